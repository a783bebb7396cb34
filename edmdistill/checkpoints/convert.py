"""From others' checkpoints to ours: an official pickle, or OpenAI's weights, as a network on the TrigFlow circle.

A conversion claims to keep the function. `convert` proves it on what it has written, before it leaves it there. Where
it is asked to change the network (`networks.adapt`), it says by how much the function has changed.
"""

from __future__ import annotations

import inspect
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from edmdistill.atomic import atomic_write, sha256_file
from edmdistill.checkpoints.function import noise_dependence
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.known import KNOWN_FILES, label_names_of
from edmdistill.checkpoints.licences import check_licence
from edmdistill.checkpoints.nvidia import OfficialCheckpoint, read_official
from edmdistill.checkpoints.openai import read_openai
from edmdistill.checkpoints.others import of_folder
from edmdistill.checkpoints.run_state import PROGRESS, newest_readable, raw_weights
from edmdistill.checkpoints.source import name_of, resolve
from edmdistill.checkpoints.store import (
    CARD,
    CONFIG,
    MODEL,
    CheckpointConfig,
    NetworkSpec,
    Provenance,
    build_flow,
    checkpoint_in,
    describe,
    fill,
    load_checkpoint,
    meta_network,
    read_config,
    refuse_occupied,
    write_checkpoint,
)
from edmdistill.errors import CheckpointError
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.magnitude import GAINS
from edmdistill.networks.preconditioning import IDDPM, PRECONDITIONINGS
from edmdistill.networks.surgery.adapt import with_double_norm, with_positional_time
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time
from edmdistill.progress import write
from edmdistill.schedules import edm_sigmas
from edmdistill.trigflow import denoised, sigma_to_time

PRECONDITIONING_CLASSES = {
    "EDMPrecond": "edm",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "iddpm",
    "Precond": "edm",
}
NETWORK_CLASSES = {"SongUNet": ("song", "model."), "DhariwalUNet": ("adm", "model."), "UNet": ("edm2", "unet.")}
"""Our kind, and the prefix of its tensors in the official state."""
OURS = {"two_time", "positional_time", "double_norm", "guided", "logvar_heads"}
"""Constructor arguments that no official class has; only EDM2's have logvar_channels."""
WITHOUT_EFFECT = {"use_fp16", "model_type"}
"""Official arguments about how the network is run or named, not what it computes."""

Weights = Literal["ema", "raw"]
TOLERANCE = 1e-10
"""Largest relative difference in float64 that a conversion may make; 1e-12 is usual."""


class Parity(NamedTuple):
    """The largest difference between a checkpoint and its source at one noise level, relative to the largest pixel."""

    sigma: float
    float32: float
    float64: float


class Conversion(NamedTuple):
    """What `convert` did; no parity if the checkpoint was there already."""

    path: Path
    config: CheckpointConfig
    parity: tuple[Parity, ...]


def build_official(
    official: OfficialCheckpoint, *, upcast: bool = False, tensors: Mapping[str, Tensor] | None = None
) -> tuple[FlowNetwork, CheckpointConfig]:
    """The network in an official pickle, in float32, and its configuration.

    Arguments, names and shapes are compared with our network before it is given any memory.

    Args:
        upcast: EDM2 stores float16, and the official code rounds gain / sqrt(fan_in) to it. False keeps that rounding
            and so the official images; True is the network upcast first, which moves them by up to 7e-4.
        tensors: in the place of its own, by the official names.
    Raises: CheckpointError: arguments that are unknown or make no network, or tensors that do not fit it.
    """
    where = str(official.path)
    kind, prefix = NETWORK_CLASSES[official.network_class]
    flow = build_flow(NetworkSpec(kind, _arguments(official, kind)), _preconditioning(official), where)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in (tensors or official.tensors).items()}
    if isinstance(flow.preconditioning, IDDPM):  # its noise levels are stored, but follow from its numbers
        levels = tensors.pop("u", torch.empty(0))
        if levels.shape != flow.preconditioning.levels.shape or not levels.allclose(flow.preconditioning.levels):
            raise CheckpointError(f"{where} holds other noise levels than its arguments make: it is damaged.")
    fill(flow.network, tensors, where)
    if not upcast:
        _round_gains(flow.network)
    names, file = label_names_of(official), KNOWN_FILES.get(official.sha256)
    config = CheckpointConfig(
        stage="teacher",
        encoder=_encoder(official),
        label_names=None if names is None else tuple(names),
        provenance=Provenance(
            source=official.path.name, sha256=official.sha256, licence=file.licence if file else "cc-by-nc-sa-4.0"
        ),
        **describe(flow),
    )
    return flow.float(), config


