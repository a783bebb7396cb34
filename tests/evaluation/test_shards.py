"""Shards: what is measured is measured once, by any process, and comes back in order and in the same batches."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_files import open_below
from ranks import Rank, in_ranks

from edmdistill.checkpoints.store import save_tensors
from edmdistill.errors import EdmDistillError, NotFiniteError
from edmdistill.evaluation import shards
from edmdistill.evaluation.shards import ONE_PROCESS, MeasuredBatch, Work, batches, measure_all, remove_shards

COUNT, BATCH = 50, 7


class Measure:
    """Measures image i as the number i, and remembers which; fails at the batch that would make more than `most`."""

    def __init__(self, most: int = COUNT) -> None:
        self.seen: list[int] = []
        self.most = most

    def __call__(self, rows: Iterable[range]) -> Iterator[MeasuredBatch]:
        for piece in rows:
            if len(self.seen) + len(piece) > self.most:
                raise KeyboardInterrupt
            self.seen += piece
            yield piece, {"x": torch.arange(piece.start, piece.stop)}


def whole() -> list[tuple[range, list[int]]]:
    return [(rows, list(rows)) for rows in batches(range(COUNT), BATCH)]


def read(measured: Iterator[MeasuredBatch]) -> list[tuple[range, list[int]]]:
    batches = list(measured)
    assert {arrays["x"].dtype for _, arrays in batches} <= {torch.int64}
    return [(rows, arrays["x"].tolist()) for rows, arrays in batches]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 12))
def test_batches_are_all_rows_in_order_cut_at_multiples(start: int, length: int, batch: int) -> None:
    pieces = list(batches(range(start, start + length), batch))
    assert [row for piece in pieces for row in piece] == list(range(start, start + length))
    assert all(piece.stop % batch == 0 for piece in pieces[:-1])
    assert all(0 < len(piece) <= batch for piece in pieces)


def test_without_a_folder_nothing_is_kept() -> None:
    assert read(measure_all(COUNT, BATCH, Measure())) == whole()


def test_a_stop_after_the_last_batch_is_not_lost() -> None:
    def measure(rows: Iterable[range]) -> Iterator[MeasuredBatch]:
        yield from Measure()(rows)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(measure_all(COUNT, BATCH, measure))


@pytest.mark.parametrize("most", [0, 7, 20, 49])
@pytest.mark.parametrize("per_file", [1, 14, 4096])
def test_what_was_measured_before_a_stop_is_not_measured_again(
    most: int, per_file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", per_file)
    first, second = Measure(most), Measure()
    with pytest.raises(KeyboardInterrupt):
        read(measure_all(COUNT, BATCH, first, folder=tmp_path))
    done: list[int] = []
    assert read(measure_all(COUNT, BATCH, second, folder=tmp_path, on_progress=done.append)) == whole()
    assert sorted(first.seen + second.seen) == list(range(COUNT))
    assert sum(done) == COUNT


def test_a_file_is_written_after_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a batch takes 10 of the 30: no more is lost when a process is killed."""
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=count(step=10).__next__))
    read(measure_all(COUNT, BATCH, Measure(), folder=tmp_path))
    names = ["000000000-000000021", "000000021-000000042", "000000042-000000050"]
    assert sorted(file.stem for file in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("stored", "measured"),
    [
        ([range(14, 28)], [*range(14), *range(28, COUNT)]),
        ([range(30), range(10, 20), range(25, COUNT)], []),  # by two commands at once, where a disk has no locks
    ],
)
def test_what_is_there_is_taken_once(stored: list[range], measured: list[int], tmp_path: Path) -> None:
    for rows in stored:
        values = torch.arange(rows.start, rows.stop)
        save_tensors(tmp_path / f"{rows.start:09d}-{rows.stop:09d}.safetensors", {"x": values})
    (tmp_path / "000000000-000000050.safetensors.new").write_bytes(b"torn")
    for expected in (measured, []):
        measure = Measure()
        got = list(measure_all(COUNT, BATCH, measure, folder=tmp_path))
        assert measure.seen == expected
        assert [row for _, arrays in got for row in arrays["x"].tolist()] == list(range(COUNT))
        assert all(arrays["x"].untyped_storage().nbytes() == arrays["x"].nbytes for _, arrays in got)


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_processes_take_turns_in_memory(world_size: int) -> None:
    def act(rank: Rank) -> tuple[int, list[tuple[range, list[int]]], int]:
        measure, done = Measure(10**9), list[int]()
        measured = read(measure_all(COUNT, BATCH, measure, processes=rank, on_progress=done.append))
        return len(done), measured, sum(done)

    turns, got, done = zip(*in_ranks(world_size, act), strict=True)
    assert len(set(turns)) == 1  # all take part in every turn
    assert got == (whole(), *[[]] * (world_size - 1))
    assert set(done) == {COUNT}


