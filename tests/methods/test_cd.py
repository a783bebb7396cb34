"""CD: its loss and gradient against the paper's equations in EDM's scale, and its minimum, the flow's own map."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, Toy, over, spread, teacher, truth
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods import cd
from edmdistill.methods.base import Batch, EmaOf, NoiseRange
from edmdistill.methods.cd import CD, CDConfig
from edmdistill.methods.ect import ECT, ECTConfig
from edmdistill.methods.solver import heun_step
from edmdistill.schedules import edm_sigmas
from edmdistill.trigflow import ddim_step

Make = Callable[..., Any]
NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)
ROWS = 40
CLOSING: dict[str, Any] = {"pairs": "closing", "q": 4.0, "stage_images": 100}


def batch(images: int = 0) -> Batch:
    return Batch(STD * Draws(1, ROWS).normal(3, 4, 4), None, images)


def make(weight: Tensor, **options: Any) -> CD:
    networks = {
        "teacher": Toy(teacher),
        "generator": Toy(lambda x, t: weight * torch.sin(2 * x) * over(x, t).cos()),
        "target": Toy(lambda x, t: 0.3 * torch.cos(x) * over(x, t).sin()),
    }
    config = CDConfig(**options)
    return CD(config, {name: network for name, network in networks.items() if name != "target" or config.mu}, NOISE)


@pytest.mark.parametrize(
    ("options", "images"),
    [
        ({}, 0),
        ({"N": 5, "mu": 0.9, "solver": "euler", "distance": "pseudo-huber", "c": 0.03}, 0),
        ({**CLOSING, "solver": "euler", "distance": "pseudo-huber", "weighting": "gap"}, 0),
        ({**CLOSING, "weighting": "c_out", "k": 4.0, "P_mean": -0.8, "P_std": 1.6}, 250),
    ],
    ids=["paper", "mu and Euler", "FastGen", "late"],
)
def test_loss_and_gradient_are_the_paper_s(options: dict[str, Any], images: int) -> None:
    """f(x, sigma) = c_skip x + c_out F(c_in x); the teacher's step by its slope dx/dsigma = (x - D) / sigma."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    method = make(weight, **options)
    config, data = method.config, batch(images)
    loss = method.consistency_loss(data, Draws(0, ROWS))
    (gradient,) = torch.autograd.grad(loss.value.sum(), [weight])

    draws = Draws(0, ROWS)
    if config.pairs == "grid":
        levels = [*edm_sigmas(config.N, 0.002, 80.0).flip(0).tolist()]
        levels[0] = 0.0  # the paper's lowest is sigma_min
        n = [int(u * (config.N - 1)) for u in draws.uniform().tolist()]
        t, r = (torch.tensor([levels[i + end] for i in n], dtype=torch.float64) for end in (1, 0))
    else:
        t = (draws.normal() * config.P_std + config.P_mean).exp()
        gap = 4.0 ** -(1 + images // 100)
        r = (t * (1 - gap * (1 + config.k / (1 + t.exp())))).clamp(min=0)
    eps = draws.normal(3, 4, 4)

    def f(x: Tensor, sigma: Tensor, role: str) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        scale = (sigma**2 + SIGMA_DATA**2).sqrt()
        F = method.networks[role](x / scale * SIGMA_DATA, (sigma / SIGMA_DATA).atan().flatten())
        return SIGMA_DATA**2 / scale**2 * x - SIGMA_DATA * sigma / scale * F

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - f(x, sigma, "teacher")) / sigma.reshape(-1, 1, 1, 1)

    step = (r - t).reshape(-1, 1, 1, 1)
    x_t = data.x0 + t.reshape(-1, 1, 1, 1) * eps
    x_r = x_t + step * slope(x_t, t)
    at_0 = (r == 0).reshape(-1, 1, 1, 1)
    if config.solver == "heun":
        x_r = torch.where(at_0, x_r, x_t + step * (slope(x_t, t) + slope(x_r, r.clamp(min=1e-9))) / 2)
    assert at_0.any() or images
    target = torch.where(at_0, x_r, f(x_r, r, "target" if config.mu else "generator").detach())
    error = f(x_t, t, "generator") - target
    distance = error.square().mean((1, 2, 3))
    if config.distance == "pseudo-huber":
        distance = (error.square().sum((1, 2, 3)) + config.c**2).sqrt() - config.c
    c_out = t * SIGMA_DATA / (t**2 + SIGMA_DATA**2).sqrt()
    expected = distance * {"none": 1, "gap": 1 / (t - r), "c_out": 1 / c_out**2}[config.weighting]
    torch.testing.assert_close(loss.value, expected, rtol=1e-8, atol=1e-10)
    (by_hand,) = torch.autograd.grad(expected.sum(), [weight])
    torch.testing.assert_close(gradient, by_hand, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{"N": 400}, {"N": 400, "solver": "euler"}, CLOSING], ids=["heun", "euler", "closing"]
)
def test_the_flow_s_map_agrees_at_both_ends_of_an_exact_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is 0 then, and of the solver's steps the error is theirs alone; a denoiser is far from it."""

    def loss(generator: Callable[..., Tensor]) -> Tensor:
        networks = {"teacher": Toy(teacher), "generator": Toy(generator)}
        return CD(CDConfig(**options), networks, NOISE).consistency_loss(batch(300), Draws(0, ROWS)).value.mean()

    def flow_map(x: Tensor, t: Tensor) -> Tensor:
        return truth(x, t.clamp(min=1e-9), t.clamp(min=1e-9))

    def exact(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x * over(x, spread(s) / spread(t))

    assert loss(flow_map) < 1e-3 * loss(lambda x, t: 0 * x)
    monkeypatch.setattr(cd, "heun_step", lambda flow, x, t, s, sigma_data: exact(x, t, s))
    monkeypatch.setattr(cd, "ddim_step", lambda x, F, t, s, sigma_data: exact(x, t, s))
    assert loss(flow_map) < 1e-18
    assert loss(lambda x, t: flow_map(x, t) + 0.1) > 1e-9


def test_it_tends_to_ect_where_the_teacher_s_noise_is_the_image_s() -> None:
    """Of data at one point the flow keeps the noise, so that a step of the teacher ends where ECT's pair does."""
    options: dict[str, Any] = {"q": 2.0, "stage_images": 100, "c": 0.03}
    data = Batch(torch.zeros(ROWS, 3, 4, 4, dtype=torch.float64), None, 150)
    generator = Toy(lambda x, t: 0.7 * torch.sin(2 * x) * over(x, t).cos())
    networks = {
        "generator": generator,
        "teacher": Toy(lambda x, t: x / over(x, t).tan().clamp(min=1e-9) / SIGMA_DATA),
    }
    ect = ECT(ECTConfig(**options), networks, NOISE).consistency_loss(data, Draws(0, ROWS))
    for solver in ("heun", "euler"):
        config = CDConfig(pairs="closing", distance="pseudo-huber", weighting="gap", solver=solver, **options)
        found = CD(config, networks, NOISE).consistency_loss(data, Draws(0, ROWS))
        torch.testing.assert_close(found.value, ect.value, rtol=1e-7, atol=1e-10)


def test_heun_s_step_to_0_is_ddim_s() -> None:
    x = torch.tensor([0.7, -0.4], dtype=torch.float64).reshape(2, 1, 1, 1)
    t, s = torch.tensor([0.3, 1.0]).double(), torch.zeros(2).double()

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return teacher(x, t) if (t > 0).all() else torch.full_like(x, 1e6)

    torch.testing.assert_close(heun_step(flow, x, t, s, 0.5), ddim_step(x, teacher(x, t), t, s, 0.5), rtol=0, atol=0)


def test_the_target_is_an_average_or_the_generator_itself() -> None:
    assert CD.roles_for(CDConfig()).keys() == {"teacher", "generator"}
    guided = CD.roles_for(CDConfig(mu=0.95, guidance=(1.0, 3.0), guide="network"))
    assert guided["target"] == guided["generator"]._replace(trained=False, ema_of=EmaOf("generator", 0.95))
    assert guided["target"].guided
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    values = [make(weight, mu=mu).consistency_loss(batch(), Draws(0, ROWS)).value for mu in (0.0, 0.9)]
    assert not torch.allclose(*values)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_one_weight_of_guidance_for_both_ends_and_the_step(tiny_networks: Make, tiny_batch: Make, mu: float) -> None:
    options: dict[str, Any] = {"guidance": (1.0, 3.0), "guide": "network", "mu": mu}
    networks, seen = tiny_networks(CD, **options), []
    for role in ("generator", "target") if mu else ("generator",):
        networks[role].register_forward_pre_hook(lambda _, args, more: seen.append(more["w"]), with_kwargs=True)
    CD(CDConfig(**options), networks, NOISE).consistency_loss(tiny_batch(), Draws(0, 6))
    first, second = seen
    assert first is second
    assert len(first.unique()) == 6


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("guide", ["classes", "network"])
def test_the_teacher_s_step_is_guided_by_each_row_s_weight(
    solver: Any, guide: Any, tiny_networks: Make, tiny_batch: Make
) -> None:
    """x_r, of which the target is asked, is where the step along F_guide + w (F - F_guide) ends."""
    options: dict[str, Any] = {"guidance": (1.0, 3.0), "guide": guide, "mu": 0.9, "solver": solver}
    networks, data, asked = tiny_networks(CD, **options), tiny_batch(), {}
    for role in ("generator", "target"):
        networks[role].register_forward_pre_hook(
            lambda _, args, more, role=role: asked.update({role: (*args, more["w"])}), with_kwargs=True
        )
    CD(CDConfig(**options), networks, NOISE).consistency_loss(data, Draws(0, 6))
    (x_t, t, _, w), (x_r, r, _, _) = asked["generator"], asked["target"]

    def flow(x: Tensor, time: Tensor) -> Tensor:
        F = networks["teacher"](x, time, data.labels)
        F_guide = networks["guide"](x, time, data.labels) if guide == "network" else networks["teacher"](x, time, None)
        return F_guide + over(x, w) * (F - F_guide)

    ends = heun_step(flow, x_t, t, r, SIGMA_DATA)
    expected = ends if solver == "heun" else ddim_step(x_t, flow(x_t, t), t, r, SIGMA_DATA)
    torch.testing.assert_close(x_r, expected, rtol=1e-9, atol=1e-9)
    assert len(w.unique()) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"q": 4.0}, 'with pairs = "grid", q has no effect: set pairs = "closing"'),
        ({"pairs": "closing", "N": 40}, 'with pairs = "closing", N has no effect: set pairs = "grid"'),
        ({"c": 0.03}, 'with distance = "l2", c has no effect: set distance = "pseudo-huber"'),
        ({"distance": "lpips"}, "lpips = FILE go together"),
        ({"guidance": (2.0, 1.0)}, "decreases"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CDConfig(**options)
