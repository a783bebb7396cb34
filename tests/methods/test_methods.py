"""Properties that hold for every method, on which the training loop relies."""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods import METHODS
from edmdistill.methods.base import Batch, Method, NoiseRange
from edmdistill.trigflow import ddim_step

Make = Callable[..., Any]
GUIDED = {"guidance": (1.0, 3.0), "guide": "network"}
GAN = {"gan": 0.5, "gan_loss": "relativistic", "gan_channels": 4}
OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in METHODS} | {
    "scd, vsd": {"vsd": 0.7},
    "scd, guided": GUIDED,
    "scd, vsd and guided": GUIDED | {"vsd": 0.7},
    "dscd, guided": GUIDED,
    "vsd, guided": GUIDED,
    "kd, guided": GUIDED,
    "pd, guided": GUIDED,
    "cd, guided": GUIDED | {"mu": 0.9},
    "fmd, guided": GUIDED,
    "dmd2, f-distill": {"levels": (2.5,), "f_divergence": "jensen-shannon"},
    "ctm": {"gan_channels": 4},
    "fmd, gan": GAN,
    "scd, vsd, guided and gan": GUIDED | GAN | {"vsd": 0.7, "balance": "fixed"},
    "dscd, gan": GAN | {"gan_loss": "non-saturating"},
    "cosim, gan": GAN | {"auxiliary_turns": 2},
    "fmd, lagrangian": {"objective": "lagrangian"},
    "imm": {"particles": 2},
    "ladd": {"levels": (2.5,), "r1": 1.0},
    "diffusion, augmented": {"augment": 1.0, "weighting": "adaptive"},
    "mean-flow, augmented": {"augment": 1.0, "augmentations": ("xflip", "scale", "translation")},
    "imm, augmented": {"augment": 1.0, "particles": 2},
    "sid, augmented": {"augment": 1.0, "augmentations": ("scale", "rotation"), "coef": 0.7},
    "sida, augmented": {"augment": 1.0},
}
"""Every method with its defaults, and with options that add roles."""
ALIKE = {"sida", "sida, augmented", "dmd2, f-distill", "fmd, gan", "dscd, gan", "scd, vsd, guided and gan"}
"""Those whose turns are like another's: dmd2's, and an adversary beside cosim."""
pytestmark = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in OPTIONS]
)


@pytest.fixture
def build(tiny_networks: Make, noise: NoiseRange) -> Callable[..., tuple[Method, dict[str, torch.nn.Module]]]:
    def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0):
        kind, options = METHODS[name.split(",")[0]].load(), OPTIONS[name]
        networks = tiny_networks(kind, seed, dtype, **options)
        return kind(kind.Config(**options), networks, noise), networks

    return make


def draws(seed: int = 0, size: int = 6) -> Draws:
    return Draws(seed, size)


def test_turns_and_product_are_trained_roles(build: Make, name: str) -> None:
    method, _ = build(name)
    trained = {name for name, role in method.roles_for(method.config).items() if role.trained}
    assert {turn.role for turn in method.turns()} == trained
    assert method.product in trained


