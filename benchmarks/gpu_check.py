"""Does everything run on this GPU as on a CPU, and how fast: one script, under eight minutes on an H100.

    python benchmarks/gpu_check.py [--out gpu_check.jsonl] [--parts golden methods ...] [--device cuda|emulated|cpu]
    python benchmarks/gpu_check.py --list

Each part prints lines of JSON as it goes: "ok" says whether its results are as they should be. A part that fails, hangs
or crashes CUDA does not stop the next: parts run in a process of their own, which is replaced when it dies or takes too
long. `--device emulated` runs the parts at small sizes on a device that keeps CUDA's rules over the CPU's numbers
(tests/emulated_device.py); its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
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


# What the parts share. Imports are inside: the process that watches needs no torch.


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


# The parts.


def environment(setting: Setting) -> Iterator[Line]:
    """The card, its driver, versions, and its measured speed."""
    import platform

    import torch

    yield {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    if setting.device == "cuda":
        from edmdistill.machine.gpus import measure_this_machine

        properties, gpu = torch.cuda.get_device_properties(0), measure_this_machine()
        yield {"name": properties.name, "memory": properties.total_memory, "cudnn": torch.backends.cudnn.version()}
        yield {
            "bf16 FLOP/s": gpu.half,
            "tf32 FLOP/s": gpu.tf32,
            "fp32 FLOP/s": gpu.single,
            "seconds a launch": gpu.launch,
        }


def random_numbers(setting: Setting) -> Iterator[Line]:
    """Words and uniform numbers of Draws have the CPU's bits; normal numbers differ in rare last bits."""
    from hashlib import sha256

    import torch

    from edmdistill.draws import Draws

    rows, n = (64, 10_000) if setting.full else (4, 1000)
    for name, dtype in (("uniform", torch.float64), ("normal", torch.float32)):
        here, on_device = (
            getattr(Draws([1, 2], rows, device=device), name)(n, dtype=dtype).cpu()
            for device in ("cpu", setting.device)
        )
        differ = float((here != on_device).double().mean())
        hashes = [sha256(numbers.numpy().tobytes()).hexdigest()[:16] for numbers in (here, on_device)]
        yield {"name": name, "hashes": hashes, "differ": differ, "ok": differ <= (1e-5 if name == "normal" else 0)}


GOLDEN_LIMITS = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2.5e-2}
"""Largest difference from the official outputs, relative to the largest of them; TF32 is off."""
TANGENT_LIMITS = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 0.3}
"""Relative L2 distance of the rearranged tangent from that in float64."""


def golden(setting: Setting) -> Iterator[Line]:
    """The official networks' outputs, and tangents, in three precisions."""
    import torch
    from safetensors.torch import load_file

    from edmdistill.checkpoints.nvidia import read_official
    from edmdistill.checkpoints.official import build_official
    from edmdistill.networks.flow import Denoiser
    from edmdistill.networks.preconditioning import IDDPM
    from edmdistill.trigflow import diffuse, expand, velocity

    paths = sorted(path for path in (ROOT / "tests/golden").glob("*.pkl*") if not path.name.startswith("bad-"))
    for path in paths if setting.full else paths[:2]:
        flow = build_official(read_official(path))[0].eval().requires_grad_(False)
        case = load_file(path.parent / (path.name.split(".pkl")[0] + ".safetensors"))
        x, sigma, expected = case["case0.x"], case["case0.sigma"], case["case0.D_x"]
        labels = case.get("case0.labels")
        shape, seeded = x.shape, torch.Generator().manual_seed(0)
        x0, z = (torch.randn(shape, generator=seeded) * flow.sigma_data for _ in range(2))
        t = torch.linspace(0.1, 1.4, len(x), dtype=torch.float64)
        r = t.cos() * t.sin()
        line = diffuse(x0, z, t), t, labels, expand(r, x0).float() * velocity(x0, z, t), r
        moving = not isinstance(flow.preconditioning, IDDPM)
        moved = [tensor if tensor is None else tensor.to(setting.device) for tensor in line]
        exact = flow.double().to(setting.device).tangent(*moved)[1] if moving else None
        flow = flow.float().to(setting.device)
        for name, limit in GOLDEN_LIMITS.items():
            flow.compute_dtype = None if name == "float32" else getattr(torch, name)
            given = None if labels is None else labels.to(setting.device)
            output = Denoiser(flow)(x.to(setting.device), sigma.to(setting.device), given).cpu()
            error = float((output.double() - expected.double()).abs().max() / expected.double().abs().max())
            yield {"network": path.name, "dtype": name, "error": error, "ok": error <= limit}
            if exact is not None:
                error = relative(flow.tangent(*moved)[1], exact)
                yield {"network": path.name, "dtype": name, "tangent": error, "ok": error <= TANGENT_LIMITS[name]}


