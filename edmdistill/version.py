"""The version of the code that runs, as runs and results record it."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path


@cache
def revision(package: Path = Path(__file__).parent) -> str | None:
    """Returns the git commit of the package, ending in -dirty if files have changed since; None if it is unknown."""
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")  # the enclosing repository may be another project's
        return _git(package, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        installed = json.loads(metadata.distribution("edmdistill").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return None
    commit: str | None = installed.get("vcs_info", {}).get("commit_id")
    return commit


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
