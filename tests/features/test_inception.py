"""FID's Inception against what pytorch-fid, and NVIDIA's input rule before it, compute on the same weights."""

from pathlib import Path

import pytest
import torch
from feature_files import EVALUATION, inception_weights, save_pth, sizes
from safetensors.torch import load_file

from edmdistill import load_features
from edmdistill.atomic import sha256_file
from edmdistill.errors import CheckpointError, DatasetError
from edmdistill.features.base import FeatureSpace
from edmdistill.features.inception import resize_like_tensorflow

GOLDEN = load_file(EVALUATION / "inception" / "expected.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pth(tmp_path_factory.mktemp("inception") / "pt_inception.pth", inception_weights())


@pytest.fixture(scope="module")
def inception(weights: Path) -> FeatureSpace:
    return load_features("inception", weights)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", sizes(GOLDEN))
def test_nvidias_rule_gives_the_official_features_and_logits(inception: FeatureSpace, size: str):
    features, logits = inception.features_and_logits(GOLDEN[f"u8.{size}"])
    assert features.dtype == logits.dtype == torch.float32
    assert relative(features, GOLDEN[f"nvidia.{size}"]) < 1e-5
    assert relative(logits, GOLDEN[f"nvidia_logits.{size}"]) < 1e-5


def test_pytorch_fids_rule_gives_its_features(weights: Path):
    space = load_features("inception-pytorch-fid", str(weights))
    assert relative(space(GOLDEN["u8.32"]), GOLDEN["pytorch_fid.32"]) < 1e-5
    assert (space.name, space.dim, space.num_classes) == ("inception-pytorch-fid", 2048, 1008)


def test_other_weights_are_recorded_as_such(inception: FeatureSpace, weights: Path):
    assert inception.sha256 == sha256_file(weights)
    assert not inception.official


def test_gray_is_repeated_and_an_image_does_not_depend_on_its_batch(inception: FeatureSpace):
    images = GOLDEN["u8.32"][:, :1]
    both = inception(images)
    assert relative(inception(images[:1].expand(-1, 3, -1, -1)), both[:1]) < 1e-6


def test_tensorflows_resizing_reads_pixel_i_at_i_times_the_ratio():
    """A ramp that is as steep as the ratio becomes i, up to the last pixel, beyond which there is nothing."""
    ramp = torch.arange(23.0).mul(13).expand(1, 1, 23, 23)  # 299 = 13 x 23
    resized = resize_like_tensorflow(ramp)[0, 0, 0]
    torch.testing.assert_close(resized, torch.arange(299.0).clamp(max=22 * 13), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 4, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte()]
)
def test_other_than_8_bit_images_are_refused(inception: FeatureSpace, images: torch.Tensor):
    with pytest.raises(DatasetError, match="inception takes gray or RGB images"):
        inception(images)


def test_weights_of_another_network_are_refused_in_one_sentence(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"lacks Conv2d_1a_3x3\.bn\.bias and 471 more"):
        load_features("inception", save_pth(tmp_path / "other.pth", {"weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="does not exist: give the file"):
        load_features("inception", tmp_path / "none.pth")


def test_without_weights_the_sentence_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="run `edmdistill fetch inception`, or give a file"):
        load_features("inception")
