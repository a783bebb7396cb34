"""What an exported folder says of itself, and where it may be written."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from msgspec.structs import replace
from tiny_generator import tiny_generator

from edmdistill import __version__
from edmdistill.checkpoints.config import Provenance, SamplingDefaults, read_config, write_config
from edmdistill.checkpoints.layout import EXPORT
from edmdistill.checkpoints.load import load_flow, load_generator
from edmdistill.export import parity
from edmdistill.export.folder import export
from edmdistill.networks.preconditioning import EDM
from edmdistill.sampling.generate import sample

LONG = (2.5, 2.2, 1.9, 1.6, 1.3, 1.0, 0.7, 0.4, 0.2, 0.1)
"""The levels of a generator that was trained for ten steps."""


def test_the_manifest_and_the_readme(tmp_path: Path) -> None:
    folder = tiny_generator(tmp_path / "it", preconditioning=EDM(sigma_max=2.5), images_seen=896, images_total=80_000)
    origin = Provenance(source="https://me:secret@host/*b*.pkl?token=secret", licence="my-own")
    sampling = SamplingDefaults({"2": (2.5, 0.7), "10": LONG}, gamma=0.3)
    write_config(folder, replace(read_config(folder), sampling=sampling, provenance=origin))
    rows = export(folder, "nvidia", tmp_path / "out")
    document = json.loads((tmp_path / "out" / EXPORT).read_text())
    assert (document["schema_version"], document["edmdistill"], document["to"]) == (1, __version__, "nvidia")
    assert document["gamma"] == 0.3
    assert document["parity"] == [row._asdict() for row in rows]
    recorded = document["checkpoint"]["provenance"]
    assert (recorded["source"], recorded["licence"]) == ("https://host/*b*.pkl", "my-own")
    assert [*document["sigmas"]] == [str(nfe) for nfe in (*range(1, 9), 10)]
    for nfe, sigmas in document["sigmas"].items():
        assert sigmas == pytest.approx(sorted(sigmas, reverse=True))
        assert (len(sigmas), sigmas[0]) == (int(nfe), pytest.approx(2.5))
    assert document["sigmas"]["2"] == [2.5, 0.7]  # also after a way to time and back
    assert document["sigmas"]["10"] == [*LONG]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "secret" not in text
    assert "*b" not in text.replace(r"\*b", "")
    assert "A generator from https://host/*b*.pkl, exported by edmdistill" in text.replace("\\", "")
    assert "Its weights are under this licence: my-own. This generator is unfinished: 896 of 80,000 images" in text
    assert parity.table(rows) in text
    header = ModelCard(text).data
    assert (header.license, header.license_name, header.library_name) == ("other", "my-own", "pytorch")


@pytest.mark.parametrize("name", ["out", "out.pt"])
def test_an_empty_folder_is_a_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    export(tiny_generator(tmp_path / "it"), "nvidia", tmp_path / name)
    assert (tmp_path / name / EXPORT).is_file()


def test_a_difference_is_relative_to_the_largest_pixel(tmp_path: Path) -> None:
    actual, expected = torch.tensor([0.0, -3.0]), torch.tensor([2.0, -4.0])
    assert parity.difference_of(actual, expected) == 0.5
    folder = tiny_generator(tmp_path / "it")
    flow, config = load_flow(folder)
    ours = load_generator(folder)
    rows = parity.compare(flow, config, lambda nfe: sample(ours, nfe, seeds=parity.SEEDS) * (1 - 1e-4))
    assert [row.nfe for row in rows] == [1, 2]
    assert [row.difference for row in rows] == pytest.approx([1e-4] * 2, rel=0.1)
