"""The processes of one run: started here on one machine, or by torchrun, accelerate or Slurm on several.

torch's start_processes is not used: as soon as one process fails, it kills the others, even while they save; it puts
each into its own session; and it logs warnings where one sentence is wanted.
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

from edmdistill.errors import TrainingError, counted
from edmdistill.machine.host import cores
from edmdistill.machine.signals import ECHO, NOTICES, REQUESTS

LAUNCHER = "EDMDISTILL_LAUNCHER"
"""Holds the process id of `launch` in the processes that it started."""

TICK = 0.05
SETTLE = 1.0
"""Seconds that the other processes have to exit by themselves, with their own messages, after one has failed."""
GRACE = 5.0
"""Seconds from the last request to stop until SIGKILL."""

FORWARDED_SIGNALS: dict[int, int] = {**{number: number for number in REQUESTS}, signal.SIGHUP: signal.SIGTERM}
INTERRUPTED = (130, *(-number for number in FORWARDED_SIGNALS.values()))
RESUME = "run the same command again to go on from what was saved"
HINTS: dict[int, str] = {
    signal.SIGKILL: ", probably because memory ran out (use fewer --processes; to train, a smaller "
    "--micro-batch or fewer --workers)",
    signal.SIGBUS: ", probably because /dev/shm is full (to train, use fewer --workers)",
}
PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], processes: int, *, device: str | None, on_message: Callable[[str], object]) -> int:
    """Runs `edmdistill ARGUMENTS` in several processes on this machine, and waits for all of them.

    SIGINT, SIGTERM and NOTICES are forwarded and waited for; after a second one that is no notice, for GRACE seconds
    only. If one process dies, the others are stopped, and one sentence says which it was. To be called from the main
    thread.

    Args:
        arguments: the command line's, without --processes.
        device: the device of all processes, cpu or cuda; None: cuda if available.
        on_message: called with that sentence, and with one on what is started: it takes seconds to say more.
    Returns: the exit code. 0: done. 130: interrupted and saved. 2: a user error, which the process itself has printed,
        or a killed process. 1: a bug, whose traceback the process has printed.
    Raises: TrainingError: another launcher has started this process, or there are too few devices.
        EdmDistillError: the device does not exist.
    """
    if "RANK" in os.environ or _slurm_tasks(os.environ) > 1:
        raise TrainingError(
            "--processes starts the processes of a run, but torchrun, accelerate or srun has already started them: "
            "leave --processes out"
        )
    on_message(_describe_start(processes, _require_devices(device, processes), asked=device is not None))
    children: list[subprocess.Popen[bytes]] = []
    requests: list[tuple[float, int]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not requests or now > requests[-1][0] + ECHO:
            requests.append((now, number))

    previous = {
        number: signal.signal(number, handle)
        for number in FORWARDED_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN  # nohup
    }
    try:
        # In its own group, a process gets Ctrl-C only from here and only once: a second signal would stop it before it
        # has saved. And `kill` of this process has the effect of the terminal's Ctrl-C.
        for environ in _environments(processes):
            child = subprocess.Popen(_command(arguments), env=environ, stdin=subprocess.DEVNULL, process_group=0)
            children.append(child)
        return _watch(children, requests, on_message)
    finally:
        _kill(children)
        for number, handler in previous.items():
            signal.signal(number, handler)


def without_processes(arguments: Sequence[str]) -> list[str]:
    """Returns command-line arguments without `--processes N` or `--processes=N`."""
    return [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if argument != "--processes" and before != "--processes" and not argument.startswith("--processes=")
    ]


def init_from_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Prepares a process that may be one of several for torch.distributed.  To be called before anything slow.

    In an srun's tasks, sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from Slurm's
    variables. Processes that `launch` started die with it.

    Raises: TrainingError: `accelerate launch` was called in a way that starts one process only.
    """
    launcher = environ.pop(LAUNCHER, None)
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):  # it has died already
            os.kill(os.getpid(), signal.SIGKILL)
    if "RANK" in environ:
        return
    # Without --multi_gpu, accelerate's launcher sets the address of the first process but starts only one, without a
    # rank.
    by_mpi = any(name.endswith(("PMI_SIZE", "COMM_WORLD_SIZE")) for name in environ)
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ and not by_mpi:
        raise TrainingError(
            "accelerate launch starts only one process with --cpu or without --multi_gpu, whatever --num_processes "
            "says: use --processes N, or torchrun"
        )
    if _slurm_tasks(environ) > 1:
        environ.update(_slurm_world(environ))


def process_rank(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns the rank of this process and the number of processes; to be called after `init_from_environment`."""
    return int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """Returns the number of processes that srun started, this one included; 1 outside srun.

    SLURM_NTASKS and SLURM_PROCID are set in batch scripts and salloc's shells too, which are single processes.
    """
    return int(environ.get("SLURM_STEP_NUM_TASKS", "1"))


def _slurm_world(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns torch.distributed's environment variables, from those of an srun."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
    # Steps that share a machine most likely get different ports, below the range that the system assigns from.
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
    """Returns the first name in a Slurm node list: "gpu[07-09,12],login" -> "gpu07"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]


