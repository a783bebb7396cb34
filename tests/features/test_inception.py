"""FID's Inception against what pytorch-fid, and NVIDIA's input rule before it, compute on the same weights."""

from pathlib import Path

import pytest
import torch
from feature_files import EVALUATION, inception_weights, save_pth, sizes
from nvidia_inception import nvidia_inception, save_pickle, save_script
from safetensors.torch import load_file
from script_files import Gap, script

from edmdistill import load_features
from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.store import load_tensors
from edmdistill.errors import CheckpointError, DatasetError
from edmdistill.features.base import FeatureSpace, to_rgb
from edmdistill.features.inception import Inception, resize_like_tensorflow
from edmdistill.features.inception_network import InceptionV3

GOLDEN = load_file(EVALUATION / "inception" / "expected.safetensors")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return inception_weights()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    return save_pth(tmp_path_factory.mktemp("inception") / "pt_inception.pth", tensors)


@pytest.fixture(scope="module")
def inception(weights: Path) -> FeatureSpace:
    return load_features("inception", weights)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", sizes(GOLDEN))
def test_nvidias_rule_gives_the_official_features_and_logits(inception: FeatureSpace, size: str):
    """Image by image: an image depends on no other."""
    for image, features, logits in zip(
        GOLDEN[f"u8.{size}"], GOLDEN[f"nvidia.{size}"], GOLDEN[f"nvidia_logits.{size}"], strict=True
    ):
        found = inception.features_and_logits(image[None])
        assert all(tensor.dtype == torch.float32 for tensor in found)
        assert relative(found[0][0], features) < 1e-5
        assert relative(found[1][0], logits) < 1e-5


def test_pytorch_fids_rule_gives_its_features(weights: Path):
    space = load_features("inception-pytorch-fid", str(weights))
    assert relative(space(GOLDEN["u8.32"]), GOLDEN["pytorch_fid.32"]) < 1e-5
    assert (space.name, space.dim) == ("inception-pytorch-fid", 2048)


def test_other_weights_are_recorded_as_such(inception: FeatureSpace, weights: Path):
    assert inception.sha256 == sha256_file(weights)
    assert not inception.official


def test_gray_is_repeated():
    images = GOLDEN["u8.32"]
    assert torch.equal(to_rgb(images, "inception"), images)
    gray = to_rgb(images[:, :1], "inception")
    assert all(torch.equal(gray[:, channel], images[:, 0]) for channel in range(3))


