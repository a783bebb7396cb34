"""Reads the ADM networks of OpenAI's Consistency Models: the ImageNet 64x64 teacher, edm_imagenet64_ema.pt.

The file holds weights only, saved by torch.save: the architecture is inferred from their names and shapes. It is
NVIDIA's DhariwalUNet under other names, with these differences: the noise condition is 1000 times as large, the class
embedding is stored transposed, the rows of qkv are laid out [3, heads, C/heads], not [heads, C/heads, 3], norms always
have 32 groups, and in the networks for LSUN the embedding is added before the second norm of a block.

Facts: github.com/openai/consistency_models, cm/unet.py, cm/script_util.py and cm/karras_diffusion.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edmdistill.archives import Archive
from edmdistill.checkpoints.class_names import class_names
from edmdistill.checkpoints.config import CheckpointConfig, NetworkSpec, Provenance, describe
from edmdistill.checkpoints.download import downloaded
from edmdistill.checkpoints.store import build_flow, fill
from edmdistill.checkpoints.unsupported import NVIDIA_64, describe_entries, describe_tensors, refuse_by_name
from edmdistill.errors import CheckpointError, counted
from edmdistill.networks.flow import FlowNetwork
from edmdistill.pickles import Unreadable
from edmdistill.stored_tensors import StoredTensor

HEAD_CHANNELS = 64
RESOLUTIONS = {(1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
"""Image size by channel multipliers: the weights do not show it, but OpenAI's code derives one from the other."""

PRECONDITIONING = {"kind": "edm", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "c_noise_scale": 250.0}
"""EDM's, except that the network reads c_noise = 1000 ln(sigma) / 4."""

# Their names on the left, DhariwalUNet's on the right.
TOP = {"time_embed.0": "map_layer0", "time_embed.2": "map_layer1", "out.0": "out_norm", "out.2": "out_conv"}
RESIDUAL = {
    "in_layers.0": "norm0",
    "in_layers.2": "conv0",
    "emb_layers.1": "affine",
    "out_layers.0": "norm1",
    "out_layers.3": "conv1",
    "skip_connection": "skip",
}
ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}


class UnknownNetwork(Exception):
    """The reason why weights are not of such a network: the part of a sentence that follows the file's name."""


READABLE = "of OpenAI's .pt files, edm_imagenet64_ema.pt and others of its kind can be read"


def read_openai(path: Path, sha256: str) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns the network in a `.pt` file of OpenAI's, and its configuration.

    Raises: CheckpointError: the file holds anything else.
    """
    refuse_by_name(path)
    with downloaded(path):
        arguments, tensors = read_arguments(
            path, {name: tensor.tensor() for name, tensor in read_weights(path).items()}
        )
    flow = build_flow(NetworkSpec("adm", arguments), PRECONDITIONING, str(path))
    fill(flow.network, tensors, str(path))
    provenance = Provenance(source=path.name, sha256=sha256, licence="mit")
    names = class_names(flow.label_dim, path.name)
    return flow, CheckpointConfig(stage="teacher", label_names=names, provenance=provenance, **describe(flow))


Adm = tuple[dict[str, Any], dict[str, Tensor]]
"""DhariwalUNet's constructor arguments and tensors."""


def read_arguments(path: Path, weights: Mapping[str, Tensor]) -> Adm:
    """Returns what `to_adm` returns.  Raises: CheckpointError: the weights belong to another network."""
    try:
        return to_adm(weights)
    except Exception as error:  # the weights are untrusted: whatever breaks, they are the cause
        reason = describe_misfit(error)
        sentence = describe_tensors(weights) or (reason if ": give" in reason else f"{reason}: {READABLE}")
        raise CheckpointError(f"{path} {sentence}") from error


def describe_misfit(error: Exception) -> str:
    """Returns why weights are not of the network that they were read as: what follows the file's name in a sentence.

    Args:
        error: what their reading raised.
    """
    match error:
        case UnknownNetwork():
            return str(error)
        case KeyError():
            return f"holds other weights, without {str(error.args[0])[:80]}"
    return "holds other weights, whose shapes do not fit one another"


