import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edmdistill.errors import TrainingError
from edmdistill.recipes.library import load_recipe
from edmdistill.training.run_dir import check_run, open_run

RECIPE = json.dumps({"training": {"lr": 1e-3, "batch": 8}, "ema": {"half_life_images": 5}}).encode()
FILES = ("recipe.toml", "recipe.resolved.json", "run.json")
IDENTITY = {"teacher_sha256": "abc", "data": {"name": "digits"}}


def opened(path, recipe=RECIPE, identity=IDENTITY):
    return open_run(path, recipe, identity, "# mine\n")


def test_made_whole_and_gone_back_to(tmp_path):
    path = tmp_path / "runs" / "a"
    with opened(path) as folder:
        folder.log({"images": 8})
    assert (path / "recipe.toml").read_text() == "# mine\n"
    assert json.loads((path / "recipe.resolved.json").read_text()) == json.loads(RECIPE)
    assert [entry.name for entry in path.parent.iterdir()] == ["a"]
    with opened(path) as folder:
        assert not folder.is_new()


def test_an_empty_directory_is_filled(tmp_path, monkeypatch):
    """Not replaced: a disk may be mounted there, and a shell be in it."""
    there = tmp_path / "a"
    (there / "lost+found").mkdir(parents=True)
    inode = there.stat().st_ino
    check_run(there, RECIPE, IDENTITY)
    with pytest.raises(ZeroDivisionError):
        fail_after(0, there)
    assert there.stat().st_ino == inode
    assert [entry.name for entry in there.iterdir()] == ["lost+found"]
    monkeypatch.chdir(there)
    with opened(Path(".")) as folder:
        folder.log({"images": 8})
    assert there.stat().st_ino == inode
    assert json.loads((there / "recipe.resolved.json").read_text()) == json.loads(RECIPE)
    with opened(there) as folder:
        assert not folder.is_new()


def test_a_full_disk_is_said_of_an_empty_directory_too(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_bytes", full)
        for path in (tmp_path / "a", tmp_path / "b"):
            with pytest.raises(TrainingError, match="cannot be created: No space left on device"), opened(path):
                pass
    for path in (tmp_path / "a", tmp_path / "b"):
        with opened(path):
            pass


def test_what_was_killed_before_it_was_a_run_directory_is_filled(tmp_path):
    with opened(tmp_path / "whole"):
        pass
    made = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.name != ".lock"]
    order = sorted(made, key=lambda path: (path.suffix != "", path.name == "recipe.resolved.json"))
    for count in range(len(order)):
        there = tmp_path / str(count)
        (there / ".run.json.0a1b2c3d.new").mkdir(parents=True)
        for path in order[:count]:
            (there / path).write_text("") if path.suffix else (there / path).mkdir()
        check_run(there, RECIPE, IDENTITY)
        with opened(there):
            pass
        assert (there / "recipe.resolved.json").read_bytes() == RECIPE
        assert not list(there.glob(".*.new"))


def test_a_changed_recipe_is_refused_with_the_difference(tmp_path):
    with opened(tmp_path / "a"):
        pass
    changed = json.dumps({"training": {"lr": 1e-2, "batch": 8, "seed": 1}, "ema": {"half_life_images": 5}}).encode()
    with (
        pytest.raises(TrainingError) as error,
        opened(tmp_path / "a", changed, IDENTITY | {"teacher_sha256": "def"}),
    ):
        pass
    assert str(error.value).splitlines()[1:] == [
        "  training.lr: 0.001 there, 0.01 now",
        "  training.seed: absent there, 1 now",
        "  teacher_sha256: abc there, def now",
    ]
    assert json.loads((tmp_path / "a" / "recipe.resolved.json").read_text()) == json.loads(RECIPE)


def test_what_is_only_kept_or_shown_may_change(tmp_path):
    with opened(tmp_path / "a"):
        pass
    ema = {"half_life_images": 5, "snapshot_every": 16}
    tables = {"training": {"lr": 1e-3, "batch": 8, "keep": 5}, "ema": ema}
    tables |= {"sampling": {"nfe": [1], "sigmas": {"1": [2.5]}}, "evaluation": {"protocol": "digits"}}
    changed = json.dumps(tables).encode()
    with opened(tmp_path / "a", changed):
        pass
    assert (tmp_path / "a" / "recipe.resolved.json").read_bytes() == changed


