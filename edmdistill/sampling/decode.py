"""Decodes what networks make into pictures: latents by the VAE that the checkpoint names, pixels by rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from edmdistill.arguments import checked
from edmdistill.checkpoints.encoder import LatentEncoder, latent_encoder
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.vae import Vae, cached_vae, read_vae
from edmdistill.errors import EdmDistillError, NoDecoder, counted
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.grid import to_uint8

Decoder = Callable[[Tensor], Tensor]
"""From images as a network makes them, float32 [B,C,H,W], to pictures, uint8 [B,C,H,W] or [B,3,H,W] of latents."""


class LatentDecoder:
    """Decodes a network's latents.

    Args:
        encoder: of the network's checkpoint.
        vae: by which its latents are decoded; it has their channels.
    """

    def __init__(self, encoder: LatentEncoder, vae: Vae) -> None:
        self.encoder, self.vae = encoder, vae

    @property
    def note(self) -> str | None:
        """A sentence if the VAE is not the one of the network's training data, as far as its checkpoint says."""
        recorded = self.encoder.vae_sha256
        if recorded in (None, self.vae.sha256):
            return None
        return (
            f"The VAE {self.vae.name} has other weights (sha256 {self.vae.sha256[:12]}) than that of the network's "
            f"training data ({recorded[:12]}), so colors and details may differ."
        )

    def __call__(self, x0: Tensor) -> Tensor:
        """Returns pictures of latents in the network's space.

        Args:
            x0: finite.  [B,C,h,w] float32, on any device
        Returns: uint8 [B,3,H,W], on the CPU.
        Source: EDM2, training/encoders.py: clamp(0, 1) 255, cut. In sCM's range, [-1, 1], pixels are rounded as those
            of networks without a VAE.
        """
        if not len(x0):
            size = x0.shape[-1] * self.vae.factor
            return torch.zeros(0, 3, size, size, dtype=torch.uint8, device="cpu")
        scale, bias = (x0.new_tensor(values)[:, None, None] for values in (self.encoder.scale, self.encoder.bias))
        return self.vae.decode((x0 - bias) / scale, lambda pixels: self._rounded(pixels).cpu())

    def _rounded(self, pixels: Tensor) -> Tensor:
        return pixels.clamp(0, 1).mul(255).to(torch.uint8) if self.encoder.range == "edm2" else to_uint8(pixels)


@contextmanager
def vae_on(device: torch.device | str, decoder: Decoder) -> Iterator[None]:
    """Has the VAE of a decoder, if it has one, on a device while the block runs, and then in host memory."""
    try:
        if isinstance(decoder, LatentDecoder):
            decoder.vae.model.to(device)
        yield
    finally:
        if isinstance(decoder, LatentDecoder):
            decoder.vae.model.to("cpu")


@checked
def model_decoder(
    model: Generator | Denoiser,
    vae: str | None = None,
    device: torch.device | str | None = None,
    *,
    instead: str = "use the latents as they are",
) -> Decoder:
    """Returns what turns a network's images into pictures.

    Args:
        vae: see `open_decoder`.
        device: of the VAE; default: the network's.
        instead: what a user may do without the VAE, as the end of a sentence.
    Raises: CheckpointError, EdmDistillError: see `open_decoder`; or the images are neither pixels nor known latents.
    """
    channels = model.flow.img_channels
    if model.encoder["kind"] == "pixels" and channels not in (1, 3):
        raise NoDecoder(
            f"this network makes images of {counted(channels, 'channel')}, and its checkpoint does not say how to "
            f"decode them: {instead}"
        )
    return open_decoder(model.encoder, vae, device or model.flow.device, instead=instead)


def open_decoder(
    encoder: Mapping[str, Any],
    vae: str | None = None,
    device: torch.device | str = "cpu",
    *,
    instead: str | None = None,
) -> Decoder:
    """Returns what turns a network's images into pictures.

    Args:
        encoder: of the network's checkpoint, CheckpointConfig.encoder.
        vae: folder or Hub id of the VAE, downloaded if need be; None: the one that the encoder names, if it is on this
            machine.
        device: of the VAE.
        instead: what a user may do without the VAE, as the end of a sentence.
    Raises: CheckpointError: the VAE is not here, does not fit, or cannot be read.
        EdmDistillError: a VAE for a network that works on pixels.
    """
    latents = latent_encoder(encoder)
    if latents is None:
        if vae is not None:
            raise EdmDistillError(f"--vae {vae} has no effect because the network works on pixels: leave it out")
        return to_uint8
    if vae is None:
        vae = latents.vae_name
        if vae is None or cached_vae(vae) is None:
            named = "its checkpoint names no VAE" if vae is None else f"the VAE {vae} is not in the Hub's cache"
            alternative = "" if instead is None else f", or {instead}"
            raise NoDecoder(
                f"this network makes latents, and {named}: name the VAE's folder or its Hub id with --vae{alternative}"
            )
    return LatentDecoder(latents, read_vae(vae, device, download=True, channels=len(latents.scale)))