def test_a_sample_that_is_not_finite_ends_the_turns_of_all() -> None:
    def act(rank: Rank) -> str:
        def measure(rows: Iterable[range]) -> Iterator[MeasuredBatch]:
            for piece in rows:
                if 21 in piece:
                    raise NotFiniteError("21 is not finite")
                yield piece, {"x": torch.arange(piece.start, piece.stop)}

        with pytest.raises(NotFiniteError) as caught:
            read(measure_all(COUNT, BATCH, measure, processes=rank))
        return str(caught.value)

    assert in_ranks(2, act) == ["samples of another process are not finite", "21 is not finite"]


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_processes_share_the_batches(world_size: int, tmp_path: Path) -> None:
    def act(rank: Rank) -> tuple[list[int], list[tuple[range, list[int]]], int]:
        measure, done = Measure(), list[int]()
        measured = measure_all(COUNT, BATCH, measure, folder=tmp_path, processes=rank, on_progress=done.append)
        return measure.seen, read(measured), sum(done)

    seen, got, done = zip(*in_ranks(world_size, act), strict=True)
    assert done[0] == COUNT  # the first tells of all
    assert [row for share in seen for row in share] == list(range(COUNT))
    assert max(map(len, seen)) <= COUNT // world_size + BATCH
    assert got == (whole(), *[[]] * (world_size - 1))


def test_an_error_says_in_which_process_it_is(tmp_path: Path) -> None:
    def act(rank: Rank) -> None:
        def measure(rows: Iterable[range]) -> Iterator[MeasuredBatch]:
            if rank.rank == 1:
                raise EdmDistillError("its GPU is full")
            yield from Measure()(rows)

        read(measure_all(COUNT, BATCH, measure, folder=tmp_path, processes=rank))

    with pytest.raises(EdmDistillError, match="its GPU is full") as caught:
        in_ranks(2, act)
    assert caught.value.__notes__ == ["in process 1, and not in the others"]


def test_another_batch_goes_on_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(measure_all(COUNT, 9, Measure(30), folder=tmp_path))
    rest = Measure()
    rows = [row for _, values in read(measure_all(COUNT, BATCH, rest, folder=tmp_path)) for row in values]
    assert rows == list(range(COUNT))
    assert rest.seen == list(range(27, COUNT))


def test_rows_on_another_machines_disk_are_missed(tmp_path: Path) -> None:
    def act(rank: Rank) -> None:
        read(measure_all(COUNT, BATCH, Measure(), folder=tmp_path / str(rank.rank), processes=rank))

    with pytest.raises(EdmDistillError, match=r"images 28 to 49 were measured by another process .* --work"):
        in_ranks(2, act)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    read(measure_all(COUNT, BATCH, Measure(), folder=tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EdmDistillError, match=rf"{file.name}.*; remove it, and give the same command again"):
        read(measure_all(COUNT, BATCH, Measure(), folder=tmp_path))


def test_a_folder_belongs_to_one_command_and_one_evaluation(tmp_path: Path) -> None:
    ours, theirs = Work(tmp_path), Work(tmp_path)
    folder = ours.folder({"seeds": "0-9"}, ONE_PROCESS)
    assert ours.folder({"seeds": "0-9"}, ONE_PROCESS) == folder
    with pytest.raises(EdmDistillError, match="another command makes this evaluation now"):
        theirs.folder({"seeds": "0-9"}, ONE_PROCESS)
    assert theirs.folder({"seeds": "0-8"}, ONE_PROCESS) != folder
    reference = {"reference": "digits"}  # of two commands at once, each measures it
    assert ours.folder(reference, ONE_PROCESS, several=True) != theirs.folder(reference, ONE_PROCESS, several=True)
    ours.remove()
    assert not folder.exists()
    assert theirs.folder({"seeds": "0-9"}, ONE_PROCESS) == folder
    theirs.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_named_by_what_is_in_the_identity(tmp_path: Path) -> None:
    work = Work(tmp_path)
    assert work.folder({"a": 1, "b": 2}, ONE_PROCESS) == work.folder({"b": 2, "a": 1}, ONE_PROCESS)
    work.remove()


@pytest.mark.parametrize("end", [Work.close, Work.remove])
def test_a_command_that_has_ended_holds_nothing(end: Callable[[Work], None], tmp_path: Path) -> None:
    ours, theirs, identity = Work(tmp_path), Work(tmp_path), {"seeds": "0-9"}
    folder = ours.folder(identity, ONE_PROCESS)
    assert theirs.abandoned() == []
    end(ours)
    end(ours)
    assert theirs.abandoned() == ([folder] if end is Work.close else [])
    assert theirs.folder(identity, ONE_PROCESS) == folder
    opened = open_below(tmp_path)
    with pytest.raises(EdmDistillError, match="another command makes this evaluation now"):
        ours.folder(identity, ONE_PROCESS)
    assert open_below(tmp_path) == opened != []
    theirs.close()
    assert ours.folder(identity, ONE_PROCESS).is_dir()
    ours.close()


def test_processes_have_one_folder_that_the_first_removes(tmp_path: Path) -> None:
    other, reference = Work(tmp_path), {"reference": "digits"}
    taken = other.folder(reference, ONE_PROCESS, several=True)

    def act(rank: Rank) -> Path:
        work = Work(tmp_path)
        folder = work.folder(reference, rank, several=True)
        if rank.rank == 1:
            work.remove()
            assert folder.is_dir()
        rank.any_process(False)
        if rank.rank == 0:
            work.remove()
            assert not folder.exists()
        return folder

    folders = in_ranks(2, act)
    assert folders[0] == folders[1] != taken
    other.remove()


def test_what_was_measured_is_removed_and_the_folder_stays_ours(tmp_path: Path) -> None:
    work = Work(tmp_path)
    folder = work.folder({"seeds": "0-9"}, ONE_PROCESS)
    read(measure_all(COUNT, BATCH, Measure(), folder=folder / "images"))
    remove_shards(folder)
    assert {file.name for file in folder.iterdir()} == {"lock", "request.json"}
    work.remove()
