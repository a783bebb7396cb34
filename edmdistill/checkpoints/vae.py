"""VAEs between images and latents: diffusers' AutoencoderKL, from a folder or from the Hub.

The weights are safetensors, checked by name and shape before a network is made of them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from edmdistill.atomic import expanded, sha256_file
from edmdistill.checkpoints.download import downloaded
from edmdistill.checkpoints.encoder import STABLE_DIFFUSION, ChannelStatistics, Range
from edmdistill.checkpoints.hub_client import REPOSITORY, cached_from_hub, download_from_hub
from edmdistill.checkpoints.layout import VAE_FILES
from edmdistill.checkpoints.store import fill, load_tensors
from edmdistill.checkpoints.vae_architecture import Architecture, read_architecture, require_json
from edmdistill.errors import CheckpointError, EdmDistillError, NoDecoder, counted
from edmdistill.optional import importing, require_installed
from edmdistill.transfer import is_out_of_memory

CONFIG, WEIGHTS = VAE_FILES
SUBFOLDER = "vae"
"""Folder of the VAE in a diffusers pipeline, which may be named in place of it."""
NEEDED_BY = "a VAE needs"
BATCH = 8
"""Images at a time, as in EDM2's code; halved where memory runs out."""
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the attention's layers in files that old versions of diffusers wrote, sd-vae-ft-mse among them."""