def methods(setting: Setting) -> Iterator[Line]:
    """Rounds of every method on the digits, where only the measures of a turn may wait; the first loss is the CPU's.

    In fp16, that of the first turn is near fp32's.
    """
    from edmdistill.methods import METHODS
    from edmdistill.training.loop import rounds

    number = 20 if setting.full else 1
    for method in METHODS:
        first: Line | None = None
        # In fp16 little is left of TCM's loss, the difference of two passes at times that are near each other.
        for precision, limit in (("fp32", 3e-3), ("fp16", 1e9 if method == "tcm" else 0.1)):
            if not setting.full and precision == "fp16" and method != "cosim":
                continue
            line: Line = {"method": method, "precision": precision}
            try:
                run = digits_run(setting, method, number + 20, precision=precision)
                steps = rounds(run)
                measured = [next(steps)]  # constants go to the device once; what each role moves is checked
                while run.unchecked and len(measured) < 20:  # in fp16, until its scale is low enough for a step
                    measured.append(next(steps))
                start = clock(setting)
                with one_wait_a_turn(setting):
                    measured += [next(steps) for _ in range(number)]
                line["seconds a round"] = (clock(setting) - start) / number
                first = first or next(rounds(digits_run(setting, method, number, device="cpu")))
                losses = [name for name in first if name.startswith("loss/") and name.count("/") == 1]
                compared = losses if precision == "fp32" else losses[:1]  # its first step may overflow, and be left out
                pairs = [(measured[0][name], first[name]) for name in compared]
                line["error"] = max(abs(loss - expected) / (abs(expected) + 1e-3) for loss, expected in pairs)
                finite = all(abs(row[name]) < 1e30 for row in measured for name in losses)
                yield line | {"ok": finite and line["error"] < limit}
            except Exception as error:
                yield line | {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}


def resume(setting: Setting) -> Iterator[Line]:
    """An interrupted run goes on as one never interrupted."""
    import signal

    import torch

    from edmdistill.training.session import train

    torch.backends.cudnn.deterministic = True
    whole = digits_run(setting, "cosim", 4)
    train(whole, setting.scratch / "whole", on_message=lambda sentence: None)

    def interrupt(images: int, measures: object) -> None:
        if images == 2 * whole.recipe.training.batch:
            signal.raise_signal(signal.SIGINT)

    outcomes = []
    for _ in range(2):  # what interrupts does so once
        run = digits_run(setting, "cosim", 4)
        outcomes.append(train(run, setting.scratch / "parts", on_round=interrupt, on_message=lambda sentence: None))
    error = relative(weights_of(run), weights_of(whole))
    same = torch.equal(weights_of(run), weights_of(whole))
    yield {"finished": [outcome.finished for outcome in outcomes], "error": error, "bitwise": same, "ok": error < 1e-6}


OPTIONS: dict[str, dict[str, Any]] = {
    "micro-batches": {"micro_batch": 3},
    "micro-batch auto": {"micro_batch": "auto"},
    "checkpointing": {"checkpointing": True},
    "workers": {"workers": 2},
    "second moment in bf16": {"second_moment": "bf16"},
    "average on the host": {"offload": ("ema",)},
    "optimizer on the host": {"offload": ("optimizer",)},
    "teacher on the host": {"offload": ("teacher",)},
    "all on the host": {"offload": ("ema", "optimizer", "teacher"), "checkpointing": True},
}


def options(setting: Setting) -> Iterator[Line]:
    """What saves memory changes nothing: the weights after some rounds are those of the plain run."""
    from edmdistill.training.loop import rounds
    from edmdistill.training.micro_batch import settle_micro_batch

    def trained(**machine: Any) -> tuple[Any, float]:
        run = digits_run(setting, "cosim", 4, **machine)
        settle_micro_batch(run)
        steps = rounds(run)
        next(steps)
        start = clock(setting)
        list(steps)
        return weights_of(run), (clock(setting) - start) / 3

    plain, seconds = trained()
    yield {"option": "none", "seconds a round": seconds}
    for name, machine in OPTIONS.items():
        try:
            weights, seconds = trained(**machine)
            error = relative(weights, plain)
            yield {"option": name, "seconds a round": seconds, "error": error, "ok": error < 1e-3}
        except Exception as error:
            yield {"option": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}


TOO_LARGE = "more than this card holds"

