"""What the parts share. Imports of torch are inside: the process that watches needs none."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
Line = dict[str, Any]


class Setting(NamedTuple):
    """What the parts run on.

    Attributes:
        device: cuda, emulated or cpu.
        full: sizes of a GPU; otherwise all is as small as can be.
        scratch: a folder for files.
    """

    device: str
    full: bool
    scratch: Path


def relative(actual: Any, expected: Any) -> float:
    """Returns the relative L2 distance of two tensors, on the CPU."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def clock(setting: Setting) -> float:
    """Returns seconds, once the device has done all that was queued."""
    import torch

    if setting.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(act: Callable[[], object], setting: Setting, repeats: int = 20) -> float:
    """Returns the median time of a call, after some to warm up."""
    times = []
    for index in range(repeats + 5 if setting.full else 2):
        start = clock(setting)
        act()
        if index >= 5 or not setting.full:
            times.append(clock(setting) - start)
    return sorted(times)[len(times) // 2]


def plain_numbers() -> None:
    """Turns off what trades digits for speed, or speed for equal bits: parts may have turned it on."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False


SETS = {
    **{method: ["method.allow_edm_time=true"] for method in ("scd", "sct", "mean-flow")},
    "ctm": ["method.max_steps=2", "method.gan=1.0", "method.gan_channels=32", "method.gan_warmup_images=0"],
    "fmd": ["method.allow_edm_time=true", "method.trajectory_steps=0", "method.trajectory_images=0"],
    "sida": ["method.gan_warmup_images=0"],
    "cosim": ["method.warmup_images=0"],
}
"""Changes to the shipped recipes, so that every loss is computed: the teacher of digits reads ln(sigma); CTM's solver
takes two steps; nothing begins late."""


def first_stage(setting: Setting) -> Path:
    """Returns a generator of one round of ECT, from which TCM starts."""
    from edmdistill.training.session import train

    folder = setting.scratch / "ect"
    if not folder.exists():
        train(digits_run(setting, "ect", 1, device="cpu"), folder, on_message=lambda sentence: None)
    return folder / "generator"


def digits_run(setting: Setting, method: str, rounds: int, **options: Any) -> Any:
    """Returns a run on the digits by the shipped recipe, of so many rounds.

    options: those of Machine; device, another one; precision.
    """
    import edmdistill
    from edmdistill.machine.engine import Machine
    from edmdistill.recipes.library import find_recipe
    from edmdistill.training.prepare import prepare

    batch, device = 64 if setting.full else 8, options.pop("device", setting.device)
    training = {"images": batch * rounds, "batch": batch, "log_every": 10**9, "snapshot_every": 10**9}
    training |= {"precision": options.pop("precision", "fp32")}
    sets = [f"training.{name}={json.dumps(value)}" for name, value in training.items()]
    sets += SETS.get(method, [])
    recipe = find_recipe(f"{method}/digits").resolve(method, sets)
    teacher = None if recipe.network else Path(edmdistill.__file__).parent / "assets/digits-teacher.pkl"
    if method == "tcm":
        teacher = first_stage(setting)
    return prepare(recipe, data="digits", teacher=teacher, machine=Machine(device=device, **options))


def weights_of(run: Any) -> Any:
    """Returns all that a run has trained or averaged, as one vector on the CPU."""
    import torch

    state = run.state()
    return torch.cat([state[role][name].flatten().double() for role in sorted(state) for name in sorted(state[role])])


@contextmanager
def one_wait_a_turn(setting: Setting) -> Iterator[None]:
    """Lets all that waits for the device raise, but for the measures of a turn."""
    import torch

    from edmdistill.training.metrics import RowMeans

    means = RowMeans.means

    def waits(self: RowMeans, *reduce: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return means(self, *reduce)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    if setting.device == "cpu":
        yield
        return
    RowMeans.means = waits  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        RowMeans.means = means  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("default")


def published(setting: Setting, name: str, device: str | None = None) -> Any:
    """Returns a published network with random weights, on the device; at small sizes, one of a few channels."""
    import torch

    from edmdistill.networks import new_network
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.networks.preconditioning import EDM
    from edmdistill.networks.published import PUBLISHED

    kind, (resolution, channels, classes), arguments = PUBLISHED[name]
    if not setting.full:
        resolution, classes = 8, min(classes, 10)
        arguments = arguments | {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}
    torch.manual_seed(0)
    device = device or setting.device
    with nullcontext() if device == "emulated" else torch.device(device):
        flow = FlowNetwork(new_network(kind, resolution, channels, classes, **arguments), EDM())
    return flow.to(device)


def random_run(setting: Setting, name: str, batch: int, method: str = "cosim", **options: Any) -> tuple[Any, Any]:
    """Returns a run of a published network on random images, None where the card is too small; and its plan.

    options: of Machine.
    """
    import numpy as np
    import torch

    from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
    from edmdistill.data.datasets import open_dataset
    from edmdistill.machine.engine import Machine
    from edmdistill.planning.plan import make_plan, measure
    from edmdistill.recipes.schema import Recipe
    from edmdistill.training.prepare import Sources, assemble
    from edmdistill.training.roles import build_roles

    training = {"images": 100 * batch, "batch": batch, "lr": 1e-5, "log_every": 10**9, "snapshot_every": 10**9}
    training |= {"precision": "bf16"}
    more = {"allow_edm_time": True} if method == "scd" else {}
    tables = {"method": {"name": method} | more, "training": training, "ema": {"half_life_images": 500_000}}
    recipe = Recipe.from_json(json.dumps(tables).encode())
    machine = Machine(device=setting.device, **options)
    plan = make_plan(measure(recipe, published(setting, name, "meta"), machine), machine)
    if setting.device != "cpu":
        memory = torch.cuda.get_device_properties(0).total_memory
        if plan.peak(batch, accumulates=False) > 0.93 * memory:
            return None, plan

    flow = published(setting, name, "cpu" if setting.device == "emulated" else None)  # half a teacher is made of it
    size, channels, classes = flow.img_resolution, flow.img_channels, flow.label_dim
    folder = Path(tempfile.mkdtemp(dir=setting.scratch))
    generator, labels = np.random.default_rng(0), []
    for index in range(4):
        moments = np.abs(generator.standard_normal((2 * channels, size, size), dtype=np.float32))
        np.save(folder / f"{index}.npy", moments)
        labels.append([f"{index}.npy", max(0, classes - 1 - index)])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels if classes else None}))
    encoder = {"kind": "StabilityVAEEncoder", "scale": [0.12] * channels, "bias": [0.0] * channels}
    provenance = Provenance(source="random weights")
    config = CheckpointConfig(stage="teacher", provenance=provenance, encoder=encoder, **describe(flow))
    sources = Sources(open_dataset(folder), flow, config, None, None)
    run = assemble(recipe, sources, build_roles(recipe, flow), machine)
    run.decoder, run.has_grids = None, False
    return run, plan
