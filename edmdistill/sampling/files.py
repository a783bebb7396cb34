"""Where samples go: a folder of PNGs, one PNG of them all, or an .npz. Written aside and renamed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edmdistill.atomic import atomic_write
from edmdistill.errors import EdmDistillError
from edmdistill.sampling.grid import image_grid, to_image, to_uint8

GRID_MOST = 1024  # samples in a grid
NO_CLASS = -1  # what stands in an .npz for the class of an unconditional sample


def check_output(out: Path, *, latent: bool) -> None:
    """Finds out before the work begins whether its result can be written.

    Raises: EdmDistillError: a format that is not written, latents as pictures, or a place that cannot be written.
    """
    if latent and out.suffix != ".npz":
        raise EdmDistillError(
            f"{out}: this network makes latents of a VAE, which are no pictures before they are decoded; "
            "write them to a file that ends in .npz"
        )
    if out.suffix.lower() in {".jpg", ".jpeg", ".webp", ".gif", ".npy", ".zip"}:
        raise EdmDistillError(f"{out}: {out.suffix} is not written; name an .npz, a .png for a grid, or a folder")
    is_file = out.suffix in {".npz", ".png"}
    if out.exists() and out.is_dir() == is_file:
        found, wanted = ("folder", "file") if is_file else ("file", "folder")
        raise EdmDistillError(f"{out} is a {found} already, and a {wanted} was to be written: choose another name")
    there = next(path for path in out.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise EdmDistillError(
            f"{out} cannot be written, since {there} is no folder that you may write to: choose another"
        )


def read_image(path: Path, channels: int, resolution: int) -> Tensor:
    """One picture of a size, gray or RGB as asked.  [C,H,W] float32 in [-1, 1]

    Raises: EdmDistillError: it is no picture, or of another size.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise EdmDistillError(f"{path} cannot be read as a picture ({error}): give a PNG") from error
    if pixels.shape[:2] != (resolution, resolution):
        raise EdmDistillError(
            f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, but the network's images are {resolution}x{resolution}: "
            "resize it first"
        )
    return torch.from_numpy(pixels.reshape(resolution, resolution, channels)).permute(2, 0, 1) / 127.5 - 1


def write_samples(
    out: Path, samples: Tensor, seeds: Sequence[int], classes: Sequence[int] | None, *, latent: bool
) -> None:
    """Writes what `sample` returned.

        NAME.npz: images uint8 [N,H,W,C] (or latents float32 [N,C,H,W]), seeds and labels int64 [N], -1 = no class
        NAME.png: a grid
        NAME: a folder with 000000.png for seed 0 ..., and grid.png; other files there stay

    A grid shows the first 1024 samples, with a row for each class where they hold two or more of a class on average.
    """
    if out.suffix == ".npz":
        labels = [NO_CLASS] * len(seeds) if classes is None else classes
        with atomic_write(out) as new, new.open("wb") as file:
            save = partial(np.savez, file, seeds=np.array(seeds, np.int64), labels=np.array(labels, np.int64))
            if latent:
                save(latents=samples.numpy())
            else:
                save(images=to_uint8(samples).permute(0, 2, 3, 1).numpy())
        return
    pixels = to_uint8(samples)
    shown = None if classes is None else classes[:GRID_MOST]
    rows = shown if shown is not None and 2 * len(set(shown)) <= len(shown) else None
    grid = image_grid(pixels[:GRID_MOST], labels=rows)
    if out.suffix == ".png":
        with atomic_write(out) as new:
            grid.save(new, "png")
        return
    names = [f"{seed:06d}.png" for seed in seeds]
    pictures = [*zip(names, map(to_image, pixels), strict=True), ("grid.png", grid)]
    if out.exists():
        for name, picture in pictures:
            with atomic_write(out / name) as new:
                picture.save(new, "png")
        return
    with atomic_write(out) as new:
        new.mkdir()
        for name, picture in pictures:
            picture.save(new / name)