PLANNED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "EDM2-S": ("edm2-img512-s", 32, {}),
    "EDM2-XXL, checkpointing": ("edm2-img512-xxl", 8, {"checkpointing": True}),
}


def memory(setting: Setting) -> Iterator[Line]:
    """The peak of CoSIM's rounds against `edmdistill plan`."""
    import torch

    from edmdistill.training.loop import rounds

    for name, (network, batch, machine) in PLANNED.items():
        batch = batch if setting.full else 4
        gc.collect()
        before = 0 if setting.device == "cpu" else torch.cuda.memory_allocated()  # what other parts have left
        run, plan = random_run(setting, network, batch, **machine)
        planned = plan.peak(batch, accumulates=False)
        if run is None:
            yield {"network": name, "planned": planned, "skipped": TOO_LARGE}
            continue
        steps = rounds(run)
        next(steps)
        if setting.device == "cpu":
            yield {"network": name, "planned": planned, "skipped": "a CPU does not count"}
            continue
        torch.cuda.reset_peak_memory_stats()
        next(steps)
        peak = torch.cuda.max_memory_allocated() - before
        yield {"network": name, "batch": batch, "planned": planned, "peak": peak, "ok": abs(peak / planned - 1) < 0.1}
        del run, steps
        torch.cuda.empty_cache()


SPEEDS = {
    "cosim EDM2-S": ("edm2-img512-s", 32, "cosim"),
    "scd EDM2-S": ("edm2-img512-s", 32, "scd"),
    "cosim DDPM++": ("ddpmpp-cifar10", 64, "cosim"),
    "cosim ADM": ("adm-imagenet64", 16, "cosim"),
}


def speed(setting: Setting) -> Iterator[Line]:
    """Seconds of a round in bf16, the share of the card's peak that its products reach, and the slowest kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from edmdistill.machine.gpus import measure_this_machine
    from edmdistill.training.loop import rounds

    peak = measure_this_machine().half if setting.device == "cuda" else None
    for name, (network, batch, method) in SPEEDS.items() if setting.full else list(SPEEDS.items())[:2]:
        batch = batch if setting.full else 2
        run, plan = random_run(setting, network, batch, method)
        if run is None:
            yield {"round": name, "batch": batch, "skipped": TOO_LARGE}
            continue
        steps = rounds(run)
        next(steps)
        seconds = seconds_of(lambda steps=steps: next(steps), setting, 8)
        line = {"round": name, "batch": batch, "seconds": seconds, "images/s": batch / seconds, "calls": plan.calls}
        yield line | ({} if peak is None else {"of the peak": plan.flops * batch / seconds / peak})
        if setting.device == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                next(steps)
                torch.cuda.synchronize()
            slowest = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:20]
            yield {"round": name, "kernels": {e.key[:100]: [e.self_device_time_total, e.count] for e in slowest}}
        del run, steps
        torch.cuda.empty_cache()


def sampling(setting: Setting) -> Iterator[Line]:
    """Images a second of a teacher by Heun's method, and of one step, in bf16."""
    import torch

    from edmdistill.networks.flow import Denoiser
    from edmdistill.sampling.generate import sample

    for name, batch in (("edm2-img512-s", 64), ("ddpmpp-cifar10", 256)):
        flow = published(setting, name).eval().requires_grad_(False)
        flow.network.fold()
        flow.compute_dtype = torch.bfloat16
        batch = batch if setting.full else 2
        for nfe in (1, 7):
            seconds = seconds_of(
                lambda flow=flow, nfe=nfe, batch=batch: sample(Denoiser(flow), nfe, seeds=range(batch), batch=batch),
                setting,
                3,
            )
            yield {"network": name, "nfe": nfe, "batch": batch, "images/s": batch / seconds}


def levers(setting: Setting) -> Iterator[Line]:
    """Forward and backward pass of EDM2-S, with one thing changed at a time, against bf16 in eager mode."""
    import torch

    def tf32(flow: Any) -> None:
        flow.compute_dtype = None
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    changes: dict[str, Callable[[Any], object]] = {
        "none": lambda flow: None,
        "fp16": lambda flow: setattr(flow, "compute_dtype", torch.float16),
        "fp32": lambda flow: setattr(flow, "compute_dtype", None),
        "TF32": tf32,
        "channels last": lambda flow: flow.to(memory_format=torch.channels_last),
        "cudnn.benchmark": lambda flow: setattr(torch.backends.cudnn, "benchmark", True),
        "checkpointing": lambda flow: flow.network.checkpoint_blocks(),
    }
    yield from passes(setting, changes)


