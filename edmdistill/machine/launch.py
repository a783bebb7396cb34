"""The processes of one run: started here on one machine, or by torchrun, accelerate or Slurm on several.

torch's own start_processes is not used: it ends every process as soon as one has ended badly, also those that are
saving, puts each into a session of its own, and warns by log lines where one sentence is wanted.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import FrameType

from edmdistill.errors import TrainingError

LAUNCHER = "EDMDISTILL_LAUNCHER"
"""Tells a process that `launch` started who did."""

TICK = 0.05
ECHO = 0.5
"""Seconds in which a signal is one with the last: `timeout` and process managers send it to a process and its group."""
SETTLE = 1.0
"""Seconds that the other processes have to end by themselves, and to tell more, when one has ended badly."""
GRACE = 5.0
"""Seconds from the last request to end until SIGKILL."""

PASSED_ON: dict[int, int] = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)
RESUME = "the same command goes on from the last state"
HINTS: dict[int, str] = {
    signal.SIGKILL: ", as the system does when memory runs out (a smaller --micro-batch or fewer --workers need less)",
    signal.SIGBUS: ", as happens when /dev/shm is full (fewer --workers need less)",
}
PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], processes: int, *, device: str | None, note: Callable[[str], object]) -> int:
    """Runs `edmdistill ARGUMENTS` in several processes of this machine, and waits for all of them.

    SIGINT and SIGTERM are passed on and waited for; a second one, for GRACE seconds only. If one process dies, the
    others are ended, and one sentence says which it was. Call it from the main thread.

    Args:
        arguments: of the command line, without --processes.
        device: of all processes, cpu or cuda; None: cuda where there is one.
        note: hears the sentence.
    Returns: the exit code: 0; 130: interrupted and saved; 2: a user's error, which the process itself has told, or a
        killed process; 1: a fault, whose traceback the process has printed.
    Raises: TrainingError: another launcher has started this process, or there are too few devices.
        EdmDistillError: no such device is here.
    """
    if "RANK" in os.environ or _slurm_tasks(os.environ) > 1:
        raise TrainingError(
            "--processes starts the processes of a run, but torchrun, accelerate or srun has started several already: "
            "leave --processes out"
        )
    cpu = _all_on_cpu(device, processes)
    children: list[subprocess.Popen[bytes]] = []
    asked: list[tuple[float, int]] = []

    def ask(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not asked or now > asked[-1][0] + ECHO:
            asked.append((now, number))

    usual = {
        number: signal.signal(number, ask)
        for number in PASSED_ON
        if signal.getsignal(number) != signal.SIG_IGN  # nohup
    }
    try:
        # In a group of its own a process hears of Ctrl-C from here alone, and once, for a second signal would stop it
        # before it has saved; and `kill` of this process is as good as the terminal's Ctrl-C.
        for own in _environments(processes, cpu):
            child = subprocess.Popen(_command(arguments), env=own, stdin=subprocess.DEVNULL, process_group=0)
            children.append(child)
        return _watch(children, asked, note)
    finally:
        _kill(children)
        for number, handler in usual.items():
            signal.signal(number, handler)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_processes(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line without `--processes N` or `--processes=N`."""
    return [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if argument != "--processes" and before != "--processes" and not argument.startswith("--processes=")
    ]


def init_from_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Readies a process that may be one of several for torch.distributed.  To be called before anything slow.

    The tasks of an srun get RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from Slurm's
    variables; the processes that `launch` started are bound to it, and do not outlive it.

    Raises: TrainingError: started by accelerate in a way that leaves every process alone.
    """
    launcher = environ.pop(LAUNCHER, None)
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):  # it died before
            os.kill(os.getpid(), signal.SIGKILL)
    if "RANK" in environ:
        return
    # accelerate's launcher without --multi_gpu says where the first process is, but starts one alone, without a rank.
    by_mpi = any(name.endswith(("PMI_SIZE", "COMM_WORLD_SIZE")) for name in environ)
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ and not by_mpi:
        raise TrainingError(
            "accelerate launch starts one process, whatever --num_processes says, with --cpu or without --multi_gpu: "
            "give edmdistill train --processes N, or use torchrun"
        )
    if _slurm_tasks(environ) > 1:
        environ.update(_slurm_world(environ))


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """How many processes an srun has started with this one.

    A batch script and an salloc's shell have SLURM_NTASKS and SLURM_PROCID too, but are one process: only srun counts.
    """
    return int(environ.get("SLURM_STEP_NUM_TASKS", "1"))


def _slurm_world(environ: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed wants to know, from an srun's variables."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
    # Any two steps that share a machine have, most likely, two ports, below those that the system hands out.
    step = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '0')}"
    world = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(nodes),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(15000 + zlib.crc32(step.encode()) % 15000),
    }
    if "SLURM_STEP_TASKS_PER_NODE" in environ:
        world["LOCAL_WORLD_SIZE"] = str(
            _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
        )
    return world


def _first_host(nodes: str) -> str:
    """The first name of a Slurm node list: "gpu[07-09,12],login" -> "gpu07"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]


