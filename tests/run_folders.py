"""Run directories that no run made."""

import json
from pathlib import Path

from edmdistill.recipes.library import load_recipe


def untrained_run(path: Path) -> Path:
    """Writes what a run of cosim/digits-quickstart leaves before its first step."""
    path.mkdir()
    (path / "recipe.resolved.json").write_bytes(load_recipe("cosim/digits-quickstart").to_json())
    (path / "recipe.toml").write_text("# Trained by --recipe cosim/digits-quickstart\n")
    data = {"name": "digits", "images": 1500, "resolution": 8, "channels": 1, "classes": 10}
    (path / "run.json").write_text(json.dumps({"data": data}))
    return path
