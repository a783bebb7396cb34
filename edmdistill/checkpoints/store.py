"""Our checkpoints: a folder with config.json, model.safetensors and README.md, on disk as on the Hub.

The tensors carry the network's own names, which are the official ones below their prefix. What the network itself knows
(its kind, arguments, preconditioning, noise levels, classes, times) is written from the network, and never by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from msgspec import Struct
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edmdistill.atomic import atomic_write
from edmdistill.checkpoints.documents import code, front_matter, markdown
from edmdistill.checkpoints.licences import licence_fields
from edmdistill.checkpoints.source import resolve
from edmdistill.errors import CheckpointError
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import PRECONDITIONINGS

FORMAT_VERSION = "1.0"
"""Of config.json: MAJOR.MINOR. What a file lacks has its default, so every older minor reads as it did. A newer minor
only adds fields that an older program may pass over, and it does; a newer major it would misread, and refuses."""
CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"

C_NOISE = {
    "edm": "{c_noise_scale:g} ln(sigma)",
    "vp": "({M} - 1) t(sigma)",
    "ve": "ln(sigma/2)",
    "iddpm": "{M} - 1 - index(sigma)",
}
"""What the network reads as its noise level, in words."""


class NetworkSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """Which network, and its constructor's arguments."""

    kind: str
    arguments: dict[str, Any]


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """How a generator wants to be sampled, unless it is told otherwise.

    Attributes:
        sigmas: noise levels, falling, by their number: {"2": [80.0, 2.515]}; for others, EDM's curve.
        gamma: share of fresh noise between the steps, in [0, 1].
    """

    sigmas: dict[str, tuple[float, ...]] = {}
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}, outside [0, 1]")
        for nfe, sigmas in self.sigmas.items():
            if str(len(sigmas)) != nfe or list(sigmas) != sorted(sigmas, reverse=True) or min(sigmas) <= 0:
                raise ValueError(f"the schedule for {nfe} steps is {list(sigmas)}")


class Guidance(Struct, frozen=True, forbid_unknown_fields=True):
    """The guidance that a generator has learnt of its teacher.

    Attributes:
        kind: classes: away from the teacher without them; network: away from another network.
        range: of the weights that it can be told; of one weight, that is built in.
    """

    kind: Literal["classes", "network"]
    range: tuple[float, float]

    def __post_init__(self) -> None:
        if not 1 <= self.range[0] <= self.range[1]:
            raise ValueError(f"the range of guidance is {list(self.range)}")

    @property
    def words(self) -> str:
        """What it is, and what --guidance takes."""
        low, high = self.range
        by = "its classes" if self.kind == "classes" else "another network"
        return f"by {by}" + (f": --guidance takes {low:g} to {high:g}" if low < high else f" at weight {low:g}")


