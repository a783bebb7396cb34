"""Pictures as the official tool reads them, and what is said to be lost of each."""

import io
from contextlib import contextmanager

import numpy as np
import pytest
from picture_files import encoded, raw_png, saved
from PIL import Image

from edmdistill.data import pictures
from edmdistill.data.pictures import CLIPPED, CMYK, DEEP, GRAYSCALE, OTHER, PALETTE, TRANSPARENCY, decode_picture
from edmdistill.errors import DatasetError


def deep(color: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    return raw_png(8, 8, 16, color, 8 * (b"\0" + bytes(range(8 * 2 * {0: 1, 2: 3, 6: 4}[color]))))


CASES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "RGB": (encoded(0, 8, 8), ()),
    "JPEG": (encoded(0, 8, 8, "RGB", "jpeg"), ()),
    "gray": (encoded(0, 8, 8, "L"), (GRAYSCALE,)),
    "gray and alpha": (encoded(0, 8, 8, "LA"), (GRAYSCALE, TRANSPARENCY)),
    "alpha": (encoded(0, 8, 8, "RGBA"), (TRANSPARENCY,)),
    "a transparent color": (saved(Image.new("RGB", (8, 8)), transparency=(1, 2, 3)), (TRANSPARENCY,)),
    "palette": (saved(Image.new("P", (8, 8), 3)), (PALETTE,)),
    "16-bit RGB": (deep(2), (DEEP,)),
    "16-bit RGBA": (deep(6), (DEEP, TRANSPARENCY)),
    "16-bit gray": (deep(0), (CLIPPED,)),
    "a byte like that of 16 bits": (b"P6\n#" + b"x" * 20 + b"\x10\n8 8\n255\n" + bytes(192), ()),
    "print": (encoded(0, 8, 8, "CMYK", "jpeg"), (CMYK,)),
    "another space": (saved(Image.new("LAB", (8, 8)), "tiff"), (OTHER,)),
}


@pytest.mark.parametrize("what", CASES)
def test_all_becomes_rgb_and_what_is_lost_is_named(what: str) -> None:
    data, changes = CASES[what]
    image, found = decode_picture(data, "set: a.png")
    assert (image.mode, image.size, found) == ("RGB", (8, 8), changes)
    if what != "another space":
        with Image.open(io.BytesIO(data)) as whole:
            assert np.array_equal(np.asarray(image), np.asarray(whole.convert("RGB")))


def test_other_formats_are_not_tried() -> None:
    """Which Pillow would read, some of them by other programs."""
    with pytest.raises(DatasetError, match=r"^set: a\.png is not a readable picture \(none of PNG, JPEG"):
        decode_picture(saved(Image.new("RGB", (8, 8)), "pcx"), "set: a.png")


def test_what_is_too_large_is_refused_and_what_is_large_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[str] = []

    @contextmanager
    def lock():
        alone.append("alone")
        yield

    monkeypatch.setattr(pictures, "_large", lock())
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64)
    monkeypatch.setattr(pictures, "LARGE", 64)
    decode_picture(encoded(0, 9, 7), "a")
    assert not alone
    decode_picture(encoded(0, 8, 8), "a")
    assert alone == ["alone"]
    with pytest.raises(DatasetError, match="5x13, and at most 64 pixels are read"):
        decode_picture(encoded(0, 5, 13), "a")
