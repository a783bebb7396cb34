"""From images to features, batch by batch: some are drawn or read ahead while those before them are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing

import torch
from torch import Tensor

from edmdistill.evaluation.images import Images
from edmdistill.evaluation.shards import MeasuredBatch
from edmdistill.features.base import FeatureSpace
from edmdistill.threads import ahead

DIGEST = "sha256"
MOST_THREADS = 4
"""Threads that draw or read; each holds a batch."""


def measure_images(
    images: Images,
    spaces: Mapping[str, FeatureSpace],
    rows: Iterable[range],
    *,
    device: torch.device | str = "cpu",
    logits: Collection[str] = (),
    digests: bool = False,
) -> Iterator[MeasuredBatch]:
    """Yields the features of images, on the CPU: NAME/features, float32 [B,d], for each space.

    On a CPU, batches are drawn by threads of one core each, which small networks use better than one batch uses all.

    Args:
        device: of the spaces.
        rows: consecutive images, in batches.
        logits: the spaces whose NAME/logits, float32 [B,K], are wanted too.
        digests: add the sha256 of each image's pixels, uint8 [B,32].
    """

    def measure(batch: tuple[range, Tensor]) -> MeasuredBatch:
        piece, pixels = batch
        arrays = {DIGEST: image_digests(pixels)} if digests else {}
        with torch.no_grad():
            for name, space in spaces.items():
                features, scores = space.features_and_logits(pixels)
                arrays[f"{name}/features"] = features.to("cpu", torch.float32)
                if name in logits and scores is not None:
                    arrays[f"{name}/logits"] = scores.to("cpu", torch.float32)
        return piece, arrays

    readers = min(torch.get_num_threads(), MOST_THREADS) if images.readers is None else images.readers
    # Feature spaces set global flags of CUDA, which a network must not see change while it draws.
    measurers = 1 if readers and torch.device(device).type == "cpu" else 0
    with closing(ahead(lambda piece: (piece, images.read(piece)), rows, readers, share_cores=True)) as read:
        yield from ahead(measure, read, measurers, share_cores=True)


def image_digests(images: Tensor) -> Tensor:
    """Returns the sha256 of each image's pixels.  uint8 [B,C,H,W] -> uint8 [B,32]"""
    digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images.numpy())
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 32)


def pixels_sha256(size: tuple[int, ...], digests: Tensor) -> str:
    """Returns the hash of images for Reference.sha256: of their size, (C, H, W), and their digests [N,32], in order."""
    head = f"{len(digests)}x{'x'.join(map(str, size))}:"
    return hashlib.sha256(head.encode() + digests.numpy().tobytes()).hexdigest()
