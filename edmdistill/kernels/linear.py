"""Linear maps and convolutions, in the dtype of their input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as f
from torch import Tensor, nn

from edmdistill.kernels.dual import affine_rule, tangent_of
from edmdistill.kernels.winograd import FrozenWeight, pays, winograd_conv2d

tangent_of(f.linear, f.conv2d)(affine_rule)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.  x [B,N], weight [M,N], bias [M] -> [B,M]"""
    return f.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, frozen: FrozenWeight | None = None) -> Tensor:
    """Convolution that keeps the resolution (odd kernel, zero padding).  weight [M,C,k,k] -> [B,M,H,W]

    frozen: the weight's transform, for Winograd's convolution where it pays; None = never.
    """
    if frozen is not None and pays(x, weight) and frozen.weight is weight:
        return winograd_conv2d(x, frozen.transformed, bias)
    bias = None if bias is None else bias.to(x.dtype)
    return f.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2)


def multiplies_bfloat16() -> bool:
    """Returns whether the CPU has instructions for bfloat16, by which large networks take less time in it."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def allow_tf32(allowed: bool) -> None:
    """Lets CUDA round the factors of float32 products to 11 bits (TF32), or not; in the whole process.

    torch allows it in convolutions alone, unless told otherwise.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Sets whether TF32 is allowed inside a `with` block, and restores what was set before; see `allow_tf32`."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(allowed)
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def lay_out_weights(network: nn.Module, plain: bool = False) -> None:
    """Gives the weights of convolutions the layout in which they are fastest on their device; images follow theirs.

    On a CPU that is channels-last: oneDNN then need not reorder images. On a GPU it has not been measured.

    Args:
        plain: no such layout, but torch's own.
    """
    for parameter in network.parameters():
        if parameter.ndim == 4:
            layout = torch.contiguous_format if plain or parameter.device.type != "cpu" else torch.channels_last
            parameter.data = parameter.data.contiguous(memory_format=layout)
