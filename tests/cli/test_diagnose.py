"""edmdistill diagnose."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_generator import tiny_generator

from edmdistill.cli import main
from edmdistill.evaluation import diagnosis, noise_levels
from edmdistill.evaluation.diagnosis import JUMP_SIGMAS, Diagnosis, Gap, SingleJump, sentences


def test_a_generator_is_diagnosed_as_a_table_and_as_json(tmp_path: Path):
    command = ["diagnose", str(tiny_generator(tmp_path / "generator")), "--protocol", "digits", "--n", "20"]
    lines = CliRunner().invoke(main, command, catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : len(JUMP_SIGMAS) + 1]] == [f"{sigma:g}" for sigma in JUMP_SIGMAS]
    assert lines[-1].endswith(".")
    document = json.loads(CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False).stdout)
    assert [jump["sigma"] for jump in document["jumps"]] == list(JUMP_SIGMAS)
    assert [f"{jump['generator']:.3g}" for jump in document["jumps"]] == [line.split()[1] for line in lines[1:9]]
    assert document["sentences"] == lines[len(JUMP_SIGMAS) + 1 :]


def test_the_teacher_stands_beside_and_the_gaps_below(monkeypatch: pytest.MonkeyPatch):
    found = Diagnosis([SingleJump(80, 9.0, 12.5), SingleJump(0.3, 2.0, 1.0)], [Gap(0.1, 0.3, 0.45, 0.25)])
    asked: list[object] = []
    monkeypatch.setattr("edmdistill.cli.diagnose.say_unfinished", lambda *sources: None)  # there is no run
    monkeypatch.setattr(diagnosis, "diagnose", lambda *args, **options: asked.append((args, options)) or found)
    command = ["diagnose", "run", "--protocol", "pixels", "--teacher", "it", "--ref", "mine.zip", "--n", "21"]
    command += [
        "--data",
        "latents.zip",
        "--vae",
        "vae",
        "--weights",
        "inception=i.pt",
        "--batch",
        "7",
        "--device",
        "cpu",
    ]
    lines = CliRunner().invoke(main, command, catch_exceptions=False).stdout.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["sigma", "generator", "teacher"], ["80", "9", "12.5"], ["0.3", "2", "1"]
    ]  # fmt: skip
    assert lines[3:] == ["s 0.1, t 0.3: gap 0.45, sensitivity 0.25", *sentences(found)]
    document = json.loads(CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False).stdout)
    assert document["source"] == "run"
    assert document["gaps"] == [{"sigma_s": 0.1, "sigma_t": 0.3, "gap": 0.45, "sensitivity": 0.25}]
    options = {"protocol": "pixels", "teacher": "it", "reference": "mine.zip", "count": 21, "batch": 7}
    options |= {"data": "latents.zip", "vae": "vae", "weights": {"inception": Path("i.pt")}}
    assert asked == [(("run",), options | {"device": torch.device("cpu")})] * 2
    alone = CliRunner().invoke(main, ["diagnose", "run", "--protocol", "digits"]).stdout
    assert alone.splitlines()[0].split() == ["sigma", "generator"]


def test_ctrl_c_says_that_nothing_is_measured(monkeypatch: pytest.MonkeyPatch):
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edmdistill.cli.diagnose.say_unfinished", lambda *sources: None)  # there is no run
    monkeypatch.setattr(diagnosis, "diagnose", stop)
    monkeypatch.setattr(noise_levels, "losses_by_noise", stop)
    for command in (["diagnose", "run", "--protocol", "digits"], ["loss", "digits", "--data", "digits"]):
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, result.stdout) == (130, "")
        assert "Interrupted: nothing is measured yet." in result.stderr


def test_a_teacher_cannot_be_diagnosed(tmp_path: Path):
    teacher = tiny_generator(tmp_path / "teacher", stage="teacher")
    result = CliRunner().invoke(main, ["diagnose", str(teacher), "--protocol", "digits"])
    assert result.exit_code == 2
    assert "is a teacher, not a generator" in result.stderr
