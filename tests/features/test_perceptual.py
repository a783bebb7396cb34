"""Feature maps, heads and files of the user's: made by the seed, frozen, row by row."""

import copy
from pathlib import Path

import pytest
import torch
from script_files import Gap, Maps, script
from torch import Tensor, nn

from edmdistill.errors import CheckpointError, DatasetError, TrainingError
from edmdistill.features.perceptual import (
    NUM_MAPS,
    MultiScaleDiscriminator,
    PerceptualDistance,
    ScriptFeatures,
    make_discriminator,
    make_features,
)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_random_pyramid_takes_any_images(size: int, channels: int) -> None:
    like = torch.zeros(1, channels, size, size)
    features, heads = make_features((), like, 16, seed=0), make_discriminator(1, 16, seed=0)
    x = torch.randn(3, channels, size, size, requires_grad=True)
    maps = features(x)
    assert [part.shape[1:] for part in maps] == [(16, size >> level, size >> level) for level in range(NUM_MAPS)]
    logits = heads(maps)
    (slope,) = torch.autograd.grad(logits[1].sum(), x)
    assert (slope[1] != 0).any()
    assert (slope[[0, 2]] == 0).all()


def test_the_seed_decides_all_weights_and_draws_nothing_else() -> None:
    like = torch.zeros(1, 1, 8, 8)
    torch.manual_seed(5)
    one, two, other = (make_features((), like, 8, seed=seed).state_dict() for seed in (1, 1, 2))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(make_discriminator(1, 8, 3).heads[0][0].weight, make_discriminator(1, 8, 3).heads[0][0].weight)


def test_features_have_about_the_same_size_at_all_levels() -> None:
    torch.manual_seed(0)
    features = make_features((), torch.zeros(1, 3, 32, 32), 64, seed=0).requires_grad_(False)
    maps = features(0.5 * torch.randn(8, 3, 32, 32))
    assert all(0.05 < float(part.std()) < 20 for part in maps)


def test_files(tmp_path: Path) -> None:
    path = script(Maps(), tmp_path / "maps.pt", torch.zeros(1, 3, 224, 224))
    features = make_features((path,), torch.zeros(1, 1, 8, 8), 6, seed=0).requires_grad_(False).eval()
    maps = features(torch.randn(2, 1, 8, 8))
    assert [part.shape for part in maps] == [(2, 6, 8 >> level, 8 >> level) for level in range(NUM_MAPS)]
    assert isinstance(MultiScaleDiscriminator(NUM_MAPS, 6)(maps), Tensor)
    far = PerceptualDistance(script(Gap(), tmp_path / "gap.pt", *torch.zeros(2, 1, 3, 8, 8)))
    a, b = torch.rand(2, 4, 1, 16, 16)
    smooth = [nn.functional.interpolate(x, (224, 224), mode="bilinear") for x in (a, b)]
    torch.testing.assert_close(far(a, b), (smooth[0] - smooth[1]).square().mean((1, 2, 3)) / 4)
    # Shapes without numbers, by which a run is tried first, and another precision.
    shapes = copy.deepcopy(features).to("meta")(torch.empty(2, 1, 8, 8, device="meta"))
    assert [(part.shape, part.device.type) for part in shapes] == [(part.shape, "meta") for part in maps]
    assert far.to("meta")(*torch.empty(2, 4, 1, 16, 16, device="meta")).shape == (4,)
    assert features.double()(torch.randn(2, 1, 8, 8, dtype=torch.float64))[0].dtype == torch.float64


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "no.pt").write_text("no")
    for path in (tmp_path / "no.pt", tmp_path / "nowhere.pt"):
        with pytest.raises(CheckpointError, match=r"cannot be read as TorchScript.*: give what torch.jit.save wrote"):
            PerceptualDistance(str(path))
    path = script(Maps(2), tmp_path / "two.pt", torch.zeros(1, 3, 224, 224))
    with pytest.raises(TrainingError, match="gives 2 feature maps, but 4 are needed"):
        ScriptFeatures(path)(torch.zeros(1, 3, 8, 8))
    far = PerceptualDistance(script(Gap(), tmp_path / "gap.pt", *torch.zeros(2, 1, 3, 8, 8)))
    with pytest.raises(DatasetError, match=r"takes gray or RGB images, .* not .*: remove it"):
        far(*torch.zeros(2, 1, 4, 8, 8))
