"""One pass with tangents and gradient: sCM's loss by it is that of a pass with tangents and one with gradient."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tangent_points import CONTINUOUS, SPEED, TIMES, classes, normal
from tolerance import assert_rounded, depth
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edmdistill.kernels import dual
from edmdistill.kernels.dual import Dual
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.rebuild import add_guidance, add_logvar
from edmdistill.networks.surgery.two_time import add_second_time

MakeFlow = Callable[..., FlowNetwork]


class Learned(NamedTuple):
    """What sCM's loss is made of, and its gradients."""

    F: Tensor
    dF: Tensor
    u: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def learned(flow: FlowNetwork, second: Tensor | None, passes: int) -> Learned:
    """By one pass, or by one with tangents and another with gradient."""
    flow.zero_grad()
    point, along = (normal(flow), TIMES, classes(flow), second), (normal(flow, 2), SPEED)
    inputs = {"u_at": (TIMES,), "w": SPEED.abs() if flow.guided else None}
    torch.manual_seed(1)
    if passes == 1:
        F, dF, u = flow(*point, along=along, **inputs)
    else:
        _, dF = flow.tangent(*point[:3], *along, second, w=inputs["w"])
        F, u = flow(*point, **inputs)
    loss = ((-u).exp() * (F - F.detach() - dF).square().mean((1, 2, 3)) + u).mean()
    loss.backward()
    return Learned(F, dF, u, loss, {name: p.grad for name, p in flow.named_parameters() if p.grad is not None})


def assert_same(found: Learned, expected: Learned, roundings: int) -> None:
    assert (found.F.requires_grad, found.dF.requires_grad) == (True, False)
    assert found.gradients.keys() == expected.gradients.keys()
    for a, b in zip(
        (*found[:4], *found.gradients.values()), (*expected[:4], *expected.gradients.values()), strict=True
    ):
        assert_rounded(a, b, roundings)


@pytest.mark.parametrize("case", CONTINUOUS)
def test_one_pass_is_a_pass_with_tangents_and_one_with_gradient(make_flow: MakeFlow, case: str) -> None:
    """With dropout, two times and a guidance weight."""
    flow = make_flow(case, torch.float64, dropout=0.4)
    flow = add_guidance(add_logvar(add_second_time(flow), seed=0)).double().train()
    for name in "second_time.gain", "map_guidance.weight":
        nn.init.constant_(flow.network.get_parameter(name), 0.3)
    second = TIMES / 2
    expected = learned(flow, second, 2)
    assert {"second_time.gain", "map_guidance.weight"} <= {name.removeprefix("network.") for name in expected.gradients}
    assert_same(learned(flow, second, 1), expected, depth(flow))


@pytest.mark.parametrize(("case", "precision"), [("adm", torch.bfloat16), ("edm2", torch.float16)])
def test_one_pass_in_half_precision(make_flow: MakeFlow, case: str, precision: torch.dtype) -> None:
    flow = add_logvar(make_flow(case), seed=0).train()
    flow.compute_dtype = precision
    assert_same(learned(flow, None, 1), learned(flow, None, 2), depth(flow))


@pytest.mark.parametrize("mutant", ["the value detached", "dropout of its own"])
def test_mistakes_are_seen(make_flow: MakeFlow, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make_flow("edm2", torch.float64, dropout=0.4).train()
    expected = learned(flow, None, 2)
    if mutant == "the value detached":
        monkeypatch.setattr(dual, "paired", lambda y, dy: y if dy is None else Dual(y.detach(), dy))
    else:
        keys = flow.dropout_keys
        monkeypatch.setattr(flow, "dropout_keys", lambda x: keys(x) + 1)
    with pytest.raises(AssertionError):
        assert_same(learned(flow, None, 1), expected, depth(flow))


class Convolutions(TorchDispatchMode):
    """Counts those of forward passes."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


def test_checkpointed_blocks_recompute_no_tangents(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2", torch.float64, dropout=0.3).train()
    expected, plain = learned(flow, None, 1), copy.deepcopy(flow)
    flow.network.checkpoint_blocks()
    assert_same(learned(flow, None, 1), expected, depth(flow))

    def convolutions(flow: FlowNetwork, along: tuple[Tensor, ...]) -> int:
        F = flow(normal(flow), TIMES, classes(flow), along=along)
        with Convolutions() as recomputed:
            (F[0] if along else F).sum().backward()
        return recomputed.count

    along = normal(flow, 2), SPEED
    assert convolutions(plain, along) == 0
    assert convolutions(flow, along) == convolutions(flow, ()) > 0
    flow.network.compiled = True  # its code may save other tensors without tangents
    assert convolutions(flow, along) == 2 * convolutions(flow, ())
