"""Resumes a run from the newest state of its directory."""

from __future__ import annotations

from collections.abc import Callable

from edmdistill.checkpoints.run_state import Progress
from edmdistill.errors import TrainingError
from edmdistill.training.run import Run
from edmdistill.training.run_dir import RunDir
from edmdistill.training.state import read_state, resumable_state, state_path


def resume(run: Run, folder: RunDir, tell: Callable[[str], object]) -> Progress | None:
    """Restores the newest whole state.  Returns: its progress; None if there is no state."""
    newest = run.engine.on_main(lambda: resumable_state(folder.state, tell))
    images = run.engine.broadcast(-1 if newest is None else int(newest.name))
    if images < 0:
        return None
    path = state_path(folder.state, images)
    state = read_state(path)
    try:
        run.restore(state.tensors, images)
        for role, scale in run.scales.items():
            scale.restore(state.progress.scales[role])
    except (KeyError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the state {path} is from another run, although the recipe and run.json match: restore {folder.path} from "
            "a backup, or use another --run-dir"
        ) from error
    return state.progress
