"""Crops and sizes: by hand on small pictures, and the fast halving against Pillow's own."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from edmdistill.data import transforms
from edmdistill.data.transforms import (
    BICUBIC,
    BOX,
    LANCZOS,
    TRANSFORMS,
    center_crop,
    center_crop_dhariwal,
    center_crop_wide,
    find_transform,
    halve,
    scale,
)
from edmdistill.errors import DatasetError


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = (3,) if mode == "RGB" else ()
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 300), st.integers(2, 300), st.sampled_from(("RGB", "L")))
def test_halving_is_pillows_box_filter(width: int, height: int, mode: str) -> None:
    image = noise(width, height, mode)
    assert halve(image).tobytes() == image.resize((width // 2, height // 2), BOX).tobytes()


def test_another_pillow_that_reduces_otherwise_is_not_used_to_halve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transforms, "_halve_fast", lambda image, box: image.resize((image.width // 2, image.height // 2), 0)
    )
    transforms._reduces_alike.cache_clear()
    try:
        image = noise(64, 32)
        assert halve(image).tobytes() == image.resize((32, 16), BOX).tobytes()
    finally:
        transforms._reduces_alike.cache_clear()


def official_dhariwal(image: Image.Image, side: int) -> Image.Image:
    """Guided diffusion's arithmetic, step by step."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), BOX)
    ratio = side / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


@settings(deadline=None, max_examples=60)
@given(st.integers(16, 150), st.integers(16, 150), st.sampled_from((1, 2, 4)), st.sampled_from((8, 16, 32)))
@example(125, 93, 4, 16)
@example(93, 125, 4, 16)
@example(60, 88, 2, 32)
@example(77, 28, 2, 8)
@example(75, 109, 1, 32)
def test_what_is_cropped_off_is_not_computed_and_changes_nothing(
    width: int, height: int, factor: int, side: int
) -> None:
    image = noise(factor * width, factor * height)
    assert center_crop_dhariwal(image, (side, side)).tobytes() == official_dhariwal(image, side).tobytes()


@pytest.mark.parametrize(("width", "height", "corner"), [(8, 5, (1, 0)), (4, 9, (0, 2)), (4, 4, (0, 0))])
def test_the_center_of_a_picture_is_kept_where_nothing_is_resized(
    width: int, height: int, corner: tuple[int, int]
) -> None:
    side, (left, top) = min(width, height), corner
    pixels = np.asarray(noise(width, height))[top : top + side, left : left + side]
    assert np.array_equal(np.asarray(center_crop(noise(width, height), (side, side))), pixels)
    assert np.array_equal(np.asarray(center_crop_dhariwal(noise(width, height), (side, side))), pixels)


def test_a_picture_of_the_size_is_not_touched() -> None:
    assert scale(noise(8, 8), (8, 8)).tobytes() == noise(8, 8).tobytes()
    assert scale(noise(8, 4), (8, 8)).size == (8, 8)


def test_a_wide_picture_gets_black_bars() -> None:
    square = np.asarray(center_crop_wide(noise(8, 4), (8, 4)))
    assert square.shape == (8, 8, 3)
    assert not square[:2].any()
    assert not square[6:].any()
    assert np.array_equal(square[2:6], np.asarray(noise(8, 4)))


@pytest.mark.parametrize(("width", "height", "kept"), [(11, 8, (1, 7)), (9, 8, (0, 7)), (16, 12, (3, 9))])
def test_the_middle_of_a_wide_picture_is_kept(width: int, height: int, kept: tuple[int, int]) -> None:
    """So many rows as it would have at the width that is asked for, whether it has more columns or not."""
    square = center_crop_wide(noise(width, height), (8, 4))
    assert square is not None
    middle = noise(width, height).crop((0, kept[0], width, kept[1])).resize((8, 4), LANCZOS)
    assert square.crop((0, 2, 8, 6)).tobytes() == middle.tobytes()


@pytest.mark.parametrize(("width", "height"), [(7, 8), (8, 3)])
def test_what_is_too_small_for_a_wide_picture_is_left_out(width: int, height: int) -> None:
    assert center_crop_wide(noise(width, height), (8, 4)) is None


def test_a_ribbon_does_not_take_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="1x60000 would become 64x3,840,000"):
        center_crop_dhariwal(Image.new("RGB", (1, 60000)), (64, 64))
    monkeypatch.setattr(transforms, "MAX_PIXELS", 64 * 128)
    assert center_crop_dhariwal(Image.new("RGB", (1, 2)), (64, 64)).size == (64, 64)
    with pytest.raises(ValueError, match="at most 8,192 pixels are"):
        center_crop_dhariwal(Image.new("RGB", (1, 3)), (64, 64))


@pytest.mark.parametrize(
    ("name", "size"), [("none", None), ("none", (1, 1)), ("center-crop-wide", (64, 32)), ("center-crop", (4096, 4096))]
)
def test_sizes_that_suit(name: str, size: tuple[int, int] | None) -> None:
    assert find_transform(name, size) is TRANSFORMS[name]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("center-crob", (64, 64), "did you mean 'center-crop'"),
        ("center-crop", None, "needs a size"),
        ("center-crop", (64, 32), "not square"),
        ("center-crop-wide", (32, 64), "higher than wide"),
        ("none", (60, 60), "no power of two|not a power of two"),
        ("none", (8192, 8192), "up to 4096"),
    ],
)
def test_sizes_that_do_not_suit(name: str, size: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        find_transform(name, size)