class Provenance(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the weights come from."""

    source: str
    """URL, Hub id or file name of what was converted; for a generator, of its teacher."""
    sha256: str | None = None
    """Of that file."""
    licence: str | None = None
    parent: str | None = None
    """sha256 of the checkpoint whose weights these were initialised with."""
    guide: str | None = None
    """sha256 of the network by which the teacher was guided."""
    init: str | None = None
    """sha256 of the generator that the run began with."""


class CheckpointConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """config.json."""

    format_version: str = FORMAT_VERSION
    stage: Literal["teacher", "generator", "auxiliary"]
    network: NetworkSpec
    preconditioning: dict[str, Any]
    """`kind`, and its numbers."""
    parameterization: Literal["trigflow"] = "trigflow"
    c_noise: str
    sigma_data: float
    sigma_min: float
    sigma_max: float
    label_dim: int
    label_names: tuple[str, ...] | None = None
    two_time: bool
    guidance: Guidance | None = None
    method: str | None = None
    recipe_hash: str | None = None
    images_seen: int | None = None
    ema: dict[str, Any] | None = None
    sampling: Sampling = Sampling()
    encoder: dict[str, Any] = msgspec.field(default_factory=lambda: {"kind": "pixels"})
    """What images are to the network: pixels in [-1, 1], or a VAE's latents with their statistics."""
    provenance: Provenance
    results: tuple[dict[str, Any], ...] = ()


def facts(flow: FlowNetwork) -> dict[str, Any]:
    """The fields of CheckpointConfig that the network itself knows."""
    network, preconditioning = flow.network, flow.preconditioning
    # By isinstance, for a sharded network is of a class of its own.
    network_kind = next(kind for kind, class_ in NETWORKS.items() if isinstance(network, class_))
    kind = next(kind for kind, class_ in PRECONDITIONINGS.items() if isinstance(preconditioning, class_))
    numbers = asdict(preconditioning)
    return {
        "network": NetworkSpec(network_kind, network.arguments),
        "preconditioning": {"kind": kind, **numbers},
        "c_noise": "t" if preconditioning.reads_time else C_NOISE[kind].format(**numbers),
        "sigma_data": flow.sigma_data,
        "sigma_min": flow.sigma_min,
        "sigma_max": flow.sigma_max,
        "label_dim": flow.label_dim,
        "two_time": flow.two_time,
    }


# Tensors.


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all.  Tensors that share memory become two.

    Raises: CheckpointError: the disk refuses.
    """
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    with atomic_write(path) as new:
        try:
            # An empty mapping beside no tensors would make a file that safetensors itself cannot read.
            save_file(own, new, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises: CheckpointError: no such file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Puts tensors into a module on the meta device, after checking every name, shape and dtype.

    Raises: CheckpointError: one is missing, left over, of another shape, or not of floating point.
    """
    expected = module.state_dict()
    advice = "it is damaged, or its configuration is of another network"
    for wrong, what in (
        (expected.keys() - tensors.keys(), "lacks {}, which its network needs"),
        (tensors.keys() - expected.keys(), "holds {}, for which its network has no place"),
    ):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise CheckpointError(f"{where} {what.format(min(wrong) + more)}: {advice}.")
    for name, tensor in tensors.items():
        shape = list(expected[name].shape)
        if list(tensor.shape) != shape:
            raise CheckpointError(
                f"{where} holds {name} in shape {list(tensor.shape)} where its network has {shape}: {advice}."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where} holds {name} as {tensor.dtype}, not as floating-point numbers: {advice}.")
    module.load_state_dict(tensors, assign=True)


# Checkpoints.


def build_flow(spec: NetworkSpec, preconditioning: Mapping[str, Any], where: str) -> FlowNetwork:
    """The network that a configuration describes, on the meta device: however large it is, it takes no memory.

    Args:
        where: what errors call the checkpoint.
    Raises: CheckpointError: an unknown kind, or arguments that make no network.
    """
    numbers = dict(preconditioning)
    kind = numbers.pop("kind", None)
    for word, table in ((spec.kind, NETWORKS), (kind, PRECONDITIONINGS)):
        if word not in table:
            raise CheckpointError(f"{where} is of the kind {word!r}, but this version knows {', '.join(table)}.")
    try:
        # What would take for ever to build is looked at first; the tensors' sizes take no time to write down.
        if spec.arguments.get("num_blocks", 0) * len(spec.arguments.get("channel_mult", ())) > 1000:
            raise ValueError("no network has that many blocks")
        if numbers.get("M", 0) > 100_000:
            raise ValueError("no network has that many noise levels")
        with torch.device("meta"):
            network = NETWORKS[spec.kind](**spec.arguments)
        return FlowNetwork(network, PRECONDITIONINGS[kind](**numbers))
    except Exception as error:  # the arguments are a stranger's: whatever they break, they are what is wrong
        raise CheckpointError(f"{where} has arguments that make no {spec.kind} network: {error}.") from error


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of a checkpoint of ours.

    Raises: CheckpointError: there is none, it is of another major version, or it says what we do not know.
    """
    path = folder / CONFIG
    try:
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint, for it has no {CONFIG}: give a converted teacher or a finished run."
        ) from error
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {CONFIG} cannot be read ({error}).") from error
    version, (major, minor) = fields.get("format_version"), FORMAT_VERSION.split(".")
    own = re.fullmatch(rf"{major}\.(\d{{1,9}})", version) if isinstance(version, str) else None
    if own is None:
        raise CheckpointError(
            f"{path} has format_version {version!r} where this version of edmdistill reads {major}.x: it is not one of "
            "our checkpoints, or a newer edmdistill wrote it."
        )
    if int(own[1]) > int(minor):
        fields = {name: value for name, value in fields.items() if name in CheckpointConfig.__struct_fields__}
    try:
        return msgspec.convert(fields, CheckpointConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} is not a checkpoint's configuration: {error}.") from error


def write_config(folder: Path, config: CheckpointConfig) -> None:
    """Writes the configuration alone, whole or not at all.  Raises: CheckpointError: the disk refuses."""
    config = replace(config, format_version=FORMAT_VERSION)
    with atomic_write(folder / CONFIG) as new:
        new.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")


def checkpoint_in(folder: Path) -> Path:
    """The folder of the checkpoint that a folder stands for: of a run directory, the one that it has made."""
    made = folder / "generator"
    return made if (made / CONFIG).is_file() else folder


def refuse_occupied(folder: Path, overwrite: bool) -> None:
    """Lets a checkpoint be written at `folder`: there is nothing, or one of ours that is to be overwritten.

    Raises: CheckpointError: there is something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} - {CONFIG, MODEL, CARD}:
        raise CheckpointError(f"{folder} exists and holds other things than a checkpoint: choose another place.")
    there = read_config(folder)  # what is not ours is not replaced
    if not overwrite:
        raise CheckpointError(
            f"{folder} holds a checkpoint already, a {there.stage} from {there.provenance.source}: "
            "choose another place, or say --overwrite."
        )


