"""A guided teacher: its velocity in closed form, the weights given to the generator, and what it learns."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods_toys import SIGMA_DATA, STD, TIMES, Scaled, Toy, answer, images, over
from torch import Tensor, nn

from edmdistill.draws import Draws
from edmdistill.errors import RecipeError
from edmdistill.methods import METHODS
from edmdistill.methods.base import Batch, Method, NoiseRange, Role
from edmdistill.methods.dscd import DSCD
from edmdistill.methods.fmd import FMD
from edmdistill.methods.guidance import GuidedTeacher
from edmdistill.methods.scd import SCD, SCDConfig
from edmdistill.recipes.schema import Recipe
from edmdistill.trigflow import ddim_step, denoised

NOISE = NoiseRange(SIGMA_DATA, 0.002, 80.0)
WIDE = 0.45
"""Standard deviation of the guide's data."""
RANGE = (1.0, 3.0)


def slope(t: Tensor, std: float) -> Tensor:
    """F / x of the diffusion of N(0, std^2)."""
    cos, sin = t.cos(), t.sin()
    return cos * sin * (SIGMA_DATA**2 - std**2) / (cos**2 * std**2 + sin**2 * SIGMA_DATA**2) / SIGMA_DATA


class Gaussian:
    """A teacher of N(0, std^2); of N(0, WIDE^2) where it is given no class.  It counts its calls."""

    def __init__(self, std: float) -> None:
        self.std, self.calls = std, 0

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        return over(x, slope(t, WIDE if labels is None else self.std)) * x


def networks(generator: object, **options: Any) -> dict[str, Any]:
    """Roles in which the guide, by classes or as a network, is one of N(0, WIDE^2)."""
    guide = {"guide": Gaussian(WIDE)} if options.get("guide") == "network" else {}
    return {"teacher": Gaussian(STD), "generator": generator} | guide


def expected(x: Tensor, t: Tensor, w: Tensor | float) -> Tensor:
    """F_guide + w (F - F_guide)."""
    return over(x, slope(t, WIDE) + w * (slope(t, STD) - slope(t, WIDE))) * x


@pytest.mark.parametrize("guide", ["classes", "network"])
def test_the_velocity_is_the_guided_one(guide: str) -> None:
    """At one weight and at one for each sample, with no more passes of the teacher than needed."""
    x, labels, w = images(), torch.ones(5, 1), torch.tensor([1.0, 1.2, 1.5, 2.0, 3.0]).double()
    for w_input, weights in ((None, 2.5), (w, w)):
        config = SCDConfig(guidance=(2.5, 2.5) if w_input is None else RANGE, guide=guide)
        roles = networks(None, guide=guide)
        guided = GuidedTeacher(roles, config)(x, TIMES, labels, w_input)
        torch.testing.assert_close(guided, expected(x, TIMES, weights), rtol=1e-12, atol=1e-14)
        assert sum(network.calls for network in roles.values() if network) == 2
    roles = networks(None)
    assert torch.equal(GuidedTeacher(roles, SCDConfig())(x, TIMES, labels), over(x, slope(TIMES, STD)) * x)
    assert roles["teacher"].calls == 1


class Recorder(Toy):
    """A guided generator that records its calls."""

    def __init__(self) -> None:
        super().__init__(lambda x, t: torch.sin(x) * over(x, t))
        self.weights: list[Tensor | None] = []
        self.calls: list[tuple[Any, ...]] = []
        self.directions: list[tuple[Tensor, ...]] = []

    def forward(self, *args: Any, w: Tensor | None = None, **options: Any) -> Any:
        self.weights.append(w)
        self.calls.append(args)
        self.directions.append(options.get("along", ()))
        return super().forward(*args, **options)


def loss(kind: type[Method], generator: nn.Module, size: int = 5, **options: Any) -> Any:
    method = kind(kind.Config(**options), networks(generator, **options), NOISE)
    batch = Batch(images()[torch.arange(size) % 5], torch.ones(size, 1))
    return method.turns()[-1].loss(batch, Draws(0, size))