@pytest.mark.slow
def test_torchscript_is_read_as_data_and_proves_itself_once(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    network = nvidia_inception(tensors)
    path = save_script(network, tmp_path / "inception-2015-12-05.pt")
    space = load_features("inception", path)
    images = GOLDEN["u8.32"][:1]
    with torch.no_grad():
        assert relative(space.logits(images).softmax(1), network(images, no_output_bias=True)) < 1e-5
    stored = tmp_path / "cache" / "features" / f"{space.sha256}.safetensors"
    assert load_tensors(stored)[1] == {"source_sha256": space.sha256}
    monkeypatch.setattr("edmdistill.features.inception.load_script", None)  # not run again
    assert load_features("inception", path).sha256 == space.sha256 == sha256_file(path)


class Numbered(torch.nn.Module):
    """Our network behind NVIDIA's input rule, with numbers in place of names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        network = InceptionV3()
        network.load_state_dict(tensors)
        *layers, last = network.eval().children()
        for place in (3, 6):
            layers.insert(place, torch.nn.MaxPool2d(3, 2))
        self.layers, self.last = torch.nn.Sequential(*layers), last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((resize_like_tensorflow(images.float()) - 128) / 128).mean((2, 3))


@pytest.mark.slow
def test_torchscript_of_other_names_proves_its_order(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    path = script(Numbered(tensors), tmp_path / "numbered.pt", torch.zeros(2, 3, 40, 56).byte())
    found = Inception(weights=Path(path))._net.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.slow
def test_torchscript_of_another_network_is_not_stored(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path / "cache"))
    network = nvidia_inception(tensors)
    network.layers.mixed_10.tower_2_pool = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    with pytest.raises(CheckpointError, match=r"differ from Inception's with its weights by [1-9]\.\de-0[0-3] of"):
        load_features("inception", save_script(network, tmp_path / "other.pt"))
    assert not (tmp_path / "cache").exists()


def test_nvidias_pickle_is_read_as_data(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = save_pickle(nvidia_inception(tensors), tmp_path / "inception-2015-12-05.pkl", monkeypatch)
    found = Inception(weights=path)._net.state_dict()
    assert all(torch.equal(found[name], tensors[name]) for name in found if not name.endswith("bn.weight"))
    assert all(bool((found[name] == 1).all()) for name in found if name.endswith("bn.weight"))


def test_tensorflows_resizing_reads_pixel_i_at_i_times_the_ratio():
    """A ramp that is as steep as the ratio becomes i, up to the last pixel, beyond which there is nothing."""
    ramp = torch.arange(23.0).mul(13).expand(1, 1, 23, 23)  # 299 = 13 x 23
    resized = resize_like_tensorflow(ramp)[0, 0, 0]
    torch.testing.assert_close(resized, torch.arange(299.0).clamp(max=22 * 13), rtol=0, atol=1e-3)


def test_tensorflows_resizing_treats_rows_as_columns():
    images = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(0))
    resized = resize_like_tensorflow(images)
    torch.testing.assert_close(resize_like_tensorflow(images.mT).mT, resized, rtol=0, atol=1e-5)


class Means(torch.nn.Module):
    """In place of Inception: its features are the mean colors, `gain` times; in a file behind the input rule."""

    def __init__(self, gain: float = 1.0, prepares: bool = False) -> None:
        super().__init__()
        self.gain, self.prepares = gain, prepares

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.prepares:
            x = (resize_like_tensorflow(x.float()) - 128) / 128
        return self.gain * x.mean((2, 3))


class Options(torch.nn.Module):
    """As NVIDIA's, it gives probabilities unless it is asked for features."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = torch.tensor([[1.0, 2.0, 3.0]])
        return features if return_features else features.softmax(1)


def test_a_script_is_proved_by_its_features(tmp_path: Path):
    space = Inception.__new__(Inception)
    space._net, space._device = Means(), "cpu"
    like = torch.zeros(1, 3, 40, 56).byte()
    space._prove(Path(script(Means(1 + 1e-5, prepares=True), tmp_path / "good.pt", like)))
    for gain, message in ((1.001, r"differ from Inception's with its weights by 1\.0e-03 of the largest: give"),
                          (0.0, "by (nan|inf) of the largest")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            space._prove(Path(script(Means(gain, prepares=True), tmp_path / "other.pt", like)))
    with pytest.raises(CheckpointError, match=r"gap\.pt does not compute features of images as NVIDIA's"):
        space._prove(Path(script(Gap(), tmp_path / "gap.pt", like.float(), like.float())))
    with pytest.raises(CheckpointError, match="does not compute features of images"):
        space._prove(Path(script(torch.nn.Flatten(), tmp_path / "flat.pt", like)))
    torch.jit.save(torch.jit.script(Options()), str(tmp_path / "options.pt"))
    space._net = lambda x: torch.tensor([[1.0, 2.0, 3.0]])
    space._prove(tmp_path / "options.pt")


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 4, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte()]
)
def test_other_than_8_bit_images_are_refused(inception: FeatureSpace, images: torch.Tensor):
    with pytest.raises(DatasetError, match=r"inception takes (gray or RGB images|images as a tensor, uint8)"):
        inception(images)


def test_weights_of_another_network_are_refused_in_one_sentence(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"other\.pth does not hold the weights of FID's Inception: give"):
        load_features("inception", save_pth(tmp_path / "other.pth", {"weight": torch.ones(3)}))
    part = {"fc.bias": torch.ones(1008), "Conv2d_1a_3x3.bn.bias": torch.ones(32)}
    with pytest.raises(CheckpointError, match=r"lacks Conv2d_1a_3x3\.bn\.running_mean and 469 more"):
        load_features("inception", save_pth(tmp_path / "part.pth", part))
    with pytest.raises(CheckpointError, match="does not exist: give the file"):
        load_features("inception", tmp_path / "none.pth")


def test_without_weights_the_sentence_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDMDISTILL_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="run `edmdistill fetch inception`; eval, sweep, "):
        load_features("inception")
