"""`encoder` of a checkpoint: what the network's images are, pixels in [-1, 1] or a VAE's latents by scale and bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from edmdistill.checkpoints.hub_client import REPOSITORY
from edmdistill.checkpoints.persistence import VAE_PARAMETERS
from edmdistill.errors import CheckpointError

Range = Literal["edm2", "scm"]
"""Range of the pixels that a VAE encodes and decodes: EDM2's [0, 1], or sCM's [-1, 1], in which the VAE was trained."""
PIXELS = {"kind": "pixels"}
Name = Annotated[str, Meta(max_length=4096)]
Scales = tuple[Annotated[float, Meta(gt=0, le=1e6)], ...]
Biases = tuple[Annotated[float, Meta(ge=-1e6, le=1e6)], ...]


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of a VAE's latents, by channel.  [C] each"""

    mean: Sequence[float]
    std: Sequence[float]


STABLE_DIFFUSION: Mapping[Range, ChannelStatistics] = {
    "edm2": ChannelStatistics(VAE_PARAMETERS["raw_mean"], VAE_PARAMETERS["raw_std"]),
    "scm": ChannelStatistics((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),
}
"""Statistics of Stable Diffusion's VAE on ImageNet at 512x512.  Source: EDM2, training/encoders.py; sCM, appendix G."""


class LatentEncoder(Struct, frozen=True):
    """How the latents of a VAE become a network's images: x0 = latents scale + bias. Other keys may follow.

    Attributes:
        scale, bias: of each channel.  [C]
        range: of the pixels that the VAE takes and gives.
        vae_name: a repository of the Hub, or the name of a folder.
        vae_sha256: of the VAE's weights, where they are known.
    """

    kind: Name
    scale: Scales
    bias: Biases
    range: Range = "edm2"
    vae_name: Name | None = None
    vae_sha256: Name | None = None


class Encoding(Struct, frozen=True, kw_only=True):
    """How a data set of latents was made: `encoder` of its dataset.json. Other keys may follow.

    Attributes:
        vae_name, vae_sha256, range: see LatentEncoder.
        raw_mean, raw_std: of the latents, by channel.  [C]
    """

    vae_name: Name
    vae_sha256: Name | None = None
    range: Range
    raw_mean: Biases
    raw_std: Scales

    def encoder(self, sigma_data: float) -> dict[str, Any]:
        """Returns `encoder` of a network that is trained on these latents, scaled to that standard deviation."""
        scale = [sigma_data / std for std in self.raw_std]
        bias = [-mean * factor for mean, factor in zip(self.raw_mean, scale, strict=True)]
        target = {"final_mean": 0, "final_std": sigma_data, "scale": scale, "bias": bias}
        return {"kind": "StabilityVAEEncoder", **msgspec.to_builtins(self), **target}


UNRECORDED = Encoding(
    vae_name=str(VAE_PARAMETERS["vae_name"]),
    range="edm2",
    raw_mean=tuple(STABLE_DIFFUSION["edm2"].mean),
    raw_std=tuple(STABLE_DIFFUSION["edm2"].std),
)
"""The encoding of a data set that says nothing, as EDM2's dataset_tool.py makes them."""


def vae_words(encoder: Mapping[str, Any]) -> list[str]:
    """Returns what a command line needs to decode a network's images: nothing, or --vae and the VAE's name."""
    if encoder["kind"] == "pixels":
        return []
    name = str(encoder.get("vae_name"))
    return ["--vae", name if REPOSITORY.fullmatch(name.partition("@")[0]) else "DIR"]


def latent_encoder(encoder: Mapping[str, Any]) -> LatentEncoder | None:
    """Returns the `encoder` of a network that works on latents, or None for one that works on pixels.

    Raises: CheckpointError: it is neither pixels nor a VAE with scale and bias.
    """
    if encoder["kind"] == "pixels":
        return None
    try:
        return msgspec.convert(encoder, LatentEncoder)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"the checkpoint's encoder {encoder['kind']!r} does not say how latents are scaled ({error}): convert the "
            "official file again"
        ) from error
