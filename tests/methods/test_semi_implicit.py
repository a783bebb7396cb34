"""The two losses on plain tensors against eq. 15 as the paper writes it, in scores, with EDM's x_s = g + sigma eps."""

import math

import pytest
import torch
from torch import Tensor

from edmdistill.methods.semi_implicit import auxiliary_loss, generator_loss, kl_generator_loss

SD = 0.5
Draw = dict[str, Tensor]


@pytest.fixture
def draw() -> Draw:
    """A random g, eps, D*, D_psi at five noise levels, and the same in TrigFlow."""
    rng = torch.Generator().manual_seed(0)
    g, eps, teacher, aux = torch.randn(4, 5, 3, 2, 2, generator=rng, dtype=torch.float64)
    sigma = torch.tensor([0.002, 0.1, 0.5, 5.0, 80.0], dtype=torch.float64)
    wide = sigma.reshape(-1, 1, 1, 1)
    x_s = g + wide * eps
    length = (wide**2 + SD**2).sqrt()
    # D = c_skip x - c_out F, with TrigFlow's sign of F.
    F_teacher, F_aux, v = (
        (SD**2 / length**2 * x_s - D) / (wide * SD / length) for D in (teacher, aux, g)
    )  # where D = g, F is v / sigma_data
    v = v * SD
    return {
        "sigma": sigma,
        "score_teacher": (teacher - x_s) / wide**2,
        "score_aux": (aux - x_s) / wide**2,
        "score_g": (g - x_s) / wide**2,
        "error": (g - teacher).abs().flatten(1).mean(1),
        "arguments": {"F_aux": F_aux, "F_teacher": F_teacher, "v": v, "s": (sigma / SD).atan()},
    }


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_generator_loss_is_the_first_line_of_eq_15(draw: Draw, alpha: float) -> None:
    u = draw["score_teacher"] - draw["score_aux"]
    line = dot(u, draw["score_teacher"] - draw["score_g"]) - alpha * dot(u, u)
    sigma = draw["sigma"]
    c_out = sigma * SD / (sigma**2 + SD**2).sqrt()
    for weight, size in {"sid": draw["error"], "c_out": c_out}.items():
        loss = generator_loss(**draw["arguments"], sigma_data=SD, alpha=alpha, weight=weight)
        close(loss.value, sigma**4 / size * line)


@pytest.mark.parametrize("coef", [0.5, 0.75, 1.0, 1.2])
def test_auxiliary_loss_is_the_second_line_of_eq_15_as_a_square(draw: Draw, coef: float) -> None:
    u = draw["score_teacher"] - draw["score_aux"]
    error = draw["score_teacher"] - draw["score_g"]
    line = -dot(u, error) + coef * dot(u, u)
    sigma = draw["sigma"]
    edm_weight = (sigma**2 + SD**2) / (sigma * SD) ** 2
    constant = dot(error, error) / (4 * coef)  # nothing in it depends on psi
    loss = auxiliary_loss(**draw["arguments"], sigma_data=SD, beta=1 / (2 * coef))
    close(loss.value, SD**2 * edm_weight * sigma**4 / coef * (line + constant))


def test_signals(draw: Draw) -> None:
    arguments = {name: tensor.clone().requires_grad_() for name, tensor in draw["arguments"].items()}
    fisher = generator_loss(**arguments, sigma_data=SD, alpha=1.0, weight="sid").signals
    u, e = SD * (arguments["F_aux"] - arguments["F_teacher"]), arguments["v"] - SD * arguments["F_teacher"]
    cosine = (dot(u, e) / (dot(u, u) * dot(e, e)).sqrt()).mean()
    for signals in fisher, kl_generator_loss(**arguments, sigma_data=SD, power=1.0).signals:
        close(signals["score_gap"], (dot(u, u) / u[0].numel()).sqrt().mean().detach())
        close(signals["cos_gap_error"], cosine.detach())
        assert all(signal.ndim == 0 and not signal.requires_grad for signal in signals.values())


@pytest.mark.parametrize("weight", ["sid", "c_out"])
def test_the_weight_stays_finite_where_the_teacher_is_right(weight: str) -> None:
    v = torch.ones(2, 1, 2, 2)
    s = torch.tensor([0.0, math.pi / 2], dtype=torch.float64)
    F_aux = torch.zeros_like(v, requires_grad=True)
    loss = generator_loss(F_aux, v / SD, v, s, sigma_data=SD, alpha=1.0, weight=weight)
    loss.value.sum().backward()
    assert loss.value.isfinite().all()
    assert F_aux.grad.isfinite().all()


def test_weights_are_clipped_at_1e_5() -> None:
    """Of a teacher that is right, e = 0, and an auxiliary score that is nearly so, u = 1e-6 in every pixel."""
    v, s = torch.ones(2, 1, 2, 2, dtype=torch.float64), torch.tensor([0.3, 1.2], dtype=torch.float64)
    right, near = v / SD, (v + 1e-6) / SD
    loss = generator_loss(near, right, v, s, sigma_data=SD, alpha=1.5, weight="sid")
    close(loss.value * 1e7, s.sin() ** 2 / 1e-5 * -1.5 * 4 * 1e-12 * 1e7)
    loss = kl_generator_loss(near, right, v, s, sigma_data=SD, power=1.0)
    close(loss.value, torch.full_like(s, 4 * 1e-6 / 1e-5))


def test_every_loss_tells_its_times(draw: Draw) -> None:
    arguments = draw["arguments"]
    for loss in (
        auxiliary_loss(**arguments, sigma_data=SD, beta=0.5),
        generator_loss(**arguments, sigma_data=SD, alpha=1.0, weight="sid"),
        kl_generator_loss(**arguments, sigma_data=SD, power=1.0),
    ):
        assert loss.t.equal(arguments["s"])


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_kl_gradient_is_dmds(draw: Draw, power: float) -> None:
    """In g: sin^power (D_psi - D*) / (mean |D* - g| + rms(D* - D_psi)), DMD's eq. 7 and 8, bounded by sample."""
    v = draw["arguments"]["v"].requires_grad_()
    loss = kl_generator_loss(**draw["arguments"] | {"v": v}, sigma_data=SD, power=power)
    sigma = draw["sigma"].reshape(-1, 1, 1, 1)
    sin = sigma / (sigma**2 + SD**2).sqrt()
    gradient = -sin * torch.autograd.grad(loss.value.sum(), v)[0]  # v = cos z - sin g
    difference = (draw["score_teacher"] - draw["score_aux"]) * sigma**2  # D* - D_psi
    size = draw["error"] + difference.square().flatten(1).mean(1).sqrt()
    close(gradient, -(sin**power) * difference / size.reshape(-1, 1, 1, 1))