def _arguments(official: OfficialCheckpoint, kind: str) -> dict[str, Any]:
    """Our network's constructor arguments. Its defaults are the official ones."""
    ours = OURS if kind == "edm2" else OURS | {"logvar_channels"}
    known = inspect.signature(NETWORKS[kind]).parameters.keys() - ours
    arguments = official.network_arguments | {
        name: value for name, value in official.arguments.items() if name in known & {"logvar_channels"}
    }
    outer = {"img_channels"} | {field.name for field in fields(PRECONDITIONINGS[_preconditioning(official)["kind"]])}
    unknown = (arguments.keys() - known) | (official.arguments.keys() - known - outer - WITHOUT_EFFECT)
    if unknown:
        raise CheckpointError(
            f"{official.path} was made with the argument {min(unknown)}, which {official.network_class} does not know: "
            "it is damaged, or written by other code than NVIDIA's."
        )
    return arguments


def _preconditioning(official: OfficialCheckpoint) -> dict[str, Any]:
    """Kind and numbers. Our defaults are the official ones, but for EDM's range, which is unlimited there."""
    kind = PRECONDITIONING_CLASSES[official.preconditioning_class]
    numbers = {}
    for name in official.arguments.keys() & {field.name for field in fields(PRECONDITIONINGS[kind])}:
        # The object's attribute, where it has one, is what the official code computes with.
        value = official.attributes.get(name, official.arguments[name])
        if not (name in ("sigma_min", "sigma_max") and value in (0, math.inf)):
            numbers[name] = value
    return {"kind": kind, **numbers}


def _encoder(official: OfficialCheckpoint) -> dict[str, Any]:
    """What images are to the network."""
    if official.encoder is None or official.encoder["class_name"] == "StandardRGBEncoder":
        return {"kind": "pixels"}
    own = {"class_name", "arguments", "batch_size"}
    statistics = {name: value for name, value in official.encoder.items() if name not in own}
    return {"kind": official.encoder["class_name"], **statistics}


@torch.no_grad()
def _round_gains(network: nn.Module) -> None:
    """Rounds gain / sqrt(fan_in) to the gain's own precision, as the official EDM2 code does where that is float16."""
    for layer in network.modules():
        for name, scaled in GAINS.items():
            gain = getattr(layer, name, None)
            if gain is not None and gain.dtype != torch.float32:
                root = math.sqrt(getattr(layer, scaled).weight[0].numel())
                setattr(layer, name, nn.Parameter((gain / root).float() * root))


