"""Checks what stopped evaluations have left in the user's cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from edmdistill.errors import CheckpointError
from edmdistill.machine.checks.finding import GIB, Finding


def check_evaluations() -> Iterator[Finding]:
    """Checks whether evaluations were stopped and not taken up again."""
    folders = abandoned_evaluations()
    if not folders:
        yield Finding("evaluations", "ok", "none is unfinished")
        return
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    oldest = datetime.fromtimestamp(min(folder.stat().st_mtime for folder in folders), UTC)
    yield Finding(
        "evaluations",
        "warn",
        f"{len(folders)} unfinished in {folders[0].parent}, {size / GIB:.2f} GiB, the oldest of {oldest:%Y-%m-%d}",
        "give the same command again to go on, or remove them with `edmdistill doctor --remove-evaluations`",
    )


def abandoned_evaluations() -> list[Path]:
    """Returns the folders of evaluations in the user's cache that no command makes now."""
    from edmdistill.evaluation.shards import Work, evaluations_folder

    try:
        return Work(evaluations_folder()).abandoned()
    except (CheckpointError, PermissionError):  # no home folder, or another user's: nothing was kept there
        return []


def remove_evaluations() -> list[Path]:
    """Removes the abandoned evaluations, and returns their folders."""
    folders = abandoned_evaluations()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return folders
