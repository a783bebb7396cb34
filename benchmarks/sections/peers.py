"""Beside other programs, on one thread, with networks of the same shape; ratios below 1: ours is faster.

Sampling: one denoiser's forward pass, as each samples (ours folded, theirs in eval mode), with the same weights.
Training: a whole step with gradients' norm, Adam and average, on a batch of 32 digits; theirs from the losses and
networks of the checkout, in the order of its loop. SiD's code needs DDP and FastGen's its trainer; neither is run.
Both sides keep the memory that they free, as our commands do: else chance decides which of them gets its pages anew.
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
from typing import Any
from unittest.mock import MagicMock

import torch
from cases import digits_run, random_flow, save_teacher
from timing import Call, Row, interleaved
from torch import nn

from edmdistill.checkpoints.store import fill
from edmdistill.machine.host import keep_freed_memory
from edmdistill.networks import new_network
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.training.loop import rounds

SIZE, CLASSES, BATCH = 32, 10, 32
DENOISERS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "EDM2": ("edm2", "edm2", 4, {"channel_mult": [1, 2, 3], "num_blocks": 2}),
    "EDM, DDPM++": ("edm", "song", 3, {"channel_mult": [2, 2, 2], "num_blocks": 2}),
    "EDM, ADM": ("edm", "adm", 3, {"channel_mult": [1, 2, 2], "num_blocks": 2}),
}
"""By label: the checkout, our kind of network, channels of images, and arguments of the network."""

DIGITS = {"channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": []}
ABSENT = "omegaconf attrs loguru boto3 botocore botocore.exceptions ftfy einops imageio imageio.v3 diffusers requests"
"""What FastGen imports and its step does not call."""

CHECKOUTS = {"fastgen": "NVlabs/FastGen", "edm2": "NVlabs/edm2", "edm": "NVlabs/edm", "sid": "mingyuanzhou/SiD"}


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


def denoisers(label: str, checkout: Path, width: int = 64) -> tuple[nn.Module, Denoiser]:
    """Returns their network and ours, with the same weights; those that start at 0 are random."""
    torch.manual_seed(0)
    peer, kind, channels, inner = DENOISERS[label]
    images = {"img_resolution": SIZE, "img_channels": channels, "label_dim": CLASSES}
    arguments = images | inner | {"model_channels": width}
    with imports_from(checkout):
        if peer == "edm2":
            theirs = importlib.import_module("training.networks_edm2").Precond(**arguments)
        else:
            model_type = {"song": "SongUNet", "adm": "DhariwalUNet"}[kind]
            theirs = importlib.import_module("training.networks").EDMPrecond(**arguments, model_type=model_type)
    theirs.eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    with torch.device("meta"):
        network = new_network(kind, **arguments)
    prefix = "unet." if peer == "edm2" else "model."
    state = {name.removeprefix(prefix): tensor.clone() for name, tensor in theirs.state_dict().items()}
    fill(network, {name: tensor for name, tensor in state.items() if name in network.state_dict()}, label)
    network.fold()
    return theirs, Denoiser(FlowNetwork(network, EDM()).eval().requires_grad_(False))


@torch.no_grad()
def sampling(label: str, checkout: Path, batch: int, turns: int) -> Row:
    """Returns a forward pass of ours over theirs, and the largest difference of their results."""
    theirs, ours = denoisers(label, checkout)
    x, sigma = torch.randn(batch, ours.img_channels, SIZE, SIZE), torch.full((batch,), 2.5)
    labels = torch.eye(CLASSES)[torch.arange(batch) % CLASSES]
    times = interleaved({"theirs": lambda: theirs(x, sigma, labels), "ours": lambda: ours(x, sigma, labels)}, turns)
    difference = (theirs(x, sigma, labels) - ours(x, sigma, labels)).abs().max()
    return {
        "peer": CHECKOUTS[DENOISERS[label][0]],
        "work": f"{label}, a forward pass of {batch} images",
        "ours / theirs": times.ratio("ours", "theirs"),
        "difference": float(difference),
    }


def our_round(method: str, kind: str, arguments: dict[str, Any], scratch: Path, **sets: Any) -> Call:
    """Returns a call that takes our next round."""
    flow = random_flow(kind, 8, 1, CLASSES, arguments)
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


def fastgen_step(checkout: Path, arguments: dict[str, Any]) -> Call:
    """Returns a call that takes one of FastGen's sCD steps, on its EDM2."""
    package = types.ModuleType("fastgen.methods")  # its own imports every method
    package.__path__ = [str(checkout / "fastgen/methods")]
    package.CMModel = package.FastGenModel = nn.Module
    stand_ins = {name: MagicMock() for name in ABSENT.split()}
    with imports_from(checkout, **stand_ins, **{"fastgen.methods": package}):
        scm = importlib.import_module("fastgen.methods.consistency_model.sCM")
        precond = importlib.import_module("fastgen.networks.EDM2.network").EDM2Precond
        net = precond(8, 1, CLASSES, **arguments)
        teacher, average = (copy.deepcopy(net).eval().requires_grad_(False) for _ in range(2))
        model = scm.SCMModel.__new__(scm.SCMModel)
        nn.Module.__init__(model)
        model.net, model.teacher, model.sigma_data, model.precision_amp_jvp = net, teacher, 0.5, None
        model.device = torch.device("cpu")
        model.net_trigflow, model.teacher_trigflow = scm.TrigFlowPrecond(net), scm.TrigFlowPrecond(teacher)
    model.sample_t_cfg = types.SimpleNamespace(quantize=False, sigma_data=0.5)
    model.config = types.SimpleNamespace(guidance_scale=None, skip_layers=None)
    switches = ("use_cd", "prior_weighting_enabled", "g_norm_spatial_invariance", "divide_x_0_spatial_dim")
    numbers = {"tangent_warmup_steps": 100, "tangent_warmup_const": 0.1, "use_jvp_finite_diff": False}
    model.loss_config = types.SimpleNamespace(**dict.fromkeys(switches, True), **numbers)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99))

    def step() -> None:
        x0, labels = torch.rand(BATCH, 1, 8, 8) * 2 - 1, torch.eye(CLASSES)[torch.arange(BATCH) % CLASSES]
        t = net.noise_scheduler.sample_t(BATCH, "lognormal", train_p_mean=-1.3, train_p_std=1.6)
        loss, *_ = model._compute_scm_loss(x0, t, condition=labels, iteration=1000)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e6, foreach=True).item()
        adam_step(net, optimizer, average)
        with torch.no_grad():
            net.forced_weight_normalization()

    return step


