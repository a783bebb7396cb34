"""A checkpoint of a run that has not come to its end is used with a word, each time."""

from pathlib import Path

import pytest
from commands import call
from tiny_generator import tiny_generator

SENTENCE = "This generator is unfinished: 896 of 80,000 images seen."


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "SOURCE", "--seeds", "0", "--nfe", "1", "--device", "cpu", "--out", "DIR/images"],
        ["eval", "SOURCE", "--protocol", "digits", "--n", "2", "--nfe", "1", "--device", "cpu"],
        ["sweep", "SOURCE", "--protocol", "digits", "--n", "2", "--nfe", "1", "--device", "cpu"],
        ["diagnose", "SOURCE", "--protocol", "digits", "--n", "2", "--device", "cpu"],
        ["export", "SOURCE", "--to", "nvidia", "--out", "DIR/export"],
        ["push-to-hub", "SOURCE", "me/name", "--licence", "mit", "--dry-run"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("seen", [896, 80_000])
def test_it_is_said(tmp_path: Path, words: list[str], seen: int) -> None:
    source = tiny_generator(tmp_path / "run" / "generator", images_seen=seen, images_total=80_000)
    result = call(*(word.replace("SOURCE", str(source)).replace("DIR", str(tmp_path)) for word in words))
    assert result.exit_code == 0, result.output
    assert result.stderr.count(SENTENCE) == (seen == 896)


@pytest.mark.parametrize("seen", [896, 80_000])
def test_training_from_it_says_so(tmp_path: Path, seen: int) -> None:
    """A warm start and a second stage."""
    facts = {"images_seen": seen, "images_total": 80_000}
    source = tiny_generator(tmp_path / "generator", method="ect", **facts)
    teacher = tiny_generator(tmp_path / "teacher", "teacher", **facts)
    warm = ["sid", teacher, "--init", source, "--recipe", "sid/digits"]
    for words in (warm, ["tcm", source, "--recipe", "tcm/digits"]):
        result = call("train", *words, "--data", "digits", "--run-dir", tmp_path / "run", "--dry-run")
        assert result.exit_code == 0, result.output
        assert result.stderr.count(SENTENCE) == (seen == 896)
    assert call("loss", teacher, "--data", "digits", "--images", 2).stderr.count("is unfinished") == (seen == 896)
