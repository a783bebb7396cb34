"""Crops and sizes of pictures, pixel by pixel those of EDM's and EDM2's dataset_tool.py.

Each transform takes a picture, RGB or (`scale` alone) grayscale, and the width and height that were asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from PIL import Image

from edmdistill.errors import DatasetError, did_you_mean

MAX_PIXELS = 2 * 89_478_485
"""The most pixels of a picture, before and while it is resized: where Pillow, and with it the official tool, stops."""
BICUBIC_REACH = 6
"""More pixels than lie between one that is resized to at least half its size and the farthest that it depends on."""
BOX, BICUBIC, LANCZOS = Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS

Picture = Image.Image
Size = tuple[int, int]


def scale(image: Picture, size: Size) -> Picture:
    """Returns all of the picture at that size, whatever this does to its proportions."""
    return image if image.size == size else image.resize(size, LANCZOS)


def center_crop(image: Picture, size: Size) -> Picture:
    """Returns the largest square in the middle at that size."""
    (width, height), side = image.size, min(image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize(size, LANCZOS)


def center_crop_wide(image: Picture, size: Size) -> Picture | None:
    """Returns the middle of a wide picture, its full width, with black bars above and below that make it a square.

    Returns: None where the picture is narrower than the size, or too low for its proportions.
    """
    width, height = size
    crop = round(width * image.height / image.width)
    if image.width < width or crop < height:
        return None
    top, bottom = (image.height - crop) // 2, (image.height + crop) // 2
    square = Image.new("RGB", (width, width))
    square.paste(image.crop((0, top, image.width, bottom)).resize(size, LANCZOS), (0, (width - height) // 2))
    return square


def center_crop_dhariwal(image: Picture, size: Size) -> Picture:
    """Returns the middle of the picture as ADM crops ImageNet: halved while it can be, resized, and then cropped.

    Raises: ValueError: it is so narrow that it would take more than MAX_PIXELS on the way.
    Source: Dhariwal & Nichol 2021, guided_diffusion/image_datasets.py.
    """
    side, halved, times = size[0], image.size, 0
    while min(halved) >= 2 * side:
        halved, times = (halved[0] // 2, halved[1] // 2), times + 1
    ratio = side / min(halved)
    resized = round(halved[0] * ratio), round(halved[1] * ratio)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} would become {resized[0]:,}x{resized[1]:,} before it is cropped, and at "
            f"most {MAX_PIXELS:,} pixels are"
        )
    left, top = (resized[0] - side) // 2, (resized[1] - side) // 2
    if times:
        image = _halve_middle(image, halved, times, max(left, top) / max(resized))
    if left:  # resize() begins with the width here, and then needs the columns alone that are kept
        image = image.resize((resized[0], halved[1]), BICUBIC).crop((left, 0, left + side, halved[1]))
        return image.resize((side, side), BICUBIC)
    return image.resize(resized, BICUBIC).crop((0, top, side, top + side))


def _halve_middle(image: Picture, halved: Size, times: int, margin: float) -> Picture:
    """Returns the picture halved so many times; black where what is left will be cropped off.

    Args:
        margin: the share of the longer side that is cropped off at either end.
    """
    longer = int(image.height > image.width)
    spare = int(margin * halved[longer]) - BICUBIC_REACH
    if spare <= 0 or image.size[longer] != halved[longer] << times or not _begins_with_width(image):
        spare = 0  # all of it: pixels of an odd side depend on where they are in it
    start = (0, spare << times) if longer else (spare << times, 0)
    image = halve(image, (*start, image.width - start[0], image.height - start[1]))
    for _ in range(times - 1):
        image = halve(image)
    if not spare:
        return image
    whole = Image.new(image.mode, halved)
    whole.paste(image, (0, spare) if longer else (spare, 0))
    return whole


def halve(image: Picture, box: tuple[int, int, int, int] | None = None) -> Picture:
    """Returns a picture, or what of it is in a box, at half its width and height, rounded down, by Pillow's box filter.

    Of an even side, reduce() makes the same sums faster, where resize() begins with the width.
    """
    box = box or (0, 0, *image.size)
    fast = _begins_with_width(image) and _reduces_alike()
    return _halve_fast(image, box) if fast else image.resize(_half(box), BOX, box)


def _begins_with_width(image: Picture) -> bool:
    """Returns whether resize() certainly does: Pillow 13 does not in pictures more than twice as high as wide."""
    return 2 * image.height <= 3 * image.width


def _half(box: tuple[int, int, int, int]) -> Size:
    return (box[2] - box[0]) // 2, (box[3] - box[1]) // 2


def _halve_fast(image: Picture, box: tuple[int, int, int, int]) -> Picture:
    size, even = _half(box), (box[2] - box[0]) % 2 == 0
    if not even:
        return image.resize(size, BOX, box)
    image = image.reduce((2, 1), box)
    return image.reduce((1, 2)) if image.height % 2 == 0 else image.resize(size, BOX)


@cache
def _reduces_alike() -> bool:
    """Returns whether this Pillow halves a wide and a high picture to the same pixels both ways."""
    noise = random.Random(0).randbytes(3 * 64 * 96)
    images = [Image.frombytes("RGB", size, noise) for size in ((96, 64), (64, 96), (95, 64), (64, 95))]
    return all(
        _halve_fast(image, (0, 0, *image.size)).tobytes() == image.resize(_half((0, 0, *image.size)), BOX).tobytes()
        for image in images
    )


class Transform(NamedTuple):
    """A transform, what it keeps of a picture, its filter, and whether the size may be wider than high."""

    apply: Callable[[Picture, Size], Picture | None]
    crop: str
    filter: str
    wide: bool = False


TRANSFORMS = {
    "none": Transform(scale, "nothing is cropped", "lanczos"),
    "center-crop": Transform(center_crop, "the largest square in the middle", "lanczos"),
    "center-crop-wide": Transform(center_crop_wide, "the full width, with black bars", "lanczos", wide=True),
    "center-crop-dhariwal": Transform(center_crop_dhariwal, "a square in the middle, after resizing", "box, bicubic"),
}
"""By the official names; `none` is what the official tool does without one."""


def find_transform(name: str, size: Size | None) -> Transform:
    """Returns the transform of a name, once it is known to suit the size.

    Raises: DatasetError: it is not known, needs a size, or needs a square.
    """
    if name not in TRANSFORMS:
        raise DatasetError(f"the transform {name!r} is not known; {did_you_mean(name, TRANSFORMS)}")
    transform = TRANSFORMS[name]
    if size is None and name != "none":
        raise DatasetError(f"the transform {name} needs a size; give --resolution, as in --resolution 64")
    if size is None:
        return transform
    width, height = size
    if width < height or (width > height and not transform.wide):
        raise DatasetError(
            f"--resolution {width}x{height} is {'higher than wide' if transform.wide else 'not square'}, and images of "
            "a data set are squares; give one number, or WIDTHxHEIGHT with center-crop-wide"
        )
    if width & (width - 1) or not 1 <= width <= 4096:
        raise DatasetError(
            f"--resolution {width} is not a power of two up to 4096, which the networks need; give 32, 64 or the like"
        )
    return transform
