"""Runs that are killed: each life is a process that trains in a run directory until its end.

lives.py '[recipe, teacher or null, run directory, [end, ...]]' prints how its lives ended, as a list: finished, killed,
or an exit code. There is a life for each end. It is killed, by SIGKILL, at a touch of a file in its directory, an open,
a rename, a removal ...: at so many of them, or at the first of a file with the text in its name. 0 lets it live.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from shared_probes import share_probes

from edmdistill.machine.engine import Machine
from edmdistill.recipes.schema import Recipe
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run
from edmdistill.training.session import train


def die_at(end: int | str, run_dir: str) -> None:
    """Lets this process be killed at such a touch from here."""
    left, text = (end, run_dir) if isinstance(end, int) else (1, end)

    def touched(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        names = [str(word) for word in arguments[:2]] if event.startswith(("open", "os.", "shutil.")) else []
        if any(run_dir in name and text in name for name in names):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if end:
        sys.addaudithook(touched)


def live(run: Run, run_dir: str, end: int | str) -> None:
    die_at(end, run_dir)
    train(run, Path(run_dir), on_message=lambda sentence: None)


def lives(recipe: str, teacher: str | None, run_dir: str, at: list[int | str]) -> list[str]:
    """They end where one has finished."""
    ends: list[str] = []
    run = prepare(Recipe.from_json(recipe.encode()), data="digits", teacher=teacher, machine=Machine(device="cpu"))
    for end in at:
        child = os.fork()
        if not child:
            live(run, run_dir, end)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends.append({0: "finished", -signal.SIGKILL: "killed"}.get(status, f"exit {status}"))
        if status == 0:
            break
    return ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    share_probes()
    print(json.dumps(lives(*json.loads(sys.argv[1]))))
