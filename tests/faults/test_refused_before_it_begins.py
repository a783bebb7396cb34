"""What cannot be trained is refused before a word of training is said, by --dry-run just as by the run itself."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from edmdistill.cli import main
from edmdistill.training import trackers

SMALL = [
    "network.arguments={model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8}",
    "training.batch=8",
    "training.images=8",
    "training.log_every=8",
    "training.snapshot_every=8",
    "sampling.nfe=[1]",
]


def words(run_dir: str, *more: str) -> list[str]:
    sets = [word for override in SMALL for word in ("--set", override)]
    where = ["--data", "digits", "--recipe", "diffusion/digits", "--run-dir", run_dir, "--device", "cpu"]
    return ["train", "diffusion", *where, *sets, *more]


def photos(place: Path) -> None:
    place.mkdir()
    (place / "a.png").write_bytes(b"a")


def file(place: Path) -> None:
    place.write_bytes(b"a")


def another_run(place: Path) -> None:
    assert CliRunner().invoke(main, words(str(place))).exit_code == 0


def in_use(place: Path) -> None:
    another_run(place)
    code = (
        f"import fcntl, time; f = open({str(place / '.lock')!r}); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    )
    process = subprocess.Popen([sys.executable, "-c", f"{code} time.sleep(99)"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    HOLDERS.append(process)


NO_FOLDER = "is not a folder you may write to"
HOLDERS: list[subprocess.Popen[bytes]] = []
PLACES: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "photos": (photos, [], "photos exists and is not a run directory"),
    "file": (file, [], "file cannot be created"),
    "below a file": (
        lambda place: file(place.parent / "f"),
        ["--run-dir", "f/run"],
        NO_FOLDER,
    ),
    "a pipe": (lambda place: os.mkfifo(place), [], "is a device or a pipe"),
    "another run": (another_run, ["--set", "training.lr=0.5"], "belongs to another run"),
    "in use": (in_use, [], "is in use by process"),
    "rows": (lambda place: None, ["--micro-batch", "auto"], "this run is on the CPU: use a number of images"),
    "even": (lambda place: None, ["--set", "sampling.nfe=[2]"], "takes an odd number of network evaluations"),
    "protocol": (
        lambda place: None,
        ["--set", "evaluation.protocol=nope", "--set", "evaluation.every=8", "--set", "evaluation.nfe=[1]"],
        "there is no protocol 'nope'",
    ),
    "a tracker": (lambda place: None, ["--log-with", "wandb"], "--log-with wandb needs a package"),
    "root": (lambda place: None, ["--run-dir", "/"], "is the root folder"),
    "nothing": (lambda place: None, ["--run-dir", ""], "the path is empty"),
    "NUL": (lambda place: None, ["--run-dir", "a\0b"], "control character"),
    "long": (lambda place: None, ["--run-dir", "a" * 300], "longer than"),
    "nobody": (lambda place: None, ["--run-dir", "~nobody-at-all/x"], "does not exist on this machine"),
    "the folder itself": (lambda place: file(place.parent / "f"), ["--run-dir", "."], "is not a run directory"),
    "/proc": (lambda place: None, ["--run-dir", "/proc/run"], "/proc/run cannot be created"),
    "a device": (lambda place: None, ["--run-dir", "/dev/null/run"], NO_FOLDER),
}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
@pytest.mark.parametrize(("make", "more", "sentence"), PLACES.values(), ids=PLACES)
def test_it_is_one_sentence_alone(make, more, sentence, dry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    name = request.node.callspec.id.rpartition("-")[0]
    make(tmp_path / name)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    try:
        result = CliRunner().invoke(main, words(name, *more, *dry))
    finally:
        for process in HOLDERS:
            process.kill()
            process.wait()
            process.stdout.close()
        HOLDERS.clear()
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert sentence in result.stderr
    assert "Training" not in result.stderr
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
