"""Beside other programs, with networks of the same shape; ratios below 1: ours is faster.

Sampling: one denoiser's forward pass, as each samples (ours folded, theirs in eval mode), with the same weights.
Training: a whole step with gradients' norm, Adam and average, theirs from the losses and networks of the checkout, in
the order of its loop. SiD's code needs DDP and FastGen's its trainer; neither is run.
On a CPU, one thread, small networks, and batches of 32 digits; both sides keep the memory that they free, as our
commands do: else chance decides which of them gets its pages anew. On a GPU, published networks with random weights,
sampling in the precision of NVIDIA's checkpoints, training in bf16. With --compile our denoisers are also measured with
compiled blocks, and on a GPU the training steps are compiled.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from cases import digits_run, random_flow, save_teacher
from gpu_parts.shared import Setting, random_run
from timing import Call, Row, interleaved
from torch import nn

from edmdistill.checkpoints.store import fill
from edmdistill.machine.compile import compile_blocks
from edmdistill.machine.host import keep_freed_memory
from edmdistill.networks import new_network
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.published import PUBLISHED, Shape
from edmdistill.training.loop import rounds

BATCH = 32
CHECKOUTS = {"fastgen": "NVlabs/FastGen", "edm2": "NVlabs/edm2", "edm": "NVlabs/edm", "sid": "mingyuanzhou/SiD"}
OFFICIAL = {"song": "SongUNet", "adm": "DhariwalUNet"}
"""Classes of NVIDIA's networks, by our kind."""


class Case(NamedTuple):
    """A network that two programs have.

    Attributes:
        arguments: of the network; both sides have the same names.
        half: theirs samples in float16.
    """

    kind: str
    shape: Shape
    arguments: dict[str, Any]
    half: bool = False


SMALL = {"model_channels": 64, "num_blocks": 2}
DENOISERS: dict[str, Case] = {
    "EDM2": Case("edm2", (32, 4, 10), SMALL | {"channel_mult": [1, 2, 3]}),
    "EDM, DDPM++": Case("song", (32, 3, 10), SMALL | {"channel_mult": [2, 2, 2]}),
    "EDM, ADM": Case("adm", (32, 3, 10), SMALL | {"channel_mult": [1, 2, 2]}),
}
GPU_DENOISERS: dict[str, tuple[Case, int]] = {
    "EDM2-S, latents of 64x64": (Case(*PUBLISHED["edm2-img512-s"], half=True), 64),
    "EDM, DDPM++, CIFAR-10": (Case(*PUBLISHED["ddpmpp-cifar10-cond"]), 256),
    "EDM, ADM, ImageNet 64x64": (Case(*PUBLISHED["adm-imagenet64"], half=True), 64),
}
"""By label: the network, and a batch."""
GPU_STEPS = {"EDM2-S": ("edm2-img512-s", 32), "ADM": ("adm-imagenet64", 16)}
"""Steps of sCD by label: a published network, and a batch."""

DIGITS = {"channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": []}
ABSENT = "omegaconf attrs loguru boto3 botocore botocore.exceptions ftfy einops imageio imageio.v3 diffusers requests"
"""What FastGen imports and its step does not call."""


