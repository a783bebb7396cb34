"""Our checkpoints: a folder with config.json, model.safetensors and README.md, on disk as on the Hub.

The tensors carry the network's own names, which are the official ones below their prefix. What the network itself knows
(its kind, arguments, preconditioning, noise levels, classes, times) is written from the network, and never by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta, Struct
from msgspec.structs import force_setattr, replace
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edmdistill.atomic import atomic_write
from edmdistill.checkpoints.documents import code, front_matter, markdown
from edmdistill.checkpoints.known import class_names
from edmdistill.checkpoints.licences import licence_fields
from edmdistill.checkpoints.source import resolve
from edmdistill.errors import CheckpointError
from edmdistill.networks import NETWORKS
from edmdistill.networks.arguments import Share, typed
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import IDDPM, PRECONDITIONINGS, Sigma, make_preconditioning

FORMAT_VERSION = "1.1"
"""Of config.json: MAJOR.MINOR. What a file lacks has its default, so every older minor reads as it did. A newer minor
only adds fields that an older program may pass over, and it does; a newer major it would misread, and refuses.

1.1: label_dropout, noise_dependence, images_total."""
CONFIG_BYTES = 16 * 2**20
"""No configuration is longer; ImageNet's class names take 30,000."""
CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"

C_NOISE = {
    "edm": "{c_noise_scale:g} ln(sigma)",
    "vp": "({M} - 1) t(sigma)",
    "ve": "ln(sigma/2)",
    "iddpm": "{M} - 1 - index(sigma)",
}
"""What the network reads as its noise level, in words."""


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that would speak to a terminal rather than be read on it."""
Text = Annotated[str, Meta(max_length=4096)]
Images = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Weight = Annotated[float, Meta(ge=1, le=1e6)]


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

    sigmas: dict[str, tuple[Sigma, ...]] = {}
    gamma: Share = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}, outside [0, 1]")
        for nfe, sigmas in self.sigmas.items():
            falling = all(a > b for a, b in zip(sigmas, (*sigmas[1:], 0.0), strict=True))
            if not sigmas or str(len(sigmas)) != nfe or not falling:
                raise ValueError(f"the schedule for {nfe[:20]} steps is {list(sigmas)[:20]}")


class Guidance(Struct, frozen=True, forbid_unknown_fields=True):
    """The guidance that a generator has learnt of its teacher.

    Attributes:
        kind: classes: away from the teacher without them; network: away from another network.
        range: of the weights that it can be told; of one weight, that is built in.
    """

    kind: Literal["classes", "network"]
    range: tuple[Weight, Weight]

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

    source: Text
    """URL, Hub id or file name of what was converted; for a generator, of its teacher."""
    sha256: Text | None = None
    """Of that file."""
    licence: Text | None = None
    parent: Text | None = None
    """sha256 of the checkpoint whose weights these were initialised with."""
    guide: Text | None = None
    """sha256 of the network by which the teacher was guided."""
    init: str | None = None
    """sha256 of the generator that the run began with."""

    def __post_init__(self) -> None:
        # A file's name may hold what no configuration may.
        force_setattr(self, "source", CONTROL.sub("\ufffd", self.source))


class Latents(Struct, frozen=True):
    """What `encoder` says of the latents of a VAE: x0 = latents scale + bias, by channel. Other keys may follow."""

    kind: Text
    scale: tuple[Annotated[float, Meta(gt=0, le=1e6)], ...]
    bias: tuple[Annotated[float, Meta(ge=-1e6, le=1e6)], ...]


class CheckpointConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """config.json."""

    format_version: Text = FORMAT_VERSION
    stage: Literal["teacher", "generator", "auxiliary"]
    network: NetworkSpec
    preconditioning: dict[str, Any]
    """`kind`, and its numbers."""
    parameterization: Literal["trigflow"] = "trigflow"
    c_noise: Text
    sigma_data: Sigma
    sigma_min: Sigma
    sigma_max: Sigma
    label_dim: Images
    label_names: tuple[Text, ...] | None = None
    label_dropout: Share | None = None
    """Share of the teacher's training in which it was given no class; None: as its network's arguments say."""
    noise_dependence: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """How far D at sigma_max depends on the noise; see checkpoints/function.py.  None: not measured."""
    two_time: bool
    guidance: Guidance | None = None
    method: Text | None = None
    recipe_hash: Text | None = None
    images_seen: Images | None = None
    images_total: Images | None = None
    """How many the recipe asks for; a generator that has seen fewer is unfinished."""
    ema: dict[str, Any] | None = None
    sampling: Sampling = Sampling()
    encoder: dict[str, Any] = msgspec.field(default_factory=lambda: {"kind": "pixels"})
    """What images are to the network: pixels in [-1, 1], or a VAE's latents with their statistics."""
    provenance: Provenance
    results: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Raises: ValueError: fields that contradict one another."""
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min:g}, which is not below sigma_max, {self.sigma_max:g}")
        if self.label_names is not None and len(self.label_names) != self.label_dim:
            raise ValueError(f"label_names holds {len(self.label_names)} names for {self.label_dim} classes")


def unfinished(config: CheckpointConfig) -> str | None:
    """Returns a sentence if a checkpoint is of a run that has not come to its end; else None."""
    seen, total = config.images_seen, config.images_total
    if seen is None or total is None or seen >= total:
        return None
    return f"This {config.stage} is unfinished: {seen:,} of {total:,} images seen."


def describe(flow: FlowNetwork) -> dict[str, Any]:
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
        "label_dropout": flow.label_dropout if flow.label_dim else None,
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
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error


def require_finite(tensor: Tensor, name: str, where: str) -> None:
    """Raises: CheckpointError: a tensor of a checkpoint holds NaN or infinity."""
    # A sum shows them in one pass and without memory; but one of large numbers may be infinite by itself.
    if not tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32).isfinite():
        finite = tensor.isfinite()
        if not finite.all():
            raise CheckpointError(
                f"{where} holds NaN or infinity in {name}, at {int((~finite).sum()):,} of {finite.numel():,} numbers: "
                "the network is broken; take an earlier snapshot, or download the file again."
            )


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Puts tensors into a module on the meta device, after checking every name, shape and dtype.

    Raises: CheckpointError: one is missing, left over, of another shape, not of floating point, or not finite.
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
        require_finite(tensor, name, where)
    module.load_state_dict(tensors, assign=True)


# Checkpoints.


def build_flow(
    spec: NetworkSpec, preconditioning: Mapping[str, Any], where: str, label_dropout: float | None = None
) -> FlowNetwork:
    """The network that a configuration describes, on the meta device: however large it is, it takes no memory.

    Args:
        where: what errors call the checkpoint.
        label_dropout: see FlowNetwork.
    Raises: CheckpointError: an unknown kind, or arguments that make no network, or none that denoises.
    """
    numbers = dict(preconditioning)
    kind = numbers.pop("kind", None)
    for word, table in ((spec.kind, NETWORKS), (kind, PRECONDITIONINGS)):
        if not isinstance(word, str) or word not in table:
            raise CheckpointError(f"{where} is of the kind {word!r:.80}, but this version knows {', '.join(table)}.")
    try:
        with torch.device("meta"):
            network = NETWORKS[spec.kind](**spec.arguments)
    except Exception as error:  # the arguments are a stranger's: whatever they break, they are what is wrong
        raise CheckpointError(f"{where} has arguments that make no {spec.kind} network: {error!s:.300}.") from error
    try:
        flow = FlowNetwork(network, make_preconditioning(str(kind), numbers), label_dropout=label_dropout)
    except Exception as error:
        raise CheckpointError(f"{where} has numbers that make no {kind} preconditioning: {error!s:.300}.") from error
    # iDDPM's networks give the variance as well, which nobody reads.
    wanted = flow.img_channels * (2 if isinstance(flow.preconditioning, IDDPM) else 1)
    found = network.arguments.get("out_channels", wanted)
    if found != wanted:
        raise CheckpointError(
            f"{where} is of a network that makes {found} channels of {flow.img_channels}, where {kind} takes {wanted}: "
            "it is no denoiser of such images."
        )
    if network.positional_time != flow.preconditioning.reads_time:
        reads = "t" if network.positional_time else "ln(sigma)"
        raise CheckpointError(
            f"{where} contradicts itself: its network reads {reads}, its preconditioning is for another."
        )
    return flow


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of a checkpoint of ours.

    Raises: CheckpointError: there is none, it is of another major version, or it says what we do not know.
    """
    path = folder / CONFIG
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > CONFIG_BYTES):
            raise ValueError(f"it is no file of at most {CONFIG_BYTES >> 20} MiB")
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        _refuse_control_characters(fields)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint, for it has no {CONFIG}: give a converted teacher or a finished run."
        ) from error
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {CONFIG} cannot be read ({error}).") from error
    version, (major, minor) = fields.get("format_version"), FORMAT_VERSION.split(".")
    own = re.fullmatch(rf"{major}\.([0-9]{{1,9}})", version) if isinstance(version, str) else None
    if own is None:
        raise CheckpointError(
            f"{path} has format_version {version!r:.40} where this version of edmdistill reads {major}.x: it is not "
            "one of our checkpoints, or a newer edmdistill wrote it."
        )
    if int(own[1]) > int(minor):
        fields = {name: value for name, value in fields.items() if name in CheckpointConfig.__struct_fields__}
    try:
        config: CheckpointConfig = typed(fields, CheckpointConfig)
        if config.encoder != {"kind": "pixels"}:
            typed(config.encoder, Latents)
        # Checkpoints of version 1.0 from official files lack the names.
        names = config.label_names or class_names(config.label_dim, config.provenance.source)
        return replace(config, label_names=names)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a checkpoint's configuration: {error}.") from error