def _tasks_per_node(counts: str) -> list[int]:
    """Expands Slurm's run lengths: "4(x2),3" -> [4, 4, 3]."""
    pairs = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    return [int(pair[1]) for pair in pairs if pair for _ in range(int(pair[2] or 1))]


def _require_devices(device: str | None, processes: int) -> str:
    """Returns the kind of device of all processes.

    Raises: as `launch`, where there is no GPU for each process, and they do not run on the CPU.
    """
    import torch

    from edmdistill.machine.devices import named_device

    chosen = named_device(device)
    if chosen.index is not None:
        raise TrainingError(
            f"--device {device} is a single GPU, but each of {processes} processes uses its own: use --device cuda"
        )
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and count < processes:
        fewer = f"--processes {count}" + (" or fewer" if count > 1 else "")
        raise TrainingError(
            f"--processes {processes} needs one GPU for each process, but this machine has {count}: use {fewer}, or "
            "--device cpu"
        )
    return str(chosen.type)


def _describe_start(processes: int, kind: str, *, asked: bool) -> str:
    """Returns a sentence on the processes that are started.

    Args:
        kind: of their devices.
        asked: whether the user named it.
    """
    if kind != "cpu":
        return f"Starting {processes} processes, one for each GPU."
    why = "" if asked else ", because torch finds no GPU here"
    return f"Starting {processes} processes on the CPU, which has {counted(cores(), 'core')}{why}."


def _environments(processes: int) -> list[dict[str, str]]:
    """Returns the environment variables of each process."""
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
    return [
        {"OMP_NUM_THREADS": str(max(1, cores() // processes))}
        | os.environ
        | shared
        | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(processes)
    ]


def imports_from_working_directory() -> bool:
    """Returns whether this process imports from the working directory; if not, those that it starts must not either."""
    return os.getcwd() in sys.path or "" in sys.path


def _command(arguments: Sequence[str]) -> list[str]:
    path = [] if imports_from_working_directory() else ["-P"]
    return [sys.executable, *path, "-m", "edmdistill", *arguments]


def _watch(
    children: Sequence[subprocess.Popen[bytes]],
    requests: Sequence[tuple[float, int]],
    on_message: Callable[[str], object],
) -> int:
    """Waits for all processes, and forwards the signals that arrive.  Returns: the exit code."""
    ended: dict[int, int] = {}  # exit code by rank, in the order in which they ended; below 0: minus the signal
    failures: dict[int, int] = {}  # those that failed, not at our request
    forwarded, stopping, killed = 0, False, False
    stop_at, kill_at = math.inf, math.inf
    while len(ended) < len(children):
        time.sleep(TICK)
        now = time.monotonic()
        for _, number in requests[forwarded:]:
            forwarded += 1
            _send(children, FORWARDED_SIGNALS[number])
        if kill_at == math.inf and sum(number not in NOTICES for _, number in requests) > 1:
            kill_at = now + GRACE

        for rank, child in enumerate(children):
            code = child.poll()
            if rank in ended or code is None:
                continue
            ended[rank] = code
            expected = code in (0, 130) or (forwarded and code in INTERRUPTED)
            if not (expected or stopping or killed):
                failures[rank] = code
                stop_at = min(stop_at, now + SETTLE)

        if now >= stop_at and not stopping:
            stopping, kill_at = True, now + GRACE
            _send(children, signal.SIGTERM)
        if now >= kill_at and not killed:
            killed = True
            _kill(children)

    if failures:
        rank, code = min(failures.items(), key=lambda failure: _suspicion(failure[1]))
        if code != 2:
            on_message(_describe_failure(rank, len(children), code))
        return 2 if code == 2 or code < 0 else 1
    if killed:
        on_message(f"Some processes did not stop within {GRACE:g} seconds and were killed; {RESUME}.")
    return 0 if set(ended.values()) == {0} else 130


def _suspicion(code: int) -> int:
    """Returns a rank of exit codes, lowest for the likeliest cause: a process that lost a peer fails too, but is rarely
    killed.

    Among equals the first to end is the cause. SIGABRT is how NCCL reacts to the loss of a peer.
    """
    if code < 0 and code != -signal.SIGABRT:
        return 0
    return 2 if code == 2 else 1


def _describe_failure(rank: int, processes: int, code: int) -> str:
    if code < 0:
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        what = f"was killed by {name}{HINTS.get(-code, '')}"
    else:
        what = "failed (its traceback is above)" if code == 1 else f"exited with code {code}"
    return f"The process of rank {rank} (of {processes}) {what}; the others were stopped; {RESUME}."


def _send(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Sends a signal to each running process, but not to its data workers."""
    for child in children:
        child.send_signal(number)


def _kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kills each running process and its data workers."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    for child in children:
        child.wait()
