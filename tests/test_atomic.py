"""Atomic writes: a place holds what it held before or what was written, whole, and nothing is left beside it."""

import fcntl
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from open_files import open_below

from edmdistill import atomic
from edmdistill.atomic import atomic_write, exists, expanded, remove_leftovers, sha256_file, temporary_folder
from edmdistill.errors import CheckpointError, EdmDistillError
from edmdistill.evaluation.references import open_statistics
from edmdistill.report.summary import read_run

# Of forks from a process with threads, as those of pytest are; Python 3.15. The children only write files.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

SYSTEM_CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.chmod"}


def write_folder(path: Path, content: str) -> None:
    with atomic_write(path) as new:
        new.mkdir()
        for name in ("a", "b"):
            (new / name).write_text(content)


def write_file(path: Path, content: str) -> None:
    with atomic_write(path) as new:
        new.write_text(content)


def read(path: Path) -> list[str]:
    return [file.read_text() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Runs the work in a child that kills itself at a system call.  Returns: whether it lived to the end."""
    child = os.fork()
    if child == 0:
        left = call

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in SYSTEM_CALLS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("write", [write_folder, write_file])
def test_killed_at_any_system_call_the_place_is_whole_and_the_next_write_leaves_nothing(
    write: Callable[[Path, str], None], exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    path, seen, call = tmp_path / "place", set(), 0
    lived = False
    while not lived:
        write(path, "old")
        lived = killed_at(call, lambda: write(path, "new"))
        remove_leftovers(tmp_path)  # what a run does when it goes on
        assert os.listdir(tmp_path) == ["place"]
        content = read(path)
        assert content in (["old"] * len(content), ["new"] * len(content))
        seen.add(content[0])
        call += 1
    assert seen == {"old", "new"}
    assert call > 5


@pytest.mark.skipif(sys.platform != "linux", reason="the system has its own name for it elsewhere")
def test_folders_are_exchanged_in_one_step(tmp_path: Path):
    write_folder(tmp_path / "a", "a")
    write_folder(tmp_path / "b", "b")
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert (read(tmp_path / "a")[0], read(tmp_path / "b")[0]) == ("b", "a")


def test_the_next_write_to_the_same_place_removes_what_a_killed_one_left(tmp_path: Path):
    place = tmp_path / "place"
    assert not killed_at(4, lambda: write_folder(place, "x"))
    assert [name for name in os.listdir(tmp_path) if name.endswith(".new")]
    write_folder(tmp_path / "other", "y")
    assert len(os.listdir(tmp_path)) == 2  # another's leftovers are not its own
    write_folder(place, "z")
    assert sorted(os.listdir(tmp_path)) == ["other", "place"]


def test_a_living_writer_is_left_alone(tmp_path: Path):
    with atomic_write(tmp_path / "place") as first:
        first.write_text("first")
        write_file(tmp_path / "place", "second")
        remove_leftovers(tmp_path)
        assert first.read_text() == "first"
    assert read(tmp_path / "place") == ["first"]
    assert os.listdir(tmp_path) == ["place"]


def test_without_locks_it_writes_and_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not killed_at(4, lambda: write_file(tmp_path / "place", "x"))

    def refuse(*arguments: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_file(tmp_path / "place", "new")
    assert read(tmp_path / "place") == ["new"]
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("again", [False, True], ids=["removed", "made again"])
def test_a_folder_that_goes_while_it_is_locked_is_not_locked(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, lock = tmp_path / "folder", fcntl.flock
    folder.mkdir()

    def late(descriptor: int, operation: int) -> None:
        folder.rmdir()
        if again:
            folder.mkdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert atomic.lock_folder(folder) is None
    assert open_below(tmp_path) == []


def test_a_failing_block_changes_nothing(tmp_path: Path):
    write_file(tmp_path / "place", "old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "place") as new:
        new.write_text("half" * (1 // 0))
    assert read(tmp_path / "place") == ["old"]
    assert os.listdir(tmp_path) == ["place"]


@pytest.mark.parametrize("done", [1, 2])
def test_interrupted_between_two_renames_it_puts_the_old_folder_back(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or the new one stays, where both were done."""
    write_folder(tmp_path / "place", "old")
    rename, count = Path.rename, 0

    def interrupted(path: Path, target: Path) -> None:
        nonlocal count
        rename(path, target)
        count += 1
        if count == done:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "place", "new")
    assert read(tmp_path / "place") == [{1: "old", 2: "new"}[done]] * 2
    assert os.listdir(tmp_path) == ["place"]


