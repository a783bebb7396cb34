"""Images and arrays from bytes: what is in them comes out, and what a header claims is checked to the last byte."""

import io
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import ExifTags, Image

from edmdistill.data.decode import decode_array, decode_image
from edmdistill.errors import DatasetError


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 3)], ids=["gray", "rgb"])
def test_channels_come_first(shape: tuple[int, ...]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    expected = pixels[None] if len(shape) == 2 else pixels.transpose(2, 0, 1)
    assert np.array_equal(decode_image(png(Image.fromarray(pixels)), "it"), expected)


@pytest.mark.parametrize("size", [(4096, 1), (1, 4096), (4097, 1), (1, 4097)])
def test_no_side_is_longer_than_4096(size: tuple[int, int]) -> None:
    fits = max(size) == 4096
    with nullcontext() if fits else pytest.raises(DatasetError, match=r"it is .*, larger than 4096 pixels a side"):
        assert decode_image(png(Image.new("L", size)), "it").shape == (1, *size[::-1])


@pytest.mark.parametrize(("form", "lossy"), [("PNG", False), ("BMP", False), ("JPEG", True), ("WEBP", True)])
def test_lossy_formats_are_refused_where_that_matters(form: str, lossy: bool) -> None:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, form)
    assert decode_image(out.getvalue(), "it").shape == (3, 4, 4)
    with pytest.raises(DatasetError, match=f"it is a {form}, and lossy") if lossy else nullcontext():
        decode_image(out.getvalue(), "it", lossless=True)


@pytest.mark.parametrize(
    ("tags", "turned"), [({}, 0), ({"Make": "x"}, 0), ({"Orientation": 1}, 0), ({"Orientation": 6}, 1)]
)
def test_what_exif_would_turn_is_told(tags: dict[str, object], turned: int) -> None:
    exif = Image.Exif()
    for name, value in tags.items():
        exif[ExifTags.Base[name]] = value
    out, told = io.BytesIO(), list[int]()
    Image.new("RGB", (4, 4)).save(out, "PNG", exif=exif)
    decode_image(out.getvalue(), "it", on_turned=lambda: told.append(1))
    assert sum(told) == turned


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version)
    return out.getvalue()


VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("array", [VALUES, VALUES[:0], VALUES.reshape(-1), np.float64(3), VALUES > 2])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_as_numpy_writes_them(array: np.ndarray, version: tuple[int, int]) -> None:
    found = decode_array(npy(np.asanyarray(array), version), "it")
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_one_column_lies_alike_in_both_orders() -> None:
    column = npy(VALUES[:, :1]).replace(b"'fortran_order': False", b"'fortran_order': True ")
    assert np.array_equal(decode_array(column, "it"), VALUES[:, :1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.asfortranarray(VALUES)), "Fortran order: save numpy.ascontiguousarray of it"),
        (npy(VALUES, (3, 0)), "version 3.0 of the format"),
        (npy(VALUES)[:-1], "its header claims 24 bytes, but there are 23"),
        (npy(VALUES.reshape(1, 1, 1, 1, 1, 1, 1, 2, 3)), "shape .1, 1, 1, 1, 1, 1, 1, 2, 3."),
        (npy(VALUES).replace(b"(2, 3), }", b"(-2,-3),}"), "shape .-2, -3."),
        (npy(np.array([None])), "they are pickles"),
        (b"\x93NUMPY", "reading magic string"),
    ],
)
def test_arrays_that_are_not_read(data: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"it is not a readable array \(.*{message}"):
        decode_array(data, "it")
