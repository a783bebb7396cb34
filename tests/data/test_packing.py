"""Pictures that are packed by threads: in their order, at the same time, and not too far ahead."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from picture_files import encoded
from PIL import _imaging
from waiting import LIMIT

from edmdistill import threads
from edmdistill.data import packing
from edmdistill.data.packing import AHEAD, CHUNK, PackJob, packed_chunks
from edmdistill.data.pictures import Pictures
from edmdistill.data.transforms import Size, find_transform
from edmdistill.errors import DatasetError

COUNT = 10 * CHUNK + 3
PNG = encoded(0, 4, 4)


def job(read: Callable[[int], bytes] = lambda i: PNG, transform: str = "none", size: Size | None = None) -> PackJob:
    pictures = Pictures("folder", [f"{i}.png" for i in range(COUNT)], [0] * COUNT, read)
    return PackJob(Path("set"), pictures, find_transform(transform, size), size, COUNT)


@pytest.mark.parametrize("start", [0, 5, COUNT - 1, COUNT])
def test_every_picture_comes_once_in_its_order(start: int) -> None:
    read: list[int] = []

    def sized(i: int) -> bytes:
        read.append(i)
        return encoded(0, 1 + i, 1)

    widths = [packed.shape[0] for chunk in packed_chunks(job(sized), start, 3) for packed in chunk]
    assert widths == [1 + i for i in range(start, COUNT)]
    assert sorted(read) == list(range(start, COUNT))


def test_threads_work_at_the_same_time() -> None:
    """Each waits for the other two."""
    together = threading.Barrier(3)

    def read(i: int) -> bytes:
        if i % CHUNK == 0 and i < 9 * CHUNK:
            together.wait(LIMIT)
        return PNG

    assert sum(map(len, packed_chunks(job(read), 0, 3))) == COUNT


def test_no_more_is_packed_than_a_few_chunks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each is packed as soon as it is handed out."""

    class AtOnce(ThreadPoolExecutor):
        def submit(self, *work: Any) -> Future[Any]:
            wait([future := super().submit(*work)])
            return future

    monkeypatch.setattr(threads, "ThreadPoolExecutor", AtOnce)
    read: list[int] = []
    with closing(packed_chunks(job(lambda i: read.append(i) or PNG), 0, 2)) as chunks:  # type: ignore[func-returns-value]
        next(chunks)
    assert len(read) <= 2 * AHEAD * CHUNK < COUNT


def test_pillow_is_left_as_it_was() -> None:
    before = _imaging.get_blocks_max()
    with closing(packed_chunks(job(), 0, 2 + before)) as chunks:
        next(chunks)
        assert _imaging.get_blocks_max() > before
    assert _imaging.get_blocks_max() == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(5, "Input/output error"), r"\[Errno 5\] Input/output error"), (MemoryError(), "MemoryError")],
    ids=["disk", "memory"],
)
def test_what_cannot_be_read_or_resized_is_named(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise error

    with pytest.raises(DatasetError, match=rf"^set: 0\.png cannot be read \({reason}\); replace or remove it$"):
        list(packed_chunks(job(broken), 0, 1))
    monkeypatch.setattr(packing.Image.Image, "resize", broken)
    with pytest.raises(DatasetError, match=rf"^set: 0\.png cannot be resized \({reason}\); replace or remove it$"):
        list(packed_chunks(job(transform="center-crop", size=(2, 2)), 0, 1))
