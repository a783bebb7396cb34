"""edmdistill convert."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_set import BAD

from edmdistill.checkpoints import convert, source
from edmdistill.cli import main

SOUND = "bad-modulesrc-exec.pkl"  # a network like another, with a source text that must not run


def test_text(golden: Path, tmp_path: Path) -> None:
    command = ["convert", str(golden / "iddpm-adm-uncond.pkl.gz"), str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert "iddpm-adm-uncond.pkl.gz: adm, 16x16 pixels, 0 classes, preconditioned as iddpm." in result.stdout
    assert "sigma    float32    float64" in result.stdout
    assert "cc-by-nc-sa-4.0" in result.stdout
    assert [
        line for line in result.stderr.splitlines() if not line.startswith("converting: ")
    ] == []  # of a slow machine
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert "already: nothing was done" in result.stdout


def test_json(golden: Path, tmp_path: Path) -> None:
    command = ["convert", str(golden / "edm-tiny-cond.pkl"), str(tmp_path / "out"), "--json", "--licence", "mit"]
    document = json.loads(CliRunner().invoke(main, command).stdout)
    assert document["schema_version"] == 1
    assert document["config"]["provenance"]["licence"] == "mit"
    assert [sorted(row) for row in document["parity"]] == [["float32", "float64", "sigma"]] * 8


def test_the_source_is_found_and_read_once(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("resolve", "read_official", "sha256_file"):
        function = getattr(source, name)
        monkeypatch.setattr(
            source, name, lambda path, name=name, function=function: calls.append(name) or function(path)
        )
    for _ in range(2):  # the second time, nothing is done
        calls.clear()
        command = ["convert", str(golden / "edm-tiny-cond.pkl"), str(tmp_path / "out")]
        assert CliRunner().invoke(main, command).exit_code == 0
        assert calls == ["resolve", "read_official"]  # which hashes what it reads


def test_a_missing_file_has_a_neighbor(golden: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", str(golden / "edm-tiny-con.pkl"), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "did you mean" in result.stderr


@pytest.mark.parametrize("name", BAD)
def test_bad(bad: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["convert", str(bad / name), "out"])
    if name == SOUND:
        assert result.exit_code == 0
        assert os.listdir() == ["out"]
        return
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert os.listdir() == []


def test_a_bad_file_costs_no_torch(bad: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from edmdistill.cli import main\n"
        f"sys.argv = ['edmdistill', 'convert', {str(bad / 'bad-os-system.pkl')!r}, 'out']\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == "False\n"


def test_a_teacher_that_reads_t(golden: Path, tmp_path: Path) -> None:
    command = ["convert", str(golden / "edm2-rgb-cond.pkl"), str(tmp_path / "out"), "--time-embedding", "positional"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert "sigma    float32    float64" in result.stdout
    assert "It is another function than its source." in result.stdout
    result = CliRunner().invoke(main, [*command, "--no-double-norm"])
    assert result.exit_code == 2
    assert "holds a checkpoint already" in result.stderr


@pytest.mark.parametrize("option", [["--time-embedding", "positional"], ["--no-double-norm"], ["--parity", "none"]])
def test_options_of_teachers_are_none_of_generators(tmp_path: Path, option: list[str]) -> None:
    result = CliRunner().invoke(main, ["convert", "sid.pkl", str(tmp_path / "out"), "--generator", "sid", *option])
    assert result.exit_code == 2
    assert "are for teachers, not for --generator: leave them out." in result.stderr


def test_the_comparison_is_as_asked(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plan = convert.plan_comparison
    monkeypatch.setattr(convert, "plan_comparison", lambda flow, parity: asked.append(parity) or plan(flow, "quick"))
    command = ["convert", str(golden / "edm-tiny-cond.pkl"), str(tmp_path / "out"), "--json", "--overwrite"]
    for option, levels in (([], 8), (["--parity", "full"], 8), (["--parity", "none"], 0)):
        document = json.loads(CliRunner().invoke(main, [*command, *option]).stdout)
        assert len(document["parity"]) == levels
    assert asked == ["quick", "full"]


def test_what_is_private_of_an_address_is_not_printed(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "download", lambda url: golden / "edm-tiny-cond.pkl")
    url = "https://me:secret@host/edm.pkl?token=secret"
    for said in ("out is written", "out holds the conversion of https://host/edm.pkl already"):
        result = CliRunner().invoke(main, ["convert", url, str(tmp_path / "out")])
        assert result.exit_code == 0, result.output
        assert said in result.stdout
        assert "secret" not in result.output