@contextmanager
def imports_from(checkout: Path, **stand_ins: Any) -> Iterator[None]:
    """Lets modules come from a checkout while the block runs, and forgets them after it: checkouts share names."""
    checkout, hidden = checkout.resolve(), {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        for name, module in list(sys.modules.items()):
            if name in stand_ins or str(checkout) in str(getattr(module, "__file__", "")):
                del sys.modules[name]
        sys.modules.update(hidden)


def denoisers(case: Case, checkout: Path, device: str = "cpu") -> tuple[nn.Module, Denoiser]:
    """Returns their network and ours, with the same weights; those that start at 0 are random."""
    torch.manual_seed(0)
    resolution, channels, classes = case.shape
    arguments = {"img_resolution": resolution, "img_channels": channels, "label_dim": classes} | case.arguments
    with imports_from(checkout):
        if case.kind == "edm2":
            make = importlib.import_module("training.networks_edm2").Precond
        else:
            make = importlib.import_module("training.networks").EDMPrecond
        official = {} if case.kind == "edm2" else {"model_type": OFFICIAL[case.kind]}
        theirs = make(**arguments, **official, use_fp16=case.half)
    theirs.eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    with torch.device("meta"):
        network = new_network(case.kind, **arguments)
    prefix = "unet." if case.kind == "edm2" else "model."
    state = {name.removeprefix(prefix): tensor.clone() for name, tensor in theirs.state_dict().items()}
    fill(network, {name: tensor for name, tensor in state.items() if name in network.state_dict()}, case.kind)
    network.fold()
    flow = FlowNetwork(network, EDM()).eval().requires_grad_(False).to(device)
    flow.compute_dtype = torch.float16 if case.half and device != "cpu" else None  # so does theirs
    return theirs.to(device), Denoiser(flow)


@torch.no_grad()
def sampling(label: str, case: Case, checkout: Path, batch: int, options: argparse.Namespace) -> Row:
    """Returns a forward pass of ours over theirs, and the largest difference of their results."""
    device = options.device
    theirs, ours = denoisers(case, checkout, device)
    resolution, channels, classes = case.shape
    x = torch.randn(batch, channels, resolution, resolution, device=device)
    sigma = torch.full((batch,), 2.5, device=device)
    labels = torch.eye(classes, device=device)[torch.arange(batch) % classes]
    calls = {"theirs": lambda: theirs(x, sigma, labels), "ours": lambda: ours(x, sigma, labels)}
    row = {
        "peer": CHECKOUTS["edm2" if case.kind == "edm2" else "edm"],
        "work": f"{label}, a forward pass of {batch} images",
        "ours / theirs": interleaved(calls, options.rounds, device).ratio("ours", "theirs"),
        "difference": float((theirs(x, sigma, labels) - ours(x, sigma, labels)).abs().max()),
    }
    if options.compile:
        compile_blocks(ours.flow.network, "default")
        row["compiled / theirs"] = interleaved(calls, options.rounds, device).ratio("ours", "theirs")
    return row


def our_round(method: str, kind: str, arguments: dict[str, Any], scratch: Path, **sets: Any) -> Call:
    """Returns a call that takes our next round."""
    flow = random_flow(kind, 8, 1, 10, arguments)
    teacher = save_teacher(flow, scratch / f"{method}-{kind}-{arguments['model_channels']}")
    steps = rounds(digits_run(method, teacher, 10**6, {"training.batch": BATCH} | sets))
    return lambda: next(steps)


def adam_step(network: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None) -> None:
    """Ends a step of theirs: takes the optimizer's, and updates an average of half-life 5,000 images."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if average is not None:
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - 0.5 ** (BATCH / 5000))


def fastgen_step(case: Case, checkout: Path, batch: int = BATCH, device: str = "cpu") -> Call:
    """Returns a call that takes one of FastGen's sCD steps; on a GPU under autocast to bf16, as its trainer has it."""
    resolution, channels, classes = case.shape
    package = types.ModuleType("fastgen.methods")  # its own imports every method
    package.__path__ = [str(checkout / "fastgen/methods")]
    package.CMModel = package.FastGenModel = nn.Module
    stand_ins = {name: MagicMock() for name in ABSENT.split()}
    with imports_from(checkout, **stand_ins, **{"fastgen.methods": package}):
        scm = importlib.import_module("fastgen.methods.consistency_model.sCM")
        if case.kind == "edm2":
            make = importlib.import_module("fastgen.networks.EDM2.network").EDM2Precond
        else:
            make = importlib.import_module("fastgen.networks.EDM.network").EDMPrecond
        official = {} if case.kind == "edm2" else {"model_type": OFFICIAL[case.kind]}
        net = make(resolution, channels, classes, **case.arguments, **official).to(device)
        teacher, average = (copy.deepcopy(net).eval().requires_grad_(False) for _ in range(2))
        model = scm.SCMModel.__new__(scm.SCMModel)
        nn.Module.__init__(model)
        model.net, model.teacher, model.sigma_data, model.precision_amp_jvp = net, teacher, 0.5, None
        model.device = torch.device(device)
        model.net_trigflow, model.teacher_trigflow = scm.TrigFlowPrecond(net), scm.TrigFlowPrecond(teacher)
    model.sample_t_cfg = types.SimpleNamespace(quantize=False, sigma_data=0.5)
    model.config = types.SimpleNamespace(guidance_scale=None, skip_layers=None)
    switches = ("use_cd", "prior_weighting_enabled", "g_norm_spatial_invariance", "divide_x_0_spatial_dim")
    numbers = {"tangent_warmup_steps": 100, "tangent_warmup_const": 0.1, "use_jvp_finite_diff": False}
    model.loss_config = types.SimpleNamespace(**dict.fromkeys(switches, True), **numbers)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99))
    times = {"train_p_mean": -1.3, "train_p_std": 1.6}

    def step() -> None:
        x0 = torch.rand(batch, channels, resolution, resolution, device=device) * 2 - 1
        labels = torch.eye(classes, device=device)[torch.arange(batch) % classes]
        t = net.noise_scheduler.sample_t(batch, "lognormal", device=model.device, **times)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss, *_ = model._compute_scm_loss(x0, t, condition=labels, iteration=1000)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e6, foreach=True).item()
        adam_step(net, optimizer, average)
        if case.kind == "edm2":
            with torch.no_grad():
                net.forced_weight_normalization()

    return step


