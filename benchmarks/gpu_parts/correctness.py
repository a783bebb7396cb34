"""Whether everything computes on this device as on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_parts.shared import ROOT, Line, Setting, clock, digits_run, one_wait_a_turn, relative, weights_of


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
    "micro-batches": {"micro_batch": 7},
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
