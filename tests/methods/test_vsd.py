"""aVSD against the gradient of the divergence that it stands for, in closed form for Gaussians, and trained on them."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.methods import score_distillation
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.scd import SCD, SCDConfig
from edmdistill.methods.vsd import VSD
from edmdistill.trigflow import cos_sin

Make = Callable[..., Any]
SD, D = 0.5, 3
EYE = torch.eye(D, dtype=torch.float64)
DATA = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64), 0.2 * EYE + 0.05
"""Mean and covariance."""


class Affine(nn.Module):
    """A generator that makes M z + b of the noise z, and u = 0 in every head; its weights are M and b."""

    def __init__(self, M: Tensor, b: Tensor) -> None:
        super().__init__()
        self.M, self.b = nn.Parameter(M), nn.Parameter(b)

    def distribution(self) -> tuple[Tensor, Tensor]:
        return self.b, SD**2 * self.M @ self.M.T

    def forward(self, x: Tensor, t: Tensor, labels: None = None, *, u_at: tuple[Tensor, ...] = ()) -> Any:
        cos, sin = (part.flatten(1) for part in cos_sin(t, x))
        g = x.flatten(1) / sin @ self.M.T + self.b
        F = ((cos * x.flatten(1) - g) / (sin * SD)).reshape(x.shape)
        return (F, *map(torch.zeros_like, u_at)) if u_at else F


@pytest.fixture
def affine() -> Affine:
    rng = torch.Generator().manual_seed(0)
    M, b = torch.randn(D, D, generator=rng).double(), torch.randn(D, generator=rng).double()
    return Affine(0.4 * M, 0.3 * b)


def with_u(F: Callable[..., Tensor], u: Tensor | float = 0.0) -> Callable[..., Any]:
    """A network that is a function, whose heads return u."""

    def network(x: Tensor, t: Tensor, labels: None = None, *, u_at: tuple[Tensor, ...] = ()) -> Any:
        return (F(x, t), *(torch.zeros_like(at) + u for at in u_at)) if u_at else F(x, t)

    return network


@pytest.fixture
def at_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], None]:
    """t -> None: the times at which the scores are compared are no longer drawn, but these."""
    return lambda t: monkeypatch.setattr(score_distillation, "lognormal_times", lambda *_, **__: t)


def vsd(noise: NoiseRange, teacher: Any, generator: Any, auxiliary: Any) -> VSD:
    return VSD(VSD.Config(), {"teacher": teacher, "generator": generator, "auxiliary": auxiliary}, noise)


def labels_alone(x: Tensor) -> Batch:
    return Batch(torch.full_like(x, torch.nan), None)


# Closed forms.


@pytest.mark.parametrize("t", [0.05, 0.6, 1.2, 1.5])
def test_the_generator_s_gradient_is_that_of_the_divergence(
    affine: Affine, gaussian_flow: Make, cubature: Make, scripted: Make, noise: NoiseRange, at_time: Make, t: float
) -> None:
    """2 e^-u / D sigma_d sin(t) / cos(t)^2 times that of KL(q_t || p_t), where F_phi is the generator's own."""
    cos, sin = math.cos(t), math.sin(t)
    teacher, auxiliary = gaussian_flow(*DATA), gaussian_flow(*(part.detach() for part in affine.distribution()))

    def diffused(gaussian: tuple[Tensor, Tensor]) -> torch.distributions.MultivariateNormal:
        covariance = cos**2 * gaussian[1] + sin**2 * SD**2 * EYE
        return torch.distributions.MultivariateNormal(cos * gaussian[0], covariance)

    divergence = torch.distributions.kl_divergence(diffused(affine.distribution()), diffused(DATA))
    z, other = cubature(2, D)  # the mean over these points is the expectation: all is quadratic
    seen: list[Tensor] = []

    def asked(x_t: Tensor, t: Tensor, labels: None) -> Tensor:
        seen.append(x_t)
        return teacher(x_t, t)

    at_time(torch.full((len(z),), t, dtype=torch.float64))
    loss = vsd(noise, asked, affine, auxiliary).generator_loss(labels_alone(z), scripted(z, other))
    g = (SD * z.flatten(1) @ affine.M.T + affine.b).reshape(z.shape).detach()
    torch.testing.assert_close(seen, [cos * g + sin * SD * other])
    slopes = torch.autograd.grad(loss.value.mean(), list(affine.parameters()))
    factor = 2 / D * SD * sin / cos**2
    for slope, expected in zip(slopes, torch.autograd.grad(divergence, list(affine.parameters())), strict=True):
        torch.testing.assert_close(slope, factor * expected, rtol=1e-9, atol=1e-12)


