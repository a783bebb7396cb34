"""What half precision costs a network that predicts the noise."""

from __future__ import annotations

import torch

from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import NoisePrediction

ROUNDING = {torch.bfloat16: 9e-3, torch.float16: 1e-3}
"""Error of a network's output in half precision, root mean square, where the output is of unit size."""


def rounding_error(flow: FlowNetwork, dtype: torch.dtype | None, sigma: float) -> float:
    """Returns about how far rounding moves D(x; sigma), in units of sigma_data; 0 where that is negligible.

    Where a network predicts the noise n, D = x - sigma n is a small difference of large numbers: the error of n appears
    sigma / sigma_data times.

    Args:
        dtype: of the arithmetic inside the network; None: its own.
        sigma: a noise level.
    """
    if not isinstance(flow.preconditioning, NoisePrediction):
        return 0.0
    return ROUNDING.get(dtype or flow.dtype, 0.0) * sigma / flow.sigma_data
