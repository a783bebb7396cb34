"""The squared MMD as a V-statistic of a kernel, and the paths of IMM: inverses, slopes and the weight."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edmdistill.methods.moment_matching import PATHS, elbo_weight, squared_mmd

TAU = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)
COEFFICIENTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "ot-fm": lambda tau: (1 - tau, tau),
    "cosine": lambda tau: ((math.pi / 2 * tau).cos(), (math.pi / 2 * tau).sin()),
}
"""tau -> alpha, sigma, by the names of PATHS, from the paper's section 2."""


def particles(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_its_coefficients(name: str) -> None:
    path, (alpha, sigma) = PATHS[name], COEFFICIENTS[name](TAU)
    torch.testing.assert_close(path.eta(TAU), sigma / alpha)
    torch.testing.assert_close(path.tau(path.eta(TAU)), TAU)
    torch.testing.assert_close(path.alpha(path.eta(TAU)), alpha)
    assert COEFFICIENTS.keys() == PATHS.keys()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("a", "b"), [(1.0, 5.0), (2.0, -3.0), (0.0, 0.0)])
def test_the_weight_is_that_of_equation_13(name: str, a: float, b: float) -> None:
    """The slope of the log-SNR lambda = 2 ln(alpha / sigma) is autograd's."""
    tau = TAU.clone().requires_grad_()
    alpha, sigma = COEFFICIENTS[name](tau)
    lambda_ = 2 * (alpha / sigma).log()
    (slope,) = torch.autograd.grad(lambda_.sum(), tau)
    expected = 0.5 * torch.sigmoid(b - lambda_) * -slope * alpha**a / (alpha**2 + sigma**2)
    torch.testing.assert_close(elbo_weight(PATHS[name].eta(TAU), PATHS[name], a, b), expected.detach())


@pytest.mark.parametrize("M", [1, 2, 3, 6])
def test_it_is_the_v_statistic_of_the_kernel(M: int) -> None:
    """Summed pair by pair of each particle, over groups whose kernels have widths of their own."""
    y_t, y_r = particles(6), particles(6, 1)
    c_out = torch.tensor([0.3, 1.2, 0.5, 0.7, 2.0, 0.9], dtype=torch.float64)[: 6 // M].repeat_interleave(M)

    def k(x: Tensor, y: Tensor, row: int) -> float:
        return math.exp(-float((x - y).norm()) / (float(c_out[row]) * x.numel()))

    for i, value in enumerate(squared_mmd(y_t, y_r, c_out, M).tolist()):
        group = range(i // M * M, i // M * M + M)
        part = [k(a[i], b[j], i) * sign for a, b, sign in ((y_t, y_t, 1), (y_r, y_r, 1), (y_t, y_r, -2)) for j in group]
        # The smallest distance, 1e-8, is that of a particle to itself too.
        assert value == pytest.approx(sum(part) / M, abs=1e-7)


def test_it_is_a_squared_distance() -> None:
    """Not negative, 0 of a sample with itself in any order, the same both ways, and of moved or turned samples."""
    y_t, y_r, c_out = particles(8), particles(8, 1), torch.full((8,), 0.5, dtype=torch.float64)

    def mmd(a: Tensor, b: Tensor) -> Tensor:
        return squared_mmd(a, b, c_out, 4).reshape(2, 4).mean(1)

    value = mmd(y_t, y_r)
    assert (value > 1e-3).all()
    torch.testing.assert_close(mmd(y_r, y_t), value)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 4, 5])
    assert mmd(y_t, y_t[order]).abs().max() < 1e-12
    torch.testing.assert_close(mmd(y_t[order], y_r), value)
    torch.testing.assert_close(mmd(y_t + 3, y_r + 3), value)
    torch.testing.assert_close(mmd(-y_t.flip(2), -y_r.flip(2)), value)


def test_a_group_depends_on_its_own_particles_alone() -> None:
    y_t, y_r, c_out = particles(6), particles(6, 1), torch.full((6,), 0.5, dtype=torch.float64)
    whole = squared_mmd(y_t, y_r, c_out, 3)
    parts = [squared_mmd(y_t[rows], y_r[rows], c_out[rows], 3) for rows in (slice(3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_gradient_draws_samples_together_and_ends_where_they_meet() -> None:
    y_t, y_r = particles(4).requires_grad_(), particles(4, 1)
    c_out = torch.full((4,), 0.5, dtype=torch.float64)
    before = squared_mmd(y_t, y_r, c_out, 4).mean()
    (slope,) = torch.autograd.grad(before, y_t)
    after = squared_mmd(y_t - 1e-3 / float(slope.norm()) * slope, y_r, c_out, 4).mean()
    assert after < before
    same = y_r.clone().requires_grad_()
    (slope,) = torch.autograd.grad(squared_mmd(same, y_r, c_out, 4).sum(), same)
    assert slope.abs().max() < 1e-12
    (slope,) = torch.autograd.grad(squared_mmd(y_t, y_r, torch.zeros(4), 4).sum(), y_t)
    assert (slope == 0).all()  # a scale of 0 is a jump of no length


def test_equal_ends_have_no_loss_and_no_gradient() -> None:
    """At s = r = t, where both jumps have no length, and in float32 just beside it."""
    for gap in (0.0, 1e-7):
        x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        mmd = squared_mmd(x, x.detach().clone(), torch.full((4,), gap), 4)
        assert (mmd == 0).all()
        (slope,) = torch.autograd.grad(mmd.sum(), x)
        assert (slope == 0).all()
