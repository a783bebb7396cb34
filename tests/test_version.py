"""The revision that runs and results name."""

import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from edmdistill import version


def revision(package: Path) -> str | None:
    version.revision.cache_clear()
    return version.revision(package)


def git(folder: Path, *words: str) -> None:
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


@pytest.mark.usefixtures("not_installed")
def test_the_revision_is_the_packages_own(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "another project's")
    assert revision(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "ours")
    own = revision(package)
    assert own is not None
    assert len(own) == 40
    git(tmp_path, "tag", "-a", "v1.0", "-m", "a release")
    assert revision(package) == own, "a commit, whatever its tags"
    (package / "__init__.py").write_text("changed")
    assert revision(package) == f"{own}-dirty"


@pytest.mark.parametrize("path", [None, ""], ids=["git", "no git"])
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ('{"url": "git+https://a", "vcs_info": {"commit_id": "0123abc"}}', "0123abc"),
        ('{"url": "file:///a"}', None),
        (None, None),
    ],
    ids=["repository", "folder", "index"],
)
def test_without_a_repository_it_is_what_the_package_was_installed_from(
    record: str | None, expected: str | None, path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pip records it (PEP 610)."""
    asked: list[str] = []
    monkeypatch.setattr(
        metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda f: asked.append(f) or record)
    )
    if path is not None:
        monkeypatch.setenv("PATH", path)
    assert revision(tmp_path) == expected
    assert asked == ["direct_url.json"]


@pytest.mark.usefixtures("not_installed")
def test_a_copy_that_was_not_installed_has_none(tmp_path: Path) -> None:
    assert revision(tmp_path) is None
