"""What half precision and TF32 cost a network that predicts the noise."""

from __future__ import annotations

from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import NoisePrediction

ROUNDING = {"bfloat16": 9e-3, "bf16": 9e-3, "float16": 1e-3, "fp16": 1e-3, "tf32": 1e-3}
"""Error of a network's output, root mean square, where the output is of unit size. TF32 has the bits of float16."""


def rounding_error(flow: FlowNetwork, precision: str, sigma: float) -> float:
    """Returns about how far rounding moves D(x; sigma), in units of sigma_data; 0 where that is negligible.

    Where a network predicts the noise n, D = x - sigma n is a small difference of large numbers: the error of n appears
    sigma / sigma_data times.

    Args:
        precision: of the arithmetic inside the network, by its name in torch or in recipes.
        sigma: a noise level.
    """
    if not isinstance(flow.preconditioning, NoisePrediction):
        return 0.0
    return ROUNDING.get(precision, 0.0) * sigma / flow.sigma_data
