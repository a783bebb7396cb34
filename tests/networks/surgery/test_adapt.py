"""Networks made to read t: what they imitate, what becomes of their slopes, and what is refused."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edmdistill.errors import CheckpointError
from edmdistill.machine.offload import offload
from edmdistill.networks.base import Conditioning, ResidualBlock
from edmdistill.networks.embeddings import TimeEmbedding
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.adapt import fit, training_sigmas, with_double_norm, with_positional_time
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.networks.unet_block import UNetBlock
from edmdistill.trigflow import sigma_to_time

MakeFlow = Callable[..., FlowNetwork]
TIMES = torch.tensor([0.3, 0.8, 1.3], dtype=torch.float64)
WITH_EDM = ["ddpmpp", "song-skip", "adm", "edm2"]


@pytest.fixture(params=WITH_EDM)
def old(make_flow: MakeFlow, request: pytest.FixtureRequest) -> FlowNetwork:
    return make_flow(request.param, torch.float64)


@pytest.fixture
def adapted(old: FlowNetwork) -> FlowNetwork:
    new = with_positional_time(old)
    return with_double_norm(new) if "double_norm" in new.network.arguments else new


def point(flow: FlowNetwork) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    x = torch.randn(3, flow.img_channels, flow.img_resolution, flow.img_resolution, dtype=flow.dtype)
    return x, TIMES, torch.arange(3) if flow.label_dim else None


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def slopes(flow: FlowNetwork, t: Tensor, h: float = 1e-7) -> Tensor:
    """sin(t) |d embedding / dt|, which continuous-time training reads.  Source: sCM, eq. 7."""
    ahead, behind = (flow.network.embed(Conditioning(flow.preconditioning.trigflow(t + d)[-1])) for d in (h, -h))
    return t.sin() * ((ahead - behind) / (2 * h)).norm(dim=1)


@torch.no_grad()
def test_what_can_be_represented_is_fitted_exactly() -> None:
    torch.manual_seed(0)
    own = TimeEmbedding(8).double()
    t = torch.linspace(0, math.pi / 2, 4096, dtype=torch.float64)
    W = fit(own.features(t), own(t), ridge=1e-13)
    assert error(own.features(t) @ W.T, own(t)) <= 1e-7
    assert error(own.features(t) @ fit(own.features(t), own(t)).T, own(t)) <= 0.002


@torch.no_grad()
def test_the_fit_is_the_ridge_problems_minimum() -> None:
    torch.manual_seed(0)
    f, y = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    W = fit(f, y, ridge=0.3)
    gradient = (f @ W.T - y).T @ f / 50 + 0.3 * W
    assert gradient.abs().max() <= 1e-12
    torch.testing.assert_close(fit(f.float(), y.float(), ridge=0.3), W, rtol=1e-5, atol=1e-6)  # in float64 too


@torch.no_grad()
def test_c_noise_is_t_and_nothing_but_the_features_is_new(old: FlowNetwork) -> None:
    new = with_positional_time(old)
    assert new.preconditioning.reads_time
    assert torch.equal(new.preconditioning.trigflow(TIMES)[-1], TIMES)
    torch.testing.assert_close(new.preconditioning.c_noise(0.5 * TIMES.tan()), TIMES)
    state, before = new.network.state_dict(), old.network.state_dict()
    assert {name for name in state if name not in before} == {f"{old.network.time_layers[0]}.mix.weight"}
    assert all(torch.equal(state[name], before[name]) for name in state if name in before)


@torch.no_grad()
def test_it_imitates_the_old_network(old: FlowNetwork) -> None:
    x, _, labels = point(old)
    new = with_positional_time(old)
    for sigma in (0.05, 0.3, 2.0):
        t = sigma_to_time(sigma, 0.5)
        assert error(new(x, t, labels), old(x, t, labels)) <= 0.1


@torch.no_grad()
def test_the_datas_numbers_stay(make_flow: MakeFlow) -> None:
    """Also where they are not the usual ones, for which the fit is as good."""
    network = make_flow("edm2", torch.float64).network
    old = FlowNetwork(network, EDM(sigma_data=2.0, sigma_min=0.01, sigma_max=40.0))
    new = with_positional_time(old)
    assert new.preconditioning == EDM(sigma_data=2.0, sigma_min=0.01, sigma_max=40.0, c_noise_kind="time")
    x, _, labels = point(old)
    for sigma in (0.05, 0.3, 2.0):
        t = sigma_to_time(sigma, 2.0)
        assert error(new(x, t, labels), old(x, t, labels)) <= 0.1


def test_training_is_where_the_paper_has_it(make_flow: MakeFlow) -> None:
    """ln(sigma) ~ N(-1, 1.6^2), within the range of the network."""
    network = make_flow("edm2").network
    ln = training_sigmas(FlowNetwork(network, EDM(sigma_min=1e-9, sigma_max=1e9)), 4096).log()
    assert ln.dtype == torch.float64
    assert (float(ln.mean()), float(ln.std())) == (pytest.approx(-1), pytest.approx(1.6, rel=1e-2))
    torch.testing.assert_close(ln + 1, -(ln + 1).flip(0))
    assert bool((ln.diff() > 0).all())
    within = training_sigmas(FlowNetwork(network, EDM(sigma_min=0.1, sigma_max=2.0)), 4096)
    assert (float(within.min()), float(within.max())) == (0.1, 2.0)


@torch.no_grad()
def test_the_embedding_is_calm_at_the_ends_of_the_circle(old: FlowNetwork) -> None:
    new = with_positional_time(old)
    ends = torch.tensor([1.52, 1.55, 1.564], dtype=torch.float64)
    assert slopes(old, ends).max() > 10 * slopes(new, ends).max()
    t = sigma_to_time(training_sigmas(old, 256), 0.5)
    assert slopes(new, t).mean() < slopes(old, t).mean()


@torch.no_grad()
def test_the_tangent_is_the_finite_difference(adapted: FlowNetwork) -> None:
    x, t, labels = point(adapted)
    torch.manual_seed(2)
    dx, dt, h = torch.randn_like(x), torch.tensor([1.0, -0.5, 0.2]).double(), 1e-6
    F, found = adapted.tangent(x, t, labels, dx, dt)
    assert torch.equal(F, adapted(x, t, labels))
    moved = (adapted(x + h * dx, t + h * dt, labels) - adapted(x - h * dx, t - h * dt, labels)) / (2 * h)
    assert error(found, moved) <= 1e-7


@torch.no_grad()
def test_it_can_be_offloaded(adapted: FlowNetwork) -> None:
    """As `--offload teacher` does it."""
    expected = adapted(*point(adapted))
    offload(adapted.network, torch.device("cpu"))
    assert torch.equal(adapted(*point(adapted)), expected)


@torch.no_grad()
def test_no_clamp_is_in_the_way_of_a_second_time(adapted: FlowNetwork) -> None:
    two = add_second_time(adapted)
    assert torch.equal(two(*point(adapted), TIMES.flip(0)), adapted(*point(adapted)))
    two.network.get_parameter("second_time.gain").fill_(0.3)
    assert not torch.equal(two(*point(adapted), TIMES.flip(0)), adapted(*point(adapted)))


def test_every_new_weight_learns(adapted: FlowNetwork) -> None:
    adapted(*point(adapted)).square().sum().backward()
    new = {name: p for name, p in adapted.named_parameters() if "mix" in name or "mod_gain" in name}
    assert len(new) >= 1
    for name, parameter in new.items():
        assert (parameter.grad != 0).all(), name


@torch.no_grad()
@pytest.mark.parametrize("case", ["adm", "edm2"])
def test_modulations_have_one_size_at_all_times(make_flow: MakeFlow, case: str) -> None:
    """The one that they had before on the average over training, where they were of many."""
    flow = make_flow(case, torch.float64)
    new = with_double_norm(flow)
    sigma = training_sigmas(flow, 1024)
    labels = torch.eye(6, dtype=torch.float64)[torch.arange(1024) % 6, :-1]
    emb = flow.network.embed(Conditioning(flow.preconditioning.c_noise(sigma), labels))
    blocks = [[m for m in f.network.modules() if isinstance(m, ResidualBlock)] for f in (flow, new)]
    for before, after in zip(*blocks, strict=True):
        for was, now in zip(before.modulations(emb), after.normalized_modulations(emb), strict=True):
            rms = now.square().mean(1).sqrt()
            torch.testing.assert_close(rms, was.square().mean(1).sqrt().mean().expand(1024), rtol=1e-2, atol=0)
            assert error(now / rms[:, None], was / was.square().mean(1, keepdim=True).sqrt()) <= 1e-2


def test_what_cannot_be_adapted(make_flow: MakeFlow) -> None:
    for case, name in (("ddpmpp-vp", "VP"), ("ncsnpp-ve", "VE"), ("adm-iddpm", "IDDPM")):
        with pytest.raises(CheckpointError, match=f"needs EDM's preconditioning, but this teacher has {name}'s"):
            with_positional_time(make_flow(case))
    adapted = with_positional_time(make_flow("adm"))
    with pytest.raises(CheckpointError, match="already reads t"):
        with_positional_time(adapted)
    with pytest.raises(CheckpointError, match="reads two times"):
        with_positional_time(add_second_time(make_flow("adm")))
    with pytest.raises(CheckpointError, match="already has adaptive double normalization"):
        with_double_norm(with_double_norm(adapted))
    with pytest.raises(CheckpointError, match="SongUNet has no adaptive norm"):
        with_double_norm(make_flow("ddpmpp"))
    with pytest.raises(CheckpointError, match="DhariwalUNet has no adaptive norm"):
        with_double_norm(make_flow("adm", adaptive_scale=False))
    with pytest.raises(ValueError, match="scale and shift"):
        make_flow("adm", adaptive_scale=False, double_norm=True)


def test_what_is_normalized_of_adms_scale_is_the_factor() -> None:
    """Without any modulation the factor is 1, of unit size: the block's function stays."""
    torch.manual_seed(0)
    plain, normalized = UNetBlock(8, 8, 4), UNetBlock(8, 8, 4, double_norm=True)
    normalized.load_state_dict(plain.state_dict(), strict=False)
    for block in (plain, normalized):
        block.layer = 1
        torch.nn.init.zeros_(block.affine.weight)
        torch.nn.init.zeros_(block.affine.bias)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    torch.testing.assert_close(normalized(x, emb), plain(x, emb), rtol=1e-3, atol=1e-3)
    assert float((plain(x, emb) - x).detach().abs().max()) > 0.1