def sid_step(checkout: Path, arguments: dict[str, Any]) -> Call:
    """Returns a call that takes one of SiD's rounds, on its DDPM++: the auxiliary score's turn and the generator's."""
    with imports_from(checkout):
        networks, losses = (importlib.import_module(f"training.{name}") for name in ("networks", "sid_loss"))
        teacher = networks.EDMPrecond(8, 1, 10, model_type="SongUNet", **arguments)
        loss_of = losses.SID_EDMLoss()
    teacher.eval().requires_grad_(False)
    auxiliary, generator, average = (copy.deepcopy(teacher) for _ in range(3))
    adams = {net: torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.999)) for net in (auxiliary, generator)}
    sigma, labels = 2.5 * torch.ones(BATCH, 1, 1, 1), torch.eye(10)[torch.arange(BATCH) % 10]

    def turn(net: nn.Module, average: nn.Module | None = None) -> None:
        net.train().requires_grad_(True)
        images = generator(2.5 * torch.randn(BATCH, 1, 8, 8), sigma, labels)
        if net is auxiliary:
            loss = loss_of(fake_score=auxiliary, images=images, labels=labels)
        else:
            loss = loss_of.generator_loss(teacher, auxiliary, images, labels, alpha=1.2)
        loss.sum().mul(1 / BATCH).backward()
        loss.sum().item()
        net.eval().requires_grad_(False)
        for parameter in net.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        adam_step(net, adams[net], average)

    def step() -> None:
        turn(auxiliary)
        turn(generator, average)

    return step


def training(work: str, theirs: Call, ours: Call, options: argparse.Namespace) -> Row:
    """Returns a training step of ours over theirs."""
    times = interleaved({"theirs": theirs, "ours": ours}, options.rounds, options.device)
    return {"work": work, "ours / theirs": times.ratio("ours", "theirs"), "ours, ms": round(times.ms("ours"))}


def size(arguments: dict[str, Any], kind: str) -> str:
    """Returns a network's number of parameters, in words."""
    flow = random_flow(kind, 8, 1, 10, arguments)
    return f"{sum(p.numel() for p in flow.parameters()) / 1e6:.1f}M parameters"


def on_cpu(options: argparse.Namespace) -> Iterator[Row]:
    keep_freed_memory()
    for label, case in DENOISERS.items():
        if checkout := options.peers.get("edm2" if case.kind == "edm2" else "edm"):
            for batch in (4, 16):
                yield sampling(label, case, checkout, batch, options)
    for width in (32, 88):
        if checkout := options.peers.get("fastgen"):
            arguments = DIGITS | {"model_channels": width}
            ours = our_round("scd", "edm2", arguments, options.scratch)
            theirs = fastgen_step(Case("edm2", (8, 1, 10), arguments), checkout)
            row = training(f"step of sCD, {size(arguments, 'edm2')}", theirs, ours, options)
            yield {"peer": CHECKOUTS["fastgen"]} | row
    if checkout := options.peers.get("sid"):
        arguments = DIGITS | {"model_channels": 32, "dropout": 0.0}
        ours = our_round("sid", "song", arguments, options.scratch)
        row = training(f"round of SiD, {size(arguments, 'song')}", sid_step(checkout, arguments), ours, options)
        yield {"peer": CHECKOUTS["sid"]} | row


def on_gpu(options: argparse.Namespace) -> Iterator[Row]:
    for label, (case, batch) in GPU_DENOISERS.items():
        if checkout := options.peers.get("edm2" if case.kind == "edm2" else "edm"):
            yield sampling(label, case, checkout, batch, options)
    for label, (name, batch) in GPU_STEPS.items():
        if checkout := options.peers.get("fastgen"):
            setting = Setting(options.device, True, options.scratch)
            run, _ = random_run(setting, name, batch, "scd", compile="default" if options.compile else None)
            if run is None:  # more than this card holds
                continue
            steps = rounds(run)
            theirs = fastgen_step(Case(*PUBLISHED[name]), checkout, batch, options.device)
            row = training(f"step of sCD, {label}, batch {batch}", theirs, lambda steps=steps: next(steps), options)
            yield {"peer": CHECKOUTS["fastgen"]} | row
            del run, steps, theirs


def measure(options: argparse.Namespace) -> Iterator[Row]:
    yield from (on_cpu if options.device == "cpu" else on_gpu)(options)
