"""`data prepare` against the official dataset_tool.py, on the same pictures, one after the other in every round.

    python benchmarks/data_prepare.py CHECKOUT [PICTURES] [--count 400] [--sizes 64 256 512] [--rounds 5] [--workers 2]

CHECKOUT is a clone of NVlabs/edm2. Its tool runs in this process: without PyTorch's start, and without its VAE. Without
PICTURES, JPEGs of colored noise in ImageNet's usual sizes are made. The zips of both are compared pixel by pixel.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, __version__

from edmdistill.data.prepare import prepare_data

SHAPES = ((375, 500), (500, 375), (333, 500), (375, 500))
"""Height and width of the pictures that are made."""
TRANSFORMS = "center-crop-dhariwal", "center-crop"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    official = load_official(options.checkout)
    with tempfile.TemporaryDirectory() as folder:
        pictures = options.pictures or make_pictures(Path(folder) / "pictures", options.count)
        print(f"{options.workers} workers, {os.cpu_count()} cores, Pillow {__version__}, {pictures.name}")
        for transform in TRANSFORMS:
            for size in options.sizes:
                print(compare(official, pictures, Path(folder), transform, size, options), flush=True)


def compare(
    official: Callable[..., None], source: Path, folder: Path, transform: str, size: int, options: argparse.Namespace
) -> str:
    """Returns a line on both at one size."""
    theirs, ours = folder / "theirs.zip", folder / "ours.zip"

    def run_theirs() -> None:
        official(str(source), str(theirs), options.count, transform, (size, size))

    def run_ours() -> None:
        prepare_data(
            source,
            ours,
            resolution=size,
            transform=transform,
            max_images=options.count,
            workers=options.workers,
            overwrite=True,
        )

    times = np.array([[seconds(run) for run in (run_theirs, run_ours)] for _ in range(options.rounds + 1)])[1:]
    count = require_equal(theirs, ours)
    slow, fast = count / np.median(times, axis=0)
    ratios = times[:, 0] / times[:, 1]
    return (
        f"{transform} {size}: official {slow:.0f} images/s, ours {fast:.0f}, ratio {np.median(ratios):.2f} "
        f"({ratios.min():.2f} to {ratios.max():.2f}), {count} images equal"
    )


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        run()
    return time.perf_counter() - start


def require_equal(theirs: Path, ours: Path) -> int:
    """Returns the number of images, once names, pixels and labels are known to be the same."""
    with zipfile.ZipFile(theirs) as a, zipfile.ZipFile(ours) as b:
        assert a.namelist() == b.namelist()
        assert json.loads(a.read("dataset.json"))["labels"] == json.loads(b.read("dataset.json"))["labels"]
        names = [name for name in a.namelist() if name.endswith(".png")]
        for name in names:
            one, two = (Image.open(io.BytesIO(archive.read(name))) for archive in (a, b))
            assert one.mode == two.mode, name
            assert one.tobytes() == two.tobytes(), name
    return len(names)


def load_official(checkout: Path) -> Callable[..., None]:
    """Returns the function behind the tool's `convert`, with an empty module in place of its VAE."""
    encoders: Any = types.ModuleType("training.encoders")
    encoders.StabilityVAEEncoder = None
    sys.modules["training"], sys.modules["training.encoders"] = types.ModuleType("training"), encoders
    sys.path.insert(0, str(checkout))
    import dataset_tool

    convert: Callable[..., None] = dataset_tool.convert.callback
    return convert


def make_pictures(folder: Path, count: int) -> Path:
    """Makes JPEGs with the spectrum of photographs, of about ImageNet's bytes a pixel."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = SHAPES[i % len(SHAPES)]
        frequency = np.fft.rfftfreq(width)[None] ** 2 + np.fft.fftfreq(height)[:, None] ** 2
        spectra = [rng.normal(size=(2, *frequency.shape)) for _ in range(4)]
        channels = []
        for own in spectra[1:]:
            real, imaginary = spectra[0] + 0.3 * own
            values = np.fft.irfft2((real + 1j * imaginary) / (frequency + 1e-5) ** 0.525, s=(height, width))
            channels.append(120 + 50 * (values - values.mean()) / values.std())
        path = folder / f"class{i % 5}" / f"{i:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


if __name__ == "__main__":
    main()