def read_weights(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file of torch.save, of which nothing is run, without DistributedDataParallel's prefix.

    Raises: CheckpointError: it is no state dict, or damaged.
    """
    try:
        archive = Archive(path)
        weights = archive.load("data.pkl", "data", {})
        if not isinstance(weights, dict):
            raise Unreadable("holds no plain dict of tensors: give weights such as edm_imagenet64_ema.pt")
        if not weights:
            raise Unreadable("holds an empty dict, without tensors: give weights such as edm_imagenet64_ema.pt")
        tensors = {str(name).removeprefix("module."): value for name, value in weights.items()}
        wrong = next((name for name, value in tensors.items() if not isinstance(value, StoredTensor)), None)
        if wrong is not None or len(tensors) < len(weights):
            other = describe_entries(weights)
            what = "two have the same name" if wrong is None else f"there is none under {wrong!r:.60}"
            raise Unreadable(other or f"holds no plain dict of tensors ({what}): {READABLE}")
        archive.budget.take(sum(tensor.nbytes for tensor in tensors.values()))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Unreadable as error:
        raise CheckpointError(f"{path} {error}") from error
    return tensors


def to_adm(weights: Mapping[str, Tensor], resolution: int | None = None) -> Adm:
    """Returns DhariwalUNet's constructor arguments and tensors.

    Args:
        weights: by OpenAI's names.
        resolution: the image size; None = by RESOLUTIONS.
    Raises: UnknownNetwork: they belong to another network; KeyError, ValueError ...: to a very different one.
    """
    _require_denoiser(weights["input_blocks.0.0.weight"].shape[1], weights["out.2.weight"].shape[0])
    model_channels, num_blocks, channel_mult = _architecture(weights)
    resolution = resolution or RESOLUTIONS.get(tuple(channel_mult))
    if resolution is None:
        raise UnknownNetwork(f"has channel multipliers {channel_mult}, for which the image size is not known")

    left, tensors = dict(weights), {}
    attn_resolutions = set()

    def move(theirs: str, ours: str) -> None:
        for leaf in ("weight", "bias"):
            if f"{theirs}.{leaf}" in left:
                tensors[f"{ours}.{leaf}"] = left.pop(f"{theirs}.{leaf}").float()

    first = f"enc.{resolution}x{resolution}_conv"
    for theirs, ours in {"input_blocks.0.0": first, **TOP}.items():
        move(theirs, ours)
    if "label_emb.weight" in left:
        tensors["map_label.weight"] = left.pop("label_emb.weight").float().t().contiguous()
    for sequence, res, blocks in _sequences(len(channel_mult), num_blocks, resolution):
        for layer in count():
            at = f"{sequence}.{layer}"
            if f"{at}.qkv.weight" in left:
                attn_resolutions |= {res} if sequence.startswith("input") else set()
                for leaf in ("weight", "bias"):
                    left[f"{at}.qkv.{leaf}"] = _interleave(left[f"{at}.qkv.{leaf}"])
                table = ATTENTION
            elif f"{at}.in_layers.2.weight" in left and blocks:
                block, table = blocks.pop(0), RESIDUAL
            else:
                break
            for theirs, ours in table.items():
                move(f"{at}.{theirs}", f"{block}.{ours}")
            if block.endswith(("_down", "_up")):
                for conv in ("conv0", "skip"):  # the box filter, which they do not store
                    tensors[f"{block}.{conv}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    if left:
        raise UnknownNetwork(f"holds {min(left)}, for which ADM has no place")
    arguments = {
        "img_resolution": resolution,
        "in_channels": tensors[f"{first}.weight"].shape[1],
        "out_channels": tensors["out_conv.weight"].shape[0],
        "label_dim": tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0,
        "model_channels": model_channels,
        "channel_mult": channel_mult,
        "num_blocks": num_blocks,
        "attn_resolutions": sorted(attn_resolutions, reverse=True),
        "adaptive_scale": len(tensors[f"{block}.affine.bias"]) == 2 * len(tensors[f"{block}.conv0.bias"]),
        "group_channels": 1,
    }
    return arguments, tensors


def _architecture(weights: Mapping[str, Tensor]) -> tuple[int, int, list[int]]:
    """Returns model_channels, num_blocks and channel_mult.

    Raises: UnknownNetwork: it is no ADM network; KeyError, ValueError ...: it is very different.
    """
    model_channels = weights["time_embed.0.weight"].shape[1]
    sequences = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    # A level of the decoder ends on a second residual block, which doubles the resolution.
    ups = [f"output_blocks.{j}.{k}.in_layers.2.weight" for j in range(sequences) for k in (1, 2)]
    levels = 1 + sum(name in weights for name in ups)
    num_blocks = sequences // levels - 1
    last = [f"input_blocks.{(level + 1) * (num_blocks + 1) - 1}.0.out_layers.3.weight" for level in range(levels)]
    channel_mult = [weights[name].shape[0] // model_channels for name in last]
    return model_channels, num_blocks, channel_mult


def _require_denoiser(channels_in: int, channels_out: int) -> None:
    """Requires a network from images to images: gray or RGB, because OpenAI's latents have no statistics.

    Raises: UnknownNetwork: it belongs to guided-diffusion, or is an upsampler.
    """
    if channels_in == 6:
        raise UnknownNetwork(f"is an upsampler, which reads a small image too (6 channels in): give {NVIDIA_64}")
    if channels_out == 2 * channels_in:
        raise UnknownNetwork(
            f"is a network of guided-diffusion, which learns variances too ({counted(channels_out, 'channel')} out) "
            f"on other noise levels than EDM's: give {NVIDIA_64}"
        )
    if channels_in != channels_out or channels_in not in (1, 3):
        raise UnknownNetwork(
            f"takes {counted(channels_in, 'channel')} and gives {channels_out}, where a denoiser takes and gives the "
            "1 or 3 of an image: give edm_imagenet64_ema.pt or its like"
        )


def _sequences(levels: int, num_blocks: int, resolution: int) -> Iterator[tuple[str, int, list[str]]]:
    """Yields each sequence of OpenAI's layers, its resolution, and our blocks for its residual layers, in order."""
    at = count(1)
    for level in range(levels):
        res = resolution >> level
        if level:
            yield f"input_blocks.{next(at)}", res, [f"enc.{res}x{res}_down"]
        for i in range(num_blocks):
            yield f"input_blocks.{next(at)}", res, [f"enc.{res}x{res}_block{i}"]
    yield "middle_block", res, [f"dec.{res}x{res}_in0", f"dec.{res}x{res}_in1"]
    at = count()
    for level in reversed(range(levels)):
        res = resolution >> level
        for i in range(num_blocks + 1):
            up = [f"dec.{2 * res}x{2 * res}_up"] if level and i == num_blocks else []
            yield f"output_blocks.{next(at)}", res, [f"dec.{res}x{res}_block{i}", *up]


def _interleave(rows: Tensor) -> Tensor:
    """Returns rows [3, heads, C/heads] of qkv as [heads, C/heads, 3].  [3C,...]"""
    inner = rows.shape[1:]
    split = rows.reshape(3, -1, HEAD_CHANNELS, *inner)
    return split.permute(1, 2, 0, *range(3, split.ndim)).reshape(-1, *inner)
