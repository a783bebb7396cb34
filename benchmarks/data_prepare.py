"""`data prepare` against the official dataset_tool.py, on the same pictures, one after the other in every round.

    python benchmarks/data_prepare.py CHECKOUT [PICTURES] [--count 400] [--sizes 64 256 512] [--rounds 5] [--workers 2]
        [--commands]

CHECKOUT is a clone of NVlabs/edm2. Its tool runs in this process, without its VAE, so that its start is not counted;
with --commands, both run as a user starts them. Without PICTURES, JPEGs of colored noise in ImageNet's usual sizes are
made. CPU time is that of all threads. The zips of both are compared pixel by pixel.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
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
Tool = Callable[[Path, Path, int], None]
"""Makes a zip of pictures at a size."""
TRANSFORMS = "center-crop-dhariwal", "center-crop"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    tools = as_commands if options.commands else as_functions
    with tempfile.TemporaryDirectory() as folder:
        pictures = options.pictures or make_pictures(Path(folder) / "pictures", options.count)
        print(f"{options.workers} workers, {os.cpu_count()} cores, Pillow {__version__}, {pictures.name}")
        for transform in TRANSFORMS:
            for size in options.sizes:
                line = compare(tools(transform, options), pictures, Path(folder), size, options)
                print(f"{transform} {line}", flush=True)


def compare(tools: tuple[Tool, Tool], source: Path, folder: Path, size: int, options: argparse.Namespace) -> str:
    """Returns a line on both at one size."""
    zips = folder / "theirs.zip", folder / "ours.zip"
    runs = [
        [seconds(tool, source, out, size) for tool, out in zip(tools, zips, strict=True)]
        for _ in range(options.rounds + 1)
    ]
    times = np.array(runs[1:])  # [rounds, tools, (wall, CPU)]
    count = require_equal(*zips)
    slow, fast = count / np.median(times[..., 0], axis=0)
    ratios = times[:, 0] / times[:, 1]
    return (
        f"{size}: official {slow:.0f} images/s, ours {fast:.0f}, ratio {np.median(ratios[:, 0]):.2f} "
        f"({ratios[:, 0].min():.2f} to {ratios[:, 0].max():.2f}), ratio of CPU time {np.median(ratios[:, 1]):.2f}; "
        f"{count} images are equal"
    )


def seconds(tool: Tool, source: Path, out: Path, size: int) -> tuple[float, float]:
    """Returns the seconds that a tool takes: of the clock, and of the CPUs."""
    out.unlink(missing_ok=True)
    start, used = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stderr(io.StringIO()):
        tool(source, out, size)
    return time.perf_counter() - start, cpu_seconds() - used


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def as_functions(transform: str, options: argparse.Namespace) -> tuple[Tool, Tool]:
    """Returns the official tool and ours, in this process."""
    convert = load_official(options.checkout)

    def theirs(source: Path, out: Path, size: int) -> None:
        convert(str(source), str(out), options.count, transform, (size, size))

    def ours(source: Path, out: Path, size: int) -> None:
        prepare_data(
            source, out, resolution=size, transform=transform, max_images=options.count, workers=options.workers
        )

    return theirs, ours


def as_commands(transform: str, options: argparse.Namespace) -> tuple[Tool, Tool]:
    """Returns the official tool and ours, as a user starts them."""
    given = ["--transform", transform, "--max-images", str(options.count)]

    def run(*command: object) -> None:
        subprocess.run([sys.executable, *map(str, command), *given], check=True, capture_output=True)

    def theirs(source: Path, out: Path, size: int) -> None:
        tool = options.checkout / "dataset_tool.py"
        run(tool, "convert", "--source", source, "--dest", out, "--resolution", f"{size}x{size}")

    def ours(source: Path, out: Path, size: int) -> None:
        run("-m", "edmdistill", "data", "prepare", source, out, "--resolution", size, "--workers", options.workers)

    return theirs, ours


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
        for spectrum in spectra[1:]:
            real, imaginary = spectra[0] + 0.3 * spectrum
            values = np.fft.irfft2((real + 1j * imaginary) / (frequency + 1e-5) ** 0.525, s=(height, width))
            channels.append(120 + 50 * (values - values.mean()) / values.std())
        path = folder / f"class{i % 5}" / f"{i:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


if __name__ == "__main__":
    main()
