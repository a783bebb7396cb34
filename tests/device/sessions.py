"""Whole runs on the emulated device, in a process of its own.

sessions.py '[teacher, recipe, folder]' trains in folder/cpu and folder/device, where a disk is full at the second state
of a third run, and prints the relative distances of their files, the thread that wrote states, and that run's error.
"""

import errno
import json
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from emulated_device import DEVICE, emulated
from rounds import start
from shared_probes import share_probes

from edmdistill.checkpoints.store import load_tensors
from edmdistill.errors import TrainingError
from edmdistill.training import session
from edmdistill.training.session import train

FILES = (
    "state/000000000024/generator",
    "state/000000000024/auxiliary",
    "state/000000000008/generator",
    "generator/model",
)


def distances(one: Path, other: Path) -> dict[str, float]:
    """Of files, the largest relative distance of a tensor of the same name."""
    found = {}
    for file in FILES:
        a, b = (load_tensors(folder / f"{file}.safetensors")[0] for folder in (one, other))
        assert a.keys() == b.keys()
        found[file] = max(float((a[name] - b[name]).norm() / (b[name].norm() + 1e-12)) for name in a)
    return found


def measure(teacher: str, recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    own, there = Path(folder) / "cpu", Path(folder) / "device"
    train(start(teacher, recipe, "cpu", {}), own, on_message=lambda sentence: None)
    threads, save_state = set(), session.save_state

    def watched(*args: Any) -> Path:
        threads.add(threading.current_thread().name.partition("_")[0])
        return save_state(*args)

    def full(*args: Any) -> Path:
        if args[1].progress.images == 16:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_state(*args)

    with emulated(), patch.object(session, "save_state", watched):
        offloaded = start(teacher, recipe, DEVICE, {"offload": ["ema", "teacher", "optimizer"]})
        train(offloaded, there, on_message=lambda sentence: None)
    sentence = ""
    with emulated(), patch.object(session, "save_state", full):
        try:
            train(start(teacher, recipe, DEVICE, {}), Path(folder) / "full", on_message=lambda sentence: None)
        except TrainingError as error:
            sentence = str(error)
    metrics = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (own, there)]
    scores = [{name: value for name, value in line.items() if "fd_digits" in name} for line in metrics]
    return {"distances": distances(there, own), "threads": sorted(threads), "error": sentence, "scores": scores}


if __name__ == "__main__":
    torch.set_num_threads(1)
    share_probes()
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
