"""Reads what a run directory says of its run, which may be under way."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

import msgspec

from edmdistill.atomic import reachable
from edmdistill.checkpoints.config import CheckpointConfig, read_config
from edmdistill.checkpoints.layout import CONFIG, RECIPE, RUN, TOML
from edmdistill.errors import EdmDistillError, RecipeError
from edmdistill.evaluation.tables import GeneratorId
from edmdistill.jsonl import read_lines
from edmdistill.machine.environment import SessionRecord
from edmdistill.recipes.library import noted_command
from edmdistill.recipes.schema import Recipe
from edmdistill.training.run_dir import METRICS, SESSIONS, DataIdentity, MetricsLine, RunIdentity


class RunSummary(NamedTuple):
    """The content of a run directory.

    Attributes:
        train_arguments: the recipe and the overrides as arguments of `train`.
        data: of run.json.
        config: of the checkpoint that the run has left, if it has.
        metrics: the lines of metrics.jsonl.
        sessions: the lines of sessions.jsonl; runs of before there were any have none.
    """

    path: Path
    recipe: Recipe
    train_arguments: list[str]
    data: DataIdentity
    config: CheckpointConfig | None
    metrics: list[MetricsLine]
    sessions: list[SessionRecord]

    @property
    def text(self) -> str:
        """The recipe as its author wrote it."""
        return (self.path / TOML).read_text("utf-8")

    @property
    def images(self) -> int:
        """Images seen by the checkpoint."""
        return (self.config.images_seen if self.config else None) or 0

    @property
    def generator(self) -> GeneratorId:
        return GeneratorId(self.recipe.hash, self.images)


def read_run(path: Path) -> RunSummary:
    """Returns the run in a directory, finished or not.  Raises: EdmDistillError: it is no run directory, or damaged."""
    if not reachable(path / RECIPE).is_file():
        raise EdmDistillError(
            f"{path} is not a run directory, because it has no {RECIPE}: use the --run-dir of edmdistill train"
        )
    generator = path / "generator"
    try:
        return RunSummary(
            path,
            Recipe.from_json((path / RECIPE).read_bytes()),
            _train_arguments(path / TOML),
            msgspec.json.decode((path / RUN).read_bytes(), type=RunIdentity)["data"],
            read_config(generator) if (generator / CONFIG).exists() else None,
            read_lines(path / METRICS, MetricsLine, ["images", "seconds"]),
            read_lines(path / SESSIONS, SessionRecord),
        )
    except RecipeError as error:
        raise EdmDistillError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise EdmDistillError(
            f"{path} is a damaged run directory ({error}): train again in another --run-dir"
        ) from error


def _train_arguments(file: Path) -> list[str]:
    """Returns what `train` notes above the recipe's own text; without such a note, the file itself is the recipe."""
    text = file.read_text("utf-8")
    tomllib.loads(text)  # the page says which of its values are whose
    name, sets = noted_command(text) or (str(file), [])
    return ["--recipe", name, *(word for override in sets for word in ("--set", override))]