def _tasks_per_node(counts: str) -> list[int]:
    """Slurm's run lengths, spelt out: "4(x2),3" -> [4, 4, 3]."""
    pairs = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    return [int(pair[1]) for pair in pairs if pair for _ in range(int(pair[2] or 1))]


def _all_on_cpu(device: str | None, processes: int) -> bool:
    """Whether the processes train on the CPU.  Raises: as `launch`."""
    import torch

    from edmdistill.machine.devices import named_device

    chosen = named_device(device)
    if chosen.index is not None:
        raise TrainingError(
            f"--device {device} is one device, but each of {processes} processes has its own: give --device cuda"
        )
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and count < processes:
        raise TrainingError(
            f"--processes {processes} wants a CUDA device for each, and there are {count}: "
            f"give --processes {count} or fewer, or --device cpu"
        )
    return chosen.type == "cpu"


def _environments(processes: int, cpu: bool) -> list[dict[str, str]]:
    """The environment of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
    }
    if cpu:
        shared["ACCELERATE_USE_CPU"] = "1"
    return [
        {"OMP_NUM_THREADS": str(max(1, cores() // processes))}
        | os.environ
        | shared
        | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(processes)
    ]


def _command(arguments: Sequence[str]) -> list[str]:
    # -P: what lies in the working directory is no module for us, if it was none for the process that asks.
    path = [] if os.getcwd() in sys.path or "" in sys.path else ["-P"]
    return [sys.executable, *path, "-m", "edmdistill", *arguments]


def _watch(
    children: Sequence[subprocess.Popen[bytes]], asked: Sequence[tuple[float, int]], note: Callable[[str], object]
) -> int:
    """Waits for all, passing on the signals that come in.  Returns: the exit code."""
    ended: dict[int, int] = {}  # exit code by rank, in the order of their ends; below 0: minus the signal
    failures: dict[int, int] = {}  # those of them that ended badly, and not at our request
    passed, ending, killed = 0, False, False
    end_at, kill_at = math.inf, math.inf
    while len(ended) < len(children):
        time.sleep(TICK)
        now = time.monotonic()
        for _, number in asked[passed:]:
            passed += 1
            _send(children, PASSED_ON[number])
            if passed == 2:
                kill_at = now + GRACE

        for rank, child in enumerate(children):
            code = child.poll()
            if rank in ended or code is None:
                continue
            ended[rank] = code
            stopped = code in (0, 130) or (passed and code in INTERRUPTED)
            if not (stopped or ending or killed):
                failures[rank] = code
                end_at = min(end_at, now + SETTLE)

        if now >= end_at and not ending:
            ending, kill_at = True, now + GRACE
            _send(children, signal.SIGTERM)
        if now >= kill_at and not killed:
            killed = True
            _kill(children)

    if failures:
        rank, code = min(failures.items(), key=lambda failure: _suspicion(failure[1]))
        if code != 2:
            note(_sentence(rank, len(children), code))
        return 2 if code == 2 or code < 0 else 1
    if killed:
        note(f"Some processes did not stop in {GRACE:g} seconds and were killed; {RESUME}.")
    return 0 if set(ended.values()) == {0} else 130


def _suspicion(code: int) -> int:
    """How late an exit code stands among those to blame: who loses a peer fails too, but is rarely killed.

    Of equals, the first to end is to blame. SIGABRT is how NCCL takes the loss of a peer.
    """
    if code < 0 and code != -signal.SIGABRT:
        return 0
    return 2 if code == 2 else 1


def _sentence(rank: int, processes: int, code: int) -> str:
    if code < 0:
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        what = f"was killed by {name}{HINTS.get(-code, '')}"
    else:
        what = "failed, as its traceback says" if code == 1 else f"ended with exit code {code}"
    return f"The process of rank {rank}, of {processes} processes, {what}; the others were ended too; {RESUME}."


def _send(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """A signal for each process that runs, and not for its data workers."""
    for child in children:
        child.send_signal(number)


def _kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGKILL for each process that runs, and for its data workers."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    for child in children:
        child.wait()
