"""What a run says of where it is computed."""

import json
import mmap
import resource
import signal
from pathlib import Path

import torch

from edmdistill import __version__
from edmdistill.cli.train import command
from edmdistill.machine.engine import Engine, Machine
from edmdistill.machine.environment import environment, machine_of, peak_memory
from edmdistill.training.session import train


def test_every_session_says_where_and_from_when_and_what_it_took(start, tmp_path: Path):
    train(start("sid"), tmp_path / "run", on_round=lambda images, measures: signal.raise_signal(signal.SIGINT))
    train(start("sid"), tmp_path / "run")
    train(start("sid"), tmp_path / "run")  # is finished, and does nothing
    sessions = [json.loads(line) for line in (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()]
    assert [session["images"] for session in sessions] == [0, 8]
    for session in sessions:
        assert (session["edmdistill"], session["torch"]) == (__version__, torch.__version__)
        assert session["processes"] == 1
        assert session["device"]
        assert session["device_memory"] > 2**28
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    taken = [line["memory"] for line in lines]
    assert all(0 <= bytes_ < 2**40 for bytes_ in taken)


MACHINE = Machine("cpu", 4, False, ("ema", "optimizer"), True, 1, ("wandb",), 3, "default", "bf16")
NAMES = {"checkpoint_activations": "checkpointing", "compile_mode": "compile"}
IN_THE_RECIPE, IN_THE_IDENTITY = {"method", "recipe", "sets"}, {"teacher", "guide", "data", "init"}
CHANGES_NOTHING = {
    *("run_dir", "vae", "force_guidance", "fit", "log_with", "profile", "stop_on", "dry_run", "quiet", "verbose")
}
"""`fit` chooses among the others; `vae` is named by the grids' and measurements' own records."""


def test_a_session_says_every_option_that_changes_numbers_or_memory():
    record = json.loads(json.dumps(environment(Engine(MACHINE))))
    assert machine_of(record) == MACHINE._replace(device=None, log_with=())
    assert record["threads"] == torch.get_num_threads()
    assert record["kernels"] == "torch"
    recorded = {*record, *IN_THE_RECIPE, *IN_THE_IDENTITY, *CHANGES_NOTHING}
    assert {NAMES.get(str(option.name), option.name) for option in command.params} - recorded == set()


def test_a_session_of_an_earlier_version_has_the_defaults():
    assert machine_of({"micro_batch": 8, "shard": True}) == Machine(None, 8, True)


def test_the_most_memory_never_falls_and_sees_what_was_freed():
    device = torch.device("cpu")
    before = peak_memory(device)
    # More than there ever was, and not from what malloc keeps of what was freed.
    with mmap.mmap(-1, before - resident() + 40_000_000) as there:
        for page in range(0, len(there), mmap.PAGESIZE):
            there[page] = 1
        after = peak_memory(device)
    assert after > before
    assert peak_memory(device) > after - 2**20  # the system counts to a few pages


def resident() -> int:
    """The bytes that this process holds now, where the system says so."""
    counts = Path("/proc/self/statm")
    return int(counts.read_text().split()[1]) * resource.getpagesize() if counts.exists() else 0