@pytest.mark.parametrize("guide", ["classes", "network"])
def test_scd_gets_the_weights_of_its_velocity(guide: str) -> None:
    generator = Recorder()
    loss(SCD, generator, guidance=RANGE, guide=guide)
    ((x, t, _),), (w,), ((dx, dt),) = generator.calls, generator.weights, generator.directions
    torch.testing.assert_close(dx, over(x, dt) * SIGMA_DATA * expected(x, t, w), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("guide", ["classes", "network"])
def test_dscd_steps_along_the_guided_velocity(guide: str) -> None:
    generator = Recorder()
    loss(DSCD, generator, guidance=RANGE, guide=guide)
    w = generator.weights[0]
    assert [seen is w for seen in generator.weights] == [True] * 2
    (x_before, t_before, _), (x, t, _) = generator.calls
    step = ddim_step(x, expected(x, t, w), t, t_before, SIGMA_DATA)
    torch.testing.assert_close(x_before, step, rtol=1e-9, atol=1e-12)


def test_a_flow_maps_trajectories_have_a_weight_each() -> None:
    """Its second points lie a guided DDIM step behind the first, and the generator gets the same weight at both."""
    generator = Recorder()
    loss(FMD, generator, guidance=RANGE, trajectory_steps=2, trajectory_images=1)
    ((x, t, *_),), (w,) = generator.calls, generator.weights
    assert torch.equal(w[:5], w[5:])
    step = ddim_step(x[:5], expected(x[:5], t[:5], w[:5]), t[:5], t[5:], SIGMA_DATA)
    torch.testing.assert_close(x[5:], step, rtol=1e-9, atol=1e-12)


def test_weights_are_uniform_in_the_range_and_not_given_where_fixed() -> None:
    generator = Recorder()
    loss(SCD, generator, size=4000, guidance=(1.5, 3.5))
    w = generator.weights[0]
    assert w.shape == (4000,)
    quarters = torch.histc((w - 1.5) / 2, 4, 0, 1) / 4000
    torch.testing.assert_close(quarters, torch.full((4,), 0.25).double(), rtol=0, atol=0.03)
    for one in (1.0, 2.5):
        generator = Recorder()
        loss(SCD, generator, guidance=(one, one))
        assert generator.weights == [None]


def test_beside_vsd_the_auxiliary_score_follows_the_generator_at_its_weight() -> None:
    """And the three networks that see x_t in the generator's turn get the same weight."""
    config, roles = SCDConfig(guidance=RANGE, vsd=1.0), {"generator": Recorder(), "auxiliary": Recorder()}
    assert {name: role.guided for name, role in SCD.roles_for(config).items()} == {
        "teacher": False,
        "generator": True,
        "auxiliary": True,
    }
    networks = {"teacher": Gaussian(STD), **roles}
    teacher_calls = []

    class Watched(GuidedTeacher):
        def __call__(self, *args: Any, **options: Any) -> Tensor:
            teacher_calls.append((args[0], options["w"]))
            return super().__call__(*args, **options)

    method = SCD(config, networks, NOISE)
    method.teacher = Watched(networks, config)
    batch = Batch(images(), torch.ones(5, 1))
    for turn in method.turns():
        for network in roles.values():
            network.weights.clear()
        turn.loss(batch, Draws(0, 5))
        assert roles["generator"].weights[-1] is roles["auxiliary"].weights[-1]
        assert roles["generator"].weights[-1].shape == (5,)
    x_t, w = teacher_calls[-1]
    assert x_t is roles["auxiliary"].calls[-1][0]
    assert w is roles["auxiliary"].weights[-1]


# Learning.


def endpoint(t: Tensor, w: Tensor) -> Tensor:
    """Returns x_0 / x_t on the guided trajectory: d ln x / dt is the w-weighted mean of those of two Gaussians."""

    def of(std: float) -> Tensor:
        return std / (t.cos() ** 2 * std**2 + t.sin() ** 2 * SIGMA_DATA**2).sqrt()

    return of(WIDE) ** (1 - w) * of(STD) ** w


class TrueMap(nn.Module):
    """The flow map of the guided velocity, of each sample's weight."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, second: Tensor, *, u_at=(), w: Tensor, along=()) -> Any:
        def F(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            x_s = over(x, endpoint(t, w) / endpoint(s, w)) * x
            return (over(x, (t - s).cos()) * x - x_s) / (over(x, (t - s).sin()) * SIGMA_DATA)

        return answer(F, (x, t, second), along, *map(torch.zeros_like, u_at))


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
def test_the_true_map_of_every_weight_loses_nothing(objective: str) -> None:
    """The velocity, its class and the network's passes have each sample's own weight, whichever time moves."""
    assert loss(FMD, TrueMap(), guidance=RANGE, objective=objective).value.max() < 1e-16


def test_the_endpoint_is_that_of_the_guided_velocity() -> None:
    t, w = TIMES.clone().requires_grad_(), torch.tensor([1.0, 1.2, 1.5, 2.0, 3.0]).double()
    (rate,) = torch.autograd.grad(-endpoint(t, w).log().sum(), t)
    one = torch.ones(5, 1, 1, 1).double()
    torch.testing.assert_close(rate, SIGMA_DATA * expected(one, TIMES, w).flatten(), rtol=1e-10, atol=1e-12)
    assert torch.equal(endpoint(torch.zeros(5).double(), w), torch.ones(5).double())


class Perturbed(Scaled):
    """F = a(t, w) x: the exact consistency function plus waves in t, constant and linear in w, whose weights it learns.

    So training has one fixed point, where the weights are 0, and there every sample's tangent vanishes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((3, 2), 0.3, dtype=torch.float64))

    def a(self, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a and da/dt."""
        t = t.clamp(min=1e-6)  # 0 / 0 at t = 0
        cos, sin, end = t.cos(), t.sin(), endpoint(t, w)
        rate = SIGMA_DATA * (slope(t, WIDE) + w * (slope(t, STD) - slope(t, WIDE)))
        exact, exact_slope = (cos - end) / sin, (end * rate - sin) / sin - (cos - end) * cos / sin**2
        waves = torch.stack([torch.ones_like(t), (2 * t).cos(), (2 * t).sin()], 1)
        slopes = torch.stack([torch.zeros_like(t), -2 * (2 * t).sin(), 2 * (2 * t).cos()], 1)
        weights = self.weights @ torch.stack([torch.ones_like(w), w - sum(RANGE) / 2])
        return exact / SIGMA_DATA + (waves.T * weights).sum(0), exact_slope / SIGMA_DATA + (slopes.T * weights).sum(0)


@pytest.mark.parametrize("kind", [SCD, DSCD])
def test_one_generator_learns_the_trajectories_of_all_weights(kind: type[Method]) -> None:
    """From weights that are far off to within 1% of the exact endpoint, at any time and guidance weight."""
    network = Perturbed()
    method = kind(kind.Config(P_mean=-0.8, P_std=1.6, guidance=RANGE), networks(network), NOISE)
    t, w = torch.cartesian_prod(torch.tensor([0.3, 0.8, 1.2, 1.5]), torch.tensor([1.0, 2.0, 3.0])).double().unbind(1)

    def errors() -> Tensor:
        one = torch.ones(len(t), 1, 1, 1).double()
        with torch.no_grad():
            return denoised(one, network(one, t, w=w), t, SIGMA_DATA).flatten() / endpoint(t, w) - 1

    assert errors().abs().max() > 0.3
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        draws = Draws([2, step], 64)
        batch = Batch(STD * draws.normal(1, 4, 4), torch.ones(64, 1))
        method.turns()[-1].loss(batch, draws).value.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert errors().abs().max() < 0.01


# Options.


def test_roles_by_option() -> None:
    for kind in (SCD, DSCD):
        plain = kind.Config()
        assert (kind.roles_for(plain), kind.guidance(plain)) == (kind.roles, (1.0, 1.0))
        built_in = kind.Config(guidance=(1.5, 1.5))
        assert (kind.roles_for(built_in), kind.guidance(built_in)) == (kind.roles, (1.5, 1.5))
        both = kind.roles_for(kind.Config(guidance=RANGE, guide="network"))
        assert both["generator"] == kind.roles["generator"]._replace(guided=True)
        assert both["guide"] == Role(trained=False, source="guide")
        assert both.keys() == {"teacher", "generator", "guide"}


@pytest.fixture
def tables() -> Callable[..., bytes]:
    """tables(**options): a recipe of sCD as JSON."""
    training = {"images": 8, "batch": 8, "lr": 1.0, "log_every": 8, "snapshot_every": 8}
    return lambda **options: json.dumps(
        {"method": {"name": "scd", **options}, "training": training, "ema": {"half_life_images": 1}}
    ).encode()


def test_a_recipe_holds_the_range(tables: Callable[..., bytes]) -> None:
    recipe = Recipe.from_json(tables(guidance=[1, 2], guide="network"))
    assert recipe.guidance == (1.0, 2.0)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance": [2, 1]}, r"guidance = \[2, 1\] decreases: give the lower weight first"),
        ({"guidance": [0.5, 1]}, "method.guidance = .*: each of its values must be at least 1"),
        ({"guidance": 1.5}, "method.guidance = 1.5 must be a list"),
        ({"guide": "network"}, 'guide = "network" has no effect at weight 1: give a range'),
        ({"guide": "teacher"}, "method.guide = 'teacher': choose one of classes, network"),
    ],
)
def test_invalid_options_are_refused(tables: Callable[..., bytes], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as caught:
        Recipe.from_json(tables(**options))
    assert "\n" not in str(caught.value)


def test_every_guided_method_checks_its_range() -> None:
    kinds = [entry.load() for entry in METHODS.values()]
    guided = [kind.Config for kind in kinds if "guidance" in kind.Config.__struct_fields__]
    assert len(guided) >= 4
    for Config in guided:
        with pytest.raises(ValueError, match="decreases"):
            Config(guidance=(2.0, 1.0))
        with pytest.raises(ValueError, match="no effect at weight 1"):
            Config(guide="network")


def refusal(kind: type[Method], label_dim: int, label_dropout: float | None, **options: Any) -> str | None:
    facts = {"positional_time": True, "label_dim": label_dim, "label_dropout": label_dropout}
    return kind.check_teacher(kind.Config(**options), **facts)


@pytest.mark.parametrize("kind", [SCD, DSCD])
def test_a_teacher_without_classes_is_guided_by_a_network_alone(kind: type[Method]) -> None:
    reason = refusal(kind, 0, 0.1, guidance=RANGE)
    assert reason is not None
    assert "this network has none: use --set method.guide=network" in reason
    assert "--force-guidance" not in reason
    assert refusal(kind, 0, 0.1, guidance=RANGE, guide="network") is None
    assert refusal(kind, 0, 0.1) is None


@pytest.mark.parametrize("kind", [SCD, DSCD])
def test_a_teacher_with_classes_guides_itself_if_it_was_trained_without_them(kind: type[Method]) -> None:
    reason = refusal(kind, 3, 0.0, guidance=RANGE)
    assert reason is not None
    assert "was never trained without them" in reason
    assert reason.endswith(", or --force-guidance")
    assert refusal(kind, 3, 0.1, guidance=RANGE) is None
    assert refusal(kind, 3, None, guidance=RANGE) is None  # it may have been