def test_the_auxiliary_score_is_best_where_it_is_the_generator_s(
    affine: Affine, gaussian_flow: Make, cubature: Make, scripted: Make, noise: NoiseRange, at_time: Make
) -> None:
    best, z = gaussian_flow(*(part.detach() for part in affine.distribution())), cubature(2, D)
    W = torch.zeros(D, D, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    u = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    auxiliary = with_u(lambda x, t: best(x, t) + (x.flatten(1) @ W + b).reshape(x.shape), u)
    at_time(torch.full((len(z[0]),), 0.9, dtype=torch.float64))
    loss = vsd(noise, None, affine, auxiliary).auxiliary_loss(labels_alone(z[0]), scripted(*z))
    *slopes, rise = torch.autograd.grad(loss.value.mean(), [W, b, u])
    assert max(slope.abs().max() for slope in slopes) < 1e-12
    # What is left is the variance of v / sigma_d given x_t; e^u is that of one pixel where u is best.
    V = math.cos(0.9) ** 2 * affine.distribution()[1] + math.sin(0.9) ** 2 * SD**2 * EYE
    left = torch.trace(affine.distribution()[1] @ torch.linalg.inv(V)) / D
    torch.testing.assert_close(loss.signals["velocity_error"], left.detach())
    torch.testing.assert_close(rise, 1 - (-u).exp() * left)


def test_u_is_best_at_the_log_of_the_mean_square(
    tiny_networks: Make, tiny_batch: Make, noise: NoiseRange, at_time: Make
) -> None:
    """And of several heads the last is used, at the time of x_t."""
    networks = tiny_networks(SCD, vsd=1.0)
    t = torch.linspace(0.1, 1.5, 6, dtype=torch.float64)
    u = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def generator(x: Tensor, start: Tensor, labels: Tensor, *, u_at: tuple[Tensor, ...]) -> Any:
        assert u_at[-1] is t
        assert len(u_at) == 3
        return networks["generator"](x, start, labels), start, start, u

    at_time(t)
    loss = vsd(noise, **(networks | {"generator": generator})).vsd_loss(tiny_batch(), Draws(0, 6), logvars=3)
    squares = loss.value.detach()  # at u = 0
    torch.testing.assert_close(loss.signals["score_gap"], squares.sqrt().mean())
    torch.testing.assert_close(torch.autograd.grad(loss.value.sum(), u)[0], 1 - squares)


def test_gradients_flow_to_the_turn_s_own_network_alone(
    tiny_networks: Make, tiny_batch: Make, noise: NoiseRange
) -> None:
    networks = tiny_networks(VSD)
    for turn in VSD(VSD.Config(), networks, noise).turns():
        turn.loss(tiny_batch(), Draws(0, 6)).value.sum().backward()
        for role, network in networks.items():
            moved = [parameter.grad is not None for parameter in network.parameters()]
            assert all(moved) if role == turn.role else not any(moved), (turn.role, role)
            network.zero_grad()


def test_the_times_are_the_paper_s(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    """Source: sCM, table 4."""
    expected = {"auxiliary": (-0.8, 1.6), "generator": (0.4, 2.0)}
    for turn in VSD(VSD.Config(), tiny_networks(VSD), noise).turns():
        ln = (SD * turn.loss(tiny_batch(4000), Draws(0, 4000)).t.tan()).log()
        mean, std = expected[turn.role]
        assert float(ln.mean()) == pytest.approx(mean, abs=4 * std / 4000**0.5)
        assert float(ln.std()) == pytest.approx(std, rel=0.05)


# Beside a consistency loss.


def test_scd_takes_the_sum(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> None:
    """With the same random numbers: sCD's loss, then vsd times the other, both of the guided teacher."""
    networks, batch, draws = tiny_networks(SCD, vsd=0.7), tiny_batch(), Draws(0, 6)

    def teacher(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return networks["teacher"](x, t, torch.zeros_like(batch.labels) if labels is None else labels)

    def guided(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return teacher(x, t, None) + 1.5 * (teacher(x, t, labels) - teacher(x, t, None))

    guided_networks = {**networks, "teacher": teacher}
    both = SCD(SCDConfig(vsd=0.7, guidance=(1.5, 1.5)), guided_networks, noise).generator_loss(batch, Draws(0, 6))
    alone = SCD(SCDConfig(guidance=(1.5, 1.5)), guided_networks, noise).generator_loss(batch, draws)
    other = SCD(SCDConfig(vsd=0.7), networks | {"teacher": guided}, noise).vsd_loss(batch, draws, logvars=2)
    torch.testing.assert_close(both.value, alone.value + 0.7 * other.value)
    assert both.signals == alone.signals | other.signals


def test_the_auxiliary_score_has_as_many_turns_as_asked_for(tiny_networks: Make, noise: NoiseRange) -> None:
    for kind, options in ((SCD, {"vsd": 1.0}), (VSD, {})):
        method = kind(kind.Config(auxiliary_turns=2, **options), tiny_networks(kind, **options), noise)
        assert [turn.role for turn in method.turns()] == ["auxiliary", "auxiliary", "generator"]


def test_scd_without_it_has_no_auxiliary_score(tiny_networks: Make, noise: NoiseRange) -> None:
    assert [turn.role for turn in SCD(SCDConfig(), tiny_networks(SCD), noise).turns()] == ["generator"]
    assert "auxiliary" not in SCD.roles_for(SCDConfig())
    with pytest.raises(msgspec.ValidationError, match="intervals = 4 needs as many steps"):
        msgspec.convert({"vsd": 1.0, "intervals": 4}, SCDConfig)


# Learning.


class Score(nn.Module):
    """An auxiliary score that can be the true one of any Gaussian: its weights are mean and Cholesky factor."""

    def __init__(self, flow: Make, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.flow = flow
        self.mean, self.L = nn.Parameter(mean), nn.Parameter(torch.linalg.cholesky(covariance))

    def forward(self, x: Tensor, t: Tensor, labels: None = None, *, u_at: tuple[Tensor, ...] = ()) -> Any:
        return with_u(self.flow(self.mean, self.L @ self.L.T))(x, t, u_at=u_at)


def test_learns_the_distribution_of_the_data(affine: Affine, gaussian_flow: Make, noise: NoiseRange) -> None:
    """The mean and the covariance, each from its own start."""
    auxiliary = Score(gaussian_flow, *(part.detach().clone() for part in affine.distribution()))
    networks = {"teacher": gaussian_flow(*DATA), "generator": affine, "auxiliary": auxiliary}
    optimizers = {
        role: torch.optim.Adam(networks[role].parameters(), betas=(0.0, 0.99)) for role in ("generator", "auxiliary")
    }
    turns = VSD(VSD.Config(), networks, noise).turns()
    for step in range(300):
        for turn in turns:
            optimizer = optimizers[turn.role]
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 300)
            optimizer.zero_grad()
            batch = Batch(torch.zeros(128, D, 1, 1, dtype=torch.float64), None)
            turn.loss(batch, Draws([step, turn.role == "generator"], 128)).value.mean().backward()
            optimizer.step()
    for learned in affine.distribution(), (auxiliary.mean, auxiliary.L @ auxiliary.L.T):
        for part, expected in zip(learned, DATA, strict=True):
            torch.testing.assert_close(part.detach(), expected, rtol=0, atol=0.03)