def test_options_are_a_frozen_struct_that_rejects_unknown_fields(name: str) -> None:
    Config, options = METHODS[name.split(",")[0]].load().Config, OPTIONS[name]
    assert msgspec.convert(options, Config) == Config(**options)
    assert hash(Config(**options)) == hash(Config(**options))
    with pytest.raises(msgspec.ValidationError, match="nonsense"):
        msgspec.convert({"nonsense": 1}, Config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_are_a_finite_number_for_each_sample(
    build: Make, tiny_batch: Make, name: str, dtype: torch.dtype
) -> None:
    method, _ = build(name, dtype)
    for turn in method.turns():
        loss = turn.whole(tiny_batch(1000, dtype=dtype), draws(size=1000))
        assert loss.value.shape == loss.t.shape == (1000,)
        assert loss.value.dtype == dtype
        assert loss.value.isfinite().all()
        assert (loss.t >= 0).all()
        assert (loss.t <= math.pi / 2).all()
        assert all(s.ndim == 0 and s.isfinite() and not s.requires_grad for s in loss.signals.values())


def test_a_turn_reaches_every_weight_of_its_role_and_no_other(build: Make, tiny_batch: Make, name: str) -> None:
    """And holds no graph of the generator, unless it is the generator's."""
    method, networks = build(name)
    for turn in method.turns():
        for role, network in networks.items():
            network.requires_grad_(role in (turn.role, method.product)).zero_grad()
        turn.whole(tiny_batch(), draws()).value.mean().backward()
        if turn.role != method.product:
            assert all(parameter.grad is None for parameter in networks[method.product].parameters())
        for key, parameter in networks[turn.role].named_parameters():
            if name == "diffusion" and key.startswith("head"):
                continue  # only adaptive weighting reads it
            assert parameter.grad.isfinite().all()
            # The hinge of a fresh discriminator leaves a bias where it is: data and generated images pull alike.
            assert (parameter.grad != 0).all() or turn.role == "discriminator"


def test_losses_depend_on_the_draws_alone(build: Make, tiny_batch: Make, name: str) -> None:
    method, _ = build(name)
    for turn in method.turns():
        torch.manual_seed(1)
        first = turn.whole(tiny_batch(), draws()).value
        torch.manual_seed(2)
        assert (turn.whole(tiny_batch(), draws()).value == first).all()
        assert (turn.whole(tiny_batch(), draws(1)).value != first).all()


def test_samples_do_not_mix(build: Make, tiny_batch: Make, name: str) -> None:
    """A sample's loss has a gradient in the labels of its group alone, so a batch can be split into micro-batches."""
    method, _ = build(name)
    group = method.group_size(method.config)
    for turn in method.turns():
        batch = tiny_batch()
        labels = batch.labels.requires_grad_()
        (slope,) = torch.autograd.grad(turn.whole(batch, draws()).value[2], labels, allow_unused=True)
        if turn.role == "discriminator":
            assert slope is None  # it sees images alone; tests/features/test_perceptual.py
            continue
        own = torch.arange(len(labels)) // group == 2 // group
        assert (slope[own] != 0).all()
        assert (slope[~own] == 0).all()


def watched(method: Method, networks: dict[str, Any], see: Callable[..., None]) -> tuple[Method, set[str]]:
    """The method with networks that show each pass: role, x_t, t, labels, second time and result; their roles."""

    def watch(role: str) -> Callable[..., Any]:
        def F(x_t: Tensor, t: Tensor, labels: Tensor, second: Tensor | None = None, **options):
            found = networks[role](x_t, t, labels, second, **options)
            see(role, x_t, t, labels, second, found)
            return found

        F.watch = networks[role].watch
        return F

    flows = {name for name, role in method.roles_for(method.config).items() if role.make is None}
    return type(method)(method.config, networks | {role: watch(role) for role in flows}, method.noise), flows


def test_every_network_gets_the_labels_and_times_of_each_sample(build: Make, tiny_batch: Make, name: str) -> None:
    (method, networks), batch = build(name), tiny_batch()
    roles, called = method.roles_for(method.config), set()

    def see(role: str, x_t: Tensor, t: Tensor, labels: Tensor, second: Tensor | None, found: Any) -> None:
        called.add(role)
        assert labels is batch.labels
        assert t.shape == (len(batch.x0),)
        assert (second is not None) == roles[role].two_time
        assert second is None or ((second >= t) if role == "auxiliary" else (second <= t)).all()

    method, flows = watched(method, networks, see)
    for turn in method.turns():
        turn.whole(batch, draws())
    assert called == flows


def test_monitors_read_times_and_images_of_the_turn_s_own_passes(build: Make, tiny_batch: Make, name: str) -> None:
    """A loss counts at the time of its network's pass with gradient, or of its scores'; images are an estimate."""
    passes, sigma_data = [], build(name)[0].noise.sigma_data

    def see(role: str, x_t: Tensor, t: Tensor, labels: Tensor, second: Tensor | None, found: Any) -> None:
        F = found[0] if isinstance(found, tuple) else found
        # CTM's images are those of its last jump, to sigma_min.
        end = second if name == "ctm" and second is not None else torch.zeros_like(t)
        image = ddim_step(x_t, F, t, end, sigma_data) if F.shape == x_t.shape else torch.zeros_like(x_t)
        if torch.is_grad_enabled() or role == "teacher":
            passes.append((role, t, image))

    method, _ = watched(*build(name), see)
    for turn in method.turns():
        passes.clear()
        loss = turn.whole(tiny_batch(), draws())
        scored = turn.role == "generator" and name.split(",")[0] in ("cosim", "sid", "sida", "dmd2", "ladd", "vsd")
        asked = [t for role, t, _ in passes if role == ("teacher" if scored else turn.role)]
        assert turn.role == "discriminator" or any(t.equal(loss.t) for t in asked)
        assert (loss.generated is not None) == (turn.role == "generator")
        if loss.generated is not None:
            assert name == "cosim" or not loss.generated.requires_grad
            assert any(torch.allclose(image, loss.generated, rtol=1e-9, atol=1e-12) for _, _, image in passes)


def test_signals_are_means_over_samples(build: Make, tiny_batch: Make, name: str) -> None:
    """Those of two halves of a batch have the mean of the whole; weights of terms are measured once for a batch."""
    method, _ = build(name)
    batch = tiny_batch(8)
    for turn in method.turns():
        weights = [turn.preview(batch, draws(size=8))._replace(cached=None)] if turn.preview else []
        whole, *halves = (
            turn.loss(Batch(batch.x0[rows], batch.labels[rows]), Draws(0, 8, rows), *weights).signals
            for rows in (slice(0, 8), slice(0, 4), slice(4, 8))
        )
        for signal, mean in whole.items():
            torch.testing.assert_close(sum(half[signal] for half in halves) / 2, mean)