def test_all_is_on_the_disk_before_it_is_moved_and_then_the_move_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name), sync(file))
    )
    monkeypatch.setattr(Path, "replace", lambda path, target: (events.append("moved"), replace(path, target)))
    write_folder(tmp_path / "here" / "place", "x")
    assert set(events[:-2]) == {"a", "b", "place"}
    assert events[-2:] == ["moved", "here"]
    assert open_below(tmp_path) == []


def test_a_sentence_on_a_file_inside_names_it_where_it_was_to_be(tmp_path: Path):
    def write() -> None:
        with atomic_write(tmp_path / "place") as new:
            new.touch()  # no folder
            write_file(new / "file", "x")

    with pytest.raises(CheckpointError, match=f"^{tmp_path}/place/file cannot be written"):
        write()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_modes_are_as_the_umask_says_whatever_the_writer(umask: int, tmp_path: Path):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "folder") as new:
            new.mkdir()
            for name in ("private", "script"):
                (new / name).touch(mode=0o600)
            (new / "script").chmod(0o700)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "folder").iterdir()}
    assert modes["private"] == 0o666 & ~umask
    assert modes["script"] == 0o666 & ~umask | 0o100


def test_symbolic_links_are_followed(tmp_path: Path):
    (tmp_path / "real").mkdir()
    for write, name in ((write_file, "file"), (write_folder, "folder")):
        link = tmp_path / name
        link.symlink_to(tmp_path / "real" / name)
        for content in ("1", "2"):
            write(link, content)
            assert link.is_symlink()
            assert set(read(link)) == set(read(tmp_path / "real" / name)) == {content}


def test_what_may_not_be_replaced_stays(tmp_path: Path):
    write_folder(tmp_path / "place", "old")
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "place", replace=False) as new:
        new.mkdir()
    assert read(tmp_path / "place") == ["old", "old"]
    assert os.listdir(tmp_path) == ["place"]
    (tmp_path / "empty").mkdir()
    with atomic_write(tmp_path / "empty", replace=False) as new:  # there is nothing to lose
        write_folder(new, "new")
    assert read(tmp_path / "empty") == ["new", "new"]


def test_a_device_or_a_pipe_is_refused_in_a_sentence(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/full")):
        with pytest.raises(CheckpointError, match="is a device or a pipe"), atomic_write(place) as new:
            new.write_text("x")


def test_the_longest_name_is_written(tmp_path: Path):
    write_file(tmp_path / ("n" * 255), "x")
    assert os.listdir(tmp_path) == ["n" * 255]


def test_a_name_that_is_no_text_is_written(tmp_path: Path):
    path = tmp_path / os.fsdecode(b"\xff")
    with atomic_write(path) as new:
        new.write_text("new")
    assert path.read_text() == "new"


def test_what_cannot_be_known_is_not_said_to_be_absent(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    assert exists(tmp_path)
    assert exists(tmp_path / "file")
    for absent in ("nothing", "dangling", "file/below"):
        assert not exists(tmp_path / absent)
        assert expanded(tmp_path / absent) == tmp_path / absent
    for name in ("x" * 5000, "a\0b", "loop"):
        with pytest.raises((OSError, ValueError)):
            exists(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"cannot be reached \([^\n]{5,80}\): give another path$"):
            expanded(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "loop"], ids=["long", "NUL", "loop"])
def test_runs_and_references_that_cannot_be_reached(name: str, tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(EdmDistillError, match=r"cannot be reached \([^\n]{5,80}\): give another path$"):
        read_run(tmp_path / name)
    with pytest.raises(EdmDistillError, match=r"cannot be opened \([^\n]{5,80}\); give EDM's"):
        open_statistics(tmp_path / name)


def test_a_folder_in_the_place_of_a_recipe_is_none(tmp_path: Path):
    (tmp_path / "recipe.resolved.json").mkdir()
    with pytest.raises(EdmDistillError, match="is not a run directory"):
        read_run(tmp_path)


def test_digests(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_temporary_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / ".edmdistill.0123abcd.new").mkdir()
    with temporary_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert folder.stat().st_mode & 0o777 == 0o700
        with temporary_folder() as other:
            assert sorted(tmp_path.iterdir()) == sorted([folder, other])
    assert not list(tmp_path.iterdir())
