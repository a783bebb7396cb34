"""`train --processes`: what two processes leave behind when one of them dies, or the user stops them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from edmdistill.machine.launch import LAUNCHER

ROOT = Path(__file__).parents[2]
SMALL = [
    "network.arguments={model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8}",
    "training.batch=8",
    "training.images=4000",
    "training.lr=1e-4",
    "training.log_every=800",
    "training.snapshot_every=800",
    "sampling.nfe=[1]",
]
LAST = "samples/000004000.png"


def start(run_dir: Path, *more: str) -> subprocess.Popen[str]:
    sets = [word for override in SMALL for word in ("--set", override)]
    words = ["train", "diffusion", "--data", "digits", "--recipe", "diffusion/digits", "--run-dir", str(run_dir)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "edmdistill", *words, "--device", "cpu", *sets, *more]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate()
    return process.returncode, said


def child_of(launcher: int, rank: int) -> int:
    """The process that has this rank."""
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if {f"{LAUNCHER}={launcher}".encode(), f"RANK={rank}".encode()} <= set(words):
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss/teacher"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_process_that_dies_costs_nothing_but_time(tmp_path: Path) -> None:
    """Killed in two processes, interrupted in two, ended in one: the run that one process does."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(start(whole))[0] == 0

    run = start(broken, "--processes", "2")
    wait_until((broken / "state/000000000800").exists)
    os.kill(child_of(run.pid, 1), signal.SIGKILL)
    code, said = finish(run)
    assert code == 2
    assert "The process of rank 1 (of 2) was killed by SIGKILL" in said
    assert "run the same command again to go on from what was saved" in said
    assert "Traceback" not in said

    lines = len(losses(broken))
    run = start(broken, "--processes", "2")
    wait_until(lambda: len(losses(broken)) > lines)
    run.send_signal(signal.SIGINT)
    code, said = finish(run)
    assert code == 130
    assert "Going on after" in said
    assert "the same command goes on from there" in said

    code, said = finish(start(broken))
    assert code == 0
    assert "Going on after" in said
    assert losses(broken) == pytest.approx(losses(whole), abs=1e-4)
    assert (broken / LAST).exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--shard",)])
def test_processes_share_what_evaluation_asks_for(tmp_path: Path, how: tuple[str, ...]) -> None:
    """The metrics of one process, also of an average whose weights are shared out: 3 batches, of which one is short."""
    table = ["evaluation.protocol=digits", "evaluation.every=800", "evaluation.n=300", "evaluation.nfe=[3]"]
    sets = [word for override in ("training.images=800", *table) for word in ("--set", override)]
    values = []
    for run_dir, options in ((tmp_path / "one", ()), (tmp_path / "two", ("--processes", "2", *how))):
        code, said = finish(start(run_dir, *sets, *options))
        assert code == 0, said
        (line,) = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        assert f"kept in {run_dir / 'best'}" in said
        values.append({name: value for name, value in line.items() if "NFE" in name})
    one, two = values
    assert {name.partition("@")[0] for name in one} == {"fd_digits", "class_accuracy"}
    assert two == pytest.approx(one, rel=1e-3)
