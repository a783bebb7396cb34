"""The revision that runs and results name."""

import subprocess
from pathlib import Path

from edmdistill import version


def revision(package: Path) -> str | None:
    version.revision.cache_clear()
    return version.revision(package)


def git(folder: Path, *words: str) -> None:
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True)


def test_the_revision_is_the_packages_own(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "another project's")
    elsewhere = revision(package)  # what installed this very package, if that was a repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "ours")
    own = revision(package)
    assert own is not None
    assert len(own) == 40
    assert own != elsewhere
    (package / "__init__.py").write_text("changed")
    assert revision(package) == f"{own}-dirty"
