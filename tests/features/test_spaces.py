"""Feature spaces: one interface for all, and what the shipped classifier of digits is worth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edmdistill import load_features
from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.data.datasets import open_dataset
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation.frechet import frechet_distance, statistics
from edmdistill.features.base import exact_float32
from edmdistill.features.spaces import FEATURE_SPACES, Pixels, embedded_space, small_classifier

TRAIN, TEST = open_dataset("digits"), open_dataset("digits", split="test")


def test_the_spaces_are_these():
    assert list(FEATURE_SPACES) == ["pixels", "inception", "inception-pytorch-fid", "dinov2", "dinov2-dgm", *EMBEDDED]
    assert all(space.name == name for name, space in FEATURE_SPACES.items())
    with pytest.raises(EdmDistillError, match="there is no feature space 'inceptoin'; did you mean 'inception'"):
        load_features("inceptoin")


@pytest.mark.parametrize("name", ["pixels", "digits"])
def test_interface(name: str) -> None:
    space = load_features(name)
    assert space.official
    images = TEST.images(range(20))
    features = space(images)
    assert space.name == name
    assert (features.dtype, len(features), features.ndim) == (torch.float32, 20, 2)
    assert features.shape[1] == (space.dim or images[0].numel())
    assert not features.requires_grad
    torch.testing.assert_close(torch.cat([space(images[:7]), space(images[7:])]), features, rtol=0, atol=1e-5)


def test_pixels_are_the_pixels() -> None:
    images = torch.tensor([0, 255]).to(torch.uint8).reshape(1, 2, 1, 1)
    assert Pixels()(images).tolist() == [[-1.0, 1.0]]


def test_the_classifier_knows_digits_that_it_has_not_seen() -> None:
    digits = load_features("digits")
    guesses = digits.logits(TEST.images(range(len(TEST)))).argmax(1)
    accuracy = (guesses == TEST.labels(range(len(TEST)))).float().mean()
    assert accuracy >= 0.98


def test_the_distance_tells_digits_from_others() -> None:
    """More noise is farther; the digits that were not trained on are near."""
    digits = load_features("digits")
    real = TRAIN.images(range(len(TRAIN)))
    rng = torch.Generator().manual_seed(0)
    reference = statistics(digits(real))

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(statistics(digits(images)), reference)

    def noisy(std: float) -> torch.Tensor:
        return (real + std * torch.randn(real.shape, generator=rng)).clamp(0, 255).to(torch.uint8)

    noise = torch.randint(256, (5000, 1, 8, 8), generator=rng).to(torch.uint8)
    assert distance(TEST.images(range(len(TEST)))) < 12
    assert distance(noisy(8)) < 2 < distance(noisy(16)) < 10 < distance(noisy(32)) < 40 < distance(noisy(64))
    assert distance(noise) > 500


def made(path: Path) -> dict[str, Any]:
    """How a file of features was made."""
    return json.loads(load_tensors(path)[1]["made"])


def test_the_file_says_how_it_was_made_and_is_small() -> None:
    digits, tiles = (EMBEDDED[name].features for name in ("digits", "tiles"))
    assert made(digits)["by"] == "python -m edmdistill.assets.make_features"  # where the script was then
    assert made(digits)["held_out_accuracy"] >= 0.98
    assert made(tiles)["by"] == "python scripts/make_features.py tiles"
    assert made(tiles)["held_out_accuracy"] >= 0.6
    assert digits.stat().st_size < 300_000
    assert tiles.stat().st_size < 400_000
    assert load_features("tiles").sha256 == "946269c9ba6e12651186805adf83ccfe0edccdce58b5cc2e9f5c8a44e9c7a756"
    assert load_features("digits").sha256 == "cd2ee813e28bf5422c392ed30589e24e65b3448812303b5ac4d31659c1ac8316"


def test_other_weights_of_the_digits_are_not_official(tmp_path: Path) -> None:
    tensors = load_tensors(EMBEDDED["digits"].features)[0]
    save_tensors(tmp_path / "other.safetensors", tensors)  # the same numbers, but another file
    space = load_features("digits", tmp_path / "other.safetensors")
    assert not space.official
    images = TEST.images(range(3))
    features, logits = space.features_and_logits(images)
    assert torch.equal(features, load_features("digits")(images))
    assert torch.equal(logits, load_features("digits").logits(images))


def test_pixels_have_no_weights() -> None:
    with pytest.raises(EdmDistillError, match="pixels has no weights"):
        load_features("pixels", EMBEDDED["digits"].features)


def test_digits_refuse_other_images() -> None:
    with pytest.raises(DatasetError, match="takes 1x8x8 images, not 3x32x32; choose one for such images"):
        load_features("digits")(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.slow
def test_the_maker_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit on the CPU and torch that made the file; elsewhere training rounds otherwise, to the same accuracy."""
    import make_features

    monkeypatch.setattr("sys.argv", ["make_features", "digits", str(tmp_path / "made.safetensors")])
    make_features.main()
    assert made(tmp_path / "made.safetensors")["held_out_accuracy"] >= 0.97


OTHERS = (torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), np.zeros((1, 1, 8, 8), np.uint8), [])


@pytest.mark.parametrize("images", OTHERS, ids=["floats", "one", "numpy", "list"])
@pytest.mark.parametrize("name", ["pixels", "digits"])
def test_images_are_bytes(name: str, images: Any) -> None:
    with pytest.raises(DatasetError, match=f"the feature space {name} takes images as a tensor, uint8"):
        load_features(name)(images)


def test_features_are_computed_in_full_float32() -> None:
    """Whatever its caller allows, who finds it allowed again."""
    matmul, cudnn, x = torch.backends.cuda.matmul, torch.backends.cudnn, torch.ones(2, 2, requires_grad=True)
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        with cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
            with torch.autocast("cpu", torch.bfloat16):
                with exact_float32():
                    assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, False)
                    assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
                    assert ((x @ x).dtype, (x @ x).requires_grad) == (torch.float32, False)
                assert ((x @ x).dtype, (x @ x).requires_grad) == (torch.bfloat16, True)
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)
            assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    finally:
        matmul.allow_tf32 = before


def test_an_embedded_space_is_its_classifier_in_double_precision() -> None:
    images = open_dataset("digits").images(range(20))
    network = small_classifier(EMBEDDED["digits"])
    network.load_state_dict(load_tensors(EMBEDDED["digits"].features)[0])
    x = images.double() / 127.5 - 1
    features, logits = load_features("digits").features_and_logits(images)
    assert (features.dtype, logits.dtype) == (torch.float32, torch.float64)
    assert torch.equal(features, network.double().features(x).float())
    assert torch.equal(logits, network(x))


def test_whose_weights_a_file_has(tmp_path: Path) -> None:
    assert [embedded_space(embedded.features) for embedded in EMBEDDED.values()] == [*EMBEDDED]
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    assert embedded_space(tmp_path / "other.safetensors") == "digits"