def _refuse_control_characters(fields: Any) -> None:
    """Raises: ValueError: a text anywhere in these fields holds one."""
    left = [fields]
    while left:
        match left.pop():
            case str() as text if CONTROL.search(text):
                raise ValueError(f"it holds control characters, in {text[:40]!r}")
            case list() as items:
                left += items
            case dict() as table:
                left += [*table, *table.values()]


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
    config = replace(config, **describe(flow))
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
    flow = meta_network(config, folder)
    fill(flow.network, load_tensors(folder / MODEL, device)[0], str(folder / MODEL))
    return flow, config


def meta_network(config: CheckpointConfig, folder: Path) -> FlowNetwork:
    """Returns the network of a configuration on the meta device: it has no numbers and takes no memory.

    Args:
        folder: of the checkpoint, for errors.
    Raises: CheckpointError: it makes no network, or contradicts itself.
    """
    flow = build_flow(config.network, config.preconditioning, str(folder), config.label_dropout)
    for name in ("sigma_data", "sigma_min", "sigma_max", "label_dim", "two_time"):
        said, fact = getattr(config, name), getattr(flow, name)
        if said != fact:
            raise CheckpointError(f"{folder / CONFIG} contradicts itself: {name} is {said}, its network has {fact}.")
    if flow.guided != (config.guidance is not None and config.guidance.range[0] < config.guidance.range[1]):
        reads = "reads a weight of guidance" if flow.guided else "reads no weight of guidance"
        raise CheckpointError(f"{folder / CONFIG} contradicts itself: its network {reads}, guidance says otherwise.")
    for name in ("scale", "bias") if config.encoder["kind"] != "pixels" else ():
        count = len(config.encoder[name])
        if count != flow.img_channels:
            raise CheckpointError(
                f"{folder / CONFIG} contradicts itself: its encoder has a {name} for {count} channels, its network has "
                f"{flow.img_channels}."
            )
    return flow


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
