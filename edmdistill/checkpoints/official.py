"""Networks in official files as ours: how NVIDIA's classes and arguments, and OpenAI's weights, map to ours."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edmdistill.checkpoints.class_names import KNOWN_FILES, official_class_names
from edmdistill.checkpoints.config import CheckpointConfig, NetworkSpec, Provenance, describe
from edmdistill.checkpoints.encoder import PIXELS
from edmdistill.checkpoints.nvidia import OfficialCheckpoint
from edmdistill.checkpoints.openai import UnknownNetwork, read_openai
from edmdistill.checkpoints.persistence import DAMAGED
from edmdistill.checkpoints.source import Source, open_source
from edmdistill.checkpoints.store import build_flow, fill
from edmdistill.checkpoints.unsupported import describe_folder
from edmdistill.errors import CheckpointError
from edmdistill.networks import NETWORKS
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.magnitude import GAIN_LAYERS
from edmdistill.networks.preconditioning import IDDPM, PRECONDITIONINGS

PRECONDITIONING_CLASSES = {
    "EDMPrecond": "edm",
    "ECMPrecond": "consistency",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "iddpm",
    "Precond": "edm",
}
NETWORK_CLASSES = {"SongUNet": ("song", "model."), "DhariwalUNet": ("adm", "model."), "UNet": ("edm2", "unet.")}
"""Our network's kind, and the prefix of its tensors in the official state dict."""
_OURS = {"two_time", "positional_time", "double_norm", "guided", "logvar_heads", "split_times"}
OUR_ARGUMENTS = {
    "edm2": _OURS | {"label_dropout"},
    "song": _OURS | {"logvar_channels"},
    "adm": _OURS | {"logvar_channels", "adaptive_scale", "group_channels"},
}
"""Constructor arguments that the official class of a kind does not have."""
IGNORED_ARGUMENTS = {"use_fp16", "model_type"}
"""Official arguments that do not change what the network computes."""
OTHER_DEFAULTS: Mapping[str, Mapping[str, object]] = {"ECMPrecond": {"sigma_min": 0.003}}
"""Defaults of an official class that are not our preconditioning's, but for EDM's range, which is unlimited there."""


def outline_official(official: OfficialCheckpoint) -> FlowNetwork:
    """Returns the network of an official pickle on the meta device.

    Raises: CheckpointError: arguments are unknown or make no network.
    """
    kind, _ = NETWORK_CLASSES[official.network_class]
    return build_flow(NetworkSpec(kind, _arguments(official, kind)), _preconditioning(official), str(official.path))


