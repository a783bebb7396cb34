"""What an evaluation of many images holds at a time."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edmdistill.data.datasets import open_dataset
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.frechet import BLOCK
from edmdistill.evaluation.images import Images
from edmdistill.evaluation.shards import SHARD_IMAGES, Work
from edmdistill.features.spaces import Pixels

COUNT = 20_000
SIZE = 1, 8, 8


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a folder"])
def test_no_more_is_held_than_statistics_and_files_need(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics take up 4,096 features at a time, and a file holds as many; all others are gone."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = [0]

    def held(made: Tensor) -> Tensor:
        alive.add(made)
        most[0] = max(most[0], sum(map(len, alive)))
        return made

    of_pixels = Pixels.features_and_logits

    def features_and_logits(space: Pixels, images: Tensor) -> tuple[Tensor, Any]:
        features, logits = of_pixels(space, images)
        return held(features), logits

    monkeypatch.setattr(Pixels, "features_and_logits", features_and_logits)
    random = torch.Generator().manual_seed(0)

    def read(rows: range) -> Tensor:
        return held(torch.randint(0, 256, (len(rows), *SIZE), generator=random, dtype=torch.uint8))

    images = Images(COUNT, SIZE, read, None, None, "unknown", readers=1, identity=lambda: "random")
    gc.collect()
    work = Work(tmp_path) if kept else None
    evaluate(images, open_dataset("digits", split="test"), protocol="pixels", work=work)
    assert most[0] < BLOCK + SHARD_IMAGES + 1000 < COUNT / 2
