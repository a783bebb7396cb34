"""Decoding: the official pixels of latents, sCM's range, and which VAE is taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.checkpoints.vae import read_vae
from edmdistill.errors import CheckpointError, EdmDistillError
from edmdistill.sampling.decode import LatentDecoder, open_decoder
from edmdistill.sampling.grid import to_uint8


@pytest.fixture(scope="module")
def vae(golden: Path) -> str:
    return str(golden / "evaluation/latents/tiny-vae")


@pytest.fixture(scope="module")
def case(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "evaluation/latents/expected.safetensors")


@pytest.fixture(scope="module")
def encoder(golden: Path) -> dict[str, Any]:
    """Of an official teacher."""
    return build_official(read_official(golden / "edm2-latent-cond.pkl"))[1].encoder


def test_the_official_pixels(encoder: dict[str, Any], vae: str, case: dict[str, torch.Tensor]) -> None:
    pixels = open_decoder(encoder, vae)(case["latents"])
    assert (pixels.dtype, pixels.shape) == (torch.uint8, case["decoded_u8"].shape)
    difference = (pixels.int() - case["decoded_u8"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_the_range_of_scm(encoder: dict[str, Any], vae: str, case: dict[str, torch.Tensor]) -> None:
    decode = open_decoder(encoder | {"range": "scm"}, vae)
    assert isinstance(decode, LatentDecoder)
    scale, bias = (torch.tensor(encoder[name])[:, None, None] for name in ("scale", "bias"))
    with torch.no_grad():
        pixels = decode.vae.model.decode((case["latents"] - bias) / scale).sample
    difference = (decode(case["latents"]).int() - to_uint8(pixels).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_no_latents_are_no_pictures(encoder: dict[str, Any], vae: str) -> None:
    assert open_decoder(encoder, vae)(torch.zeros(0, 4, 8, 8)).shape == (0, 3, 64, 64)


def test_pixels_are_rounded(vae: str) -> None:
    assert open_decoder({"kind": "pixels"})(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]
    with pytest.raises(EdmDistillError, match="has no effect because the network works on pixels"):
        open_decoder({"kind": "pixels"}, vae)


def test_which_vae(encoder: dict[str, Any], vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint names one of the Hub, which is not downloaded unasked; a folder's name is not looked up."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(Path(vae).parent)
    message = "the VAE stabilityai/sd-vae-ft-mse is not in the Hub's cache: name .* with --vae$"
    with pytest.raises(CheckpointError, match=message):
        open_decoder(encoder)
    with pytest.raises(CheckpointError, match="the VAE tiny-vae is not in the Hub's cache"):
        open_decoder(encoder | {"vae_name": "tiny-vae"})
    with pytest.raises(CheckpointError, match="its checkpoint names no VAE"):
        open_decoder({name: encoder[name] for name in ("kind", "scale", "bias")})


def test_a_vae_of_other_weights_is_noted(encoder: dict[str, Any], vae: str) -> None:
    decode = open_decoder(encoder | {"vae_sha256": "0" * 64}, vae)
    assert isinstance(decode, LatentDecoder)
    assert decode.note is not None
    assert "other weights" in decode.note
    assert LatentDecoder(replace(decode.encoder, vae_sha256=decode.vae.sha256), decode.vae).note is None
    assert LatentDecoder(replace(decode.encoder, vae_sha256=None), decode.vae).note is None


def test_a_vae_of_other_channels(encoder: dict[str, Any], vae: str) -> None:
    with pytest.raises(CheckpointError, match="has latents of 4 channels, but those of the network have 3"):
        open_decoder(encoder | {"scale": [1.0] * 3, "bias": [0.0] * 3}, vae)


def test_the_vae_may_run_in_half_precision(encoder: dict[str, Any], vae: str, case: dict[str, torch.Tensor]) -> None:
    pixels = LatentDecoder(open_decoder(encoder, vae).encoder, read_vae(vae, dtype=torch.bfloat16))(case["latents"])
    assert (pixels.int() - case["decoded_u8"].int()).abs().float().mean() < 4
