"""`encoder` of a checkpoint: how latents become a network's images, and how a command names their VAE."""

import pytest
import torch

from edmdistill.checkpoints.encoder import UNRECORDED, Encoding, latent_encoder, vae_words
from edmdistill.errors import CheckpointError


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_latents_of_the_stated_statistics_get_mean_zero_and_sigma_data(sigma_data: float) -> None:
    made = Encoding(vae_name="me/vae", vae_sha256="ab" * 32, range="scm", raw_mean=(1.5, -2.0), raw_std=(3.0, 0.5))
    encoder = made.encoder(sigma_data)
    assert encoder["kind"] == "StabilityVAEEncoder"
    assert (encoder["final_mean"], encoder["final_std"]) == (0, sigma_data)
    read = latent_encoder(encoder)
    assert read is not None
    assert (read.vae_name, read.vae_sha256, read.range) == ("me/vae", "ab" * 32, "scm")
    mean, std, scale, bias = map(torch.tensor, (made.raw_mean, made.raw_std, read.scale, read.bias))
    torch.testing.assert_close(mean * scale + bias, torch.zeros(2))
    torch.testing.assert_close((mean + std) * scale + bias, torch.full((2,), sigma_data))


def test_a_data_set_that_says_nothing_is_edm2s() -> None:
    encoder = UNRECORDED.encoder(0.5)
    assert (encoder["vae_name"], encoder["range"]) == ("stabilityai/sd-vae-ft-mse", "edm2")
    assert len(encoder["scale"]) == len(encoder["bias"]) == 4


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ({"kind": "pixels", "vae_name": "me/vae"}, []),
        ({"kind": "StabilityVAEEncoder", "vae_name": "me/vae"}, ["--vae", "me/vae"]),
        ({"kind": "StabilityVAEEncoder", "vae_name": "me/vae@v1"}, ["--vae", "me/vae@v1"]),
        ({"kind": "StabilityVAEEncoder", "vae_name": "a folder"}, ["--vae", "DIR"]),
        ({"kind": "StabilityVAEEncoder", "vae_name": "me/vae; rm"}, ["--vae", "DIR"]),
        ({"kind": "StabilityVAEEncoder"}, ["--vae", "DIR"]),
    ],
)
def test_the_words_that_name_a_vae(encoder: dict[str, str], words: list[str]) -> None:
    assert vae_words(encoder) == words


def test_pixels_have_no_encoder_and_others_must_say_how_they_are_scaled() -> None:
    assert latent_encoder({"kind": "pixels"}) is None
    with pytest.raises(
        CheckpointError, match=r"encoder 'mine' does not say how latents are scaled \(.*scale.*\): conv"
    ):
        latent_encoder({"kind": "mine", "bias": [0.0]})