def write_checkpoint(
    folder: Path, flow: FlowNetwork, config: CheckpointConfig, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the three files into a folder, which is made."""
    config = replace(config, **facts(flow))
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / MODEL, flow.network.state_dict() if tensors is None else tensors, {"format": "pt"})
    write_config(folder, config)
    (folder / CARD).write_text(_card(config), encoding="utf-8")


def save_checkpoint(
    folder: Path,
    flow: FlowNetwork,
    config: CheckpointConfig,
    *,
    overwrite: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        config: what the network knows of itself (`facts`) is put right in it.
        overwrite: replace a checkpoint of ours that is there.
        tensors: of flow.network, where flow holds only a part of each.
    Raises: CheckpointError: something is in the way, or the disk refuses.
    """
    refuse_occupied(folder, overwrite)
    with atomic_write(folder) as new:
        write_checkpoint(new, flow, config, tensors)


def load_checkpoint(source: str | Path, device: torch.device | str = "cpu") -> tuple[FlowNetwork, CheckpointConfig]:
    """A checkpoint of ours: a folder, or a repository of the Hub.

    Raises: CheckpointError: it is not there, not ours, or damaged.  HubError: the Hub refuses.
    """
    folder = resolve(source)
    config = read_config(folder)
    flow = build_flow(config.network, config.preconditioning, str(folder))
    for name in ("sigma_data", "sigma_min", "sigma_max", "label_dim", "two_time"):
        said, fact = getattr(config, name), getattr(flow, name)
        if said != fact:
            raise CheckpointError(f"{folder / CONFIG} contradicts itself: {name} is {said}, its network has {fact}.")
    if flow.guided != (config.guidance is not None and config.guidance.range[0] < config.guidance.range[1]):
        reads = "reads a weight of guidance" if flow.guided else "reads no weight of guidance"
        raise CheckpointError(f"{folder / CONFIG} contradicts itself: its network {reads}, guidance says otherwise.")
    fill(flow.network, load_tensors(folder / MODEL, device)[0], str(folder / MODEL))
    return flow, config


def _card(config: CheckpointConfig) -> str:
    """The README until the checkpoint is published, with the Hub's header: what it is, whence, and its use."""
    what = {"teacher": "a diffusion model", "generator": "a few-step generator", "auxiliary": "an auxiliary score"}
    provenance = config.provenance
    licence = provenance.licence or "other"
    digest = f" (sha256 {code(provenance.sha256)})" if provenance.sha256 else ""
    guidance = f"Its teacher was guided {config.guidance.words}.\n" if config.guidance else ""
    fields = {"library_name": "edmdistill", "pipeline_tag": "unconditional-image-generation"}
    return f"""{front_matter(fields | licence_fields(provenance.licence))}
This is {what[config.stage]} in edmdistill's TrigFlow format, from {markdown(provenance.source)}{digest}.
Its weights are under this licence: {markdown(licence)}.
{guidance}
    edmdistill sample PATH_OR_HUB_ID --seeds 0-15 --out images/
"""
