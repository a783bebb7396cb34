"""An evaluation that is killed, interrupted or shared goes on to the number of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_generator import tiny_generator
from waiting import wait_until

from edmdistill.machine.launch import LAUNCHER

SCRIPT = """
import sys
from edmdistill.cli import main
from edmdistill.evaluation import images, shards
shards.SHARD_IMAGES, images.BLOCKS[16] = 32, 16
if __name__ == "__main__":
    main(sys.argv[1:])
"""
COUNT = 3000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_generator(tmp_path / "generator")


def start(source: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    """Starts the evaluation; its files are small, so that every kill leaves some."""
    script = out.parent / "evaluation.py"
    script.write_text(SCRIPT)
    words = ["eval", source, "--protocol", "digits", "--nfe", "2,4", "--n", COUNT, "--device", "cpu"]
    words += ["--metrics", "fd_digits,class_accuracy,precision_digits", "--work", out.parent / "work", "--out", out]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, script, *map(str, words), *map(str, more)]
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)


def metrics(process: subprocess.Popen[str], out: Path) -> list[dict[str, float]]:
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return [result["metrics"] for result in json.loads(out.read_text())["results"]]


def files(work: Path) -> int:
    # os.walk passes over folders that the process removes meanwhile; before Python 3.13 Path.rglob raises.
    return sum(name.endswith(".safetensors") for _, _, names in os.walk(work) for name in names)


@pytest.mark.slow
def test_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    whole = metrics(start(source, tmp_path / "whole.json"), tmp_path / "whole.json")
    chance, work, kills = random.Random(0), tmp_path / "work", 0
    assert not list(work.iterdir())
    for _ in range(20):
        process, before = start(source, tmp_path / "killed.json"), files(work)
        while process.poll() is None and files(work) <= before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
        if process.returncode == 0:  # it was done before the kill
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills
    assert metrics(start(source, tmp_path / "killed.json"), tmp_path / "killed.json") == whole
    assert not list(work.iterdir())


@pytest.mark.slow
def test_interrupted_on_two_processes_and_resumed_on_one(source: Path, tmp_path: Path) -> None:
    whole = metrics(start(source, tmp_path / "whole.json"), tmp_path / "whole.json")
    process = start(source, tmp_path / "two.json", "--processes", 2)
    wait_until(lambda: process.poll() is not None or files(tmp_path / "work") >= 3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "the same command goes on with what is kept in" in said
    assert said.count("Interrupted") == 1
    kept = files(tmp_path / "work")
    assert kept >= 3
    assert metrics(start(source, tmp_path / "two.json"), tmp_path / "two.json") == whole
    again = start(source, tmp_path / "both.json", "--processes", 2)
    assert metrics(again, tmp_path / "both.json") == whole


@pytest.mark.slow
def test_one_of_two_processes_dies(source: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path / "two.json", "--processes", 2)
    wait_until(lambda: process.poll() is not None or files(tmp_path / "work") >= 3)
    victim = next(
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if {f"{LAUNCHER}={process.pid}".encode(), b"RANK=1"} <= environment_of(folder)
    )
    os.kill(victim, signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 2, said
    assert "The process of rank 1 (of 2) was killed by SIGKILL" in said
    assert "use fewer --processes" in said
    assert "Traceback" not in said
    assert files(tmp_path / "work") >= 3


def environment_of(process: Path) -> set[bytes]:
    """Returns the environment of a process by its folder in /proc; empty if it is another user's, or has ended."""
    try:
        return {*(process / "environ").read_bytes().split(b"\0")}
    except OSError:
        return set()
