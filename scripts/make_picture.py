"""Draws README's picture, a row of images for each sampler: python scripts/make_picture.py RUNS OUT.png

RUNS is the folder of `make quickstart`, runs/quickstart. A column has one seed and one class.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.nn import functional

import edmdistill

COLUMNS, SCALE, GAP, MARGIN = 20, 4, 8, 150
ROWS = [("teacher", 4), ("teacher", 12), ("cosim", 1), ("cosim", 2), ("cosim", 4)]


def row(source: Path, nfe: int) -> Image.Image:
    """Images of classes 0 to 9 in turn, side by side; a teacher's by the solver of README's table."""
    teacher = source.name == "teacher"
    model = (edmdistill.load_denoiser if teacher else edmdistill.load_generator)(source)
    labels, solver = [i % 10 for i in range(COLUMNS)], "dpm-solver++2m" if teacher else None
    images = edmdistill.sample(model, nfe, seeds=range(COLUMNS), labels=labels, solver=solver)
    strip = torch.cat(list(functional.pad(images[:, 0], (0, 1), value=1.0)), dim=1)  # a white line after each
    picture = Image.fromarray((strip * 127.5 + 128).clip(0, 255).to(torch.uint8).numpy())
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


def main(runs: str, out: str) -> None:
    """Writes the picture."""
    rows = [(f"{name}, {nfe} evaluation{'s' * (nfe > 1)}", row(Path(runs) / name, nfe)) for name, nfe in ROWS]
    width, height = rows[0][1].size
    picture = Image.new("L", (MARGIN + width, len(rows) * (height + GAP) - GAP), 255)
    draw = ImageDraw.Draw(picture)
    for i, (name, strip) in enumerate(rows):
        top = i * (height + GAP)
        draw.text((0, top + height // 2), name.replace("cosim", "CoSIM"), fill=0, anchor="lm", font_size=13)
        picture.paste(strip, (MARGIN, top))
    picture.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
