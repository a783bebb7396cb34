"""Converts images in [-1, 1] to uint8 and to pictures, and arranges them in grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional

GAP = 2  # pixels between two images
PAPER = 255
SMALLEST = 32  # smaller images are enlarged in a grid to this size
THUMBNAIL = 128  # pixels a side, in a grid that holds many
MARK = "edmdistill"
"""The key of a PNG's text by which grids are known, and refused as data: `GRID` of data/decode.py."""
TEXT, MARGIN = 12, 8  # font size and the space around text, in pixels


def to_uint8(images: Tensor) -> Tensor:
    """Returns clip(127.5 x + 128, 0, 255) as uint8.  Any shape, nominally in [-1, 1].  Source: EDM, generate.py."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def thumbnails(pixels: Tensor, side: int = THUMBNAIL) -> Tensor:
    """Returns pictures reduced by a whole factor to at most `side` pixels a side.  uint8 [N,C,H,W]"""
    factor = -(-pixels.shape[-1] // side)
    return pixels if factor == 1 else functional.avg_pool2d(pixels.float(), factor).round().to(torch.uint8)


def to_image(pixels: Tensor) -> Image.Image:
    """Returns a picture, grayscale or RGB, of uint8 [C,H,W], C = 1 or 3"""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def image_grid(
    images: Tensor,
    columns: int | None = None,
    *,
    labels: Sequence[int] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Returns all images side by side on white.

    Args:
        images: uint8 [N,C,H,W], C = 1 or 3.
        columns: images in a row; default: a nearly square grid, or the size of the largest class.
        labels: class of each image; every class then starts a new row, in ascending order.  [N]
        scale: enlargement factor; default: 1, or enough to bring small images to 32 pixels.
    """
    N, C, H, W = images.shape
    members = (
        [range(N)] if labels is None else [[i for i in range(N) if labels[i] == label] for label in sorted(set(labels))]
    )
    if columns is None:
        columns = math.ceil(math.sqrt(N)) if labels is None else max(map(len, members))
    rows = [group[at : at + columns] for group in members for at in range(0, len(group), columns)]
    scale = scale or max(1, math.ceil(SMALLEST / H))
    tiles = images.cpu().numpy().repeat(scale, 2).repeat(scale, 3)
    height, width = H * scale + GAP, W * scale + GAP
    canvas = np.full((C, len(rows) * height - GAP, columns * width - GAP), PAPER, np.uint8)
    for y, row in enumerate(rows):
        for x, i in enumerate(row):
            canvas[:, y * height : (y + 1) * height - GAP, x * width : (x + 1) * width - GAP] = tiles[i]
    return to_image(torch.from_numpy(canvas))


def save_grid(picture: Image.Image, file: Path | IO[bytes], **texts: str) -> None:
    """Writes a grid as a PNG with the mark of grids.

    Args:
        texts: by key; that of MARK is the digest of the request for samples that the grid shows.
    """
    about = PngInfo()
    for key, text in ({MARK: "grid"} | texts).items():
        about.add_text(key, text)
    picture.save(file, "png", pnginfo=about)


def named_rows(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Returns rows of images, each with its name on the left.  rows: uint8 [N,C,H,W] each, of one N, C, H and W."""
    grid = image_grid(torch.cat([images for _, images in rows]), columns=len(rows[0][1]))
    font = ImageFont.load_default(TEXT)
    left = max(math.ceil(font.getlength(name)) for name, _ in rows) + 2 * MARGIN
    page = Image.new(grid.mode, (left + grid.width, grid.height), "white")
    page.paste(grid, (left, 0))
    pen, height = ImageDraw.Draw(page), (grid.height + GAP) / len(rows)
    for index, (name, _) in enumerate(rows):
        pen.text((left - MARGIN, (index + 0.5) * height - GAP / 2), name, fill="black", font=font, anchor="rm")
    return page
