"""How near two computations of the same numbers are.

Equal bits are asserted of moved data, of integers, and of the same kernels on tensors of the same shapes, strides and
alignment, for torch puts all that it allocates at multiples of 64 bytes. Tensors that a file lends lie where the file
has them, and parts of a tensor where they begin: there, vector units add in another order, and each in its own.
"""

import math

import torch
from torch import Tensor, nn

CONFIDENCE = 8
"""Standard deviations of a random walk: one rounding in 1e14 is further off."""


def rounding(dtype: torch.dtype, operations: int) -> float:
    """Returns how far `operations` roundings in a row lead, relative: lambda sqrt(n) u, with the unit roundoff u.

    Source: Higham & Mary 2019, A new approach to probabilistic rounding error analysis, theorem 2.4.
    """
    return CONFIDENCE * math.sqrt(operations) * torch.finfo(dtype).eps / 2


def depth(network: nn.Module) -> int:
    """Returns the number of roundings from input to output: of each layer, one for each weight of an output."""
    return sum(parameter[0].numel() for parameter in network.parameters() if parameter.ndim > 1)


def assert_rounded(found: Tensor, expected: Tensor, operations: int) -> None:
    """Asserts that so many roundings explain all differences, relative to the largest number."""
    bound = rounding(expected.dtype, operations) * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
