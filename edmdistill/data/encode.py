"""Encodes a data set of images into the latents of a VAE, as EDM2's data sets store them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edmdistill import __version__
from edmdistill.checkpoints.encoder import ChannelStatistics, Range
from edmdistill.checkpoints.vae import Vae
from edmdistill.data.datasets import Dataset
from edmdistill.data.latent_zip import LatentZip, member_name
from edmdistill.data.latents import channel_statistics
from edmdistill.errors import DatasetError, counted
from edmdistill.threads import ahead

CHUNK = 64
"""Images that are read, encoded and written together; the chunks are shared out over the processes."""
AHEAD = 4
"""Chunks that are read while one is encoded, each by its own thread."""
MEASURED = 1000
"""Images by which the statistics of the latents are compared with the declared ones."""
SHIFT, SPREAD = 0.5, 1.5
"""A mean that is off by more of its standard deviation, or a standard deviation by a larger factor, is far off."""


class EncodeJob:
    """Latents to make of a data set, by one of several processes that write one zip.

    Image i becomes 00000/img-mean-std-0000000i.npy; with mirrored images, N + i is image i mirrored, as in EDM's own
    `xflip`. Classes and their names are those of the images.

    Args:
        images: opened with `xflip` where mirrored images are to be encoded too.
        vae: on this process's device.
        pixel_range: of the pixels that the VAE sees.
        out: the zip.
        rank, processes: this process, and how many write the zip.
        overwrite: see LatentZip.
    Attributes:
        zip: what is written, and what is missing.
    Raises: DatasetError: the images do not fit the VAE, or the zip cannot be written.
    """

    def __init__(
        self,
        images: Dataset,
        vae: Vae,
        pixel_range: Range,
        out: Path,
        rank: int = 0,
        processes: int = 1,
        *,
        overwrite: bool = False,
    ) -> None:
        size = images.img_resolution
        if images.latent:
            raise DatasetError(f"{images.name} holds latents already: give the images they were made from")
        if size % vae.factor:
            raise DatasetError(
                f"{images.name} holds images of {size}x{size}, but the VAE {vae.name} makes one latent of "
                f"{vae.factor}x{vae.factor} pixels: `data prepare` makes "
                f"them of a --resolution that is a multiple of {vae.factor}"
            )
        self.images, self.vae, self.range = images, vae, pixel_range
        self.rank, self.processes = rank, processes
        request = {
            "images": images.fingerprint,
            "vae_sha256": vae.sha256,
            "range": pixel_range,
            "dtype": str(vae.model.dtype).removeprefix("torch."),
            "xflip": images.xflip,
        }
        latents = 2 * vae.channels, size // vae.factor, size // vae.factor
        self.zip = LatentZip(out, request, len(images), latents, main=rank == 0, overwrite=overwrite)

    def encode(self, on_progress: Callable[[int], object] = lambda encoded: None) -> None:
        """Encodes this process's chunks that are not there yet.

        Args:
            on_progress: called after each of the VAE's batches with the number of images that are on the disk, of all
                processes, and of those that this one has encoded since.
        Raises: DatasetError: an image cannot be read, latents are not finite, or the disk refuses.
        """
        chunks = (range(at, at + CHUNK) for at in range(0, len(self.images), CHUNK))
        missing = filter(None, map(self.zip.missing, islice(chunks, self.rank, None, self.processes)))
        with closing(ahead(lambda rows: (rows, self.images.images(rows)), missing, AHEAD)) as read:
            for rows, pixels in read:
                parts: list[Tensor] = []
                for part in torch.split(pixels.expand(-1, 3, -1, -1), self.vae.batch):
                    if parts:  # a chunk takes minutes on a CPU
                        on_progress(self.zip.written + sum(map(len, parts)))
                    parts.append(self.vae.encode(part, self.range).cpu())
                moments = torch.cat(parts)
                broken = (~moments.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
                if broken:
                    file = self.images.files[rows[broken[0]] % len(self.images.files)]
                    raise DatasetError(
                        f"{self.images.name}: {file} has latents that are not finite: encode with --dtype fp32, or by "
                        "another VAE"
                    )
                self.zip.put(rows, moments.numpy())
                on_progress(self.zip.written)

    def finish(self) -> ChannelStatistics | None:
        """Completes the zip if all images are there, once for all processes.

        Returns: what was measured of the first images; None: another process still writes, or has finished it.
        Raises: DatasetError: the disk refuses.
        """
        with suppress(FileNotFoundError), self.zip.alone():
            if self.zip.written == len(self.images) and not self.zip.is_complete():
                first = np.stack([self.zip.read(i) for i in range(min(MEASURED, len(self.images)))])
                measured = channel_statistics(torch.from_numpy(first))
                self.zip.finish(self._document(measured))
                return measured
        return None

    def _document(self, measured: ChannelStatistics) -> dict[str, Any]:
        """Returns dataset.json."""
        images, declared = self.images, self.vae.statistics(self.range)
        classes = images.labels(range(len(images)))
        labels = None if classes is None else [[member_name(i), label] for i, label in enumerate(classes.tolist())]
        mean, std = measured if far_off(measured, declared) else declared
        encoder = {
            "vae_name": self.vae.name,
            "vae_sha256": self.vae.sha256,
            "range": self.range,
            "raw_mean": list(mean),
            "raw_std": list(std),
            "measured": {"mean": measured.mean, "std": measured.std, "images": min(MEASURED, len(images))},
            "source": {"name": Path(images.name).name, "fingerprint": images.fingerprint},
            "edmdistill": __version__,
            "request": self.zip.request,
        }
        others = {"label_names": images.label_names, "prepared": images.prepared}
        known = {key: value for key, value in others.items() if value is not None}
        return {"labels": labels, **known, "encoder": encoder}


def far_off(measured: ChannelStatistics, declared: ChannelStatistics) -> bool:
    """Returns whether the statistics of a channel differ so much that latents would be scaled wrongly."""
    return any(
        abs(mean - expected) > SHIFT * spread or not 1 / SPREAD < std / spread < SPREAD
        for mean, std, expected, spread in zip(*measured, *declared, strict=True)
    )


def compare_statistics(measured: ChannelStatistics, declared: ChannelStatistics, images: int) -> list[str]:
    """Returns the lines that show both, and a warning where they differ much."""

    def numbers(values: Sequence[float]) -> str:
        return ", ".join(f"{value:.3g}" for value in values)

    lines = [
        f"Latents of the first {counted(min(MEASURED, images), 'image')}, by channel: mean {numbers(measured.mean)}; "
        f"std {numbers(measured.std)}.",
        f"Declared for this VAE: mean {numbers(declared.mean)}; std {numbers(declared.std)}.",
    ]
    if far_off(measured, declared):
        lines.append(
            "They differ much: if a teacher was trained with the declared ones, check the VAE, --range and the images; "
            "a network trained from scratch is scaled by the measured ones."
        )
    return lines
