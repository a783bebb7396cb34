"""A checkpoint of a run that has not come to its end is used with a word, each time."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_generator import tiny_generator

from edmdistill.checkpoints import store
from edmdistill.checkpoints.store import CheckpointConfig
from edmdistill.cli import main

SENTENCE = "unfinished: 896 of 80,000 images"


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "SOURCE", "--seeds", "0", "--nfe", "1", "--device", "cpu", "--out", "DIR/images"],
        ["eval", "SOURCE", "--protocol", "digits", "--n", "2", "--nfe", "1", "--device", "cpu"],
        ["sweep", "SOURCE", "--protocol", "digits", "--n", "2", "--nfe", "1", "--device", "cpu"],
        ["export", "SOURCE", "--to", "nvidia", "--out", "DIR/export"],
        ["push-to-hub", "SOURCE", "me/name", "--licence", "mit", "--dry-run"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("seen", [896, 80_000])
def test_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], seen: int) -> None:
    def unfinished(config: CheckpointConfig) -> str | None:
        return f"unfinished: {config.images_seen} of 80,000 images" if config.images_seen != 80_000 else None

    monkeypatch.setattr(store, "unfinished", unfinished, raising=False)
    source = tiny_generator(tmp_path / "run" / "generator", images_seen=seen)
    result = call(*(word.replace("SOURCE", str(source)).replace("DIR", str(tmp_path)) for word in words))
    assert result.exit_code == 0, result.output
    assert result.stderr.count(SENTENCE) == (seen == 896)
