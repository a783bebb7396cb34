"""config.json of a VAE: the constructor's arguments of diffusers' AutoencoderKL, in bounds, before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edmdistill.checkpoints.layout import VAE_FILES
from edmdistill.errors import CheckpointError, Damaged, counted

CONFIG, _ = VAE_FILES
CONFIG_BYTES = 2**20
Channels = Annotated[int, Meta(ge=1, le=65536)]
Level = Annotated[str, Meta(max_length=100)]
Levels = Annotated[tuple[Level, ...], Meta(min_length=1, max_length=8)]


class Architecture(Struct, frozen=True, kw_only=True):
    """The config.json of an AutoencoderKL, in bounds; other keys are ignored."""

    class_name: str = msgspec.field(name="_class_name")
    in_channels: Channels = 3
    out_channels: Channels = 3
    latent_channels: Channels = 4
    down_block_types: Levels = ("DownEncoderBlock2D",)
    up_block_types: Levels = ("UpDecoderBlock2D",)
    block_out_channels: Annotated[tuple[Channels, ...], Meta(min_length=1, max_length=8)] = (64,)
    layers_per_block: Annotated[int, Meta(ge=1, le=16)] = 1
    act_fn: Level = "silu"
    norm_num_groups: Channels = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    scaling_factor: Annotated[float, Meta(gt=0)] = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[Annotated[float, Meta(gt=0)], ...] | None = None


def require_json(path: Path) -> None:
    """Raises Damaged for a config.json that is cut off, or otherwise no JSON."""
    try:
        if path.is_file() and path.stat().st_size <= CONFIG_BYTES:
            msgspec.json.decode(path.read_bytes())
    except (OSError, RecursionError, msgspec.DecodeError) as error:
        raise Damaged(f"{path} cannot be used ({error})") from error


def read_architecture(folder: Path) -> Architecture:
    """Returns what a VAE's config.json says.

    Raises: CheckpointError: the folder's config.json is missing, or is not that of an AutoencoderKL.
    """
    path = folder / CONFIG
    try:
        if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"it is not a file of at most {CONFIG_BYTES >> 20} MiB")
        config = msgspec.json.decode(path.read_bytes(), type=Architecture)
        if config.class_name != "AutoencoderKL":
            raise ValueError(f"it describes {config.class_name[:60]!r}, not an AutoencoderKL")
        for channels in (config.in_channels, config.out_channels):
            if channels != 3:
                raise ValueError(f"its images have {counted(channels, 'channel')} and not 3")
        if not len(config.block_out_channels) == len(config.down_block_types) == len(config.up_block_types):
            raise ValueError("block_out_channels, down_block_types and up_block_types differ in length")
        for statistics in (config.latents_mean, config.latents_std):
            if statistics is not None and len(statistics) != config.latent_channels:
                raise ValueError(f"latents_mean or latents_std is not of {counted(config.latent_channels, 'channel')}")
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointError(
            f"{folder} is not a VAE of diffusers: {CONFIG} cannot be used ({error}); save the VAE with diffusers again"
        ) from error
    return config
