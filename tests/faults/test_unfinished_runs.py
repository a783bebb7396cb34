"""A checkpoint of a run that has not come to its end is used with a word, each time."""

import re
from pathlib import Path

import pytest
from commands import call
from PIL import Image
from tiny_generator import tiny_generator

SENTENCE = "{} is unfinished: 896 of 80,000 images seen."
PULLED = ["--reference", "DIR/picture.png", "--feature-net", "identity", "--correctors", "1"]


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
    assert result.stderr.count(SENTENCE.format(source)) == (seen == 896)


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "TEACHER", "--seeds", "0", "--out", "DIR/images", "--guide", "OTHER", "--guidance", "2"],
        ["sample", "GENERATOR", "--seeds", "0", "--out", "DIR/images", "--gamma", "0", *PULLED, "--score", "OTHER"],
        ["eval", "TEACHER", "--protocol", "digits", "--n", "2", "--guide", "OTHER", "--guidance", "2"],
        ["sweep", "TEACHER", "--protocol", "digits", "--n", "2", "--guide", "OTHER", "--guidance", "1,2"],
        ["diagnose", "GENERATOR", "--protocol", "digits", "--n", "2", "--teacher", "OTHER"],
    ],
    ids=["sample --guide", "sample --score", "eval --guide", "sweep --guide", "diagnose --teacher"],
)
@pytest.mark.parametrize("seen", [896, 80_000])
def test_it_is_said_of_every_network_that_takes_part(tmp_path: Path, words: list[str], seen: int) -> None:
    facts = {"images_seen": seen, "images_total": 80_000}
    others = {"TEACHER": tmp_path / "teacher", "OTHER": tmp_path / "other"}
    for folder, scale in zip(others.values(), (1.0, 0.5), strict=True):
        tiny_generator(folder, "teacher", scale, **facts)
    names = {"GENERATOR": tiny_generator(tmp_path / "generator"), **others, "DIR": tmp_path}
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    words = [re.sub("[A-Z]{3,}", lambda name: str(names[name[0]]), word) for word in words]
    steps = ["--nfe", "1"] if "--guide" in words else []
    result = call(*words, *steps, "--device", "cpu")
    assert result.exit_code == 0, result.output
    for folder in others.values():
        assert result.stderr.count(SENTENCE.format(folder)) == (seen == 896 and str(folder) in words)


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
        for name in (teacher, source):
            assert result.stderr.count(SENTENCE.format(name)) == (seen == 896 and name in words)
    said = call("loss", teacher, source, "--data", "digits", "--images", 2).stderr
    assert [said.count(SENTENCE.format(name)) for name in (teacher, source)] == [seen == 896] * 2