def sid_step(checkout: Path, arguments: dict[str, Any]) -> Call:
    """Returns a call that takes one of SiD's rounds, on its DDPM++: the auxiliary score's turn and the generator's."""
    with imports_from(checkout):
        networks, losses = (importlib.import_module(f"training.{name}") for name in ("networks", "sid_loss"))
        teacher = networks.EDMPrecond(8, 1, CLASSES, model_type="SongUNet", **arguments)
        loss_of = losses.SID_EDMLoss()
    teacher.eval().requires_grad_(False)
    auxiliary, generator, average = (copy.deepcopy(teacher) for _ in range(3))
    adams = {net: torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.999)) for net in (auxiliary, generator)}
    sigma, labels = 2.5 * torch.ones(BATCH, 1, 1, 1), torch.eye(CLASSES)[torch.arange(BATCH) % CLASSES]

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


def training(work: str, theirs: Call, ours: Call, parameters: str, turns: int) -> Row:
    """Returns a training step of ours over theirs."""
    times = interleaved({"theirs": theirs, "ours": ours}, turns)
    return {"work": f"{work}, {parameters}", "ours / theirs": times.ratio("ours", "theirs")}


def size(arguments: dict[str, Any], kind: str) -> str:
    """Returns a network's number of parameters, in words."""
    flow = random_flow(kind, 8, 1, CLASSES, arguments)
    return f"{sum(p.numel() for p in flow.parameters()) / 1e6:.1f}M parameters"


def measure(options: argparse.Namespace) -> Iterator[Row]:
    turns = options.rounds
    keep_freed_memory()
    for label, (peer, *_) in DENOISERS.items():
        if checkout := options.peers.get(peer):
            for batch in (4, 16):
                yield sampling(label, checkout, batch, turns)
    for width in (32, 88):
        if checkout := options.peers.get("fastgen"):
            arguments = DIGITS | {"model_channels": width}
            ours = our_round("scd", "edm2", arguments, options.scratch)
            row = training("step of sCD", fastgen_step(checkout, arguments), ours, size(arguments, "edm2"), turns)
            yield {"peer": CHECKOUTS["fastgen"]} | row
    if checkout := options.peers.get("sid"):
        arguments = DIGITS | {"model_channels": 32, "dropout": 0.0}
        ours = our_round("sid", "song", arguments, options.scratch)
        row = training("round of SiD", sid_step(checkout, arguments), ours, size(arguments, "song"), turns)
        yield {"peer": CHECKOUTS["sid"]} | row