def compiled(setting: Setting) -> Iterator[Line]:
    """The same with compiled blocks, of which there are so many kinds that it takes minutes."""
    from edmdistill.machine.compile import compile_blocks

    if setting.device == "emulated":
        yield {"skipped": "the compiler does not know the device"}
        return
    yield from passes(
        setting, {"none": lambda flow: None, "compiled blocks": lambda flow: compile_blocks(flow.network, "default")}
    )


def passes(setting: Setting, changes: dict[str, Callable[[Any], object]]) -> Iterator[Line]:
    """Times a forward and backward pass of EDM2-S in bf16 after each change; the first changes nothing."""
    import torch

    batch = 32 if setting.full else 2

    base = None
    for name, change in changes.items():
        plain_numbers()
        flow = published(setting, "edm2-img512-s")
        flow.compute_dtype = torch.bfloat16
        try:
            change(flow)
            flow.train().requires_grad_(True)
            shape = batch, flow.img_channels, flow.img_resolution, flow.img_resolution
            x, t = torch.randn(shape, device=setting.device), torch.full((batch,), 0.7, device=setting.device)
            labels = torch.zeros(batch, flow.label_dim, device=setting.device)
            labels[:, 0] = 1

            def act(flow: Any = flow, inputs: Any = (x, t, labels)) -> None:
                flow(*inputs).square().mean().backward()
                flow.zero_grad(set_to_none=True)

            seconds = seconds_of(act, setting, 10)
            base = base or seconds
            yield {"lever": name, "seconds": seconds, "speedup": base / seconds}
        except Exception as error:
            yield {"lever": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}


def compile_modes(setting: Setting) -> Iterator[Line]:
    """Rounds of CoSIM and sCD on the digits by each mode of --compile: seconds of the first two, and of a later one."""
    from edmdistill.training.loop import rounds

    if setting.device == "emulated":
        yield {"skipped": "the compiler does not know the device"}
        return
    modes = ("off", "default", "reduce-overhead", "max-autotune") if setting.full else ("off", "default")
    for method in ("cosim", "scd"):
        expected: list[float] = []
        for mode in modes:
            line: Line = {"method": method, "mode": mode}
            try:
                run = digits_run(setting, method, 40, compile=mode)
                losses = (measures["loss/generator"] for measures in rounds(run))
                start = clock(setting)
                measured = list(islice(losses, 2))
                first = clock(setting) - start
                seconds = seconds_of(lambda losses=losses: next(losses), setting)
                line |= {"first two rounds": first, "seconds a round": seconds}
                if mode == "off":  # what the others are compared with, and so no check
                    expected = measured
                else:
                    error = max(abs(loss / plain - 1) for loss, plain in zip(measured, expected, strict=True))
                    line |= {"error": error, "ok": error < 1e-2}
            except Exception as error:
                line |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
            yield line
            if not expected:
                break  # there is nothing to compare with


KERNEL_SHAPES = {
    "attention": ((288, 1, 256, 64), (192, 1, 1024, 64), (64, 1, 256, 256)),
    "group_norm_silu": ((32, 192, 64, 64), (32, 384, 32, 32), (64, 256, 16, 16)),
}


def kernels(setting: Setting) -> Iterator[Line]:
    """Triton's kernels of tangents against torch's operations: error to float64, and time."""
    import torch

    from edmdistill.kernels.attention import attention
    from edmdistill.kernels.backend import kernels as using
    from edmdistill.kernels.dual import Dual
    from edmdistill.kernels.group_norm import group_norm_silu

    if setting.device != "cuda":
        yield {"skipped": "Triton's kernels need a GPU; tests run them in its interpreter"}
        return
    for name, shapes in KERNEL_SHAPES.items():
        for shape in shapes:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                torch.manual_seed(0)
                tensors = [torch.randn(shape, device=setting.device, dtype=dtype) for _ in range(6)]
                weight, bias = (torch.randn(shape[1], device=setting.device, dtype=dtype) for _ in range(2))

                def act(wide: bool = False, name: str = name, inputs: Any = (tensors, weight, bias)) -> Any:
                    values = [x.double() if wide else x for x in (*inputs[0], *inputs[1:])]
                    duals = [Dual(value, tangent) for value, tangent in zip(values[:3], values[3:6], strict=True)]
                    if name == "attention":
                        return attention(*duals)
                    return group_norm_silu(duals[0], values[6], values[7], 32, 1e-5)

                exact, line = act(wide=True), {"kernel": name, "shape": shape, "dtype": str(dtype)}
                for backend in ("torch", "triton"):
                    with using(backend):
                        error = relative(act().tangent, exact.tangent)
                        line |= {f"{backend} error": error, f"{backend} seconds": seconds_of(act, setting)}
                line["speedup"] = line["torch seconds"] / line["triton seconds"]
                yield line | {"ok": line["triton error"] < 2 * line["torch error"] + 1e-5}


