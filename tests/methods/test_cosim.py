"""CoSIM's turns, in float64, against eq. 15 as the paper writes it, and finite differences.

A mutant is CoSIM with one mistake (conftest.py). Each must fail a check that CoSIM passes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compared_gradients import assert_near, flat, gradients
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.cosim import CoSIM, CoSIMConfig

SD = 0.5
Make = Callable[..., Any]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Tiny networks: eq. 15 as the paper writes it, in EDM's notation. ---


def drawn(batch: Batch, seed: int, config: CoSIMConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sigma_s, sigma_t [B,1,1,1], n, eps [B,C,H,W] as appendix A.1 and eq. 18 have them, in CoSIM's order of draws."""
    draws = Draws(seed, len(batch.x0))
    r_s, k, coin, U = (draws.uniform() for _ in range(4))
    r_s = config.r_s_max * r_s
    gamma = torch.where(coin < config.share_to_max, 1.0, U / torch.ceil(k * config.R))
    n, eps = (draws.normal_like(batch.x0) for _ in range(2))
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    levels = ((low + r * (high - low)) ** 7 for r in (r_s, torch.clamp(r_s + gamma, max=1.0)))
    sigma_s, sigma_t = (level.reshape(-1, 1, 1, 1) for level in levels)
    return sigma_s, sigma_t, n, eps


def denoise(network: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None, *second: Tensor) -> Tensor:
    """EDM's D(x; sigma) of a network: c_skip x - c_out F(cos(t) x, t)."""
    length = (sigma**2 + SD**2).sqrt()
    times = [torch.atan(level / SD).flatten() for level in (sigma, *second)]
    return SD**2 / length**2 * x - sigma * SD / length * network(x * SD / length, times[0], labels, *times[1:])


def naive_losses(networks: dict[str, nn.Module], batch: Batch, seed: int, config: CoSIMConfig):
    """Both lines of eq. 15, [B] each, under SiD's weights; and phi's weight w1, without gradient."""
    sigma_s, sigma_t, n, eps = drawn(batch, seed, config)
    g = denoise(networks["generator"], batch.x0 + sigma_t * n, sigma_t, batch.labels)
    x_s = g + sigma_s * eps
    D_teacher = denoise(networks["teacher"], x_s, sigma_s, batch.labels)
    D_psi = denoise(networks["auxiliary"], x_s, sigma_s, batch.labels, sigma_t)
    S, f, grad_log_q = ((D - x_s) / sigma_s**2 for D in (D_teacher, D_psi, g))
    u = S - f

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2, 3))

    sigma = sigma_s.flatten()
    c_out = sigma * SD / (sigma**2 + SD**2).sqrt()
    w1 = sigma**4 / ((g - D_teacher).abs().mean((1, 2, 3)) if config.weight == "sid" else c_out)
    w2 = sigma**4 / c_out**2 * SD**2 / config.coef
    phi = dot(u, S - grad_log_q) - config.alpha * dot(u, u)
    psi = dot(u, grad_log_q - S) + config.coef * dot(u, u)
    return phi, w2 * psi, w1.detach()


class Case(NamedTuple):
    """The networks, a batch, and the losses of the turns of a method (or mutant) on them."""

    networks: dict[str, nn.Module]
    batch: Batch
    config: CoSIMConfig
    turn: Callable[[str], Tensor]


SEED = 5


