"""How fast everything is on this device, and how much memory it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from gpu_parts.shared import (
    Line,
    Setting,
    clock,
    digits_run,
    plain_numbers,
    published,
    random_run,
    relative,
    seconds_of,
)

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
