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
    ProjectedFeatures,
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
    make_discriminator(1, 8, 3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    weights = []
    for seed in (3, 3, 4):
        torch.rand(1)
        weights.append(make_discriminator(1, 8, seed).heads[0][0].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert len(make_discriminator(2, 8, 3).heads) == 2 * NUM_MAPS


class Two(nn.Module):
    """A gradient, and a coarser one."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.arange(16.0).reshape(1, 1, 4, 4), torch.arange(4.0).reshape(1, 1, 2, 2)]


def test_maps_are_mixed_from_coarse_to_fine() -> None:
    """Each is the sum of its own and the coarser one, of unit variance if both are; here twice the mixture."""
    mixed = ProjectedFeatures([Two()], torch.zeros(1, 1, 4, 4), 1)
    fine, coarse = Two()(torch.zeros(1))
    for layers, weight in ((mixed.across, 1.0), (mixed.scales, 2.0)):
        for layer in layers[0]:
            nn.init.zeros_(layer.weight)
            with torch.no_grad():
                layer.weight[..., layer.weight.shape[-2] // 2, layer.weight.shape[-1] // 2] = weight
    up = nn.functional.interpolate(2 * coarse, (4, 4), mode="bilinear")
    found = mixed(torch.zeros(1))
    torch.testing.assert_close(found[1], 2 * coarse)
    torch.testing.assert_close(found[0], 2 * (fine + up) / 2**0.5)


def test_features_have_about_the_same_size_at_all_levels() -> None:
    torch.manual_seed(0)
    features = make_features((), torch.zeros(1, 3, 32, 32), 64, seed=0).requires_grad_(False)
    maps = features(0.5 * torch.randn(8, 3, 32, 32))
    assert all(0.05 < float(part.std()) < 20 for part in maps)


def test_files(tmp_path: Path) -> None:
    path = script(Maps(), tmp_path / "maps.pt", torch.zeros(1, 3, 224, 224))
    features = make_features((path,), torch.zeros(1, 1, 8, 8), 6, seed=0).requires_grad_(False).eval()
    assert isinstance(features.networks[0], ScriptFeatures)
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


def test_large_images_are_compared_as_they_are(tmp_path: Path) -> None:
    far = PerceptualDistance(script(Gap(), tmp_path / "gap.pt", *torch.zeros(2, 1, 3, 8, 8)))
    a, b = torch.rand(2, 1, 1, 256, 256)
    torch.testing.assert_close(far(a, b), (a - b).square().mean((1, 2, 3)) / 4)
    far.run = lambda *inputs: torch.zeros(3)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"gap\.pt must return a distance for each of 1 pairs of images, as \[B\]"):
        far(a, b)


def test_random_features_widen_as_they_shrink_and_have_biases() -> None:
    network = make_features((), torch.zeros(1, 1, 8, 8), 8, seed=0).networks[0]
    maps = network(torch.zeros(1, 1, 8, 8))
    assert [part.shape[1] for part in maps] == [16, 32, 64, 128]
    assert all(part.std() > 0.1 for part in maps)  # of an image of zeros
    assert [part.shape[2] for part in network(torch.zeros(1, 1, 4, 4))] == [4, 2, 1, 1]


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
