"""An interrupted `data prepare`: it goes on to the same bytes, and mixes nothing."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from picture_files import encoded, tar_bytes, write_folder, write_zip

from edmdistill.data import packing, prepare, prepare_state, sources
from edmdistill.data.datasets import open_dataset
from edmdistill.data.pictures import GRAYSCALE
from edmdistill.data.prepare import prepare_data
from edmdistill.errors import DatasetError

PICTURES = {f"{'ab'[i % 2]}/{i:02}.png": encoded(i, 12 + i, 9 + i % 5) for i in range(20)}
HALF = {"resolution": 8, "transform": "center-crop"}


def test_a_kill_at_any_picture_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is as old as it may be: what was written after it is cut off and made again."""
    source = write_folder(tmp_path / "set", PICTURES)
    prepare_data(source, tmp_path / "whole.zip", **HALF)
    monkeypatch.setattr(prepare, "SAVED", 0.0)
    monkeypatch.setattr(packing, "CHUNK", 3)
    calls: list[int] = []

    def stop(done: int, _: int) -> None:
        calls.append(done)
        if len(calls) > 1:
            raise KeyboardInterrupt

    for _ in range(len(PICTURES)):
        calls.clear()
        try:
            prepare_data(source, tmp_path / "out.zip", on_progress=stop, **HALF)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out.zip").exists()
            with (tmp_path / ".out.zip.parts" / "images").open("ab") as images:
                images.write(b"torn" * 2**14)
    assert calls == [20]
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zip", "set", "whole.zip"]