def read_source(path: Path) -> tuple[FlowNetwork, CheckpointConfig]:
    """The network in a file of NVIDIA's or OpenAI's, in float32, with one time.

    Raises: CheckpointError: it is neither.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} {of_folder(path)}.")
    # Both write .pkl or .pt as they like; NVIDIA's files are never zip archives.
    return read_openai(path, sha256_file(path)) if zipfile.is_zipfile(path) else build_official(read_official(path))


def _own_teacher(path: Path) -> tuple[FlowNetwork, CheckpointConfig]:
    """A teacher of ours, or of a run, with one time, as parent of what comes from it."""
    path = checkpoint_in(path)
    flow, config = load_checkpoint(path)
    if config.stage != "teacher":
        raise CheckpointError(f"{path} is a {config.stage}, made by {config.method}: give its teacher.")
    return drop_second_time(flow), replace(
        config, provenance=replace(config.provenance, parent=sha256_file(path / MODEL))
    )


def _adaptation(time_embedding: str | None, double_norm: bool | None, arguments: Mapping[str, Any]) -> dict[str, bool]:
    """The constructor arguments that are asked for, of a network that has these, where it has them."""
    if time_embedding is None:
        return {name: False for name in ("positional_time", "double_norm") if name in arguments}
    default = "double_norm" in arguments
    asked = default if double_norm is None else double_norm
    return {"positional_time": True} | ({"double_norm": asked} if default or asked else {})


def outline(source: str | Path) -> FlowNetwork:
    """The network in a checkpoint, on the meta device: its shapes without its numbers, which are not read.

    Args:
        source: as load_model's.
    Raises: CheckpointError: it cannot be read.  HubError: the Hub refuses.
    """
    path = resolve(source)
    if path.is_dir():
        folder = checkpoint_in(path)
        return meta_network(read_config(folder), folder)
    if zipfile.is_zipfile(path):
        return read_source(path)[0].to("meta")
    official = read_official(path)
    kind, _ = NETWORK_CLASSES[official.network_class]
    return build_flow(NetworkSpec(kind, _arguments(official, kind)), _preconditioning(official), str(path))


def convert(
    source: str | Path,
    out: str | Path,
    *,
    time_embedding: Literal["positional"] | None = None,
    double_norm: bool | None = None,
    overwrite: bool = False,
    licence: str | None = None,
    on_progress: Callable[[str], object] = lambda stage: None,
) -> Conversion:
    """Turns an official checkpoint into one of ours, with a second time, and proves that it is the same function.

    What is compared is the checkpoint as written and read again, on the circle, and the source in EDM's view. Where the
    same source has been converted to `out` before, nothing is done.

    Args:
        source: a path, a URL or a file of the Hub; see `resolve`.
        out: the folder to write, whole or not at all.
        time_embedding: positional: the network is to read t, for continuous-time consistency models. That is another
            function, to be trained by `edmdistill train diffusion`; a teacher of ours may be the source then.
        double_norm: adaptive double normalisation, with a positional time embedding; None: where the network has an
            adaptive norm.
        overwrite: replace a checkpoint that is there.
        licence: of the weights, see check_licence; default: what NVIDIA's or OpenAI's own are under.
        on_progress: called with what is being done.
    Raises: CheckpointError: the source cannot be read or adapted, something is in the way, or it came out another.
    """
    if double_norm and time_embedding is None:
        raise CheckpointError("--double-norm goes with --time-embedding positional: give both, or neither")
    licence = None if licence is None else check_licence(licence)
    path, out = resolve(source), Path(out)
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{out} is in the folder that is converted, {path}: choose a place outside it.")
    if not overwrite and (out / CONFIG).is_file() and path.is_file():
        there = read_config(out)
        asked = _adaptation(time_embedding, double_norm, there.network.arguments)
        same = asked.items() <= there.network.arguments.items()
        if there.stage == "teacher" and same and there.provenance.sha256 == sha256_file(path):
            return Conversion(out, load_checkpoint(out)[1], ())
    refuse_occupied(out, overwrite)
    on_progress("reading")
    if path.is_dir() and time_embedding is not None:
        flow, config = _own_teacher(path)
        provenance = config.provenance
    else:
        flow, config = read_source(path)
        provenance = replace(config.provenance, source=name_of(source))
    config = replace(config, provenance=replace(provenance, licence=licence or provenance.licence))
    asked = _adaptation(time_embedding, double_norm, flow.network.arguments)
    adapted = with_positional_time(flow) if asked.get("positional_time") else flow
    adapted = with_double_norm(adapted) if asked.get("double_norm") else adapted
    on_progress("measuring how D depends on the noise")
    config = replace(config, noise_dependence=noise_dependence(adapted))
    with atomic_write(out) as folder:
        on_progress("writing")
        two_time = add_second_time(adapted)
        config = replace(config, **describe(two_time))
        write_checkpoint(folder, two_time, config)
        del two_time, adapted
        expected = {dtype: _denoised(flow, dtype, on_progress) for dtype in (torch.float32, torch.float64)}
        del flow
        written, _ = load_checkpoint(folder)
        found = {dtype: _denoised(written, dtype, on_progress) for dtype in expected}
        errors = [[_relative(a, b) for a, b in zip(found[d], expected[d], strict=True)] for d in expected]
        parity = tuple(map(Parity, _sigmas(written).tolist(), *errors))
        worst = max(parity, key=lambda row: row.float64)
        if not worst.float64 <= (math.inf if time_embedding else TOLERANCE):
            raise CheckpointError(
                f"{path} was not converted: at sigma {worst.sigma:g} the result differs from it by {worst.float64:.1e} "
                f"in float64, more than {TOLERANCE:g}; please report this."
            )
        with (folder / CARD).open("a", encoding="utf-8") as card:
            card.write(f"\nLargest relative difference to the source, by noise level:\n\n{table(parity)}\n")
    return Conversion(out, config, parity)


def table(parity: Sequence[Parity]) -> str:
    """The parity as text, a line for each noise level, indented as Markdown's code."""
    lines = [f"    {row.sigma:>10.4g} {row.float32:>10.1e} {row.float64:>10.1e}" for row in parity]
    return "\n".join([f"    {'sigma':>10} {'float32':>10} {'float64':>10}", *lines])


