"""iPNDM and UniPC: closed forms, and diffusers' UniPC."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from toy_denoisers import ToyDenoiser, curved

from edmdistill.sampling.dpm_solver import ddim_sampler
from edmdistill.sampling.heun import EDM_SAMPLER
from edmdistill.sampling.multistep import ADAMS_BASHFORTH, bh2_weights, ipndm_sampler, unipc_sampler

NOISE = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", ADAMS_BASHFORTH)
def test_adams_bashforth_integrates_polynomials(order: int) -> None:
    """From slopes at 0, -1, -2, ... over the step from 0 to 1."""
    for degree in range(order):
        slopes = [(-float(k)) ** degree for k in range(order)]
        assert np.dot(ADAMS_BASHFORTH[order], slopes) == pytest.approx(1 / (degree + 1), abs=1e-14)


def test_ipndm_is_exact_for_slopes_of_third_degree() -> None:
    """On equal steps; the first three, of lower order, are exact too where the slope vanishes with its derivatives."""
    levels = torch.tensor([4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 0.0], dtype=torch.float64)

    def slope(sigma: torch.Tensor) -> torch.Tensor:
        return (3 - sigma).clamp(min=0) ** 3  # none until 3, where three of them are known to be 0

    denoiser = ToyDenoiser(lambda x, sigma: x - sigma * slope(sigma))
    ipndm_sampler(denoiser, NOISE, sigmas=levels)
    start, end = denoiser.images[2], denoiser.images[4]
    torch.testing.assert_close(start, 4 * NOISE, rtol=0, atol=1e-12)
    taken = -0.5 * (55 * slope(levels[3]) - 59 * slope(levels[2])) / 24  # from 2.5 to 2
    torch.testing.assert_close(end, start + taken, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratios", [(-0.7, 1.0), (-0.7, -1.9), (-0.7, -1.9, 1.0)])
@pytest.mark.parametrize("h", [0.05, 1.0, 4.0])
def test_bh2_weights_integrate_polynomials(ratios: tuple[float, ...], h: float) -> None:
    """They give the integral of the exact solution, over the weight that it gives a constant image."""
    weights = bh2_weights(ratios, h)
    for degree in range(1, len(ratios) + 1):
        exact, _ = quad(lambda r, k=degree: h * np.exp((r - 1) * h) * r**k, 0, 1, epsabs=1e-13)
        assert np.dot(weights, np.power(ratios, degree)) * -np.expm1(-h) == pytest.approx(exact, rel=1e-9)


def test_unipc_of_first_order_is_ddim_until_its_first_correction() -> None:
    sigmas = EDM_SAMPLER.sigmas(ToyDenoiser(curved), 6, 0.05, 20.0)
    first, second = ToyDenoiser(curved), ToyDenoiser(curved)
    unipc_sampler(first, NOISE, sigmas=sigmas, order=1)
    ddim_sampler(second, NOISE, sigmas=sigmas)
    torch.testing.assert_close(first.images[1], second.images[1], rtol=0, atol=1e-12)
    assert not torch.allclose(first.images[2], second.images[2])


def test_unipc_has_third_order() -> None:
    def end(num_steps: int) -> torch.Tensor:
        denoiser = ToyDenoiser(curved)
        unipc_sampler(denoiser, NOISE, sigmas=EDM_SAMPLER.sigmas(denoiser, num_steps, 0.5, 4.0))
        assert len(denoiser.images) == num_steps
        return denoiser.images[-1]

    exact = end(2049)
    errors = [float((end(num_steps) - exact).abs().max()) for num_steps in (65, 129, 257)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 6.5  # 2^3, and the end of lower order


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 9])
def test_unipc_is_diffusers(order: int, num_steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    sigmas = torch.cat([torch.logspace(1.3, -1.3, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    scheduler = UniPCMultistepScheduler(
        solver_order=order, prediction_type="sample", solver_type="bh2", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = sigmas.clone()
    x = NOISE * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        x0 = curved(x * (1 + sigma**2).sqrt(), sigma)
        x = scheduler.step(x0, timestep, x).prev_sample
    ours = unipc_sampler(ToyDenoiser(curved), NOISE, sigmas=sigmas, order=order)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)
