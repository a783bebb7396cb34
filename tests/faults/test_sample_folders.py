"""Folders and files of samples: one request each, which goes on where it stopped."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from forks import Forked
from PIL import Image
from tiny_generator import tiny_generator
from waiting import wait_until

from edmdistill.cli import main
from edmdistill.data.datasets import open_dataset
from edmdistill.data.prepare import prepare_data
from edmdistill.errors import DatasetError
from edmdistill.sampling import job
from edmdistill.sampling.seeds import parse_seeds


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = tuple(f"digit {i}" for i in range(10))
    return tiny_generator(tmp_path_factory.mktemp("source") / "generator", label_names=names)


def run(source: Path, *words: object) -> Result:
    return CliRunner().invoke(main, ["sample", str(source), "--nfe", "1", "--device", "cpu", *map(str, words)])


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Ctrl-C after so many batches; gives the list of the seeds that are drawn from now on."""

    def arrange(after: int) -> list[int]:
        whole, drawn, left = job.generate_images, [], [after]

        def generate_images(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                left[0] = -1
                raise KeyboardInterrupt
            left[0] -= 1
            drawn.extend(options["seeds"])
            return whole(*args, **options)

        monkeypatch.setattr(job, "generate_images", generate_images)
        return drawn

    return arrange


@pytest.mark.parametrize(
    "words", [["--seeds", "0-2"], ["--seeds", "0-5", "--class", "1"], ["--seeds", "0-5", "--t", "9"]]
)
@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_another_request_is_refused_unless_it_is_to_overwrite(
    source: Path, tmp_path: Path, name: str, words: list[str]
) -> None:
    out = tmp_path / name
    assert run(source, "--seeds", "0-5", "--out", out).exit_code == 0
    before = out.read_bytes() if out.is_file() else sorted(file.name for file in out.iterdir())
    refused = run(source, *words, "--out", out)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert before == (out.read_bytes() if out.is_file() else sorted(file.name for file in out.iterdir()))
    assert run(source, *words, "--out", out, "--overwrite").exit_code == 0
    if out.is_dir():
        assert len(list(out.glob("0*.png"))) == (3 if words[1] == "0-2" else 6)
        assert len(open_dataset(out)) == (3 if words[1] == "0-2" else 6)


@pytest.mark.parametrize("words", [[], ["--class", "1", "--class", "2"]], ids=["drawn", "cycle"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_grows_by_the_seeds_that_it_lacks(
    source: Path, tmp_path: Path, words: list[str], finished: bool, interrupt: Callable[[int], list[int]]
) -> None:
    """It then is what one command makes."""
    words = [*words, "--batch", "4"]
    assert run(source, *words, "--seeds", "0-11", "--out", tmp_path / "a" / "out").exit_code == 0
    drawn = interrupt(-1 if finished else 1)
    out = tmp_path / "b" / "out"
    first = run(source, *words, "--seeds", "0-3" if finished else "0-7", "--out", out)
    assert first.exit_code == (0 if finished else 130)
    shutil.copy(out / "000000.png", out / "000011.png")  # by somebody else
    assert run(source, *words, "--seeds", "0-11", "--out", out).exit_code == 0
    assert drawn == [*range(12)]
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file()}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_samples_that_are_not_finite_are_not_drawn_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that grows, in whatever order: they stay counted."""
    whole, drawn = job.generate_images, []

    def generate_images(*args: Any, seeds: list[int], **options: Any) -> Any:
        drawn.extend(seeds)
        images = whole(*args, seeds=seeds, **options)
        images[torch.tensor(seeds) % 4 == 1] = torch.nan
        return images

    monkeypatch.setattr(job, "generate_images", generate_images)
    assert run(source, "--seeds", "4-6", "--out", tmp_path / "out").exit_code == 1
    grown = run(source, "--seeds", "0-2,4-6", "--out", tmp_path / "out")
    assert (grown.exit_code, drawn) == (1, [4, 5, 6, 0, 1, 2])
    assert "2 of 6" in grown.stderr
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["not_finite"] == [1, 4]


@pytest.mark.parametrize("name", ["a.npz", "a.png"])
@pytest.mark.parametrize(("first", "grown"), [("0-7", "0-11"), ("4-11", "0-12"), ("1,3,5,7,9,11", "0-12")])
def test_an_unfinished_file_grows(
    name: str, first: str, grown: str, source: Path, tmp_path: Path, interrupt: Callable[[int], list[int]]
) -> None:
    """By the seeds that it lacks, to the file that one command would have drawn."""
    drawn = interrupt(1)
    assert run(source, "--seeds", first, "--batch", 4, "--out", tmp_path / name).exit_code == 130
    refused = run(source, "--seeds", "100", "--out", tmp_path / name)
    assert f"holds other samples (seeds {first} there, 100 now)" in refused.stderr
    assert f"--seeds {first},100 adds to them" in refused.stderr
    whole = parse_seeds(grown)
    before = parse_seeds(first)[:4]
    drawn.clear()
    assert run(source, "--seeds", grown, "--out", tmp_path / name).exit_code == 0
    assert drawn == [seed for seed in whole if seed not in before]
    assert run(source, "--seeds", grown, "--out", tmp_path / f"whole-{name}").exit_code == 0
    if name == "a.png":
        pictures = [np.asarray(Image.open(tmp_path / file)) for file in (name, f"whole-{name}")]
        assert np.array_equal(*pictures)
        return
    with np.load(tmp_path / name) as file, np.load(tmp_path / f"whole-{name}") as expected:
        assert file["seeds"].tolist() == expected["seeds"].tolist() == whole
        assert file["labels"].tolist() == expected["labels"].tolist()
        assert np.array_equal(file["images"], expected["images"])


def test_a_record_that_was_changed_by_hand_does_not_grow(source: Path, tmp_path: Path) -> None:
    assert run(source, "--seeds", "0-3", "--out", tmp_path / "out").exit_code == 0
    record = tmp_path / "out" / "samples.json"
    record.write_text(record.read_text().replace('"0-3"', '"all"'))
    refused = run(source, "--seeds", "0-9", "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "holds other samples (seeds " in refused.stderr
    assert refused.stderr.endswith("choose another path, or add --overwrite\n")


def test_a_folder_of_other_seeds_says_how_to_add_to_it(source: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ["--class", "1", "--class", "2"]
    assert run(source, *words, "--seeds", "1-3", "--out", out).exit_code == 0
    for seeds in ("2-5", "0-3"):  # of the latter, seed 1 would have another class
        refused = run(source, *words, "--seeds", seeds, "--out", out)
        assert refused.exit_code == 2
        every = refused.stderr.partition("or add --overwrite; --seeds ")[2].partition(" adds to them")[0]
        assert every == {"2-5": "1-5", "0-3": "1-3,0"}[seeds]
        assert run(source, *words, "--seeds", every, "--out", shutil.copytree(out, tmp_path / seeds)).exit_code == 0
    assert " adds to them" not in run(source, *words, "--seeds", "1-2", "--out", out).stderr
    assert " adds to them" not in run(source, "--class", "1", "--seeds", "1-5", "--out", out).stderr
    assert run(source, "--seeds", "0", "--out", tmp_path / "a.npz").exit_code == 0
    assert "only a folder takes further seeds" in run(source, "--seeds", "0-1", "--out", tmp_path / "a.npz").stderr


@pytest.mark.parametrize("name", ["out", "out.npz", "deep/er/out"])
def test_with_rejection_a_second_command_is_refused_before_its_work(
    source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--reject", "0.5", "--classifier", "digits", "--seeds", "0-3", "--out", tmp_path / name]
    results: list[Result] = []

    def generate_images(*args: Any, **options: Any) -> Any:
        if results:
            pytest.fail("the second command draws")
        results.append(run(source, *words))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "generate_images", generate_images)
        assert run(source, *words).exit_code == 130
    (second,) = results
    assert (second.exit_code, "another process is drawing into" in second.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_link_leads_to_a_folder_that_is_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "there")
    for words in ("0-1", "0-1", "0-2"):
        result = run(source, "--seeds", words, "--out", tmp_path / "link")
        assert result.exit_code == 0, result.output
    assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / "disk" / "there").glob("0*.png"))) == 3


def test_files_of_somebody_else_are_never_removed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "000000.png").write_text("a picture")
    for words in ([], ["--overwrite"]):
        result = run(source, "--seeds", "0-1", "--out", tmp_path, *words)
        assert result.exit_code == 2
        assert "did not write" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["000000.png"]


def test_a_grid_does_not_pass_as_a_sample(source: Path, tmp_path: Path) -> None:
    """That beside its samples is left out; another one is refused, whatever size pictures get."""
    folder, packed = tmp_path / "set", tmp_path / "set.zip"
    for out in ("frogs", "toads.png"):
        assert run(source, "--seeds", "0-3", "--out", folder / out).exit_code == 0
    prepare = ["data", "prepare", folder, packed, "--resolution", 8, "--transform", "center-crop", "--labels", "none"]
    refused = CliRunner().invoke(main, [*map(str, prepare)])
    assert f"{folder}: toads.png is a grid of edmdistill" in refused.stderr
    assert (refused.exit_code, packed.exists()) == (2, False)
    (folder / "frogs" / "dataset.json").unlink()  # which has no class for it
    with pytest.raises(DatasetError, match=r"toads\.png is a grid of edmdistill"):
        open_dataset(folder).images([4])
    (folder / "toads.png").rename(folder / "frogs-grid.png")
    for words in (["data", "inspect", folder], prepare):
        result = CliRunner().invoke(main, [*map(str, words)])
        assert (result.exit_code, "a grid of samples" in result.output) == (0, True)
    assert (len(open_dataset(folder)), len(open_dataset(packed))) == (4, 4)
    Image.new("L", (8, 8)).save(folder / "frogs-grid.png")
    assert len(open_dataset(folder)) == 5, "a picture of that name"


def test_a_picture_in_the_place_of_the_grid_is_kept(source: Path, tmp_path: Path) -> None:
    out, grid = tmp_path / "out", tmp_path / "out-grid.png"
    grid.write_text("a picture")
    refused = run(source, "--seeds", "0-1", "--out", out)
    assert refused.exit_code == 2
    assert f"{grid} already exists: choose another name, or add --overwrite" in refused.stderr
    assert (grid.read_text(), out.exists()) == ("a picture", False)
    assert run(source, "--seeds", "0-1", "--out", out, "--overwrite").exit_code == 0
    shutil.rmtree(out)
    assert run(source, "--seeds", "0-1", "--out", out).exit_code == 0  # a grid of the same samples is replaced
    assert grid.read_bytes().startswith(b"\x89PNG")


def test_a_finished_request_does_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("out", "out.npz", "out.PNG"):
        words = ["--seeds", "0-3", "--out", tmp_path / name]
        assert run(source, *words).exit_code == 0
        with monkeypatch.context() as patch:
            patch.setattr(job, "generate_images", pytest.fail)
            again = run(source, *words)
        assert again.exit_code == 0
        assert "already holds these 4 images" in again.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "out-grid.png", "out.npz", "out.PNG"}


@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_ctrl_c_keeps_what_is_done(
    source: Path, tmp_path: Path, name: str, interrupt: Callable[[int], list[int]]
) -> None:
    out, words = tmp_path / name, ["--seeds", "0-9", "--batch", "4"]
    drawn = interrupt(2)
    stopped = run(source, *words, "--out", out)
    assert stopped.exit_code == 130
    assert stopped.stderr.count("Interrupted: ") == 1
    assert "8 of 10 images are kept in" in stopped.stderr
    assert "the same command continues" in stopped.stderr
    assert run(source, *words, "--out", out).exit_code == 0
    assert drawn == [*range(10)]
    whole = tmp_path / f"whole{out.suffix}"
    assert run(source, *words, "--out", whole).exit_code == 0
    if out.is_dir():
        assert {file.name: file.read_bytes() for file in out.glob("*.png")} == {
            file.name: file.read_bytes() for file in whole.glob("*.png")
        }
    else:
        assert out.read_bytes() == whole.read_bytes()
    grids = {f"{folder.name}-grid.png" for folder in (out, whole) if folder.is_dir()}
    assert {entry.name for entry in tmp_path.iterdir()} == {out.name, whole.name, *grids}
    assert len({(tmp_path / grid).read_bytes() for grid in grids}) <= 1


def test_torn_files_are_drawn_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, "--seeds", "0-3", "--out", out).exit_code == 0
    whole = (out / "000002.png").read_bytes()
    (out / "000002.png").write_bytes(whole[:-20])
    (out / "000003.png").unlink()
    assert run(source, "--seeds", "0-3", "--out", out).exit_code == 0
    assert (out / "000002.png").read_bytes() == whole
    assert (out / "000003.png").exists()


WAITS = """
import time
from tqdm import tqdm
from edmdistill.__main__ import main
update = tqdm.update
def update_or_wait(bar, images=1):
    if bar.n + images > 48:
        time.sleep(600)
    return update(bar, images)
tqdm.update = update_or_wait
main()
"""
"""The command, which does not end before it is killed."""


def test_sigkill(source: Path, tmp_path: Path) -> None:
    out, program = tmp_path / "out", tmp_path / "program.py"
    program.write_text(WAITS)
    words = [
        *("sample", str(source), "--nfe", "1", "--device", "cpu", "--seeds", "0-99", "--batch", "4"),
        "--out",
        str(out),
    ]
    child = Forked(program, *words)
    wait_until(lambda: child.poll() is not None or len(list(out.glob("0*.png"))) >= 4)
    child.send_signal(signal.SIGKILL)
    assert child.finish()[0] == -signal.SIGKILL
    kept = len(list(out.glob("0*.png")))
    assert 4 <= kept <= 48
    (out / ".000099.png.0123abcd.new").write_text("half a picture")
    assert run(source, *words[2:]).exit_code == 0
    assert len(list(out.glob("0*.png"))) == 100
    assert not [entry for entry in out.iterdir() if entry.name.startswith(".")]


def test_a_folder_of_samples_is_a_data_set(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, "--seeds", "0-4,200", "--class", "3", "--class", "digit 7", "--out", out).exit_code == 0
    document = json.loads((out / "dataset.json").read_text())
    assert document["labels"] == [[f"{s:06d}.png", c] for s, c in zip([0, 1, 2, 3, 4, 200], [3, 7] * 3, strict=True)]
    assert document["label_names"][7] == "digit 7"
    data = open_dataset(out)
    labels = data.labels(range(len(data)))
    assert labels is not None
    assert labels.tolist() == [3, 7] * 3


def test_an_unfinished_folder_is_measured_with_a_word(
    source: Path, tmp_path: Path, interrupt: Callable[[int], list[int]]
) -> None:
    out = tmp_path / "out"
    interrupt(2)
    assert run(source, "--seeds", "0-9", "--batch", "4", "--out", out).exit_code == 130
    result = CliRunner().invoke(main, ["eval", str(out), "--protocol", "digits", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "not all of its 10 images are drawn" in result.stderr


def test_other_weights_are_another_request(source: Path, tmp_path: Path) -> None:
    moving = Path(shutil.copytree(source, tmp_path / "moving"))
    assert run(moving, "--seeds", "0-1", "--out", tmp_path / "out").exit_code == 0
    tiny_generator(tmp_path / "other", scale=0.5)
    shutil.copy(tmp_path / "other" / "model.safetensors", moving)
    result = run(moving, "--seeds", "0-1", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "holds other samples (weights " in result.stderr
    result = run(source, "--seeds", "0,2", "--out", tmp_path / "out")
    assert f"holds other samples (of {moving}, seeds 0-1 there, 0,2 now): choose another path" in result.stderr


def test_an_npz_is_read_as_before(source: Path, tmp_path: Path) -> None:
    assert run(source, "--seeds", "5,3,9", "--batch", "2", "--out", tmp_path / "a.npz").exit_code == 0
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["seeds"].tolist() == [5, 3, 9]
        assert (file["images"].shape, file["images"].dtype) == ((3, 8, 8, 1), np.uint8)
        assert file["labels"].shape == (3,)


def test_a_set_that_is_half_drawn_says_so(tmp_path: Path, source: Path, interrupt: Callable[[int], list[int]]) -> None:
    """To every command that takes it as data; an interrupted one is easily taken for a whole one."""
    out = tmp_path / "set"
    interrupt(2)
    assert run(source, "--seeds", "0-7", "--batch", 2, "--out", out).exit_code == 130
    sentence = f"{out}: 4 images of its `edmdistill sample` are not drawn yet; run that command again."
    assert sentence in open_dataset(out).notes
    assert sentence in prepare_data(out, tmp_path / "a.zip", labels="none").notes
    assert run(source, "--seeds", "0-7", "--batch", 2, "--out", out).exit_code == 0
    assert open_dataset(out).source_notes == []
    assert prepare_data(out, tmp_path / "b.zip").notes == ()
