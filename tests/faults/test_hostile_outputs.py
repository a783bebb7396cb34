"""Places to write that cannot be written: one sentence before any work, and nothing harmed."""

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import call
from run_folders import untrained_run
from tiny_generator import tiny_generator

from edmdistill.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator(tmp_path_factory.mktemp("source") / "generator")


OUTPUTS = [
    ("/", "root folder"),
    ("", "empty"),
    ("~nobody-by-that-name/a", "does not exist on this machine"),
    ("n" * 300, "255 bytes"),
    ("DIR/" + "n/" * 2500, "255 bytes"),
    ("a\0b", "control character"),
    ("/dev/full", "a device or a pipe"),
    ("/dev/null", "a device or a pipe"),
    ("/dev/null/a", "is not a folder you may write to"),
    ("DIR/fifo", "a device or a pipe"),
    ("DIR/file/a", "is not a folder you may write to"),
]


@pytest.mark.parametrize("command", ["sample", "eval", "sweep"])
@pytest.mark.parametrize(("out", "message"), OUTPUTS)
def test_what_cannot_be_written(source: Path, tmp_path: Path, command: str, out: str, message: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    words = {
        "sample": ["--seeds", "0"],
        "eval": ["--protocol", "digits"],
        "sweep": ["--protocol", "digits", "--nfe", "1"],
    }
    out = out.replace("DIR", str(tmp_path))
    if command != "sample" and out not in ("", "/") and not out.startswith("/dev/"):
        out += "" if out.endswith("fifo") else ".json"
    result = CliRunner().invoke(main, [command, str(source), *words[command], "--device", "cpu", "--out", out])
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if command == "sample":
        assert message in result.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fifo", "file"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    "line", ["convert SOURCE OUT", "ema SOURCE --sigma-rel .1 --out OUT", "export SOURCE --to nvidia --out OUT"]
)
@pytest.mark.parametrize(
    ("out", "advice"), [("./", "as in NAME."), ("a/..", "as in a/../NAME."), ("disk", "as in disk/NAME.")]
)
def test_a_folder_that_cannot_be_moved(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, out: str, advice: str
) -> None:
    """One without a name of its own, or where a disk is mounted, as a container's volume."""
    (tmp_path / "a").mkdir()
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    result = CliRunner().invoke(main, [{"SOURCE": str(source), "OUT": out}.get(word, word) for word in line.split()])
    assert (result.exit_code, f"{out} cannot be replaced; name a folder in it, {advice}" in result.stderr) == (2, True)


@pytest.mark.parametrize("name", ["S.pt", "S.PT", "a.html", "a.tif", "a.safetensors", "a.Jpg"])
def test_an_unknown_suffix_names_the_known_ones(source: Path, tmp_path: Path, name: str) -> None:
    words = ["sample", str(source), "--seeds", "0", "--device", "cpu", "--out", str(tmp_path / name)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert ".npz" in result.stderr
    assert ".png" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["G.PNG", "G.NpZ"])
def test_suffixes_are_compared_without_case(source: Path, tmp_path: Path, name: str) -> None:
    words = ["sample", str(source), "--nfe", "1", "--seeds", "0-1", "--device", "cpu", "--out", str(tmp_path / name)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize(("command", "name"), [("eval", "x.html"), ("eval", "x"), ("sweep", "x.txt"), ("sweep", "x")])
def test_results_are_not_written_under_another_name(source: Path, tmp_path: Path, command: str, name: str) -> None:
    words = [
        command,
        str(source),
        "--protocol",
        "digits",
        "--nfe",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / name),
    ]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "must end in .json" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--nfe", "99999999999"],
        ["--batch", "99999999999"],
        ["--seeds", "0-4294967295"],
        ["--seeds", "9" * 5000],
        ["--correctors", "99999999999"],
        ["--reject", "0.9999999999", "--classifier", "digits"],
    ],
)
def test_numbers_beyond_use(source: Path, tmp_path: Path, words: list[str]) -> None:
    command = ["sample", str(source), "--device", "cpu", *words, "--out", str(tmp_path / "a")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert not list(tmp_path.iterdir())


def test_sweep_draws_by_suffix(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.HTML"
    words = [
        "sweep",
        str(source),
        "--protocol",
        "digits",
        "--nfe",
        "1",
        "--n",
        "4",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert out.read_text().lower().startswith("<!doctype html")


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", ""),
        ("convert", "", "out"),
        ("sample", "", "--out", "out"),
        ("eval", "", "--protocol", "digits"),
        ("report", ""),
        ("compare", ""),
        ("plan", "cosim/digits", ""),
        ("export", "", "--to", "nvidia", "--out", "out"),
        ("push-to-hub", "", "me/it", "--dry-run"),
        ("loss", "", "--data", "digits"),
        ("data", "inspect", ""),
        ("data", "prepare", "", "out.zip"),
        ("train", "cosim", "", "--data", "digits", "--recipe", "cosim/digits", "--run-dir", "out"),
    ],
    ids=" ".join,
)
def test_an_empty_name_is_not_the_working_directory(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a variable that is not set: `edmdistill report "$RUN"`, in a run."""
    monkeypatch.chdir(untrained_run(tmp_path / "other"))
    before = sorted(Path().rglob("*"))
    result = call(*words)
    assert result.exit_code == 2
    assert "empty" in result.stderr
    assert sorted(Path().rglob("*")) == before
