"""From images to features, by threads."""

import pytest
import torch
from tolerance import assert_rounded

from edmdistill.data.datasets import open_dataset
from edmdistill.evaluation.images import open_images
from edmdistill.evaluation.pipeline import image_digests, measure_images, pixels_sha256
from edmdistill.evaluation.shards import batches
from edmdistill.features.spaces import load_features

PIXELS = open_dataset("digits", split="test").images(range(50))


@pytest.mark.parametrize("readers", [0, 1, None])
def test_features_and_logits_are_those_of_the_space(readers: int | None) -> None:
    images = open_images(PIXELS, 10)
    object.__setattr__(images, "readers", readers)
    spaces, cores = {"digits": load_features("digits"), "pixels": load_features("pixels")}, torch.get_num_threads()
    measured = list(measure_images(images, spaces, batches(range(50), 16), logits=["digits"], digests=True))
    assert torch.get_num_threads() == cores
    assert [rows for rows, _ in measured] == list(batches(range(50), 16))
    assert {*measured[0][1]} == {"digits/features", "digits/logits", "pixels/features", "sha256"}
    arrays = {name: torch.cat([part[name] for _, part in measured]) for name in measured[0][1]}
    features, logits = spaces["digits"].features_and_logits(PIXELS)
    assert logits is not None
    # The space computes in float64, so that only the last rounding differs.
    assert_rounded(arrays["digits/features"], features, 1)
    assert_rounded(arrays["digits/logits"], logits.float(), 1)
    assert torch.equal(arrays["sha256"], image_digests(PIXELS))


def test_the_digest_is_of_sizes_and_pixels_in_order() -> None:
    digests = image_digests(PIXELS)
    whole = pixels_sha256((1, 8, 8), digests)
    assert len(whole) == 64
    others = [pixels_sha256((1, 8, 8), digests.flip(0)), pixels_sha256((1, 4, 16), digests)]
    others.append(pixels_sha256((1, 8, 8), image_digests(PIXELS.flip(-1))))
    assert len({whole, *others}) == 4
    parts = torch.cat([image_digests(PIXELS[:7]), image_digests(PIXELS[7:])])
    assert pixels_sha256((1, 8, 8), parts) == whole
