"""Checks of what torch computes, on which devices, and in how many processes."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edmdistill.machine.checks.finding import GIB, Finding, first_line


def check_devices() -> Iterator[Finding]:
    import torch

    from edmdistill.kernels.linear import multiplies_bfloat16

    if not torch.cuda.is_available():
        if not Path("/proc/driver/nvidia/version").exists() and shutil.which("nvidia-smi") is None:
            detail = "no CUDA device: everything runs on the CPU, slowly"
            if multiplies_bfloat16():
                detail += ", but large networks draw images faster with `edmdistill sample --dtype bfloat16`"
            yield Finding("devices", "ok", detail)
        elif torch.version.cuda is None:
            fix = "install a CUDA build of torch with the command that pytorch.org gives"
            yield Finding("devices", "warn", "there is an NVIDIA driver, but torch is a CPU-only build", fix)
        else:
            detail = f"there is an NVIDIA driver, but torch, built for CUDA {torch.version.cuda}, sees no GPU"
            fix = "check CUDA_VISIBLE_DEVICES and nvidia-smi; an old driver needs a torch built for an older CUDA"
            yield Finding("devices", "fail", detail, fix)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        detail = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
            f"compute capability {major}.{minor}, {'with' if major >= 8 else 'without'} bf16"
        )
        try:
            torch.ones(1, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            fix = "install a torch that is built for this GPU with the command that pytorch.org gives"
            yield Finding(f"cuda:{index}", "fail", f"{detail}: {first_line(error)}", fix)
        else:
            yield Finding(f"cuda:{index}", "ok", detail)


def check_tangents() -> Iterator[Finding]:
    """Compares every network's forward derivative, which sCM trains with, with finite differences."""
    import torch

    from edmdistill.kernels.dual import Dual
    from edmdistill.networks import NETWORKS, new_network
    from edmdistill.networks.base import Conditioning

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    errors = {}
    for kind in NETWORKS:
        # Attention at every resolution, and weights large enough for every layer to matter.
        arguments = {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [4]}
        network = new_network(kind, 4, 1, 0, **arguments).to(device, torch.float64).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.copy_(0.1 * normal(*parameter.shape) + (parameter.ndim < 2))
        x, c_noise, dx, dc = normal(1, 1, 4, 4), normal(1), normal(1, 1, 4, 4), normal(1)
        moving: Any = Dual(c_noise, dc)
        tangent, step = network(Dual(x, dx), Conditioning(moving)).tangent, 1e-6
        ahead, behind = (network(x + sign * step * dx, Conditioning(c_noise + sign * step * dc)) for sign in (1, -1))
        truth = (ahead - behind) / (2 * step)
        errors[kind] = ((tangent - truth).norm() / truth.norm()).item()
    worst = max(errors, key=lambda kind: errors[kind])
    detail = f"{', '.join(errors)} on {device}: relative error at most {errors[worst]:.0e}"
    if errors[worst] < 1e-6:
        yield Finding("forward derivative", "ok", detail)
    else:
        yield Finding("forward derivative", "fail", f"{detail}, in {worst}", "try another version of torch")


def check_distributed() -> Iterator[Finding]:
    """Makes a process group of one process with each backend that training uses here."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding(
            "distributed", "warn", "this torch cannot train in several processes", "install another build of torch"
        )
        return
    backends = {"gloo": "cpu"} | ({"nccl": "cuda"} if torch.cuda.is_available() else {})
    for backend, device in backends.items():
        if not dist.is_backend_available(backend):
            yield Finding(
                backend, "warn", "not in this torch", "install another build of torch to train in several processes"
            )
            continue
        try:
            minute, store = datetime.timedelta(minutes=1), dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=minute)
            try:
                value = torch.ones(1, device=device)
                dist.all_reduce(value)
                if value.item() != 1:
                    raise RuntimeError(f"the sum of 1 over one process is {value.item():g}")
            finally:
                dist.destroy_process_group()
        except RuntimeError as error:
            fix = f"set {backend.upper()}_SOCKET_IFNAME to a working network interface, such as lo for one machine"
            yield Finding(backend, "fail", f"cannot make a process group: {first_line(error)}", fix)
        else:
            nccl: Any = torch.cuda.nccl
            version = ".".join(map(str, nccl.version())) + ", " if backend == "nccl" else ""
            yield Finding(backend, "ok", f"{version}a process group of one process works")
