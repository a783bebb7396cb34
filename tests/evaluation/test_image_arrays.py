"""Images in arrays of files: batches in any order, and what a file says beside them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edmdistill.errors import DatasetError
from edmdistill.evaluation.image_arrays import open_npy, open_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 3), dtype=np.uint8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_batches_come_channels_first_and_in_any_order(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    np.savez(path, images=IMAGES) if kind == "npz" else np.save(path, IMAGES)
    rows = open_npz(path)[0] if kind == "npz" else open_npy(path)
    for batch in (range(2), range(2, 5), range(1, 3), range(4, 5), range(5)):
        assert np.array_equal(rows(batch), IMAGES[batch.start : batch.stop].transpose(0, 3, 1, 2))


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, IMAGES)
    rows = open_npy(path)
    path.write_bytes(path.read_bytes()[: -2 * IMAGES[0].size - 1])
    with pytest.raises(
        DatasetError, match=r"a\.npy cannot be read to its end \(it ends in image 2 of 5\); make it again"
    ):
        rows(range(5))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGES / 255, r"images are float64 \[5, 2, 4, 3\].*; turn \[-1, 1\] into uint8 by"),
        (IMAGES.transpose(0, 3, 1, 2), "move the channels to the end"),
        (IMAGES[..., 0], r"give gray images an axis of channels by \[\.\.\., None\]"),
        (IMAGES[..., :2], "of 1 or 3 channels were expected"),
        (IMAGES[:0], "is empty"),
    ],
)
def test_arrays_that_are_no_images_are_refused_in_both_kinds_of_file(
    array: np.ndarray, message: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DatasetError, match=message):
        open_npy(tmp_path / "a.npy")
    with pytest.raises(DatasetError, match=message):
        open_npz(save(tmp_path / "a.npz", images=array))


def test_classes_and_seeds_are_integers_of_any_width(tmp_path: Path) -> None:
    for dtype in (np.int8, np.uint16, np.uint64):
        path = save(
            tmp_path / "a.npz", images=IMAGES, labels=np.arange(5, dtype=dtype), seeds=np.arange(5, dtype=dtype)
        )
        _, classes, seeds = open_npz(path)
        assert classes is not None
        assert (classes.tolist(), seeds) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    adm = save(tmp_path / "a.npz", arr_0=IMAGES, arr_1=np.arange(5), labels=np.zeros(5, int))
    classes = open_npz(adm)[1]
    assert classes is not None
    assert classes.tolist() == [0, 1, 2, 3, 4]
    assert open_npz(save(tmp_path / "a.npz", images=IMAGES, labels=np.full(5, -1)))[1:] == (None, None)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(5.0), r"labels are float64 \[5\], but an integer for each of the 5 images"),
        (np.arange(4), r"labels are int64 \[4\]"),
        (np.full(5, 2**63, np.uint64), r"labels are uint64 \[5\]"),
        (np.array([0, -1, 1, 2, -1]), "labels has classes and, for 2 images, none; label all"),
    ],
)
def test_classes_that_are_none(labels: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        open_npz(save(tmp_path / "a.npz", images=IMAGES, labels=labels))


def test_other_arrays_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds the statistics of a reference"):
        open_npz(save(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2)))
    with pytest.raises(DatasetError, match=r"holds latents, but images or arr_0 were expected.*; decode latents first"):
        open_npz(save(tmp_path / "a.npz", latents=np.zeros(2)))
