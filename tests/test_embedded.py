"""The embedded sets: their images, their teachers, and everything that goes by their names."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edmdistill.cli import main
from edmdistill.cli.types import FEATURES, PROTOCOLS
from edmdistill.data.datasets import open_dataset
from edmdistill.embedded import EMBEDDED, TEST_STRIP, TILE, _cut, _most_contrast
from edmdistill.evaluation.metrics import find_metric
from edmdistill.evaluation.protocol import get_protocol

DIGESTS = {
    "digits": "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382",
    "tiles": "023f0b19e015b6e93cfb650a66bd627091eb86f316765c2d60890df85329b5d3",
}
COUNTS = {"digits": (1500, 297), "tiles": (6000, 900)}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_images_are_always_the_same(name: str):
    embedded = EMBEDDED[name]
    images, classes, splits = embedded.load()
    assert images.shape[1:] == embedded.shape
    assert images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes() + classes.astype("<i8").tobytes()).hexdigest() == DIGESTS[name]
    assert (len(splits["train"]), len(splits["test"])) == COUNTS[name]
    assert all((np.diff(rows) > 0).all() for rows in splits.values()), "in increasing order"
    assert sorted([*splits["train"], *splits["test"]]) == splits["all"].tolist() == list(range(len(images)))
    assert set(classes) == set(range(len(embedded.label_names)))
    assert embedded.load() is embedded.load(), "made once a process"


def test_a_photograph_is_cut_at_every_eighth_pixel_and_reduced_by_means():
    ramp = np.arange(34, dtype=np.uint8)[None, :, None] * np.array([2, 0, 1], np.uint8) + np.zeros((33, 1, 3), np.uint8)
    tiles, left = _cut(ramp, 1)
    assert tiles.shape == (9, 3, TILE, TILE)
    assert left.tolist() == [0, 8, 16] * 3
    assert tiles[1, 0, 0].tolist() == [2 * (8 + i) for i in range(16)]
    halves, left = _cut(ramp, 2)
    assert halves.shape == (1, 3, TILE, TILE)
    assert left.tolist() == [0]
    assert halves[0, 0, 0].tolist() == [4 * i + 1 for i in range(16)]
    assert halves[0, 2, 0].tolist() == [2 * i + 1 for i in range(16)], "half a step is rounded up"


def test_the_tiles_with_the_most_contrast_stay_in_order():
    sizes = np.array([3, 0, 9, 5], np.uint8)
    tiles = sizes[:, None, None, None] * np.tile(np.array([0, 1], np.uint8), (1, 3, TILE, TILE // 2)) + np.uint8(100)
    assert _most_contrast(tiles, 2)[:, 0, 0, 1].tolist() == [109, 105]


def test_no_training_tile_shows_what_a_test_tile_shows():
    """At full size, where tiles can be found again in their photograph."""
    from sklearn.datasets import load_sample_images

    images, classes, splits = EMBEDDED["tiles"].load()
    tiles, left = _cut(load_sample_images().images[0], 1)
    places: dict[bytes, set[int]] = {}
    for tile, column in zip(tiles, left.tolist(), strict=True):
        places.setdefault(tile.tobytes(), set()).add(column)
    found = {
        split: [places[images[row].tobytes()] for row in splits[split] if classes[row] == 0]
        for split in ("train", "test")
    }
    begin, end = TEST_STRIP
    assert all(any(column + TILE <= begin or column >= end for column in columns) for columns in found["train"])
    assert all(any(begin <= column and column + TILE <= end for column in columns) for columns in found["test"])


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_set_comes_with_a_teacher_and_features_that_fit(name: str, tmp_path: Path):
    embedded = EMBEDDED[name]
    assert hashlib.sha256(embedded.teacher.read_bytes()).hexdigest() == embedded.teacher_sha256
    assert embedded.teacher.stat().st_size + embedded.features.stat().st_size < 3_000_000
    result = CliRunner().invoke(main, ["convert", name, str(tmp_path / "teacher")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["label_names"] == list(embedded.label_names)
    assert config["provenance"]["licence"] == "apache-2.0"
    arguments = config["network"]["arguments"]
    assert (arguments["img_channels"], arguments["img_resolution"]) == embedded.shape[:2]


@pytest.mark.parametrize("name", EMBEDDED)
def test_inspect_credits_the_authors(name: str):
    result = CliRunner().invoke(main, ["data", "inspect", name, "--split", "test"], catch_exceptions=False)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines()[:6])
    assert lines["credit"] == EMBEDDED[name].credit
    assert "CC BY" in lines["credit"]
    assert f"{name} (test)" in result.stdout
    assert f"{COUNTS[name][1]}" in lines["images"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_set_has_a_protocol_and_names_for_the_command_line(name: str):
    protocol = get_protocol(name)
    assert protocol.reference.source == name
    assert [find_metric(metric, protocol.features)[::2] for metric in protocol.metrics] == [
        (f"fd_{name}", name),
        ("class_accuracy", name),
    ]
    assert name in PROTOCOLS
    assert name in FEATURES


def test_a_folder_of_the_same_name_is_pointed_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert open_dataset("tiles").notes == []
    (tmp_path / "tiles").mkdir()
    assert open_dataset("tiles").notes == ["tiles is the embedded data set; what has that name here is ./tiles."]
