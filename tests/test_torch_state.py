"""What a user tells torch changes no result of a public call; and a call leaves torch and the process as they were."""

import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_generator import tiny_generator
from torch import Tensor
from toy_runs import NETWORK, TABLES

import edmdistill
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.store import load_tensors
from edmdistill.machine.engine import Machine
from edmdistill.recipes.schema import Recipe
from edmdistill.sampling.decode import model_decoder
from edmdistill.training.prepare import prepare
from edmdistill.training.session import train

LABELS = [3, 4]


class Given:
    """What the calls are given: made before the user tells torch anything."""

    def __init__(self, folder: Path) -> None:
        self.teacher, self.generator = folder / "teacher", folder / "generator"
        tiny_generator(self.teacher, stage="teacher")
        tiny_generator(self.generator)
        self.denoiser = edmdistill.load_denoiser(self.teacher)
        self.model = edmdistill.load_generator(self.generator)
        self.features = edmdistill.load_features("digits")
        self.decode = model_decoder(self.model)
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, 1, 8, 8, generator=rng)
        self.pixels = torch.randint(256, (20, 1, 8, 8), generator=rng, dtype=torch.uint8)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("given"))


def converted(given: Given, out: Path) -> object:
    report = edmdistill.convert("digits", out, time_embedding="positional")
    return (
        report.config.noise_dependence,
        [tuple(row) for row in report.parity],
        load_tensors(out / "model.safetensors"),
    )


def trained(given: Given, out: Path, method: str = "ect", **tables: Any) -> object:
    recipe = Recipe.from_json(json.dumps(TABLES | {"method": {"name": method}} | tables).encode())
    teacher = None if "network" in tables else given.teacher
    run = prepare(recipe, data="digits", teacher=teacher, machine=Machine(device="cpu"))
    train(run, out, on_message=lambda sentence: None)
    return load_tensors(out / "generator" / "model.safetensors")[0]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


SEEDS = range(3)
CALLS: dict[str, Callable[[Given, Path], Any]] = {
    "convert": converted,
    "load_denoiser": lambda given, out: weights(edmdistill.load_denoiser("digits")),
    "load_generator": lambda given, out: weights(edmdistill.load_generator(given.generator, dtype=torch.bfloat16)),
    "load_flow": lambda given, out: weights(load_flow(given.generator)[0]),
    "load_features": lambda given, out: edmdistill.load_features("digits")(given.pixels),
    "features": lambda given, out: given.features(given.pixels),
    "sample": lambda given, out: edmdistill.sample(given.model, seeds=SEEDS, labels=[1, 2, 3], times=[1.5, 0.7]),
    "sample a teacher": lambda given, out: edmdistill.sample(
        given.denoiser, 5, seeds=SEEDS, guidance=1.5, force_guidance=True
    ),
    "sample by DPM-Solver": lambda given, out: edmdistill.sample(
        given.denoiser, 5, seeds=SEEDS, solver="dpm-solver-2s"
    ),
    "evaluate": lambda given, out: edmdistill.evaluate(given.model, protocol="digits", seeds=range(20)).metrics,
    "evaluate images": lambda given, out: edmdistill.evaluate(given.pixels, protocol="digits").metrics,
    "train": trained,
    "train from scratch": lambda given, out: trained(
        given, out, "diffusion", network={"kind": "edm2", "arguments": NETWORK}
    ),
    "decode": lambda given, out: given.decode(given.x),
    "denoiser": lambda given, out: given.denoiser(given.x, [0.3, 2.1], LABELS),
    "round_sigma": lambda given, out: given.denoiser.round_sigma(0.3),
    "logvar": lambda given, out: given.denoiser.logvar([0.3, 2.1]),
    "generator": lambda given, out: given.model(given.x, 0.3, torch.eye(10, device="cpu")[:2].tolist()),
    "jump": lambda given, out: given.model.jump(given.x, [1.3, 0.7], 0.3, LABELS),
    "schedule": lambda given, out: given.model.schedule(2),
    "flow": lambda given, out: given.denoiser.flow(given.x, given.model.schedule(2)),
}


@contextmanager
def told(tell: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    tell(value)
    try:
        yield
    finally:
        tell(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "set_default_device": lambda: told(torch.set_default_device, "meta", None),
    "with torch.device": lambda: torch.device("meta"),
    "float64": lambda: told(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: told(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16": lambda: told(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: told(torch.set_grad_enabled, False, True),
    "deterministic": lambda: told(torch.use_deterministic_algorithms, True, False),
    "matmul": lambda: told(torch.set_float32_matmul_precision, "high", "highest"),
}


@contextmanager
def everything() -> Iterator[None]:
    """All states at once, but for those that another overrides."""
    with ExitStack() as stack:
        for name in ("set_default_device", "float16", "inference_mode", "deterministic", "matmul"):
            stack.enter_context(STATES[name]())
        yield


def random_state() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def state() -> dict[str, object]:
    """Returns what torch and others keep for a thread or the process."""
    return {
        "random numbers": random_state(),
        "device": torch.get_default_device(),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
        "floating-point errors": np.geterr(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "folder": os.getcwd(),
    }


def plain(value: Any) -> Any:
    """Returns a result as Python's values, which == compares; of tensors their dtype and device, too."""
    if isinstance(value, Tensor):
        return str(value.dtype), str(value.device), None if value.is_meta else value.detach().cpu().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def require_same(given: Given, name: str, told_torch: AbstractContextManager[Any], folder: Path) -> None:
    drawn = random_state()
    expected = plain(CALLS[name](given, folder / "untold"))
    assert random_state() == drawn  # the rest of the state changes when other packages are imported
    torch.manual_seed(1)
    with told_torch:
        before = state()
        result = CALLS[name](given, folder / "told")
        after = state()
    assert plain(result) == expected
    assert after == before


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_and_leaves_no_trace(given: Given, name: str, tmp_path: Path) -> None:
    require_same(given, name, everything(), tmp_path)


@pytest.mark.parametrize("name", ["sample", "generator"])
@pytest.mark.parametrize("told_torch", STATES)
def test_each_state_alone_changes_nothing(given: Given, name: str, told_torch: str, tmp_path: Path) -> None:
    require_same(given, name, STATES[told_torch](), tmp_path)


def test_a_network_read_in_inference_mode_can_be_trained(given: Given) -> None:
    with torch.inference_mode():
        flow, _ = load_flow(given.generator)
    flow.requires_grad_(True)(given.x, given.model.schedule(2)).square().mean().backward()
    assert any(parameter.grad is not None for parameter in flow.parameters())


def test_a_network_records_gradients_only_where_its_user_does(given: Given) -> None:
    x = given.x.clone().requires_grad_(True)
    assert given.denoiser(x, 0.3).requires_grad
    with torch.no_grad():
        assert not given.denoiser(x, 0.3).requires_grad
