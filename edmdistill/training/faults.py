"""Turns errors during training into sentences for the user: what happened, and how to continue the run."""

from __future__ import annotations

import errno
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from edmdistill.checkpoints.layout import saved_states
from edmdistill.errors import CheckpointError, DatasetError, PeerFailed, TrainingError, causes
from edmdistill.machine.host import LIMITS
from edmdistill.training.monitors import Diverged, Health
from edmdistill.training.run import Run
from edmdistill.training.run_dir import RunDir
from edmdistill.training.state import newest_healthy
from edmdistill.transfer import is_out_of_memory

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.EROFS, errno.EIO}


class Context(NamedTuple):
    """The run in which an error happened."""

    run: Run
    folder: RunDir
    health: Health


@contextmanager
def explain_errors(run: Run, folder: RunDir, health: Health) -> Iterator[None]:
    """Raises the errors of FAULTS as TrainingError or PeerFailed, with a sentence for the user."""
    try:
        yield
    except Exception as error:
        explain = next(explain for kind, explain in FAULTS if isinstance(error, kind))
        explained = explain(error, Context(run, folder, health))
        if explained is None:
            raise
        raise explained from error


def _diverged(error: Diverged, context: Context) -> TrainingError:
    run, states = context.run, saved_states(context.folder.state)
    healthy = error.best or newest_healthy(context.folder.state, context.health.last_healthy)
    word = shlex.quote(str(healthy))
    how = f"as TEACHER, {word}" if run.method.product == "teacher" else f"by --init {word}"
    other = "try a lower training.lr in another --run-dir"
    if error.advice is not None:
        advice = error.advice
    elif error.best is not None:
        advice = f"{other}, from these weights {how}, or from the start"
    elif healthy is not None:
        advice = f"the last good state is {healthy}; {other}, from its weights {how}, or from the start"
    elif states:
        advice = f"no state before it was healthy, though {states[-1]} is finite; {other}"
    else:
        advice = f"no state was saved before it; {other}"
    # All processes see the same measures, so all of them raise; only the main process reports it.
    return (TrainingError if run.engine.is_main else PeerFailed)(f"{_sentence(error)}; {advice}")


def _data_changed(error: DatasetError, context: Context) -> TrainingError:
    return TrainingError(
        f"{_sentence(error)}; if it has changed since the run began, restore it and run the same command again; other "
        "data need another --run-dir"
    )


def _disk_refuses(error: CheckpointError | OSError, context: Context) -> TrainingError | None:
    if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
        return None
    newest = max(saved_states(context.folder.state), default=None)
    retry = f"to resume from {newest}" if newest else "again, which starts from the beginning"
    number = next((cause.errno for cause in causes(error) if isinstance(cause, OSError)), errno.ENOSPC)
    if number == errno.ENOSPC:
        advice = f", with {shutil.disk_usage(context.folder.path).free / 1e6:.1f} MB free there: free some space"
    elif number == errno.EDQUOT:  # which may be full on an empty disk
        advice = "; free some of it"
    else:
        advice = f"; {LIMITS.get(number, 'make the disk writable')}"
    return TrainingError(f"{_sentence(error)}{advice}, and run the same command {retry}")


def _out_of_memory(error: RuntimeError, context: Context) -> TrainingError:
    more = "add --micro-batch auto, --checkpoint-activations, --offload or --shard to"
    advice = "give --fit less memory in" if context.run.engine.machine.planned else more
    return TrainingError(
        f"this run does not fit in GPU memory ({str(error).partition('.')[0]}): {advice} the same command, which "
        "resumes from the last state"
    )


def _runtime(error: RuntimeError, context: Context) -> TrainingError | None:
    if is_out_of_memory(error):
        return _out_of_memory(error, context)
    return PeerFailed("another process of the run has ended") if context.run.engine.is_peer_loss(error) else None


def _sentence(error: Exception) -> str:
    return str(error).rstrip(".")


FAULTS: tuple[tuple[type[Exception], Callable[[Any, Context], TrainingError | None]], ...] = (
    (Diverged, _diverged),
    (DatasetError, _data_changed),
    (CheckpointError, _disk_refuses),
    (OSError, _disk_refuses),
    (RuntimeError, _runtime),
    (Exception, lambda error, context: None),
)
"""The sentence on an error, by its class; the first match counts. None: it is raised unchanged."""
