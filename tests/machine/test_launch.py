"""The processes of a run, with small ones in their place: what becomes of them, and what is said and handed back."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from slurm_step import STEP
from waiting import LIMIT, dead, wait_until

from edmdistill.errors import TrainingError
from edmdistill.machine import launch
from edmdistill.machine.signals import REQUESTS

# A process that marks its start, and saves where it is interrupted, as a run does; a second signal ends it at once.
SAVES = textwrap.dedent("""
    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)
        Path(f"{rank}.asked").write_text(str(number))
        time.sleep(0.1)
        Path(f"{rank}.saved").touch()
        sys.exit(130)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, stop)
    Path(f"{rank}.up").touch()
    while True: time.sleep(0.01)  # a signal that comes just before a long sleep would be heard after it
""")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """start(code, processes): launches `python -c code`, which knows its rank; gives exit code and sentences but the
    first, which says what is started."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_", "RANK", "WORLD"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "TICK", 0.01)
    monkeypatch.setattr(launch, "ECHO", 0.05)
    monkeypatch.setattr(launch, "SETTLE", 0.1)
    monkeypatch.setattr(launch, "GRACE", LIMIT)

    def start(code: str, processes: int = 2) -> tuple[int, list[str]]:
        head = "import os, signal, sys, time\nfrom pathlib import Path\nrank = int(os.environ['RANK'])\n"
        monkeypatch.setattr(launch, "_command", lambda _: [sys.executable, "-c", head + textwrap.dedent(code)])
        sentences: list[str] = []
        exit_code = launch.launch(["train"], processes, device="cpu", on_message=sentences.append)
        assert sentences.pop(0).startswith(f"Starting {processes} processes on the CPU, which has ")
        return exit_code, sentences

    return start


def when(*names: str, send: int) -> None:
    """Sends this process a signal once the files are there, and then makes a file FIRST.sent beside the first."""
    files, sent = [Path(name).absolute() for name in names], Path(f"{names[0]}.sent").absolute()

    def wait() -> None:
        wait_until(lambda: all(file.exists() for file in files))
        os.kill(os.getpid(), send)
        sent.touch()

    threading.Thread(target=wait, daemon=True).start()