class Part(NamedTuple):
    """A part, its time limit in seconds on a GPU, and whether it runs only if --parts names it."""

    act: Callable[[Setting], Iterator[Line]]
    limit: float
    named: bool = False


PARTS = {
    "environment": Part(environment, 20),
    "random_numbers": Part(random_numbers, 15),
    "golden": Part(golden, 40),
    "methods": Part(methods, 95),
    "resume": Part(resume, 20),
    "options": Part(options, 30),
    "memory": Part(memory, 60),
    "speed": Part(speed, 75),
    "sampling": Part(sampling, 25),
    "levers": Part(levers, 60),
    "kernels": Part(kernels, 40),
    "compiled": Part(compiled, 600, named=True),
    "compile_modes": Part(compile_modes, 900, named=True),
}
DEFAULT = [name for name, part in PARTS.items() if not part.named]
SLOWER = 10
"""Time limits elsewhere, as a multiple."""


# The process that runs parts, and the one that watches it.


def plain_numbers() -> None:
    """Turns off what trades digits for speed, or speed for equal bits: parts may have turned it on."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False


def work(names: Iterable[str], device: str) -> None:
    """Runs parts in this process, and prints their lines. It ends early where CUDA is broken."""
    import torch

    sys.path.append(str(ROOT / "tests"))
    for name in names:
        plain_numbers()
        print(json.dumps({"part": name, "begins": True}), flush=True)
        start, failed = time.perf_counter(), False
        with tempfile.TemporaryDirectory() as scratch:
            setting = Setting(device, device == "cuda", Path(scratch))
            try:
                with on_device(device):
                    for line in PARTS[name].act(setting):
                        failed = failed or not line.get("ok", True)
                        print(json.dumps({"part": name} | line), flush=True)
                end: Line = {"ok": not failed}
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(last.filename).name}:{last.lineno}"
                end = {"ok": False, "error": f"{type(error).__name__}: {error}"[:1000], "at": place}
        print(json.dumps({"part": name, "ends": True, "seconds": time.perf_counter() - start} | end), flush=True)
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                os._exit(1)  # nothing more can run on this context


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Makes the emulated device known while the block runs."""
    if device != "emulated":
        yield
        return
    from emulated_device import emulated

    with emulated():
        yield


def watch(names: list[str], device: str, write: Callable[[Line], object]) -> bool:
    """Runs parts in processes, each for as long as it goes well.  Returns: whether all parts are as they should be."""
    fine = True
    while names:
        command = [sys.executable, __file__, "--device", device, "--worker", "--parts", *names]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        current, error = names[0], "the process died"
        deadline = [time.monotonic() + 300]  # torch's libraries are gigabytes, which a disk may read for minutes
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            for line in lines_of(process, deadline):
                if line is None:
                    process.kill()
                    error = "it took too long"
                    break
                write(line)
                current = line["part"]
                if line.get("begins"):
                    deadline[0] = time.monotonic() + PARTS[current].limit * (1 if device == "cuda" else SLOWER)
                if line.get("ends"):
                    fine = fine and line["ok"]
                    names = names[names.index(current) + 1 :]
                    deadline[0] = time.monotonic() + 60
        if names and process.returncode and names[0] == current:  # its part did not end
            write({"part": current, "ends": True, "ok": False, "error": error})
            names, fine = names[1:], False
    return fine


def lines_of(process: subprocess.Popen[bytes], deadline: list[float]) -> Iterator[Line | None]:
    """Yields what a process prints as JSON; None once the deadline has passed, which may be moved meanwhile."""
    assert process.stdout is not None
    rest = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline[0] - time.monotonic()))
        if not ready:
            yield None
            return
        new = os.read(process.stdout.fileno(), 65536)
        if not new:
            return
        *whole, rest = (rest + new).split(b"\n")
        for line in whole:
            if line.startswith(b"{"):
                yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "emulated", "cpu"])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=DEFAULT, metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"))
    parser.add_argument("--list", action="store_true", help="print the parts, and do nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:<15} {(part.act.__doc__ or '').strip().splitlines()[0]}")
    elif options.worker:
        work(options.parts, options.device)
    else:
        with options.out.open("w") as file:

            def write(line: Line) -> None:
                for target in (file, sys.stdout):
                    print(json.dumps(line), file=target, flush=True)

            sys.exit(not watch(options.parts, options.device, write))


if __name__ == "__main__":
    main()
