"""Processes that srun, torchrun or accelerate started: what the environment says of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_step import STEP

from edmdistill.machine import launch


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "LOCAL_WORLD_SIZE": "3"}),
        ({"SLURM_STEP_NODELIST": ""}, {"MASTER_ADDR": "login"}),
        ({"SLURM_STEP_NODELIST": "a1,b[2-3]"}, {"MASTER_ADDR": "a1"}),
        ({"SLURM_STEP_NODELIST": "rack[1-2]n[003,7]-ib,a"}, {"MASTER_ADDR": "rack1n003-ib"}),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "SLURM_NODEID": "2"}, {"LOCAL_WORLD_SIZE": "3"}),
        ({"MASTER_ADDR": "mine", "MASTER_PORT": "1234"}, {"MASTER_ADDR": "mine", "MASTER_PORT": "1234"}),
    ],
)
def test_slurm(change: dict[str, str], expected: dict[str, str]):
    environ = STEP | change
    launch.init_from_environment(environ)
    assert expected.items() <= environ.items()
    assert 15000 <= int(environ["MASTER_PORT"]) < 30000 or "MASTER_PORT" in change


def test_slurm_gives_all_of_a_step_one_port_and_steps_their_own():
    ports = set()
    for step in ("3", "3", "4"):
        environ = STEP | {"SLURM_STEP_ID": step, "SLURM_PROCID": "0"}
        launch.init_from_environment(environ)
        ports.add(environ["MASTER_PORT"])
    assert len(ports) == 2


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NODELIST": "gpu[1-4]"},  # a batch script: one process
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"RANK": "0", "WORLD_SIZE": "1"},  # torchrun in an srun
        {"ACCELERATE_MIXED_PRECISION": "no"},  # accelerate launch --cpu --num_processes 1
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "RANK": "0"},  # --multi_gpu
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"},  # by mpirun
    ],
)
def test_nothing_else_is_mapped(environ: dict[str, str]):
    before = dict(environ)
    launch.init_from_environment(environ)
    assert environ == before


@pytest.mark.slow  # two processes that import torch; what it sets is refused in the tests above
def test_accelerate_launch_on_a_cpu_is_refused(tmp_path: Path):
    """Asked of accelerate itself: what it sets is not documented."""
    code = "from edmdistill.machine.launch import init_from_environment; init_from_environment()"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--quiet"]
    (tmp_path / "script.py").write_text(code)
    environ = {name: value for name, value in os.environ.items() if name != "RANK"}
    found = subprocess.run([*command, str(tmp_path / "script.py")], capture_output=True, text=True, env=environ)
    assert "TrainingError: accelerate launch starts only one process" in found.stderr