@dataclass
class Vae:
    """A VAE, frozen and in evaluation mode.

    Attributes:
        name: as a record has it: a repository of the Hub, or the folder's own name.
        folder: of its config.json and its weights.
        batch: images at a time.
    """

    name: str
    folder: Path
    architecture: Architecture
    model: Any
    batch: int = BATCH

    @property
    def channels(self) -> int:
        """The channels C of its latents."""
        return self.architecture.latent_channels

    @property
    def factor(self) -> int:
        """How many pixels a latent stands for, in each direction."""
        return 1 << (len(self.architecture.block_out_channels) - 1)

    @cached_property
    def sha256(self) -> str:
        """Digest of its weights."""
        return sha256_file(self.folder / WEIGHTS)

    def statistics(self, range: Range) -> ChannelStatistics:
        """Returns the declared statistics of its latents: EDM2's and sCM's for Stable Diffusion's, else its own."""
        config, channels = self.architecture, self.channels
        if config.block_out_channels == (128, 256, 512, 512) and channels == 4:
            return STABLE_DIFFUSION[range]
        mean, std = (config.shift_factor or 0.0,) * channels, (1 / config.scaling_factor,) * channels
        return ChannelStatistics(config.latents_mean or mean, config.latents_std or std)

    def encode(self, images: Tensor, range: Range) -> Tensor:
        """Returns the mean, then the standard deviation, of images' latents.

        Args:
            images: uint8 [B,3,H,W], on any device; H and W are multiples of `factor`.
        Returns: [B,2C,H/factor,W/factor] float32, on the VAE's device.
        Source: EDM2, training/encoders.py, whose pixels are in [0, 1]; sCM, appendix G, where they are in [-1, 1].
        """

        def moments(batch: Tensor) -> Tensor:
            pixels = batch.to(self.model.device).float()
            pixels = pixels / 255 if range == "edm2" else pixels / 127.5 - 1
            latents = self.model.encode(pixels.to(self.model.dtype)).latent_dist
            return torch.cat([latents.mean, latents.std], dim=1).float()

        return self._in_batches(moments, images)

    def decode(self, latents: Tensor, finish: Callable[[Tensor], Tensor] = lambda pixels: pixels) -> Tensor:
        """Returns the images of latents as the VAE has them, nominally in its range.

        Args:
            latents: [B,C,h,w], on any device.
            finish: applied to each batch of images, such as the rounding to 8 bits.
        Returns: what `finish` makes of [B,3,H,W] float32, on the VAE's device; by default, that itself.
        """

        def pixels(batch: Tensor) -> Tensor:
            decoded: Tensor = self.model.decode(batch.to(self.model.device, self.model.dtype)).sample
            return finish(decoded.float())

        return self._in_batches(pixels, latents)

    @torch.no_grad()
    def _in_batches(self, run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Returns run(rows), a batch at a time.  Raises: CheckpointError: not even one image fits in memory."""
        while True:
            try:
                return torch.cat([run(rows[at : at + self.batch]) for at in range(0, len(rows), self.batch)])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch == 1:
                    size = "x".join(map(str, rows.shape[-2:]))
                    raise CheckpointError(
                        f"{self.name} does not fit in the GPU's memory with one image of {size}: free some of it, or "
                        "choose another --device"
                    ) from error
            torch.cuda.empty_cache()
            self.batch = max(1, self.batch // 2)


def cached_vae(name: str) -> Path | None:
    """Returns the folder of a VAE, owner/name of the Hub, if it is in the Hub's cache."""
    return cached_from_hub(name, VAE_FILES) if REPOSITORY.fullmatch(name.partition("@")[0]) else None


def find_vae(name: str, *, download: bool = False) -> Path | None:
    """Returns the folder of a VAE; None if it is not on this machine.

    Args:
        name: a folder, a pipeline's folder, or owner/name of the Hub.
        download: get it from the Hub if it is not in the cache.
    Raises: HubError: the Hub refuses.
    """
    path = expanded(name)
    if path.is_dir():
        return path if (path / CONFIG).is_file() or not (path / SUBFOLDER).is_dir() else path / SUBFOLDER
    if path.exists() or not REPOSITORY.fullmatch(name.partition("@")[0]):
        return None
    return cached_vae(name) or (download_from_hub(name, VAE_FILES) if download else None)


def require_vae(name: str, *, download: bool = False) -> Path:
    """Returns the folder of a VAE.

    Args:
        name, download: see `find_vae`.
    Raises: CheckpointError: the VAE is not here, or diffusers is not installed.  HubError: the Hub refuses.
    """
    require_installed("diffusers", extra="latent", needed_by=NEEDED_BY, error=NoDecoder)
    folder = find_vae(name, download=download)
    if folder is None:
        raise CheckpointError(
            f"there is no VAE {name}: give a folder with {CONFIG} and {WEIGHTS}, or owner/name of the Hub"
        )
    return folder


def read_vae(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    download: bool = False,
    channels: int | None = None,
) -> Vae:
    """Returns a VAE that encodes and decodes. Diffusers, whose import takes seconds, is not imported for a wrong one.

    Args:
        name, download: see `find_vae`.
        dtype: of its weights and its arithmetic.
        channels: that its latents must have; None: any.
    Raises: CheckpointError: diffusers is not installed, or the VAE is not here, is no AutoencoderKL, has other
        channels, or is damaged.
        HubError: the Hub refuses.
    """
    folder, again = require_vae(name, download=download), f"and --vae {name} downloads it again"
    with downloaded(folder / CONFIG, again):
        require_json(folder / CONFIG)
    architecture = read_architecture(folder)
    if channels not in (None, architecture.latent_channels):
        raise CheckpointError(
            f"the VAE {name} has latents of {counted(architecture.latent_channels, 'channel')}, but those of the "
            f"network have {channels}: name the VAE of its training data with --vae"
        )
    _require_weights(folder)
    AutoencoderKL = diffusers_class("AutoencoderKL", extra="latent", needed_by=NEEDED_BY, error=NoDecoder)
    arguments = msgspec.structs.asdict(architecture)
    del arguments["class_name"]
    try:
        with torch.device("meta"):
            model = AutoencoderKL(**arguments)
    except Exception as error:  # the arguments are untrusted: whatever breaks, they are the cause
        raise CheckpointError(
            f"{folder / CONFIG} has arguments that make no VAE: {error!s:.300}; save the VAE with diffusers again"
        ) from error
    old = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(OLD_NAMES)})(?=\.)")
    with downloaded(folder / WEIGHTS, again):
        stored = load_tensors(folder / WEIGHTS, device)[0]
    tensors = {
        old.sub(lambda match: match[1] + OLD_NAMES[match[2]], key): tensor.to(dtype) for key, tensor in stored.items()
    }
    fill(model, tensors, str(folder / WEIGHTS))
    where = expanded(name)
    return Vae(
        where.resolve().name if where.is_dir() else name,
        folder,
        architecture,
        model.eval().requires_grad_(False),
    )


def _require_weights(folder: Path) -> None:
    path = folder / WEIGHTS
    if not os.path.lexists(path):
        pickled = path.with_suffix(".bin")
        instead = f"it has {pickled.name}, a pickle, which is not read" if pickled.exists() else "it has none"
        raise CheckpointError(f"{folder} has no {WEIGHTS} ({instead}): save the VAE with diffusers as safetensors")


def diffusers_class(name: str, *, extra: str, needed_by: str, error: type[EdmDistillError] = EdmDistillError) -> Any:
    """Returns a class of diffusers, which imports torchao where it can, without the warnings of what that lacks.

    Args, Raises: as for `importing`.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with importing("diffusers", extra=extra, needed_by=needed_by, error=error):
            return getattr(import_module("diffusers"), name)
    finally:
        logging.disable(disabled)