def test_an_option_that_came_later_is_at_its_default(tmp_path):
    recipe = load_recipe("cosim/digits")
    with opened(tmp_path / "a", recipe.to_json()):
        pass
    file = tmp_path / "a" / "recipe.resolved.json"
    earlier = recipe.tables()
    stride = earlier["method"].pop("trajectory_stride")
    file.write_text(json.dumps(earlier))
    with opened(tmp_path / "a", recipe.to_json()):
        assert file.read_bytes() == recipe.to_json()
    file.write_text(json.dumps(earlier))
    other = load_recipe("cosim/digits", sets=[f"method.trajectory_stride={stride + 1}"])
    with pytest.raises(TrainingError, match=f"trajectory_stride: {stride} there, {stride + 1} now"):
        opened(tmp_path / "a", other.to_json()).__enter__()


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    with opened(tmp_path / "a"):
        pass
    for name in (
        ".generator.0123abcd.new/generator",  # written, but not yet in its place
        ".generator.0123abcd.new/generator.old",  # set aside for it
        "state/.000000000016.0123abcd.new/000000000016",
        "samples/.000000016.png.0123abcd.new/000000016.png",
    ):
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "file").write_text(name)
    with opened(tmp_path / "a"):
        pass
    left = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*")}
    assert left == {*FILES, ".lock", "state", "samples", "x0", "ema", "generator", "generator/file"}
    assert (tmp_path / "a/generator/file").read_text() == ".generator.0123abcd.new/generator.old"


def test_empty_folders_that_a_copy_lost_are_made_again(tmp_path):
    with opened(tmp_path / "a"):
        pass
    for name in ("state", "samples", "x0", "ema"):
        (tmp_path / "a" / name).rmdir()
    with opened(tmp_path / "a") as folder:
        assert folder.state.is_dir()
        assert folder.ema.is_dir()


@pytest.mark.parametrize("lost", ["folder", "contents", "broken"])
def test_a_run_whose_states_are_lost_is_not_started_over(tmp_path, lost):
    path = tmp_path / "a"
    with opened(path) as folder:
        folder.log({"images": 8})
    with opened(path):  # killed before its first state
        pass
    (path / "samples" / "000000000.png").touch()
    (path / "samples" / "000000008.png").touch()
    with opened(path):  # killed while its first state was written
        pass
    match lost:
        case "folder":
            (path / "state").rmdir()
        case "contents":
            (path / "samples" / "000000016.png").touch()
        case "broken":
            (path / "state" / "000000000008.broken").mkdir()
    for refused in (opened(path).__enter__, lambda: check_run(path, RECIPE, IDENTITY)):
        with pytest.raises(TrainingError, match=r"was trained, but has no intact state .*: copy .*state from where"):
            refused()
    (path / "state" / "000000000008").mkdir(parents=True)
    with opened(path):
        pass


def test_other_places_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"a")
    with pytest.raises(TrainingError, match="photos exists and is not a run directory"), opened(tmp_path / "photos"):
        pass
    (tmp_path / "file").write_bytes(b"a")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(TrainingError, match="cannot be created"), opened(path):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "file", "photos"]


def test_one_process_at_a_time(tmp_path):
    with opened(tmp_path / "a"):
        other = (
            "from pathlib import Path; from edmdistill.training.run_dir import open_run\n"
            f"with open_run(Path({str(tmp_path / 'a')!r}), {RECIPE!r}, {IDENTITY!r}, ''): pass"
        )
        failed = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
        assert f"is in use by process {os.getpid()}: wait for it" in failed.stderr
    subprocess.run([sys.executable, "-c", other], check=True)


def fail_after(lines, path):
    with opened(path) as folder:
        for images in range(lines):
            folder.log({"images": images})
        raise ZeroDivisionError


def test_a_run_that_failed_before_it_began_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_after(0, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        fail_after(1, tmp_path / "a")
    assert (tmp_path / "a" / "metrics.jsonl").is_file()


def test_metrics_are_cut_to_the_position_of_the_state(tmp_path):
    with opened(tmp_path / "a") as folder:
        for images in (8, 16, 24):
            folder.log({"images": images})
        with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
            file.write('{"images": 3')
        folder.truncate_after(24, print)
        assert (tmp_path / "a" / "metrics.jsonl").read_text().count("\n") == 3
        folder.truncate_after(20, print)
        assert (tmp_path / "a" / "metrics.jsonl").read_text() == '{"images": 8}\n{"images": 16}\n'
        folder.truncate_after(0, print)
        assert (tmp_path / "a" / "metrics.jsonl").read_text() == ""


def test_averages_are_cut_to_the_position_of_the_state(tmp_path):
    with opened(tmp_path / "a") as folder:
        for name in ("000000000016-0.050.safetensors", "000000000024-0.050.safetensors", "mine-0.050.safetensors"):
            (folder.ema / name).touch()
        (folder.ema / "0.050").mkdir()
        folder.truncate_after(16, print)
        left = {path.name for path in folder.ema.iterdir()}
        assert left == {"000000000016-0.050.safetensors", "mine-0.050.safetensors", "0.050"}