def test_ctrl_c_between_any_two_steps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that is written and not counted, or counted by half, would be there twice or seem changed."""
    source = write_folder(tmp_path / "set", {name: PICTURES[name] for name in sorted(PICTURES)[:3]})
    prepare_data(source, tmp_path / "whole.zip", **HALF)
    whole = (tmp_path / "whole.zip").read_bytes()
    for owner, name, calls in (prepare_state, "chained", 6), (prepare.EdmZip, "add", 3), (prepare.EdmZip, "_enter", 3):
        act = getattr(owner, name)
        for call in range(calls):
            left = iter(range(call))

            def step(*args: object, left: Iterator[int] = left, act: Callable[..., object] = act) -> object:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return act(*args)

            out = tmp_path / f"{name}-{call}.zip"
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, step)
                with pytest.raises(KeyboardInterrupt):
                    prepare_data(source, out, **HALF)
            prepare_data(source, out, **HALF)
            assert out.read_bytes() == whole, (name, call)


def test_a_kill_after_the_last_step_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_state.shutil, "rmtree", lambda *args, **options: None)
        prepare_data(source, out, **HALF)
    assert (tmp_path / ".out.zip.parts").is_dir()
    assert prepare_data(source, out, **HALF).notes == (f"{out} already holds these images.",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zip", "set"]
    assert len(open_dataset(out)) == len(PICTURES)


def test_a_broken_picture_is_named_and_once_it_is_replaced_the_rest_follows(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "set", PICTURES | {"b/99.png": encoded(0, 30, 30)[:200]})
    with pytest.raises(DatasetError, match=r"set: b/99\.png is not a readable picture \(.*\); replace or remove it"):
        prepare_data(source, tmp_path / "out.zip", workers=1, **HALF)
    (source / "b" / "99.png").write_bytes(encoded(0, 30, 30))
    done: list[int] = []
    prepare_data(source, tmp_path / "out.zip", on_progress=lambda now, _: done.append(now), **HALF)
    assert done[:17] == [*range(1, 17), 16]  # what is done is read again, because the folder has changed, and kept
    assert len(open_dataset(tmp_path / "out.zip")) == 21


def interrupted(source: Path, out: Path, **options: object) -> None:
    """Prepares until a first chunk of 8 pictures is done."""

    def stop(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(source, out, on_progress=stop, **HALF | options)


def going_on(source: Path, out: Path, **options: object) -> list[int]:
    """Prepares, and returns how many pictures were done at each report."""
    done: list[int] = []
    prepare_data(source, out, on_progress=lambda now, _: done.append(now), **HALF | options)
    return done


@pytest.mark.parametrize("what", ["size", "pictures", "record"])
def test_what_was_begun_otherwise_is_kept_unless_it_is_to_be_replaced(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    interrupted(source, out)
    other = HALF | {"resolution": 4} if what == "size" else HALF
    message = r"was begun with resolution \[8, 8\], not resolution \[4, 4\], and has 8 pictures"
    if what == "pictures":
        (source / "a" / "00.png").write_bytes(encoded(5, 30, 30))
        message = "the pictures have changed since .* was begun: 8 of them were done"
    if what == "record":
        (tmp_path / ".out.zip.parts" / prepare_state.RECORD).write_text("{")
        message = rf"{prepare_state.RECORD} is damaged \(.*\); begin .*out\.zip anew with --overwrite"
    parts = {path.name: path.read_bytes() for path in (tmp_path / ".out.zip.parts").iterdir()}
    with pytest.raises(DatasetError, match=message):
        prepare_data(source, out, **other)
    assert parts == {path.name: path.read_bytes() for path in (tmp_path / ".out.zip.parts").iterdir()}
    prepare_data(source, out, overwrite=True, **other)
    prepare_data(source, tmp_path / "new.zip", **other)
    assert out.read_bytes() == (tmp_path / "new.zip").read_bytes()


@pytest.mark.parametrize("form", ["folder", "zip", "tgz"])
def test_a_source_that_was_written_anew_is_read_again_and_goes_on(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(pictures: dict[str, bytes]) -> Path:
        if form == "folder":
            return write_folder(tmp_path / "set", pictures)
        path = tmp_path / "set"
        path.unlink(missing_ok=True)
        if form == "zip":
            return write_zip(path, pictures)
        path.write_bytes(tar_bytes(pictures, "w:gz"))
        return path

    out = tmp_path / "out.zip"
    interrupted(write(PICTURES), out)
    others = PICTURES | {"a/00.png": PICTURES["a/00.png"][:-1] + b"?"}
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("set/**/*")) or [tmp_path / "set"]]
    source = write(others)
    for path, time in zip(sorted(tmp_path.rglob("set/**/*")) or [source], times, strict=True):
        os.utime(path, ns=(time, time))  # as `cp -p` does
    with pytest.raises(DatasetError, match=r"the pictures have changed since .* was begun: 8 of them were done"):
        prepare_data(source, out, **HALF)
    read: list[int] = []
    prepare_data(write(PICTURES), out, on_progress=lambda done, _: read.append(done), **HALF)
    assert read[:9] == [*range(1, 9), 8]
    prepare_data(tmp_path / "set", tmp_path / "new.zip", **HALF)
    assert out.read_bytes() == (tmp_path / "new.zip").read_bytes()


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"

    def again(done: int, _: int) -> None:
        if not done:
            with pytest.raises(DatasetError, match="is being prepared by another process"):
                prepare_data(source, out, **HALF)

    prepare_data(source, out, on_progress=again, **HALF)
    assert len(open_dataset(out)) == 20


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(prepare.EdmZip, "finish", full)
        with pytest.raises(DatasetError, match=r"out\.zip cannot be written: No space left on device"):
            prepare_data(source, out, **HALF)
    assert not out.exists()
    assert going_on(source, out) == [20]
    assert len(open_dataset(out)) == 20


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("resolution", 4, r"resolution \[8, 8\], not resolution \[4, 4\]"),
        ("transform", "none", "transform center-crop, not transform none"),
        ("max_images", 19, "max_images None, not max_images 19"),
        ("labels", "none", "labels auto, not labels none"),
        ("split", "test", "split train, not split test"),
        ("source", "copy", r"source .*/set, not source .*/copy"),
    ],
)
def test_every_option_that_decides_the_images_must_stay(
    option: str, value: object, was: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    interrupted(source, out)
    others = HALF | {"source": source} | {option: tmp_path / str(value) if option == "source" else value}
    with pytest.raises(DatasetError, match=f"was begun with {was}, and has 8 pictures: give the same command"):
        prepare_data(out=out, **others)
    assert going_on(source, out)[0] == 8


@pytest.mark.parametrize("library", ["pillow", "jpeg"])
def test_another_decoder_does_not_go_on(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    interrupted(source, out)
    if library == "pillow":
        monkeypatch.setattr(prepare.PIL, "__version__", "0.1")
    else:
        monkeypatch.setattr(prepare.features, "version", lambda feature: "0.1")
    with pytest.raises(DatasetError, match=rf"was begun with {library} .*, not {library} 0\.1, and has 8 pictures"):
        prepare_data(source, out, **HALF)


def test_what_is_to_replace_a_set_goes_on_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    prepare_data(source, out, **HALF | {"resolution": 4})
    before = out.read_bytes()
    interrupted(source, out, overwrite=True)
    assert out.read_bytes() == before
    assert going_on(source, out, overwrite=True)[0] == 8
    prepare_data(source, tmp_path / "new.zip", **HALF)
    assert out.read_bytes() == (tmp_path / "new.zip").read_bytes()


def test_a_folder_that_another_process_has_just_made_is_left_alone(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    prepare_data(source, out, **HALF)
    parts = tmp_path / ".out.zip.parts"
    parts.mkdir()
    descriptor = os.open(parts, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DatasetError, match="is being prepared by another process"):
        prepare_data(source, out, **HALF)
    assert parts.is_dir()
    os.close(descriptor)


@pytest.mark.parametrize("size", [None, 100])
def test_a_record_without_its_images_begins_anew(
    size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    interrupted(source, out)
    images = tmp_path / ".out.zip.parts" / "images"
    images.unlink() if size is None else os.truncate(images, size)
    assert going_on(source, out)[0] == 0
    assert len(open_dataset(out)) == 20


def test_where_nothing_is_done_other_options_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill leaves it, with what was unpacked of a tar."""
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    with monkeypatch.context() as patched:
        patched.setattr(prepare_state.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(DatasetError, match="is not a readable picture"):
            prepare_data(write_folder(tmp_path / "broken", {"a.png": b"x"}), out, **HALF)
    parts = tmp_path / ".out.zip.parts"
    (parts / "source-1.tar").write_bytes(b"x")
    there: list[list[str]] = []
    prepare_data(source, out, on_progress=lambda *_: there.append(sorted(map(str, parts.iterdir()))), **HALF)
    assert there[0] == [str(parts / "images"), str(parts / "record.json")]


def test_an_archive_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill before the first picture; if it has changed, what was unpacked is removed."""
    source, out = tmp_path / "set.tgz", tmp_path / "out.zip"
    source.write_bytes(tar_bytes(PICTURES, "w:gz"))

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare.EdmZip, "add", kill)
        patched.setattr(prepare_state.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(source, out, **HALF)
        patched.setattr(sources, "decompress", lambda *_: pytest.fail("unpacked again"))
        with pytest.raises(KeyboardInterrupt):
            prepare_data(source, out, **HALF)
    parts = tmp_path / ".out.zip.parts"
    (first,) = parts.glob("source-*.tar")
    source.write_bytes(tar_bytes(PICTURES | {"a/more.png": encoded(5, 12, 9)}, "w:gz"))
    unpacked: list[set[Path]] = []
    prepare_data(source, out, on_progress=lambda *_: unpacked.append({*parts.glob("source-*.tar")}), **HALF)
    assert (len(unpacked[0]), first in unpacked[0]) == (1, False)
    assert len(open_dataset(out)) == 21


def test_progress_is_on_the_disk_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill loses."""
    monkeypatch.setattr(prepare, "SAVED", 0.0)
    parts, found = tmp_path / ".out.zip.parts", list[tuple[int, int]]()

    def look(done: int, _: int) -> None:
        record = json.loads((parts / "record.json").read_text())
        assert (parts / "images").stat().st_size >= record["bytes"]
        found.append((done, record["done"]))

    prepare_data(write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip", on_progress=look, **HALF)
    assert found == [(0, 0), (8, 0), (16, 8), (20, 16)]


def test_what_was_begun_anew_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_folder(tmp_path / "set", PICTURES), tmp_path / "out.zip"
    interrupted(source, out)
    (source / "a" / "00.png").write_bytes(encoded(5, 30, 30))
    interrupted(source, out, overwrite=True)
    assert going_on(source, out) == [8, 16, 20]


def test_changes_are_counted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(
        tmp_path / "set", {f"{i:02}.png": encoded(i, 8, 8, "L" if i % 2 else "RGB") for i in range(20)}
    )
    interrupted(source, tmp_path / "out.zip")
    assert prepare_data(source, tmp_path / "out.zip", **HALF).record["changes"] == {GRAYSCALE: 10}
