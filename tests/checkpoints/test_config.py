"""config.json of other versions."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_generator import tiny_generator

from edmdistill.checkpoints.config import Guidance, read_config
from edmdistill.checkpoints.layout import CONFIG
from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.checkpoints.tuning import Tuning
from edmdistill.errors import CheckpointError

STRUCTS = "", "network", "sampling", "guidance", "provenance", "tunings/2"
"""The parts of the file that a version may add fields to."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    numbers = {"gamma": 1.0, "n": 8, "schedules": 1, "images": 8, "gain": 0.0, "spread": 0.0}
    seeds = {"search_seeds": "0-7", "held_out_seeds": "8-15", "reference": None, "source_sha256": None}
    levels = dict.fromkeys(("sigmas", "before"), (80.0, 0.3)) | {"values": (), "before_values": ()}
    tuning = msgspec.convert({"metric": "fid", "protocol": "digits", **numbers, **seeds, **levels}, Tuning)
    return tiny_generator(tmp_path / "generator", guidance=Guidance("classes", (2, 2)), tunings={"2": tuning})


def part(config: dict[str, Any], path: str) -> dict[str, Any]:
    for name in filter(None, path.split("/")):
        config = config[name]
    return config


def test_those_are_all_its_parts(folder: Path) -> None:
    config = read_config(folder)
    found = {name for name in config.__struct_fields__ if isinstance(getattr(config, name), msgspec.Struct)}
    assert found | {"tunings"} == {path.partition("/")[0] for path in STRUCTS if path}


@pytest.mark.parametrize("path", STRUCTS)
def test_a_newer_minor_is_read_without_what_it_adds(folder: Path, path: str) -> None:
    """This version and older ones do not add it, so that there it is a mistake."""
    file = folder / CONFIG
    written = file.read_text()
    config = json.loads(written)
    part(config, path)["color"] = {"red": 1}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="color"):
        read_config(folder)
    file.write_text(json.dumps(config | {"format_version": "1.70"}))
    flow, read = load_checkpoint(folder)
    save_checkpoint(folder, flow, read, overwrite=True)
    assert json.loads(file.read_text()) == json.loads(written)


@pytest.mark.parametrize("path", ["network/arguments", "preconditioning"])
def test_what_computes_otherwise_is_not_ignored(folder: Path, path: str) -> None:
    file = folder / CONFIG
    config = json.loads(file.read_text())
    part(config, path)["color"] = "red"
    file.write_text(json.dumps(config | {"format_version": "1.70"}))
    with pytest.raises(CheckpointError, match="color"):
        load_checkpoint(folder)


@pytest.mark.parametrize("path", STRUCTS[1:])
def test_a_newer_minor_of_other_types_is_refused(folder: Path, path: str) -> None:
    file = folder / CONFIG
    config = json.loads(file.read_text())
    name, _, inner = path.partition("/")
    config[name] = {inner: [{"red": 1}]} if inner else [{"red": 1}]
    file.write_text(json.dumps(config | {"format_version": "1.70"}))
    with pytest.raises(CheckpointError, match=rf"^[^\n]*not a checkpoint's configuration: {name}[^\n]*$"):
        read_config(folder)
