"""A process that is killed between a state and its pictures: the next one draws them, as if it had never been."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edmdistill.training import snapshot
from edmdistill.training.run import Run
from edmdistill.training.session import train

OPTIONS = {"images": 32, "snapshot_every": 16, "log_every": 16}


def pictures(run_dir: Path) -> dict[str, bytes]:
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in sorted(run_dir.glob("*/*.png"))}


@pytest.fixture(scope="module")
def expected(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    train(start("sid", **OPTIONS), folder / "run", on_message=str)
    found = pictures(folder / "run")
    assert len(found) == 6
    return found


@pytest.mark.parametrize(
    ("which", "images"), [("save_sample_grid", 0), ("save_role_grid", 16), ("save_sample_grid", 32)]
)
def test_they_are_drawn_by_the_next_one(
    which: str,
    images: int,
    expected: dict[str, bytes],
    start: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    usual = getattr(snapshot, which)

    def killed(run: Run, folder: Path, tell: Callable[[str], object]) -> None:
        if run.images == images:
            raise KeyboardInterrupt
        usual(run, folder, tell)

    monkeypatch.setattr(snapshot, which, killed)
    with pytest.raises(KeyboardInterrupt):
        train(start("sid", **OPTIONS), tmp_path / "run", on_message=str)
    monkeypatch.undo()
    assert train(start("sid", **OPTIONS), tmp_path / "run", on_message=str).finished
    assert pictures(tmp_path / "run") == expected
