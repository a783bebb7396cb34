"""The pictures that samples are pulled toward are read as they are, or refused."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.reference import load_feature_net, read_image
from edmdistill.sampling.trajectory import ReferenceGuidance


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_gray_and_rgb_are_read_as_they_are(tmp_path: Path) -> None:
    gray = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    rgb = np.stack([gray, 255 - gray, gray // 2], -1)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    for name, channels, pixels in (("gray.png", 1, gray[None]), ("rgb.png", 3, rgb.transpose(2, 0, 1))):
        found = (read_image(tmp_path / name, channels, 8) + 1) * 127.5
        assert torch.equal(found.round(), torch.from_numpy(pixels.copy()).float())


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (Image.new("L", (8, 16)), "is 8x16, but the network's images are 8x8: resize it first"),
        (Image.new("I;16", (8, 8)), r"more than 8 bits .* \(its mode is I;16\): save it as a PNG of 8 bits"),
        (Image.new("RGBA", (8, 8)), r"transparency, .* \(its mode is RGBA\)"),
        (Image.new("LA", (8, 8)), r"\(its mode is LA\)"),
    ],
)
def test_others_are_refused(picture: Image.Image, sentence: str, tmp_path: Path) -> None:
    picture.save(tmp_path / "picture.png")
    with pytest.raises(EdmDistillError, match=rf"picture\.png .*{sentence}"):
        read_image(tmp_path / "picture.png", 1, 8)


def test_latents_have_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    with pytest.raises(EdmDistillError, match=r"makes images of 4 channels, .*: leave --reference out"):
        read_image(tmp_path / "picture.png", 4, 8)


def test_a_reference_is_a_tensor() -> None:
    image: Any = np.zeros((1, 8, 8))
    with pytest.raises(EdmDistillError, match=r"ReferenceGuidance: image = \(a numpy array.* must be a tensor"):
        ReferenceGuidance(image=image, features=lambda x: x)


@pytest.mark.parametrize("side", [60_000, 30_000_000])
def test_a_bomb_is_refused_by_its_header(side: int, tmp_path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))))
    with pytest.raises(EdmDistillError, match=r"bomb\.png cannot be read as a picture"):
        load_feature_net(f"mask:{tmp_path / 'bomb.png'}", 1, 8)