def let_grace_end(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Has the launcher's clock jump beyond GRACE at each reading once the file is there, however long that takes: so
    also where GRACE begins only after that."""
    jumps = itertools.count(1)

    def monotonic() -> float:
        return time.monotonic() + (2 * LIMIT * next(jumps) if Path(name).exists() else 0)

    monkeypatch.setattr(launch, "time", SimpleNamespace(sleep=time.sleep, monotonic=monotonic))


def test_every_process_knows_its_place_and_speaks_for_itself(start, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = """
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS"
        Path(f"{rank}.env").write_text(" ".join(os.environ[name] for name in names.split()))
        Path(f"{rank}.port").write_text(os.environ["MASTER_PORT"])
        os.write(1, f"out {rank}\\n".encode())  # in one piece
        os.write(2, f"err {rank}\\n".encode())
    """
    assert start(code, 3) == (0, [])
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    for rank in range(3):
        assert Path(f"{rank}.env").read_text() == f"{rank} {rank} 3 3 127.0.0.1 {threads}"
    assert len({Path(f"{rank}.port").read_text() for rank in range(3)}) == 1
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["out 0", "out 1", "out 2"]
    assert sorted(captured.err.splitlines()) == ["err 0", "err 1", "err 2"]


def test_what_is_started_is_said_first(monkeypatch):
    """Also that it is the CPU where torch finds no GPU: eight processes that share two cores would seem to hang."""
    monkeypatch.setattr(launch, "_watch", lambda children, *_: 0)
    monkeypatch.setattr(launch, "_command", lambda _: [sys.executable, "-c", ""])
    monkeypatch.setattr(launch, "cores", lambda: 2)
    said: list[str] = []
    for device, gpus in ((None, 0), ("cpu", 0), (None, 8)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert launch.launch([], 8, device=device, on_message=said.append) == 0
    assert said == [
        "Starting 8 processes on the CPU, which has 2 cores, because torch finds no GPU here.",
        "Starting 8 processes on the CPU, which has 2 cores.",
        "Starting 8 processes, one for each GPU.",
    ]


def test_threads_that_the_user_set_stay(start, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert start("assert os.environ['OMP_NUM_THREADS'] == '7'") == (0, [])


@pytest.mark.parametrize(
    ("code", "exit_code", "part"),
    [
        ("rank and sys.exit(1); time.sleep(3600)", 1, "failed (its traceback is above)"),
        ("rank and sys.exit(7); time.sleep(3600)", 1, "exited with code 7"),
        (
            "rank and os.kill(os.getpid(), signal.SIGBUS); time.sleep(3600)",
            2,
            "was killed by SIGBUS, probably because /dev",
        ),
        ("rank and os.kill(os.getpid(), 40); time.sleep(3600)", 2, "was killed by signal 40"),
        ("rank and sys.exit(2); time.sleep(3600)", 2, None),
    ],
)
def test_one_end_is_the_end_of_all(start, code: str, exit_code: int, part: str | None):
    found, sentences = start(code)
    assert found == exit_code
    if part is None:  # the process has told it
        assert sentences == []
    else:
        (sentence,) = sentences
        assert sentence.startswith(f"The process of rank 1 (of 2) {part}")
        assert sentence.endswith("; the others were stopped; run the same command again to go on from what was saved.")


@pytest.mark.parametrize(
    ("first", "second", "exit_code", "part"),
    [
        ("sys.exit(130)", "sys.exit(130)", 130, None),
        ("sys.exit(0)", "sys.exit(130)", 130, None),
        ("sys.exit(2)", "sys.exit(2)", 2, None),
        # Who loses a peer fails too, sooner perhaps, but is not to blame.
        ("sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", 2, "rank 1 (of 2) was killed by SIGKILL, probably"),
        ("sys.exit(2)", "sys.exit(1)", 1, "rank 1 (of 2) failed"),
        ("sys.exit(1)", "os.abort()", 1, "rank 0 (of 2) failed"),
        ("os.abort()", "sys.exit(1)", 2, "rank 0 (of 2) was killed by SIGABRT"),
    ],
)
def test_who_is_to_blame(start, monkeypatch, first: str, second: str, exit_code: int, part: str | None):
    monkeypatch.setattr(launch, "SETTLE", LIMIT)
    code = f"""
        if rank == 0:
            Path("pid").write_text(str(os.getpid()))
            Path("pid").rename("0.pid")
            {first}
        while not Path("0.pid").exists(): time.sleep(.01)
        try:
            while True:  # until the launcher has seen the end of rank 0
                os.kill(int(Path("0.pid").read_text()), 0)
                time.sleep(.01)
        except ProcessLookupError:
            {second}
    """
    found, sentences = start(code)
    assert found == exit_code
    assert len(sentences) == (part is not None)
    assert part is None or part in sentences[0]


def test_the_others_are_asked_before_they_are_killed(start, monkeypatch):
    let_grace_end(monkeypatch, "0.saved")
    code = """
        if rank == 2:
            while not (Path("0.up").exists() and Path("1.up").exists()): time.sleep(.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path("1.up").touch()
            time.sleep(3600)
    """
    exit_code, sentences = start(textwrap.dedent(code) + SAVES, 3)
    assert exit_code == 2
    assert len(sentences) == 1
    assert Path("0.saved").exists()


@pytest.mark.parametrize("number", REQUESTS)
def test_a_signal_is_passed_on_once_and_waited_for(start, monkeypatch, number: int):
    """However long processes take to save."""
    let_grace_end(monkeypatch, "1.asked")
    before = signal.getsignal(number)
    when("0.up", "1.up", send=number)
    assert start(SAVES) == (130, [])
    expected = signal.SIGTERM if number == signal.SIGHUP else number
    for rank in range(2):
        assert Path(f"{rank}.asked").read_text() == str(int(expected))
        assert Path(f"{rank}.saved").exists()
    assert signal.getsignal(number) == before


def test_nohup_is_respected(start):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        when("0.up", "1.up", send=signal.SIGHUP)
        code = """
            Path(f"{rank}.up").touch()
            while not Path("0.up.sent").exists(): time.sleep(.01)
            time.sleep(.1)
        """
        assert start(code) == (0, [])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_had_finished_when_it_was_interrupted_is_finished(start):
    when("0.up", "1.up", send=signal.SIGINT)
    code = SAVES.replace("130", "0")
    assert start(code) == (0, [])


def test_a_second_signal_stops_at_once(start, monkeypatch):
    monkeypatch.setattr(launch, "ECHO", 0)
    when("0.up", "1.up", send=signal.SIGINT)
    when("0.asked", "1.asked", send=signal.SIGINT)
    assert start(SAVES.replace("0.1", "3600")) == (130, [])
    assert not list(Path().glob("*.saved"))


def test_a_signal_sent_to_process_and_group_is_one(start, monkeypatch):
    monkeypatch.setattr(launch, "ECHO", LIMIT)
    when("0.up", "1.up", send=signal.SIGTERM)
    when("0.asked", "1.asked", send=signal.SIGTERM)
    sent = "while not Path('0.asked.sent').exists(): time.sleep(.01)"
    assert start(SAVES.replace("time.sleep(0.1)", f"{sent}\n    time.sleep(0.1)")) == (130, [])
    assert Path("0.saved").exists()
    assert Path("1.saved").exists()


def test_after_a_notice_all_are_still_waited_for(start, monkeypatch):
    """Slurm sends SIGTERM when the time after --signal=USR1@60 is over, and gives 30 s more."""
    monkeypatch.setattr(launch, "ECHO", 0)
    let_grace_end(monkeypatch, "0.asked.sent")
    when("0.up", "1.up", send=signal.SIGUSR1)
    when("0.asked", "1.asked", send=signal.SIGTERM)
    when("0.asked.sent", send=signal.SIGUSR1)
    code = SAVES.replace("signal.signal(number, signal.SIG_DFL)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    code = code.replace(
        "def stop(number, frame):", "def stop(number, frame):\n    if Path(f'{rank}.asked').exists(): return"
    )
    later = "while not Path('0.asked.sent.sent').exists(): time.sleep(.01)\n    time.sleep(.1)"
    assert start(code.replace("time.sleep(0.1)", later)) == (130, [])
    assert Path("0.saved").exists()
    assert Path("1.saved").exists()


def test_after_a_second_signal_who_does_not_stop_is_killed(start, monkeypatch):
    monkeypatch.setattr(launch, "ECHO", 0)
    let_grace_end(monkeypatch, "0.saved")
    when("0.up", "1.up", send=signal.SIGTERM)
    when("0.asked", "1.asked", send=signal.SIGTERM)
    sent = "while rank or not Path('0.asked.sent').exists(): time.sleep(.01)"
    code = SAVES.replace("signal.SIG_DFL", "signal.SIG_IGN").replace("time.sleep(0.1)", sent)
    exit_code, sentences = start(code)
    assert exit_code == 130
    assert sentences == [
        f"Some processes did not stop within {LIMIT} seconds and were killed; run the same command again to go on "
        "from what was saved."
    ]
    assert Path("0.saved").exists()


def test_a_fault_while_saving_is_told(start):
    when("0.up", "1.up", send=signal.SIGINT)
    exit_code, sentences = start(SAVES.replace("130", "1 if rank else 130"))
    assert exit_code == 1
    assert "rank 1 (of 2) failed" in sentences[0]


def test_data_workers_are_not_asked_but_are_killed(start, monkeypatch):
    """A worker that heard of SIGTERM would end before its process has saved; one that outlives it is an orphan."""
    let_grace_end(monkeypatch, "1.told")
    code = """
        import subprocess
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        Path(f"{rank}.worker").write_text(str(worker.pid))
        if rank == 0:
            while not Path("1.up").exists(): time.sleep(.01)
            os._exit(1)
        def stop(number, frame):
            time.sleep(.1)
            Path("1.alive").write_text(str(worker.poll()))
            Path("1.told").touch()
            time.sleep(3600)
        signal.signal(signal.SIGTERM, stop)
        Path("1.up").touch()
        while True: time.sleep(0.01)
    """
    try:
        assert start(code)[0] == 1
        assert Path("1.alive").read_text() == "None"
        worker = int(Path("1.worker").read_text())
        wait_until(lambda: dead(worker))
    finally:
        os.kill(int(Path("0.worker").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("late", [False, True], ids=["while they run", "before they are bound"])
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_no_process_outlives_a_killed_launcher(tmp_path: Path, late: bool):
    child = f"""if True:
        import os, time
        from pathlib import Path
        from edmdistill.machine.launch import init_from_environment
        Path(os.environ["RANK"] + ".pid.tmp").write_text(str(os.getpid()))
        Path(os.environ["RANK"] + ".pid.tmp").rename(os.environ["RANK"] + ".pid")
        while {late} and os.getppid() == int(os.environ["EDMDISTILL_LAUNCHER"]): time.sleep(.01)
        init_from_environment()
        assert "EDMDISTILL_LAUNCHER" not in os.environ
        Path(os.environ["RANK"] + ".bound").touch()
        time.sleep(3600)
    """
    script = f"""if True:
        import sys
        from edmdistill.machine import launch
        launch._command = lambda _: [sys.executable, "-c", {child!r}]
        launch.launch([], 2, device="cpu", on_message=print)
    """
    files = [tmp_path / f"{rank}.{'pid' if late else 'bound'}" for rank in range(2)]
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) as launcher:
        wait_until(lambda: all(file.exists() for file in files))
        launcher.kill()
    pids = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
    wait_until(lambda: all(dead(pid) for pid in pids))
    assert not (late and list(tmp_path.glob("*.bound")))


def test_the_command_is_this_programme():
    assert launch._command(["--version"])[-3:] == ["-m", "edmdistill", "--version"]
    found = subprocess.run(launch._command(["--version"]), capture_output=True, text=True, check=True)
    assert found.stdout.startswith("edmdistill ")


def test_the_working_directory_holds_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "edmdistill.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    subprocess.run(launch._command(["--version"]), check=True)


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ("train sid t --processes 2 --data digits", "train sid t --data digits"),
        ("train sid t --processes=2 --data digits", "train sid t --data digits"),
        ("--processes 2 --set a.b=2", "--set a.b=2"),
        ("train sid", "train sid"),
        ("", ""),
    ],
)
def test_without_processes(arguments: str, left: str):
    assert launch.without_processes(arguments.split()) == left.split()


@pytest.mark.parametrize("environment", [{"RANK": "0"}, STEP], ids=["torchrun", "srun"])
def test_no_launcher_within_a_launcher(start, monkeypatch, environment: dict[str, str]):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=r"leave --processes out$"):
        start("Path('began').touch()")
    assert not Path("began").exists()


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(TrainingError, match="this machine has 1: use --processes 1, or --device cpu"):
        launch.launch([], 2, device=None, on_message=print)


@pytest.mark.parametrize("count", [0, 2, 3])
def test_where_there_is_no_device_the_processes_run_on_the_cpu(start, monkeypatch, count: int):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr(launch, "_command", lambda _: [sys.executable, "-c", "pass"])
    assert launch.launch([], 2, device=None, on_message=print) == 0


def test_on_the_cpu_devices_do_not_count(start, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert start("pass") == (0, [])
