"""config.json of our checkpoints: which network, how it was trained and is sampled, and where it comes from.

What the network itself determines (its kind, arguments, preconditioning, noise levels, classes, times) is read off the
network, and never written by hand.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import force_setattr, replace

from edmdistill.atomic import atomic_write, require_no_pipe
from edmdistill.checkpoints.class_names import class_names
from edmdistill.checkpoints.encoder import PIXELS, LatentEncoder
from edmdistill.checkpoints.layout import CONFIG
from edmdistill.checkpoints.tuning import Tuning
from edmdistill.checkpoints.unsupported import describe_other_folder
from edmdistill.errors import CheckpointError, Damaged, counted
from edmdistill.networks import NETWORKS
from edmdistill.networks.arguments import Arg, validated
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import PRECONDITIONINGS, Sigma

FORMAT_VERSION = "1.4"
"""MAJOR.MINOR of config.json. A field that a file lacks has its default, so older minors read as before. A newer minor
only adds fields that can be ignored, at the top or in any part, and they are; a newer major would be misread, and is
refused.

1.1: label_dropout, noise_dependence, images_total. 1.2: tunings. 1.3: trained_sigmas.
1.4: use_fp16, tunings' dtype etc."""
CONFIG_BYTES = 16 * 2**20
"""Largest config.json that is read; ImageNet's class names take 30,000 bytes."""

C_NOISE = {
    "edm": "{c_noise_scale:g} ln(sigma)",
    "consistency": "{c_noise_scale:g} ln(sigma)",
    "vp": "({M} - 1) t(sigma)",
    "ve": "ln(sigma/2)",
    "iddpm": "{M} - 1 - index(sigma)",
}
"""The noise level as the network reads it, by preconditioning."""


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, which a terminal would act on."""
Text = Annotated[str, Meta(max_length=4096)]
Images = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Weight = Annotated[float, Meta(ge=1, le=1e6)]


class NetworkSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A network's class, and its constructor's arguments."""

    kind: str
    arguments: dict[str, Any]


class SamplingDefaults(Struct, frozen=True, forbid_unknown_fields=True):
    """How a generator is sampled by default.

    Attributes:
        sigmas: falling noise levels by their number, which may repeat, {"2": [80.0, 2.515]}; for other numbers, EDM's
            curve.
        gamma: share of fresh noise between the steps, in [0, 1].
    """

    sigmas: dict[str, tuple[Sigma, ...]] = {}
    gamma: Arg.Fraction = 1.0

    def __post_init__(self) -> None:
        for nfe, sigmas in self.sigmas.items():
            falling = list(sigmas) == sorted(sigmas, reverse=True)
            if not sigmas or str(len(sigmas)) != nfe or not falling:
                raise ValueError(f"the schedule for {nfe[:20]} steps is {list(sigmas)[:20]}")


class Guidance(Struct, frozen=True, forbid_unknown_fields=True):
    """The guidance that a generator has learned from its teacher.

    Attributes:
        kind: classes: away from the teacher without them; network: away from another network.
        range: of the weights that it accepts; both ends are equal where one weight is built in.
    """

    kind: Literal["classes", "network"]
    range: tuple[Weight, Weight]

    def __post_init__(self) -> None:
        if not 1 <= self.range[0] <= self.range[1]:
            raise ValueError(f"the range of guidance is {list(self.range)}")

    @property
    def words(self) -> str:
        """The kind of guidance, and the weights that --guidance takes."""
        low, high = self.range
        by = "its classes" if self.kind == "classes" else "another network"
        return f"by {by}" + (f": --guidance takes {low:g} to {high:g}" if low < high else f" at weight {low:g}")


class Provenance(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the weights come from."""

    source: Text
    """URL, Hub id or file name of what was converted; for a generator, of its teacher."""
    sha256: Text | None = None
    """Digest of that file."""
    licence: Text | None = None
    parent: Text | None = None
    """sha256 of the checkpoint whose weights these were initialized with."""
    guide: Text | None = None
    """sha256 of the network by which the teacher was guided."""
    init: str | None = None
    """sha256 of the generator that the run began with."""

    def __post_init__(self) -> None:
        # A file's name may hold control characters, which a configuration may not.
        force_setattr(self, "source", CONTROL.sub("\ufffd", self.source))


class CheckpointConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """config.json."""

    format_version: Text = FORMAT_VERSION
    stage: Literal["teacher", "generator", "auxiliary"]
    network: NetworkSpec
    preconditioning: dict[str, Any]
    """`kind`, and its parameters."""
    parameterization: Literal["trigflow"] = "trigflow"
    c_noise: Text
    sigma_data: Sigma
    sigma_min: Sigma
    sigma_max: Sigma
    label_dim: Images
    label_names: tuple[Text, ...] | None = None
    label_dropout: Arg.Fraction | None = None
    """Fraction of training images without a class; None: as the network's arguments say."""
    noise_dependence: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """How far D at sigma_max depends on the noise; see checkpoints/noise_dependence.py.  None: not measured."""
    two_time: bool
    guidance: Guidance | None = None
    method: Text | None = None
    recipe_hash: Text | None = None
    images_seen: Images | None = None
    images_total: Images | None = None
    """Images that the recipe asks for; a generator that has seen fewer is unfinished."""
    use_fp16: bool = False
    """Whether it is sampled in float16 on a GPU by default, as EDM's and EDM2's code computes networks made so."""
    ema: dict[str, Any] | None = None
    trained_sigmas: tuple[Sigma, ...] = ()
    """The falling noise levels of the steps that a generator was trained for; (): any."""
    sampling: SamplingDefaults = SamplingDefaults()
    encoder: dict[str, Any] = msgspec.field(default_factory=lambda: dict(PIXELS))
    """The network's images: pixels in [-1, 1], or a VAE's latents with their statistics."""
    provenance: Provenance
    results: tuple[dict[str, Any], ...] = ()
    tunings: dict[str, Tuning] = {}
    """How schedules of `sampling` were chosen, by their number of steps."""

    @property
    def latent(self) -> bool:
        """Whether the network's images are a VAE's latents."""
        return bool(self.encoder["kind"] != "pixels")

    def __post_init__(self) -> None:
        """Raises: ValueError: fields contradict one another."""
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min:g}, which is not below sigma_max, {self.sigma_max:g}")
        if self.label_names is not None and len(self.label_names) != self.label_dim:
            raise ValueError(
                f"label_names holds {counted(len(self.label_names), 'name')} for {counted(self.label_dim, 'class')}"
            )


