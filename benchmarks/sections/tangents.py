"""F and its tangent in forward passes of the same folded network: ours, torch.func.jvp's, and ours compiled.

32x32 images; with --compile, the digits' 8x8, whose forward pass is compiled too. func.jvp has no derivative of fused
attention, so it has MATH. Single operations: the tangent rules of `edmdistill/kernels` against func.jvp, which on a GPU
Triton's kernels replace (EDMDISTILL_KERNELS=triton).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from cases import NETWORKS, random_flow
from timing import Call, Row, interleaved
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edmdistill.kernels.attention import attention
from edmdistill.kernels.dual import Dual
from edmdistill.kernels.group_norm import group_norm_silu
from edmdistill.kernels.magnitude import normalize
from edmdistill.networks.flow import FlowNetwork

LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "EDM2": ("edm2", {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2}),
    "DDPM++": ("song", {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2}),
    "ADM": ("adm", {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [16]}),
}


def operations(device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]:
    """Returns operations with a tangent rule of their own, and the shape of their input."""
    ones = torch.ones(128, device=device)
    return {
        "group norm, SiLU": (lambda x: group_norm_silu(x, ones, ones, 32, 1e-5), (4, 128, 16, 16)),
        "normalize": (lambda x: normalize(x, 1), (4, 128, 16, 16)),
        "attention": (lambda x: attention(x, x, x), (4, 2, 256, 64)),
    }


def by_torch(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> object:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, primals, tangents)


def passes(flow: FlowNetwork, batch: int, device: str) -> dict[str, Call]:
    """Returns the plain forward pass, our tangent and torch's, at the same point along the same direction."""
    flow.to(device).eval().requires_grad_(False)
    plain = copy.deepcopy(flow)  # func.jvp refuses a group norm of channels-last images
    plain.network.fold(lay_out=False)
    flow.network.fold()
    x, dx = torch.randn(2, batch, flow.img_channels, flow.img_resolution, flow.img_resolution, device=device)
    t, dt = torch.rand(2, batch, dtype=torch.float64, device=device)
    return {
        "forward": partial(flow, x, t),
        "tangent": partial(flow.tangent, x, t, None, dx, dt),
        "func.jvp": partial(by_torch, plain, (x, t), (dx, dt)),
    }


@torch.no_grad()
def measure(options: argparse.Namespace) -> Iterator[Row]:
    device, rounds = options.device, options.rounds
    for name, (kind, arguments) in LARGE.items():
        times = interleaved(passes(random_flow(kind, 32, 3, 0, arguments), 4, device), rounds, device)
        yield {"of": name, **{way: times.ratio(way, "forward") for way in ("tangent", "func.jvp")}}
    for name, (operation, shape) in operations(device).items():
        x, dx = torch.randn(2, *shape, device=device)
        ways = {
            "forward": partial(operation, x),
            "tangent": lambda f=operation, x=x, dx=dx: f(Dual(x, dx)),
            "func.jvp": partial(by_torch, operation, (x,), (dx,)),
        }
        times = interleaved(ways, 5 * rounds, device)
        yield {"of": name, **{way: times.ratio(way, "forward") for way in ("tangent", "func.jvp")}}
    if not options.compile:
        return
    kind, arguments = NETWORKS["EDM2"]
    flow = random_flow(kind, 8, 1, 0, arguments)
    compiled = passes(flow, 32, device)
    flow.network.compile(fullgraph=True)
    ways = passes(random_flow(kind, 8, 1, 0, arguments), 32, device)
    ways |= {f"compiled {way}": compiled[way] for way in ("forward", "tangent")}
    times = interleaved(ways, rounds, device)
    yield {"of": "EDM2, 8x8", **{way: times.ratio(way, "forward") for way in list(ways)[1:]}}
