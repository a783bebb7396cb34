"""The Frechet distance against closed forms, scipy's matrix square root, and its own symmetries."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edmdistill.errors import DatasetError
from edmdistill.evaluation import frechet
from edmdistill.evaluation.frechet import GaussianStatistics, RunningStatistics, frechet_distance, statistics


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(d: int, seed: int, rank: int | None = None) -> GaussianStatistics:
    factor = normal(d, rank or d, seed=seed)
    return GaussianStatistics(normal(d, seed=seed + 100), factor @ factor.T, 1000)


@given(seed=st.integers(0, 1000), d=st.integers(1, 8))
def test_closed_form_where_covariances_commute(seed: int, d: int) -> None:
    """In a common eigenbasis the distance is |m_a - m_b|^2 + sum (sqrt a_i - sqrt b_i)^2."""
    basis = torch.linalg.qr(normal(d, d, seed=seed))[0]
    a, b = normal(2, d, seed=seed + 1).square()
    mean_a, mean_b = normal(2, d, seed=seed + 2)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(
        GaussianStatistics(mean_a, basis * a @ basis.T, 9), GaussianStatistics(mean_b, basis * b @ basis.T, 9)
    )
    assert found == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("d", [1, 2, 16, 64])
def test_equals_scipys_square_root(d: int) -> None:
    a, b = gaussian(d, 1), gaussian(d, 2)
    root = np.real(scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()))
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_exact_without_full_rank() -> None:
    """Gaussians on a plane of a larger space are as far apart as on the plane."""
    a, b = gaussian(3, 1), gaussian(3, 2)
    plane = torch.linalg.qr(normal(40, 3, seed=3))[0]
    lifted = [GaussianStatistics(plane @ g.mean, plane @ g.covariance @ plane.T, g.n) for g in (a, b)]
    assert frechet_distance(*lifted) == pytest.approx(frechet_distance(a, b), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(10, 10), (7, 25), (60, 12)])
def test_exact_for_fewer_images_than_features(n: int, m: int) -> None:
    """With centered features X and Y, tr sqrt(AB) is the sum of the singular values of X Y^T / sqrt((n - 1)(m - 1))."""
    x, y = normal(n, 40), 2 * normal(m, 40, seed=1) + 1
    centered = (x - x.mean(0)) @ (y - y.mean(0)).T / ((n - 1) * (m - 1)) ** 0.5
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum()
    expected -= 2 * torch.linalg.svdvals(centered).sum()
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(float(expected), rel=1e-9)


def test_covariances_rounded_to_float32_without_full_rank() -> None:
    """Noise of 1e-7 stands where zeros were: pivots of Cholesky's that are noise would blow up."""
    a, b = statistics(normal(12, 40)), statistics(2 * normal(25, 40, seed=1))
    rounded = [GaussianStatistics(g.mean, g.covariance.float().double(), g.n) for g in (a, b)]
    assert frechet_distance(*rounded) == pytest.approx(frechet_distance(a, b), rel=1e-3)
    L = torch.from_numpy(frechet.factor(rounded[0].covariance.numpy()))
    torch.testing.assert_close(L @ L.T, a.covariance, rtol=0, atol=1e-6)


def test_exact_for_planes_that_share_a_line() -> None:
    """Where neither plane holds the other, only what they share crosses."""
    basis = torch.linalg.qr(normal(40, 3, seed=3))[0]
    zero = torch.zeros(40, dtype=torch.float64)
    a, b = (
        GaussianStatistics(zero, basis * torch.tensor(spread, dtype=torch.float64) @ basis.T, 9)
        for spread in ([4.0, 3, 0], [9.0, 0, 5])
    )
    assert frechet_distance(a, b) == pytest.approx(4 + 3 + 9 + 5 - 2 * 6, abs=1e-7)


def test_exact_for_orthogonal_planes() -> None:
    """sqrt(AB) = 0, so the covariances add up: the case in which a matrix square root invents imaginary parts."""
    zero = torch.zeros(4, dtype=torch.float64)
    a = GaussianStatistics(zero, torch.diag(torch.tensor([1.0, 2, 0, 0], dtype=torch.float64)), 9)
    b = GaussianStatistics(zero, torch.diag(torch.tensor([0.0, 0, 3, 4], dtype=torch.float64)), 9)
    assert frechet_distance(a, b) == 10.0


@pytest.mark.parametrize("rank", [2, 32])
def test_symmetric_and_zero_to_itself(rank: int) -> None:
    a, b = gaussian(32, 1, rank), gaussian(32, 2)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-10 * float(a.covariance.trace())


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_statistics_are_numpys_in_any_batches(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "BLOCK", 300)
    features = normal(1000, 5) * torch.arange(1, 6) + offset
    running = RunningStatistics()
    for batch in features.split([0, 1, 99, 400, 500]):
        running.update(batch)
        if running.n > 1:
            running.finish()
    found = running.finish()
    assert found.n == 1000
    np.testing.assert_allclose(found.mean, features.numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(statistics(features).covariance, found.covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [200, 900], ids=["in one block", "in blocks"])
def test_statistics_of_single_precision_are_summed_in_double(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "BLOCK", 300)
    features = (normal(rows, 5) + 1000).float()
    found, exact = statistics(features), statistics(features.double())
    for one, other in zip(found[:2], exact[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_features_that_are_not_finite_give_nan() -> None:
    features = normal(20, 3)
    features[4, 1] = torch.nan
    assert math.isnan(frechet_distance(statistics(features), statistics(normal(20, 3))))


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(DatasetError, match="at least two images, but there is only 1: give more"):
        statistics(normal(1, 3))