def unfinished(config: CheckpointConfig, name: str | None = None) -> str | None:
    """Returns a sentence if a checkpoint comes from a run that has not finished; else None.

    Args:
        name: what to call it.  None: this teacher, or this generator.
    """
    seen, total = config.images_seen, config.images_total
    if seen is None or total is None or seen >= total:
        return None
    return f"{name or f'This {config.stage}'} is unfinished: {seen:,} of {total:,} images seen."


def default_nfe(config: CheckpointConfig) -> int:
    """Returns a generator's default number of evaluations: 2, or the fewest that it has a schedule for."""
    scheduled = [int(nfe) for nfe in config.sampling.sigmas]
    return 2 if 2 in scheduled or not scheduled else min(scheduled)


def describe(flow: FlowNetwork) -> dict[str, Any]:
    """Returns the fields of CheckpointConfig that the network determines."""
    network, preconditioning = flow.network, flow.preconditioning
    # By isinstance, because a sharded network has a class of its own.
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


def read_config(folder: Path) -> CheckpointConfig:
    """Returns the configuration of a checkpoint of ours.

    Raises: CheckpointError: there is none, it has another major version, or it is invalid.
    """
    path = folder / CONFIG
    require_no_pipe(path)
    try:
        if path.exists() and path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"it is not a file of at most {CONFIG_BYTES >> 20} MiB")
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        _refuse_control_characters(fields)
    except FileNotFoundError as error:
        other = describe_other_folder(folder)
        why = f"is not a checkpoint because it has no {CONFIG}: use a converted teacher or a finished run"
        raise CheckpointError(f"{folder} {other or why}") from error
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise Damaged(f"{folder} is not a checkpoint: {CONFIG} cannot be read ({error})") from error
    if "format_version" not in fields:
        why = f"is not a checkpoint of edmdistill: its {CONFIG} is another program's; give a converted teacher or a run"
        raise CheckpointError(f"{folder} {describe_other_folder(folder) or why}")
    version, (major, minor) = fields["format_version"], FORMAT_VERSION.split(".")
    supported = re.fullmatch(rf"{major}\.([0-9]{{1,9}})", version) if isinstance(version, str) else None
    if supported is None:
        raise CheckpointError(
            f"{path} has format_version {version!r:.40}, but this edmdistill reads {major}.x: upgrade "
            "edmdistill if a newer version wrote it; otherwise it is no checkpoint of edmdistill"
        )
    if int(supported[1]) > int(minor):
        fields = known_fields(fields, msgspec.inspect.type_info(CheckpointConfig))
    try:
        config: CheckpointConfig = validated(fields, CheckpointConfig)
        if config.encoder != PIXELS:
            validated(config.encoder, LatentEncoder)
        # Checkpoints of version 1.0 from official files lack the names.
        names = config.label_names or class_names(config.label_dim, config.provenance.source)
        return replace(config, label_names=names)
    except ValueError as error:
        raise Damaged(f"{path} is not a checkpoint's configuration: {error}") from error


def known_fields(value: Any, type_: msgspec.inspect.Type) -> Any:
    """Returns a value without the fields that the structs in its type do not have.

    Unknown arguments of a network stay, and are refused later: without them it would be another network.
    """
    match type_, value:
        case msgspec.inspect.StructType(), dict():
            return {
                field.name: known_fields(value[field.name], field.type) for field in type_.fields if field.name in value
            }
        case msgspec.inspect.DictType(), dict():
            return {name: known_fields(item, type_.value_type) for name, item in value.items()}
        case msgspec.inspect.UnionType(), dict():
            return known_fields(
                value, next(each for each in type_.types if not isinstance(each, msgspec.inspect.NoneType))
            )
    return value


def _refuse_control_characters(fields: Any) -> None:
    """Raises: ValueError: a string anywhere in these fields holds one."""
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
