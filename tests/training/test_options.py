"""A hundred rounds with each option, and with all together, against the plainest run in float32.

An option rounds differently, no more. How far rounding alone leads in so many rounds is measured here too, by weights
that start off by their last bit. `docs/performance.md` has the figures; -s prints them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.embedded import EMBEDDED
from edmdistill.kernels.linear import lay_out_weights
from edmdistill.machine import compile as compiling
from edmdistill.machine.engine import Machine, SecondMoment
from edmdistill.networks.base import Network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.recipes.library import load_recipe
from edmdistill.recipes.schema import CompileMode, Recipe
from edmdistill.sampling.generate import sample
from edmdistill.sampling.grid import to_uint8
from edmdistill.training.adam import LeanAdam
from edmdistill.training.loop import rounds
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch's, compiling

ROUNDS, LAST, BATCH = 100, 3, 12
"""Of a run; of them, those that a resumed run repeats; images of a round."""
MARKS = 1, 10, ROUNDS
PATH = 2e-4
"""Largest distance of weights from the plain run's, relative to the way that these have gone: three times the largest
that rounding alone leads to in a hundred rounds, 6e-5. After fewer it is a larger share of a shorter way."""
RECIPES: dict[str, tuple[str, dict[str, object]]] = {
    "cosim": ("cosim/digits-paper", {"method.warmup_images": 0}),
    "scd": ("scd/digits", {"method.warmup_images": 0, "method.allow_edm_time": "true"}),
}
"""A method whose generator learns by three networks, with Adam at beta1 = 0, and one that learns by tangents."""
RATE = {"lr_rampup_images": 0, "lr_decay": '"constant"', "decay_share": 0.5}
TRAINING = RATE | {"batch": BATCH, "images": ROUNDS * BATCH, "dropout": 0.1}


def start(method: str, machine: Machine, training: dict[str, object]) -> Run:
    name, sets = RECIPES[method]
    sets = sets | {f"training.{key}": value for key, value in (TRAINING | training).items()}
    recipe = load_recipe(name, method, [f"{key}={value}" for key, value in sets.items()])
    return prepare(recipe, data="digits", teacher=EMBEDDED["digits"].teacher, machine=machine._replace(device="cpu"))


# What is always on, and what a run without it does instead.


def plain_adam(parameters: Any, seed: int, second_moment: SecondMoment, **options: Any) -> torch.optim.Optimizer:
    if second_moment == "bf16":
        return LeanAdam(list(parameters), seed, second_moment, **options)
    return torch.optim.Adam(list(parameters), **options, foreach=False)


def plain_layout(network: torch.nn.Module, plain: bool = False) -> None:
    lay_out_weights(network, plain=True)


ALWAYS: dict[str, list[Callable[[], Any]]] = {
    "Adam in one kernel": [  # without exp_avg at beta1 = 0
        partial(patch, f"edmdistill.training.{module}.make_adam", plain_adam) for module in ("adam", "optimizers")
    ],
    "weights channels-last": [
        partial(patch, f"edmdistill.{module}.lay_out_weights", plain_layout)
        for module in ("machine.engine", "networks.base")
    ],
    "weights normalized once a turn": [partial(patch.object, Machine, "shares_weights", False)],
    "frozen networks folded": [partial(patch.object, Network, "fold", lambda network, **options: None)],
}


@contextmanager
def with_only(names: tuple[str, ...]) -> Iterator[None]:
    """Turns off what is always on, but for these."""
    with ExitStack() as stack:
        for make in (make for name, makes in ALWAYS.items() if name not in names for make in makes):
            stack.enter_context(make())
        yield


# What is asked for.


class Case(NamedTuple):
    """A way to train.

    Attributes:
        machine, training: options that are on.
        always: names of what is on in any run, and is on here too.
        last_bit: changes the last bit of some weights that training starts from.
        teacher: changes the frozen teacher, before the first step.
    """

    machine: dict[str, Any] = {}
    training: dict[str, object] = {}
    always: tuple[str, ...] = ()
    last_bit: bool = False
    teacher: Callable[[FlowNetwork], None] = lambda teacher: None


PLAIN = Case()
OPTIONS: dict[str, dict[str, Any]] = {
    "micro-batches": {"micro_batch": BATCH // 2},
    "checkpointing": {"checkpointing": True},
    "a loss in pieces": {"loss_pieces": 3},
    "average on the host": {"offload": ("ema",)},
    "optimizer on the host": {"offload": ("optimizer",)},
    "teacher on the host": {"offload": ("teacher",)},
    "workers": {"workers": 1},
}
TOGETHER = {"loss_pieces": 3, "offload": ("ema", "optimizer", "teacher"), "workers": 1}
CASES = {
    **{name: Case(always=(name,)) for name in ALWAYS},
    **{name: Case(machine) for name, machine in OPTIONS.items()},
    "all but micro-batches and checkpointing": Case(TOGETHER, always=tuple(ALWAYS)),  # which normalizes in every pass
    "all": Case(TOGETHER | OPTIONS["micro-batches"] | OPTIONS["checkpointing"], always=tuple(ALWAYS)),
    "a last bit": Case(last_bit=True),
}
WITH_TANGENTS = "weights normalized once a turn", "micro-batches", "checkpointing", "all"


COARSE = {
    "bf16": (Case(training={"precision": '"bf16"'}), 0.5),
    "second moment in bf16": (Case({"second_moment": "bf16"}), 0.015),
}
"""What rounds to 8 bits, and how far it leads, measured as PATH is."""


class Trained(NamedTuple):
    """The outcome of a run.

    Attributes:
        path: after some numbers of rounds, the weights by network.
        images: uint8 samples in two steps.
    """

    path: dict[int, dict[str, Tensor]]
    images: Tensor

    def distance(self, plain: "Trained", number: int = ROUNDS) -> float:
        """Returns the largest distance from a network of the plain run, relative to the way that it has gone."""
        begun, expected = plain.path[0], plain.path[number]
        return max(
            float((weights - expected[name]).norm() / (expected[name] - begun[name]).norm())
            for name, weights in self.path[number].items()
        )


def weights(run: Run) -> dict[str, Tensor]:
    """Returns the weights of each network that is trained, and of the average."""
    networks = {role: run.networks[role] for role in run.optimizers} | {"average": run.ema.network}
    return {
        name: torch.cat([parameter.detach().flatten().double() for parameter in network.parameters()])
        for name, network in networks.items()
    }


def trained(make: Callable[[], Run], folder: Path | None = None, case: Case = PLAIN) -> Trained:
    """Trains, and asserts that a run that resumes a few rounds before the end has the same bits.

    Args:
        make: returns a run before its first step.
        folder: for the state from which it resumes; None: none does.
        case: what of it `make` does not do.
    """
    with with_only(case.always):
        run = make()
        path = {0: weights(run)}
        if case.last_bit:
            change_last_bits(run)
        for number, _ in enumerate(rounds(run), 1):
            if number in MARKS:
                path[number] = weights(run)
            if folder is not None and number == ROUNDS - LAST:
                for name, tensors in run.state().items():
                    save_tensors(folder / f"{name}.safetensors", tensors)
        if folder is not None:
            resumed = make()
            saved = {path.stem: load_tensors(path)[0] for path in folder.iterdir()}
            resumed.restore(saved, (ROUNDS - LAST) * BATCH)
            assert len(list(rounds(resumed))) == LAST
            for group, tensors in run.state().items():
                assert tensors.keys() == saved[group].keys()
                again = resumed.state()[group]
                assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []
    run.set_trainable(None)
    images = sample(Generator(run.ema.network, run.config), 2, seeds=range(100), labels=[n % 10 for n in range(100)])
    return Trained(path, to_uint8(images))


@torch.no_grad()
def change_last_bits(run: Run) -> None:
    """Moves two thirds of the weights to a neighboring number."""
    generator = torch.Generator().manual_seed(0)
    for role in run.optimizers:
        for parameter in run.networks[role].parameters():
            up = torch.randint(-1, 2, parameter.shape, generator=generator) * torch.inf
            parameter.copy_(torch.where(up == up, parameter.nextafter(up), parameter))  # 0 times infinity is NaN


def made(method: str, case: Case) -> Callable[[], Run]:
    def make() -> Run:
        run = start(method, Machine(**case.machine), case.training)
        if (teacher := run.networks.get("teacher")) is not None:
            case.teacher(teacher)
        return run

    return make


@cache
def plain(method: str) -> Trained:
    return trained(made(method, PLAIN))


def assert_near(name: str, found: Trained, expected: Trained) -> float:
    """Asserts that rounding explains the difference of two runs.  Returns: the distance of their weights."""
    distance, apart = found.distance(expected), (found.images.int() - expected.images.int()).abs()
    print(f"\n{name}: {distance:.1e}, {float((apart == 1).double().mean()):.1e} of the samples' numbers by 1")
    assert distance < PATH
    assert apart.max() <= 1
    assert (apart == 1).double().mean() < 1e-3
    return distance


@pytest.mark.parametrize(
    ("method", "name"), [("cosim", name) for name in CASES] + [("scd", name) for name in WITH_TANGENTS]
)
def test_a_hundred_rounds_follow_the_plain_path(method: str, name: str, tmp_path: Path) -> None:
    """Bitwise resume included."""
    case = CASES[name]
    if method == "scd":  # which has no loss in pieces
        case = case._replace(machine={key: value for key, value in case.machine.items() if key != "loss_pieces"})
    expected, found = plain(method), trained(made(method, case), tmp_path, case)
    distance = assert_near(f"{method}, {name}", found, expected)
    if case.last_bit:
        print("after", {number: f"{found.distance(expected, number):.1e}" for number in MARKS}, "rounds")
        assert distance > PATH / 10  # the tolerance is that of rounding
    assert expected.images.double().std() > 50  # not gray


@pytest.mark.parametrize("name", COARSE)
def test_coarse_rounding_stays_near(name: str, tmp_path: Path) -> None:
    """Bitwise resume included."""
    case, limit = COARSE[name]
    expected, found = plain("cosim"), trained(made("cosim", case), tmp_path, case)
    distance = found.distance(expected)
    apart = (found.images.double() - expected.images.double()).square().mean().sqrt()
    print(f"\n{name}: {distance:.1e}, samples' numbers off by {apart:.2f} (root mean square)")
    assert limit / 5 < distance < limit


def in_half(teacher: FlowNetwork, dtype: torch.dtype) -> None:
    """Makes a network compute in half precision, as frozen networks of a run in that precision do."""
    teacher.compute_dtype = dtype
    teacher.network.store_convolutions(dtype)


@torch.no_grad()
def off_as_far(teacher: FlowNetwork, dtype: torch.dtype) -> None:
    """Multiplies the weights by random factors near 1, so that F is off by as much as in half precision."""
    generator = torch.Generator().manual_seed(0)
    x_t = teacher.sigma_data * torch.randn(64, teacher.img_channels, *2 * [teacher.img_resolution], generator=generator)
    where = x_t, torch.linspace(0.1, 1.56, 64), torch.arange(64) % teacher.label_dim
    half, exact = deepcopy(teacher), teacher(*where)
    in_half(half, dtype)
    weights = [(parameter, parameter.clone()) for parameter in teacher.parameters()]
    noise = [torch.randn(weight.shape, generator=generator) for _, weight in weights]
    size = 1e-3
    for _ in range(2):
        for (parameter, weight), n in zip(weights, noise, strict=True):
            parameter.copy_(weight * (1 + size * n))
        size *= float((half(*where) - exact).norm() / (teacher(*where) - exact).norm())
    print(f"\nF in {dtype} is off by {float((half(*where) - exact).norm() / exact.norm()):.1e}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_leads_as_far_as_another_so_near(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bitwise resume included."""
    expected = plain("cosim")
    found = trained(made("cosim", case := Case(teacher=partial(in_half, dtype=dtype))), tmp_path, case)
    other = trained(made("cosim", Case(teacher=partial(off_as_far, dtype=dtype))))
    distances = [run.distance(expected) for run in (found, other)]
    apart = (found.images.double() - expected.images.double()).square().mean().sqrt()
    print(f"a teacher in {dtype}: {distances[0]:.1e}, another: {distances[1]:.1e}, samples' numbers off by {apart:.2f}")
    assert distances[1] / 2.5 < distances[0] < 2.5 * distances[1]


def test_compiled_blocks_follow_the_plain_path(recipe: Callable[..., Recipe], teacher: Path, tmp_path: Path) -> None:
    """Of a smaller network, which takes about a minute to compile."""
    options = {"images": ROUNDS * BATCH, "batch": BATCH, "lr": 4e-3, "betas": [0.0, 0.99]}

    def make(mode: CompileMode) -> Run:
        machine = Machine(device="cpu", compile=mode)
        return prepare(recipe("cosim", **options), data="digits", teacher=teacher, machine=machine)

    expected = trained(partial(make, "off"))
    compiling._compiled.cache_clear()
    torch.compiler.reset()
    found = trained(partial(make, "default"), tmp_path)
    assert_near("compiled", found, expected)