@pytest.fixture
def case(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> Callable[..., Case]:
    def make(method: type = CoSIM, **options: Any) -> Case:
        networks, batch, config = tiny_networks(CoSIM), tiny_batch(), CoSIMConfig(**options)
        turns = {turn.role: turn for turn in method(config, networks, noise).turns()}
        return Case(networks, batch, config, lambda role: turns[role].loss(batch, Draws(SEED, len(batch.x0))).value)

    return make


def check_generator_turn(case: Case) -> None:
    phi, _, w1 = naive_losses(case.networks, case.batch, SEED, case.config)
    expected, actual = w1 * phi, case.turn("generator")
    assert_near(actual, expected, 1e-10)
    generator = case.networks["generator"]
    assert_near(*(flat(gradients(value.mean(), generator)) for value in (actual, expected)), 1e-10)


def check_auxiliary_turn(case: Case) -> None:
    _, expected, _ = naive_losses(case.networks, case.batch, SEED, case.config)
    auxiliary = case.networks["auxiliary"]
    actual = case.turn("auxiliary")
    assert_near(*(flat(gradients(value.mean(), auxiliary)) for value in (actual, expected)), 1e-10)


def check_auxiliary_turn_alone(case: Case) -> None:
    for role in ("teacher", "generator"):
        reached = gradients(case.turn("auxiliary").mean(), case.networks[role])
        assert reached == [None] * len(reached), f"psi's turn reaches the {role}"


@torch.no_grad()
def differences(function: Callable[[], Tensor], network: nn.Module, directions: Tensor, step: float = 1e-3) -> Tensor:
    """Central differences along directions in the space of all weights, of fourth order.  [N,weights] -> [N]"""
    weights, slopes = parameters_to_vector(network.parameters()), []
    for direction in directions:
        at = {}
        for k in (-2, -1, 1, 2):
            vector_to_parameters(weights + k * step * direction, network.parameters())
            at[k] = function()
        slopes.append((8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step))
    vector_to_parameters(weights, network.parameters())
    return torch.stack(slopes)


def check_generator_differences(case: Case) -> None:
    """Against differences of the turn's own value, with the weight that it had before the step.

    Each direction takes part of every weight, so that an error in any of them shows.
    """

    def w1() -> Tensor:
        return naive_losses(case.networks, case.batch, SEED, case.config)[2]

    before, generator = w1(), case.networks["generator"]
    found = flat(gradients(case.turn("generator").mean(), generator))
    directions = torch.nn.functional.normalize(torch.randn(8, len(found), generator=rng(), dtype=found.dtype))
    expected = differences(lambda: (case.turn("generator") * before / w1()).mean(), generator, directions)
    assert_near(directions @ found, expected, 1e-9)


GENERATOR_CHECKS = [check_generator_turn, check_generator_differences]
AUXILIARY_CHECKS = [check_auxiliary_turn, check_auxiliary_turn_alone]


@pytest.mark.parametrize("weight", ["sid", "c_out"])
@pytest.mark.parametrize(("alpha", "coef"), [(1.2, 1.0), (1.0, 0.75)])
@pytest.mark.parametrize("check", GENERATOR_CHECKS)
def test_generator_turn(case: Make, check: Callable[[Case], None], alpha: float, coef: float, weight: str) -> None:
    check(case(alpha=alpha, coef=coef, weight=weight))


@pytest.mark.parametrize("coef", [0.5, 0.75, 1.0, 1.2])
@pytest.mark.parametrize("check", AUXILIARY_CHECKS)
def test_auxiliary_turn(case: Make, check: Callable[[Case], None], coef: float) -> None:
    check(case(coef=coef))


@pytest.mark.parametrize("options", [{"R": 8}, {"share_to_max": 0.1}, {"r_s_max": 0.7}], ids=str)
@pytest.mark.parametrize("check", [check_generator_turn, check_auxiliary_turn])
def test_schedule_options(case: Make, check: Callable[[Case], None], options: dict[str, float]) -> None:
    check(case(**options))


def test_no_gradient_where_the_auxiliary_score_is_the_teachers(case: Make) -> None:
    setting = case()

    def same(x: Tensor, s: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        return setting.networks["teacher"](x, s, labels)

    method = CoSIM(CoSIMConfig(), {**setting.networks, "auxiliary": same}, NoiseRange(SD, 0.002, 80.0))
    value = method.generator_loss(setting.batch, Draws(0, len(setting.batch.x0))).value
    assert (value == 0).all()
    assert flat(gradients(value.sum(), setting.networks["generator"])).abs().max() < 1e-12


# --- The KL's gradient, t first, and the anchor. ---


def test_the_kl_gradient_passes_no_score_network(case: Make) -> None:
    """Its direction in g is D_psi - D*."""
    setting = case(gradient="kl", s_power=0.0)
    sigma_s, sigma_t, n, eps = drawn(setting.batch, SEED, setting.config)
    g = denoise(setting.networks["generator"], setting.batch.x0 + sigma_t * n, sigma_t, setting.batch.labels)
    x_s = (g + sigma_s * eps).detach()
    D_teacher = denoise(setting.networks["teacher"], x_s, sigma_s, setting.batch.labels)
    difference = D_teacher - denoise(setting.networks["auxiliary"], x_s, sigma_s, setting.batch.labels, sigma_t)
    size = (D_teacher - g).abs().mean((1, 2, 3)) + difference.square().mean((1, 2, 3)).sqrt()
    expected = -(difference / size.reshape(-1, 1, 1, 1)).detach() * g
    generator = setting.networks["generator"]
    actual = flat(gradients(setting.turn("generator").mean(), generator))
    assert_near(actual, flat(gradients(expected.sum((1, 2, 3)).mean(), generator)), 1e-10)
    for role in ("teacher", "auxiliary"):
        reached = gradients(setting.turn("generator").mean(), setting.networks[role])
        assert reached == [None] * len(reached), f"the generator's turn reaches the {role}"


@pytest.mark.parametrize("gradient", ["fisher", "kl"])
def test_short_jumps_learn_the_teachers_denoiser(case: Make, gradient: str) -> None:
    """With an anchor above all levels, the generator's turn is regression on F*, and the auxiliary score is idle."""
    setting = case(gradient=gradient, order="t", share_to_max=0.0, anchor_sigma=79.9)
    jump = CoSIM(setting.config, setting.networks, NoiseRange(SD, 0.002, 80.0)).transition(
        setting.batch, Draws(SEED, len(setting.batch.x0))
    )
    teacher = setting.networks["teacher"](jump.x_t, jump.t, setting.batch.labels)
    expected = (jump.F - teacher).square().sum((1, 2, 3))
    assert_near(setting.turn("generator"), expected, 1e-10)
    generator = setting.networks["generator"]
    assert_near(*(flat(gradients(value.mean(), generator)) for value in (setting.turn("generator"), expected)), 1e-10)


def test_the_anchor_divides_the_levels(case: Make) -> None:
    """Rows that start below it are regression, the others are as without it."""
    free, anchored = (case(gradient="kl", order="t", anchor_sigma=anchor) for anchor in (0.0, 2.0))
    jump = CoSIM(free.config, free.networks, NoiseRange(SD, 0.002, 80.0)).transition(
        free.batch, Draws(SEED, len(free.batch.x0))
    )
    short = jump.t < math.atan(2.0 / SD)
    assert 0 < short.sum() < len(short)
    same = (free.turn("generator") - anchored.turn("generator")).abs() < 1e-12
    assert (same == ~short).all()


def test_fisher_sigma_divides_the_levels(case: Make) -> None:
    """Rows whose s lies from it on have one gradient, the others the other one."""
    mixed, fisher, kl = (
        case(order="t", coef=1.0, **options)
        for options in ({"gradient": "kl", "fisher_sigma": 1.0}, {"gradient": "fisher"}, {"gradient": "kl"})
    )
    jump = CoSIM(kl.config, kl.networks, NoiseRange(SD, 0.002, 80.0)).transition(
        kl.batch, Draws(SEED, len(kl.batch.x0))
    )
    above = jump.s >= math.atan(1.0 / SD)
    assert 0 < above.sum() < len(above)
    for rows, other in ((above, fisher), (~above, kl)):
        values = [setting.turn("generator")[rows] for setting in (mixed, other)]
        assert_near(*values, 1e-12)
        networks = (setting.networks["generator"] for setting in (mixed, other))
        assert_near(*(flat(gradients(v.sum(), n)) for v, n in zip(values, networks, strict=True)), 1e-10)


# --- The mutants. ---

CAUGHT_BY_GRADIENTS = [
    ("alpha's sign", check_generator_turn),
    ("psi detached", check_generator_turn),
    ("psi detached", check_generator_differences),
    ("teacher detached", check_generator_turn),
    ("teacher detached", check_generator_differences),
    ("both detached", check_generator_turn),  # DMD's gradient: the mixture run passes with it
    ("both detached", check_generator_differences),
    ("generator detached", check_generator_turn),
    ("generator detached", check_generator_differences),
    ("weight attached", check_generator_turn),
    ("weight attached", check_generator_differences),
    ("beta doubled", check_auxiliary_turn),
    ("psi's target attached", check_auxiliary_turn_alone),
    ("psi without t", check_generator_turn),
    ("psi without t", check_auxiliary_turn),
    ("psi's times swapped", check_generator_turn),
    ("psi's times swapped", check_auxiliary_turn),
    ("r flipped", check_generator_turn),
    ("r flipped", check_auxiliary_turn),
]


@pytest.mark.parametrize(("name", "check"), CAUGHT_BY_GRADIENTS)
def test_mutant_is_caught(case: Make, mutant: Make, name: str, check: Callable[[Case], None]) -> None:
    with pytest.raises(AssertionError, match=r"relative error|psi's turn reaches"):
        check(case(mutant(name)))
