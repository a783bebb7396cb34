"""The guidance weight as an input: adding it changes nothing, and all of it can be learned."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.surgery.rebuild import add_guidance, add_logvar
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time

MakeFlow = Callable[..., FlowNetwork]
TIMES = torch.tensor([0.05, 0.8, 1.5], dtype=torch.float64)
W = torch.tensor([1.0, 1.3, 2.0], dtype=torch.float64)


def point(flow: FlowNetwork) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    x = torch.randn(3, flow.img_channels, flow.img_resolution, flow.img_resolution, dtype=flow.dtype)
    return x, TIMES, torch.eye(5)[:3] if flow.label_dim else None


def learned(flow: FlowNetwork) -> FlowNetwork:
    """Guided, as after some steps."""
    guided = add_guidance(flow)
    with torch.no_grad():
        torch.nn.init.normal_(guided.network.get_parameter("map_guidance.weight"), std=0.2)
    return guided


@torch.no_grad()
def test_the_output_is_the_same_to_the_bit(flow: FlowNetwork) -> None:
    rng = torch.get_rng_state()
    guided = add_guidance(flow)
    assert torch.equal(torch.get_rng_state(), rng)
    assert guided.guided
    assert not flow.guided
    for w in (W, torch.tensor(1.7), None):
        assert torch.equal(guided(*point(flow), w=w), flow(*point(flow)))
    assert torch.equal(Denoiser(guided)(*point(flow)), Denoiser(flow)(*point(flow)))


def test_it_learns_from_the_first_step(flow: FlowNetwork) -> None:
    guided = add_guidance(flow)
    guided(*point(flow), w=W).square().sum().backward()
    for name, parameter in guided.named_parameters():
        if "map_augment" not in name and "logvar" not in name:
            assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_each_image_has_its_weight_and_1_is_the_default(wide: FlowNetwork) -> None:
    guided = learned(wide)
    x, t, labels = point(wide)
    together = guided(x, t, labels, w=W)
    for i in range(3):
        alone = guided(x[i : i + 1], t[i : i + 1], None if labels is None else labels[i : i + 1], w=W[i])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)
    assert (guided(x, t, labels, w=W.flip(0)) - together).flatten(1).abs().amax(1)[[0, 2]].min() > 1e-4
    assert torch.equal(guided(x, t, labels), guided(x, t, labels, w=torch.tensor(1.0)))
    torch.testing.assert_close(guided(x, t, labels), guided(x, t, labels, w=torch.ones(3)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("case", ["ddpmpp", "adm", "edm2"])
def test_the_tangent_is_taken_at_a_weight_that_stands_still(make_flow: MakeFlow, case: str) -> None:
    flow = learned(make_flow(case, torch.float64))
    x, t, labels = point(flow)
    dx, dt, h = torch.cos(3 * x), torch.tensor([1.0, -0.5, 0.2]).double(), 1e-5
    F, dF = flow.tangent(x, t, labels, dx, dt, w=W)
    assert torch.equal(F, flow(x, t, labels, w=W))
    slope = (flow(x + h * dx, t + h * dt, labels, w=W) - flow(x - h * dx, t - h * dt, labels, w=W)) / (2 * h)
    assert (dF - slope).abs().max() <= 1e-6 * slope.abs().max()


@torch.no_grad()
def test_it_outlives_a_second_time_and_a_head(flow: FlowNetwork) -> None:
    guided = learned(flow)
    expected = guided(*point(flow), w=W)
    for other in drop_second_time(add_second_time(guided)), add_logvar(guided, seed=0), add_guidance(guided):
        assert torch.equal(other(*point(flow), w=W), expected)


def test_a_network_that_reads_no_weight_takes_none(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2")
    with pytest.raises(ValueError, match="takes no guidance weight, but one was given"):
        flow(*point(flow), w=W)
    x, t, labels = point(flow)
    with pytest.raises(ValueError, match="takes no guidance weight, but one was given"):
        flow.tangent(x, t, labels, x, t, w=W)
