"""`train --profile`: traces of rounds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edmdistill.training import profiling
from edmdistill.training.run import Run
from edmdistill.training.session import train


@pytest.mark.parametrize(("warmup", "count", "traced"), [(1, 1, 1), (1, 5, 2), (3, 1, 0)])
def test_a_trace_has_so_many_rounds_and_changes_no_bit(
    warmup: int,
    count: int,
    traced: int,
    start: Callable[..., Run],
    whole: Callable[..., tuple[Run, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a run of three rounds; where it ends sooner, of those that are left."""
    monkeypatch.setattr(profiling, "WARMUP", warmup)
    run, folder, sentences = start("cosim"), tmp_path / "run", list[str]()
    with profiling.traced(run, folder, count, sentences.append) as trace:
        train(run, folder, on_round=lambda images, measures: trace(), on_message=lambda sentence: None)
    for a, b in zip(whole("cosim")[0].ema.network.parameters(), run.ema.network.parameters(), strict=True):
        assert torch.equal(a, b)
    if not traced:
        assert ("wrote no trace" in sentences[0], (folder / profiling.PROFILE).exists()) == (True, False)
        return
    (file,) = (folder / profiling.PROFILE).iterdir()
    assert str(file) in sentences[0]
    assert file.name == f"{(warmup + traced) * run.recipe.training.batch:012d}-0.json"
    names = [str(event.get("name")) for event in json.loads(file.read_text())["traceEvents"]]
    after = traced < count  # what follows the last round of a run is in the trace too
    assert {name for name in names if name.startswith("ProfilerStep")} == {
        f"ProfilerStep#{warmup + n}" for n in range(traced + after)
    }
    assert "aten::convolution_backward" in names


def test_no_trace_unless_asked(start: Callable[..., Run], tmp_path: Path) -> None:
    with profiling.traced(start("cosim"), tmp_path, None, print) as trace:
        trace()
    assert list(tmp_path.iterdir()) == []