def _sigmas(flow: FlowNetwork) -> Tensor:
    return edm_sigmas(8, flow.sigma_min, flow.sigma_max)


@torch.no_grad()
def _denoised(flow: FlowNetwork, dtype: torch.dtype, on_progress: Callable[[str], object]) -> list[Tensor]:
    """What the network makes of an image at each noise level: on the circle with two times, else in EDM's view."""
    flow = flow.to(dtype).eval()
    rng = torch.Generator().manual_seed(0)
    shape = (2, 1, flow.img_channels, flow.img_resolution, flow.img_resolution)
    results = []
    for index, sigma in enumerate(_sigmas(flow)):
        on_progress(f"comparing at sigma {sigma:.4g} in {str(dtype).removeprefix('torch.')}")
        labels = None
        if flow.label_dim and index % 2 == 0:  # every other image has no class
            labels = torch.tensor([index % flow.label_dim])
        x0, n = torch.randn(shape, generator=rng, dtype=torch.float64)
        x = flow.sigma_data * x0 + sigma * n
        if flow.two_time:
            t = sigma_to_time(sigma, flow.sigma_data)
            x_t = (t.cos() * x).to(dtype)
            results.append(denoised(x_t, flow(x_t, t, labels, second=math.pi / 2 - t), t, flow.sigma_data))
        else:
            results.append(Denoiser(flow)(x.to(dtype), sigma, labels))
    return results


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def load_flow(source: str | Path, weights: Weights = "ema") -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network of a checkpoint as it stands there, in float32 on the CPU, and its configuration.

    Teachers and auxiliary scores lose their second time; a generator has it only if its jumps read it.

    Args:
        source, weights: as load_model's.
    Raises: CheckpointError: it cannot be read.  HubError: the Hub refuses.
    """
    path = resolve(source)
    if weights == "raw" or (path / PROGRESS).is_file():
        flow, config = _load_raw(path)
    elif path.is_dir():
        flow, config = load_checkpoint(checkpoint_in(path))
    else:
        flow, config = read_source(path)
    as_it_is = config.stage == "generator" or not flow.two_time
    return flow if as_it_is else drop_second_time(flow), config


def _load_raw(path: Path) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network in training of a run's newest whole state, or of the state that is given."""
    state = newest_readable(path, write)
    folder = state.parent.parent / "generator"
    config = read_config(folder)
    flow = build_flow(config.network, config.preconditioning, str(folder))
    role = "teacher" if config.stage == "teacher" else "generator"
    fill(flow.network, raw_weights(state, role), str(state))
    return flow, replace(config, images_seen=int(state.name), ema=None, results=())


def load_model(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: Weights = "ema",
) -> Denoiser | Generator:
    """Returns a network to use: a generator if the checkpoint holds one, else a denoiser.  It is not for training.

    Args:
        source: a checkpoint of ours (folder or Hub id), a run directory, a run's state RUN/state/IMAGES, an official
            pickle or OpenAI's .pt.
        weights: of a run directory, the average that the run publishes, or the raw weights of its newest state; a
            state has raw ones alone.
        dtype: of the network's arithmetic: float16 and bfloat16 inside it only, float64 throughout; default float32.
    Raises: CheckpointError: it cannot be read.  HubError: the Hub refuses.
    """
    flow, config = load_flow(source, weights)
    if dtype == torch.float64:
        flow.double()
    elif dtype is not None:
        flow.compute_dtype = dtype
    flow = flow.to(device).requires_grad_(False)
    flow.network.fold()
    if config.stage == "generator":
        return Generator(flow, config).eval()
    teacher = Denoiser(flow)
    teacher.label_names = config.label_names
    return teacher.eval()


def load_denoiser(source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Denoiser:
    """A teacher, in EDM's view; see `load_model`.  Raises: CheckpointError: it is a generator, or cannot be read."""
    model = load_model(source, device, dtype)
    if not isinstance(model, Denoiser):
        raise CheckpointError(f"{source} is a generator, and a teacher is wanted: give the one it was distilled from.")
    return model


def load_generator(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Generator:
    """A few-step generator; see `load_model`.  Raises: CheckpointError: it is a teacher, or cannot be read."""
    model = load_model(source, device, dtype)
    if not isinstance(model, Generator):
        raise CheckpointError(f"{source} is a teacher, and a generator is wanted: distil it with `edmdistill train`.")
    return model
