"""Where things lie in a checkpoint, a run directory and a saved state: names of files and folders, no torch."""

from __future__ import annotations

from pathlib import Path

CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
"""The files of a checkpoint."""
VAE_FILES = "config.json", "diffusion_pytorch_model.safetensors"
"""The files of a VAE of diffusers."""
TOML, RECIPE, RUN = "recipe.toml", "recipe.resolved.json", "run.json"
"""Files of a run directory: the recipe as its author wrote it, the one with every default, and the run's own facts."""
EXPORT = "export.json"
"""The file of a folder that `export` wrote for another program."""
PROGRESS = "progress.json"
"""The file that makes a folder a saved state."""


def checkpoint_in(folder: Path) -> Path:
    """Returns the checkpoint's folder: of a run directory its generator/, of anything else the folder itself."""
    generator = folder / "generator"
    return generator if (generator / CONFIG).is_file() else folder


def is_state(folder: Path) -> bool:
    """Returns whether a folder is a saved state of a run, RUN/state/IMAGES."""
    return (folder / PROGRESS).is_file()


def images_of(state: Path) -> int | None:
    """Returns the images that a saved state has seen, by its name; None: it was renamed."""
    name = state.absolute().name
    return int(name) if name.isdecimal() else None


def saved_states(folder: Path) -> list[Path]:
    """Returns the directories of the saved states, the oldest first.  folder: RUN/state"""
    return sorted(path for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
