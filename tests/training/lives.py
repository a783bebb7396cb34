"""Runs that are killed: each life is a process that trains in RUN_DIR until its end.

python lives.py RECIPE.json TEACHER|- RUN_DIR COUNT...    a life for each COUNT

A life is killed, by SIGKILL, at its COUNT-th touch of a file in RUN_DIR: an open, a rename, a removal ... 0 lets it
live. It prints how each ended: finished or killed.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from edmdistill.recipes import Recipe
from edmdistill.training.engine import Machine
from edmdistill.training.loop import train
from edmdistill.training.run import prepare


def die_at(count: int, run_dir: str) -> None:
    """Lets this process be killed at so many touches from here."""
    left = count

    def touched(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event.startswith(("open", "os.", "shutil.")) and any(run_dir in str(word) for word in arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if count:
        sys.addaudithook(touched)


def live(recipe: Path, teacher: str, run_dir: str, count: int) -> None:
    source = None if teacher == "-" else teacher
    run = prepare(Recipe.from_json(recipe.read_bytes()), data="digits", teacher=source, machine=Machine(device="cpu"))
    die_at(count, run_dir)
    train(run, Path(run_dir), note=lambda sentence: None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = sys.argv[1:]
    for count in map(int, words[3:]):
        child = os.fork()  # importing torch takes longer than the life
        if not child:
            live(Path(words[0]), words[1], words[2], count)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print({0: "finished", -signal.SIGKILL: "killed"}.get(status, f"exit {status}"), flush=True)
        if status == 0:
            break
