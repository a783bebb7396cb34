"""A run on a device that behaves like CUDA leaves the CPU's files; its states are written beside training."""

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Forked


@pytest.mark.slow
def test_a_run_leaves_the_same_files(teacher: Path, recipe: Any, tmp_path: Path) -> None:
    tables = json.loads(recipe("cosim", snapshot_every=8, keep=3).to_json())
    tables["evaluation"] = {"protocol": "digits", "every": 16, "n": 20, "nfe": [1], "diagnose": True}
    words = json.dumps([str(teacher), tables, str(tmp_path)])
    status, said = Forked(Path(__file__).parent / "sessions.py", words).finish()
    assert status == 0, said
    found = json.loads(said.splitlines()[-1])
    assert max(found["distances"].values()) < 1e-3
    assert found["threads"] == ["background"]
    assert "No space left on device" in found["error"]
    assert "000000000008" in found["error"]  # the state that the same command resumes from
    own, there = found["scores"]
    assert there == pytest.approx(own, rel=1e-3)
    assert own
    assert sorted(path.name for path in (tmp_path / "full" / "state").iterdir()) == ["000000000008"]
