"""The heads for log variances of losses: any network can have some, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tolerance import assert_rounded, depth
from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.surgery.rebuild import add_logvar
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time

MakeFlow = Callable[..., FlowNetwork]
TIMES = torch.tensor([0.05, 0.8, 1.5], dtype=torch.float64)


def point(flow: FlowNetwork) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    x = torch.randn(3, flow.img_channels, flow.img_resolution, flow.img_resolution, dtype=flow.dtype)
    return x, TIMES, torch.arange(3) if flow.label_dim else None


@torch.no_grad()
def test_the_output_is_the_same_to_the_bit(flow: FlowNetwork) -> None:
    rng = torch.get_rng_state()
    headed = add_logvar(flow, seed=0)
    assert torch.equal(torch.get_rng_state(), rng)
    F, u = headed(*point(flow), u_at=(TIMES,))
    assert torch.equal(F, flow(*point(flow)))
    assert u.shape == (3,)
    assert u.dtype == torch.float32
    torch.testing.assert_close(u, Denoiser(headed).logvar(headed.sigma_data * TIMES.tan()).flatten())


@torch.no_grad()
def test_a_new_head_is_nothing_at_first_and_its_seeds(make_flow: MakeFlow) -> None:
    flow = make_flow("adm")
    one, again, other = (add_logvar(flow, seed=seed) for seed in (3, 3, 4))
    assert not one(*point(flow), u_at=(TIMES,))[1].any()
    freqs = [headed.network.get_buffer("logvar_fourier.freqs") for headed in (one, again, other)]
    assert torch.equal(freqs[0], freqs[1])
    assert not torch.equal(freqs[0], freqs[2])


@torch.no_grad()
def test_edm2_keeps_its_own(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2")
    headed = add_logvar(flow, seed=0)
    assert headed.network.arguments == flow.network.arguments
    _, u = headed(*point(flow), u_at=(TIMES,))
    assert torch.equal(u, flow(*point(flow), u_at=(TIMES,))[1])
    assert u.abs().max() > 0.1


def test_the_head_learns_and_f_with_it(flow: FlowNetwork) -> None:
    headed = add_logvar(flow, seed=0)
    F, u = headed(*point(flow), u_at=(TIMES,))
    ((-u).exp() * F.square().flatten(1).mean(1) + u).sum().backward()
    for name, parameter in headed.named_parameters():
        assert "map_augment" in name or parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_every_head_is_asked_at_times_of_its_own(flow: FlowNetwork) -> None:
    """More heads are new ones behind those that are there; a network that has enough keeps them all."""
    one = add_logvar(flow, seed=0)
    for parameter in one.network.logvar_linear.parameters():
        parameter.normal_()
    two = add_logvar(one, seed=1, heads=2)
    assert add_logvar(two, seed=2).network.arguments == two.network.arguments
    for parameter in two.network.logvar_linear.parameters():
        parameter[1].normal_()
    later = TIMES.flip(0)
    F, first, second = two(*point(flow), u_at=(TIMES, later))
    assert torch.equal(F, one(*point(flow)))
    torch.testing.assert_close(first, one(*point(flow), u_at=(TIMES,))[1])
    torch.testing.assert_close(second, two(*point(flow), u_at=(later, TIMES))[2].flip(0))
    assert (first - second).abs().min() > 1e-3
    planned = add_logvar(one.to("meta"), seed=1, heads=2)  # a plan's network has shapes alone
    assert {name: tensor.shape for name, tensor in planned.state_dict().items()} == {
        name: tensor.shape for name, tensor in two.state_dict().items()
    }


@torch.no_grad()
def test_it_is_saved_and_outlives_a_second_time(flow: FlowNetwork, tmp_path: Path) -> None:
    headed = add_logvar(flow, seed=0)
    for parameter in headed.network.logvar_linear.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    save_checkpoint(
        tmp_path / "a",
        headed,
        CheckpointConfig(stage="teacher", provenance=Provenance(source="a test"), **describe(headed)),
    )
    for other in load_checkpoint(tmp_path / "a")[0].eval(), drop_second_time(add_second_time(headed)):
        pairs = zip(other(*point(flow), u_at=(TIMES,)), headed(*point(flow), u_at=(TIMES,)), strict=True)
        for found, expected in pairs:
            assert_rounded(found, expected, depth(headed))  # the file lends its weights where they lie


def test_a_network_with_too_few_heads_has_no_more(make_flow: MakeFlow) -> None:
    flow = make_flow("ddpmpp")
    with pytest.raises(NotImplementedError, match="SongUNet has no head"):
        flow(*point(flow), u_at=(TIMES,))
    with pytest.raises(NotImplementedError, match="SongUNet has 1 heads for the log variance of the loss, but 2"):
        add_logvar(flow, seed=0)(*point(flow), u_at=(TIMES, TIMES))
