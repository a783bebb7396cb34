"""CoSIM's turns on Gaussian data with a linear generator, where expectations are exact, and mutants that miss them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compared_gradients import assert_near, flat, gradients
from torch import Tensor, nn

from edmdistill.methods import cosim
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.cosim import CoSIM, CoSIMConfig

SD = 0.5
Make = Callable[..., Any]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """F = x W + b; reads no time."""

    def __init__(self, W: Tensor, b: Tensor) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(W.clone()), nn.Parameter(b.clone())

    def forward(self, x_t: Tensor, *_: Tensor | None) -> Tensor:
        return (x_t.flatten(1) @ self.W + self.b).reshape(x_t.shape)


class GaussianWorld(NamedTuple):
    """Everything at one (s, t): x0 ~ N(mean, covariance), g = x_t's affine image, so q(x_s; s, t) is Gaussian too.

    generated: (mean, covariance) of g as they follow from the generator's parameters.  fisher: E_q |S* - score of q|^2.
    batch, draws: points whose mean over (x0, z_t, z_s) is the expectation of every quadratic of them.
    """

    sigma_s: float
    teacher: Callable[..., Tensor]
    generator: Linear
    generated: Callable[[], tuple[Tensor, Tensor]]
    fisher: Callable[[], Tensor]
    batch: Batch
    draws: Callable[[], Any]


DIM = 3


@pytest.fixture(params=[(0.002, 0.1), (0.3, 2.515), (4.0, 80.0)], ids=str)
def world(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, gaussian_flow: Make, cubature: Make, scripted: Make
) -> GaussianWorld:
    sigma_s, sigma_t = request.param
    W, b, L = torch.randn(3, DIM, DIM, generator=rng(), dtype=torch.float64)
    mean, covariance = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64), 0.1 * L @ L.T
    generator = Linear(0.2 * W, b[0])
    eye = torch.eye(DIM, dtype=torch.float64)

    def generated() -> tuple[Tensor, Tensor]:
        # g = cos x_t - sin sigma_data (x_t W + b), in EDM's numbers.
        length = math.hypot(sigma_t, SD)
        cos, sin = SD / length, sigma_t / length
        M = cos * eye - sin * SD * generator.W.T
        V = cos**2 * covariance + sin**2 * SD**2 * eye
        return M @ (cos * mean) - sin * SD * generator.b, M @ V @ M.T

    def fisher() -> Tensor:
        m, Gamma = generated()
        cov_q, cov_p = Gamma + sigma_s**2 * eye, covariance + sigma_s**2 * eye
        P, Q = torch.linalg.inv(cov_p), torch.linalg.inv(cov_q)
        return torch.trace((Q - P) @ cov_q @ (Q - P)) + (P @ (m - mean)).square().sum()

    x0, z_t, z_s = cubature(3, DIM)
    x0 = (mean + x0.flatten(1) @ torch.linalg.cholesky(covariance).T).reshape(x0.shape)

    def fixed_sigmas(draws: object, **_: float) -> tuple[Tensor, Tensor]:
        return tuple(torch.full((len(x0),), sigma, dtype=torch.float64) for sigma in (sigma_s, sigma_t))

    monkeypatch.setattr(cosim, "cosim_sigmas", fixed_sigmas)
    draws = functools.partial(scripted, z_t, z_s)
    return GaussianWorld(sigma_s, gaussian_flow(mean, covariance), generator, generated, fisher, Batch(x0, None), draws)


def optimal_auxiliary(world: GaussianWorld, beta: float, gaussian_flow: Make) -> Linear:
    """Eq. 16 as a Linear: beta of the generator's own score and 1 - beta of the teacher's, as F.

    A score is affine in F, with the same coefficients for both, so the same shares hold for F.
    """
    generated = gaussian_flow(*(part.detach() for part in world.generated()))
    s = torch.tensor([math.atan(world.sigma_s / SD)], dtype=torch.float64)
    points = torch.cat([torch.zeros(1, DIM), torch.eye(DIM)]).to(torch.float64).reshape(-1, DIM, 1, 1)
    s = s.expand(len(points))
    F = (beta * generated(points, s) + (1 - beta) * world.teacher(points, s)).flatten(1)
    return Linear(F[1:] - F[0], F[0])


def gaussian_turns(world: GaussianWorld, auxiliary: Linear, noise: NoiseRange, method: type = CoSIM, **options):
    networks = {"teacher": world.teacher, "generator": world.generator, "auxiliary": auxiliary}
    turns = {turn.role: turn for turn in method(CoSIMConfig(**options), networks, noise).turns()}
    return lambda role: turns[role].loss(world.batch, world.draws()).value.mean()


def check_psi_optimum(world: GaussianWorld, gaussian_flow: Make, noise: NoiseRange, coef: float, method: type) -> None:
    auxiliary = optimal_auxiliary(world, 1 / (2 * coef), gaussian_flow)
    value = gaussian_turns(world, auxiliary, noise, method, coef=coef)
    slope = flat(gradients(value("auxiliary"), auxiliary)).abs().max().item()
    assert slope < 1e-11, f"slope {slope:.2g}"


@pytest.mark.parametrize("coef", [0.5, 0.75, 1.0, 1.2])
def test_psi_optimum_is_eq_16(world: GaussianWorld, gaussian_flow: Make, noise: NoiseRange, coef: float) -> None:
    check_psi_optimum(world, gaussian_flow, noise, coef, CoSIM)


@pytest.mark.parametrize(("alpha", "coef"), [(1.2, 1.0), (1.2, 0.5), (0.5, 0.5), (1.0, 1.0), (1.2, 0.75), (2.0, 1.0)])
def test_phi_loss_at_psi_optimum_is_eq_38(
    world: GaussianWorld, gaussian_flow: Make, noise: NoiseRange, alpha: float, coef: float
) -> None:
    auxiliary = optimal_auxiliary(world, 1 / (2 * coef), gaussian_flow)
    value = gaussian_turns(world, auxiliary, noise, alpha=alpha, coef=coef, weight="c_out")("generator")
    factor = (unweighted(value, world) / world.fisher()).item()
    assert factor == pytest.approx((2 * coef - alpha) / (4 * coef**2), abs=1e-7)


def unweighted(value: Tensor, world: GaussianWorld) -> Tensor:
    """Without w1 = sigma^4 / c_out."""
    return value * SD / math.hypot(world.sigma_s, SD) / world.sigma_s**3


def check_envelope(world: GaussianWorld, gaussian_flow: Make, noise: NoiseRange, method: type, alpha: float) -> None:
    """At coef = alpha psi's optimum is stationary for phi's loss too: with psi frozen, phi's gradient is eq. 38's."""
    auxiliary = optimal_auxiliary(world, 1 / (2 * alpha), gaussian_flow)
    value = gaussian_turns(world, auxiliary, noise, method, alpha=alpha, coef=alpha, weight="c_out")("generator")
    expected = flat(gradients(world.fisher() / (4 * alpha), world.generator))
    assert_near(flat(gradients(unweighted(value, world), world.generator)), expected, 1e-10)


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.2])
def test_phi_gradient_is_eq_38s_where_coef_is_alpha(
    world: GaussianWorld, gaussian_flow: Make, noise: NoiseRange, alpha: float
) -> None:
    check_envelope(world, gaussian_flow, noise, CoSIM, alpha)


@pytest.mark.parametrize(
    "name", ["alpha's sign", "psi detached", "teacher detached", "both detached", "generator detached"]
)
def test_mutant_does_not_descend_eq_38(
    world: GaussianWorld, gaussian_flow: Make, noise: NoiseRange, mutant: Make, name: str
) -> None:
    with pytest.raises(AssertionError, match="relative error"):
        check_envelope(world, gaussian_flow, noise, mutant(name), 1.0)


def test_mutant_misses_psi_optimum(world: GaussianWorld, gaussian_flow: Make, noise: NoiseRange, mutant: Make) -> None:
    with pytest.raises(AssertionError, match="slope"):
        check_psi_optimum(world, gaussian_flow, noise, 1.0, mutant("beta doubled"))
