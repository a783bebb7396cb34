"""IMM: loss and gradient against the paper's equations on the paper's own paths; the expected loss in closed form."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, over, spread
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.imm import IMM, IMMConfig
from edmdistill.methods.moment_matching import PATHS

NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)
ETAS = (0.004, 160.0)


class MapToy(nn.Module):
    """A network of two times, from a function of x, t and s."""

    def __init__(self, F: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.F = F

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None, second: Tensor) -> Tensor:
        return self.F(x, over(x, t), over(x, second))


def make(F: Callable[[Tensor, Tensor, Tensor], Tensor], **options: object) -> IMM:
    return IMM(IMMConfig(**options), {"generator": MapToy(F)}, NOISE)


def smooth(weight: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, t, s: weight * torch.sin(2 * x) * t.cos() + 0.3 * x * s.sin()


def paper_loss(F: Callable[..., Tensor], x: Tensor, eps: Tensor, u: Tensor, M: int, cosine: bool, a: int) -> Tensor:
    """Eq. 67 with eq. 13, k = 8 and b = 5, image by image; u: what t and s of each group are drawn from.  [B/M,2]"""
    q = math.pi / 2
    alpha = (lambda t: math.cos(q * t)) if cosine else (lambda t: 1 - t)
    sigma = (lambda t: math.sin(q * t)) if cosine else (lambda t: t)
    slope = (lambda t: -2 * q / (alpha(t) * sigma(t))) if cosine else (lambda t: -2 / (t * (1 - t)))  # of log-SNR
    inverse = (lambda eta: math.atan(eta) / q) if cosine else (lambda eta: eta / (1 + eta))

    def f(x_t: Tensor, t: float, s: float) -> Tensor:  # Simple-EDM, appendix C.5
        norm = math.hypot(alpha(t), sigma(t))
        angles = [torch.tensor(math.atan2(sigma(at), alpha(at)), dtype=torch.float64) for at in (t, s)]
        G = F(x_t / norm, *angles)
        c_skip = (alpha(s) * alpha(t) + sigma(s) * sigma(t)) / norm**2
        return c_skip * x_t + c_out(s, t) * G

    def c_out(s: float, t: float) -> float:
        return -(alpha(s) * sigma(t) - sigma(s) * alpha(t)) / math.hypot(alpha(t), sigma(t)) * SIGMA_DATA

    low, high = map(inverse, ETAS)
    total = torch.zeros([], dtype=torch.float64)
    for i, (u_t, u_s) in enumerate(u.tolist()):
        t = low + (high - low) * u_t
        s = low + (t - low) * u_s
        r = max(s, inverse(sigma(t) / alpha(t) - (ETAS[1] - ETAS[0]) / 2**8))
        w = -slope(t) / 2 / (1 + math.exp(2 * math.log(alpha(t) / sigma(t)) - 5))
        w *= alpha(t) ** a / (alpha(t) ** 2 + sigma(t) ** 2)
        y_t, y_r = [], []
        for j in range(i * M, i * M + M):
            x_t = alpha(t) * x[j] + sigma(t) * eps[j]
            x_r = (alpha(r) - sigma(r) / sigma(t) * alpha(t)) * x[j] + sigma(r) / sigma(t) * x_t  # DDIM, eq. 11
            y_t.append(f(x_t, t, s))
            y_r.append(f(x_r, r, s).detach() if r > s else x_r)

        def k(x: Tensor, y: Tensor, scale: float = abs(c_out(s, t)) * x[0].numel()) -> Tensor:
            distance = (x - y).norm() if (x - y).any() else torch.tensor(1e-8, dtype=torch.float64)
            return (-distance / scale).exp()

        for j in range(M):
            for n in range(M):
                terms = k(y_t[j], y_t[n]) + k(y_r[j], y_r[n]) - 2 * k(y_t[j], y_r[n])
                total = total + w * terms / M**2 / len(u)
    return total


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize(("path", "a"), [("ot-fm", 1), ("cosine", 2)])
def test_loss_and_gradient_are_the_paper_s(M: int, path: str, a: int) -> None:
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    method = make(smooth(weight), particles=M, path=path, a=a, k=8)
    x0 = STD * Draws(1, 8).normal(3, 4, 4)
    loss = method.moment_matching_loss(Batch(x0, None), Draws(0, 8)).value.mean()
    draws = Draws(0, 8)
    u, eps = draws.uniform(2)[::M], SIGMA_DATA * draws.normal(3, 4, 4)
    expected = paper_loss(smooth(weight), x0, eps, u, M, path == "cosine", a)
    torch.testing.assert_close(loss, expected, rtol=3e-8, atol=0)  # the smallest distance does not scale with a path
    gradients = [torch.autograd.grad(value, weight)[0] for value in (loss, expected)]
    assert abs(gradients[1]) > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=0)


# Gaussian data, one pixel: every term of the loss in closed form.


def mean_kernel(variance: float, c_out: float) -> float:
    """E exp(-|y| / c_out) for y ~ N(0, variance)."""
    return float(torch.special.erfcx(torch.tensor(math.sqrt(variance / 2) / c_out, dtype=torch.float64)))


@pytest.mark.parametrize("M", [1, 4])
@pytest.mark.parametrize("error", [0.0, 0.5])
def test_expected_loss(M: int, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The V-statistic's: with the true map, that of pairs with themselves alone, because all others cancel.

    The map's image has the standard deviation (1 + error t) spread(s); 0 is the true one.
    """
    t, r, s, groups = 1.2, 1.0, 0.4, 20_000

    def F(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        y = (1 + error * t) * x * spread(s) / spread(t)
        return ((t - s).cos() * x - y) / ((t - s).sin() * SIGMA_DATA)

    method, draws = make(F, particles=M), Draws(5, groups * M)
    times = [torch.full((groups,), time, dtype=torch.float64) for time in (t, s, r)]
    monkeypatch.setattr(method, "draw_times", lambda draws: times)
    x0 = STD * Draws(6, groups * M).normal(1, 1, 1)
    loss = method.moment_matching_loss(Batch(x0, None), draws).value.reshape(groups, M).mean(1)

    to_s = spread(torch.tensor([s, t, r], dtype=torch.float64))
    (A, B), c = ((to_s[0] / to_s[1:]) * (1 + error * torch.tensor([t, r]))).tolist(), SIGMA_DATA * math.sin(t - s)
    V, W = (A * float(to_s[1])) ** 2, (B * float(to_s[2])) ** 2
    twins = (STD * (A * math.cos(t) - B * math.cos(r))) ** 2 + (SIGMA_DATA * (A * math.sin(t) - B * math.sin(r))) ** 2
    others = mean_kernel(2 * V, c) + mean_kernel(2 * W, c) - 2 * mean_kernel(V + W, c)
    if error:
        assert others > 1e-4
    else:
        assert abs(others) < 1e-15
    mmd = (1 - 1 / M) * others + (2 - 2 * mean_kernel(twins, c)) / M
    w = (
        1
        / (1 + math.exp(-5 - 2 * math.log(math.tan(t))))
        * (1 + math.tan(t)) ** 3
        / math.tan(t)
        / (1 + math.tan(t) ** 2)
    )
    deviation = float(loss.std()) / math.sqrt(groups)
    assert deviation < 0.02 * w * mmd
    assert abs(float(loss.mean()) - w * mmd) < 4 * deviation


# Times.


@pytest.mark.parametrize("path", PATHS)
def test_times_are_uniform_on_the_path_and_shared_by_a_group(path: str) -> None:
    method, step = make(smooth(torch.ones([])), path=path), (ETAS[1] - ETAS[0]) / 2**12
    t, s, r = method.draw_times(Draws(0, 40_000))
    assert len(t) == len(s) == len(r) == 10_000
    assert (s <= r).all()
    assert (r <= t).all()
    tau_t, tau_s = (PATHS[path].tau(time.tan()) for time in (t, s))
    low, high = (float(PATHS[path].tau(torch.tensor(eta))) for eta in ETAS)
    for share in ((tau_t - low) / (high - low), (tau_s - low) / (tau_t - low)):
        assert float(share.mean()) == pytest.approx(0.5, abs=0.015)
        assert float(share.std()) == pytest.approx(12**-0.5, abs=0.01)
    apart = r > s
    assert 0.8 < float(apart.double().mean()) < 1
    torch.testing.assert_close(t.tan()[apart] - r.tan()[apart], torch.full_like(t[apart], step), rtol=1e-6, atol=1e-9)
    assert (t.tan()[~apart] - s.tan()[~apart] <= step + 1e-9).all()


def test_a_smallest_gap_keeps_r_from_t() -> None:
    t, s, r = make(smooth(torch.ones([])), min_gap=0.01).draw_times(Draws(0, 4000))
    tau_t, tau_s, tau_r = (PATHS["ot-fm"].tau(time.tan()) for time in (t, s, r))
    assert (tau_t - tau_r >= torch.minimum(tau_t - tau_s, torch.tensor(0.01)) - 1e-12).all()
    assert (tau_t - tau_r > 0.0101).any()


# Groups.


def test_a_split_between_groups_changes_no_loss() -> None:
    method = make(smooth(torch.tensor(0.7, dtype=torch.float64)))
    x0 = STD * Draws(1, 24).normal(3, 4, 4)
    whole = method.moment_matching_loss(Batch(x0, None), Draws(0, 24))
    for start, stop in pairwise((0, 4, 16, 24)):
        part = method.moment_matching_loss(Batch(x0[start:stop], None), Draws(0, 24, slice(start, stop)))
        torch.testing.assert_close(part.value, whole.value[start:stop], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(part.t, whole.t[start:stop], rtol=1e-14, atol=0)  # atan rounds by its row