def build_official(
    official: OfficialCheckpoint, *, upcast: bool = False, tensors: Mapping[str, Tensor] | None = None
) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network in an official pickle, in float32, and its configuration.

    Arguments, names and shapes are compared with our network before any memory is allocated.

    Args:
        upcast: EDM2 stores float16, and the official code rounds gain / sqrt(fan_in) to it. False keeps that rounding
            and so the official images; True is the network upcast first, which moves them by up to 7e-4.
        tensors: to use in place of its own, by their official names.
    Raises: CheckpointError: arguments are unknown or make no network, or tensors do not fit it.
    """
    where, (_, prefix) = str(official.path), NETWORK_CLASSES[official.network_class]
    flow = outline_official(official)
    if tensors is None:  # one by one, so that no second copy is in memory; a gain stays as it is, see `_round_gains`
        tensors = {
            name: stored.tensor(torch.float32 if stored.shape else None) for name, stored in official.stored.items()
        }
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if isinstance(flow.preconditioning, IDDPM):  # its noise levels are stored, but follow from its arguments
        levels = tensors.pop("u", torch.empty(0))
        if levels.shape != flow.preconditioning.levels.shape or not levels.allclose(flow.preconditioning.levels):
            raise CheckpointError(
                f"{where} holds other noise levels than its arguments give: it is damaged; download it again"
            )
    fill(flow.network, tensors, where)
    if not upcast:
        _round_gains(flow.network)
    names, file = official_class_names(official), KNOWN_FILES.get(official.sha256)
    config = CheckpointConfig(
        stage="teacher",
        encoder=_encoder(official),
        use_fp16=bool(official.attributes.get("use_fp16")),
        label_names=None if names is None else tuple(names),
        provenance=Provenance(
            source=official.path.name, sha256=official.sha256, licence=file.licence if file else "cc-by-nc-sa-4.0"
        ),
        **describe(flow),
    )
    return flow.float(), config


def edm_arguments(tensors: Mapping[str, Tensor], kind: Literal["song", "adm"]) -> dict[str, Any]:
    """Returns the constructor arguments of DDPM++ or ADM that the names, without prefix, and shapes of tensors imply.

    Raises: UnknownNetwork: they belong to another network; KeyError, ValueError ...: to a similar one.
    """
    pattern = re.compile(r"enc\.(\d+)x\1_block(\d+)\.(conv0|qkv)\.weight")
    blocks = [match for name in tensors if (match := pattern.fullmatch(name))]
    if not blocks:
        raise UnknownNetwork("holds other weights, without blocks of an encoder such as enc.64x64_block0")
    sizes = sorted({int(match[1]) for match in blocks}, reverse=True)
    whole = f"{sizes[0]}x{sizes[0]}"
    out = {"adm": "out_conv", "song": f"dec.{whole}_aux_conv"}[kind]
    channels = tensors["map_layer0.weight"].shape[1]
    widths = [tensors[f"enc.{size}x{size}_block0.conv0.weight"].shape[0] for size in sizes]
    augment, label = tensors.get("map_augment.weight"), tensors.get("map_label.weight")
    return {
        "img_resolution": sizes[0],
        "in_channels": tensors[f"enc.{whole}_conv.weight"].shape[1],
        "out_channels": tensors[f"{out}.weight"].shape[0],
        "label_dim": 0 if label is None else label.shape[1],
        "augment_dim": 0 if augment is None else augment.shape[1],
        "model_channels": channels,
        "channel_mult": [width // channels for width in widths],
        "channel_mult_emb": tensors["map_layer0.weight"].shape[0] // channels,
        "num_blocks": 1 + max(int(match[2]) for match in blocks),
        "attn_resolutions": sorted({int(match[1]) for match in blocks if match[3] == "qkv"}, reverse=True),
        "dropout": 0.0,
    }


def _arguments(official: OfficialCheckpoint, kind: str) -> dict[str, Any]:
    """Returns our network's constructor arguments.  Its defaults are the official ones."""
    known = inspect.signature(NETWORKS[kind]).parameters.keys() - OUR_ARGUMENTS[kind]
    arguments = official.network_arguments | {
        name: value for name, value in official.arguments.items() if name in known & {"logvar_channels"}
    }
    outer = {"img_channels"} | {field.name for field in fields(PRECONDITIONINGS[_preconditioning(official)["kind"]])}
    unknown = (arguments.keys() - known) | (official.arguments.keys() - known - outer - IGNORED_ARGUMENTS)
    if unknown:
        raise CheckpointError(
            f"{official.path} was made with the argument {min(unknown)}, which {official.network_class} does not "
            f"have: {DAMAGED}"
        )
    return arguments


def _preconditioning(official: OfficialCheckpoint) -> dict[str, Any]:
    """Returns kind and arguments of our preconditioning."""
    kind = PRECONDITIONING_CLASSES[official.preconditioning_class]
    arguments = {**OTHER_DEFAULTS.get(official.preconditioning_class, {}), **official.arguments}
    numbers = {}
    for name in arguments.keys() & {field.name for field in fields(PRECONDITIONINGS[kind])}:
        # The official code computes with the object's attribute, where it has one.
        value = official.attributes.get(name, arguments[name])
        if not (name in ("sigma_min", "sigma_max") and value in (0, math.inf)):
            numbers[name] = value
    return {"kind": kind, **numbers}


def _encoder(official: OfficialCheckpoint) -> dict[str, Any]:
    """Returns `encoder` of our configuration."""
    if official.encoder is None or official.encoder["class_name"] == "StandardRGBEncoder":
        return dict(PIXELS)
    other = {"class_name", "arguments", "batch_size"}
    statistics = {name: value for name, value in official.encoder.items() if name not in other}
    return {"kind": official.encoder["class_name"], **statistics}


@torch.no_grad()
def _round_gains(network: nn.Module) -> None:
    """Rounds gain / sqrt(fan_in) to the gain's own precision, as the official EDM2 code does where that is float16."""
    for layer in network.modules():
        for name, scaled in GAIN_LAYERS.items():
            gain = getattr(layer, name, None)
            if gain is not None and gain.dtype != torch.float32:
                root = math.sqrt(getattr(layer, scaled).weight[0].numel())
                setattr(layer, name, nn.Parameter((gain / root).float() * root))


def load_official(source: str | Path | Source) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network in a file of NVIDIA's or OpenAI's, in float32, with one time, and its configuration.

    Raises: CheckpointError: it is neither.
    """
    source = open_source(source)
    if source.path.is_dir():
        raise CheckpointError(f"{source.path} {describe_folder(source.path)}")
    if source.is_archive:
        return read_openai(source.path, source.sha256)
    if PRECONDITIONING_CLASSES[source.official.preconditioning_class] == "consistency":
        raise CheckpointError(
            f"{source.path} is a consistency model of ECT, a few-step generator and not a teacher: to sample and "
            "measure it, convert it with --generator ect"
        )
    return build_official(source.official)
