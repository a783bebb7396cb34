"""Protocols and their references: what is hashed, what is opened, and what is written down."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation import protocol as module
from edmdistill.evaluation.protocol import PROTOCOLS, Reference, describe_reference, get_protocol, open_reference
from edmdistill.evaluation.references import ReferenceStatistics, open_statistics

MOMENTS = {"mu": np.zeros(2), "sigma": np.eye(2)}


def test_the_hash_is_of_what_a_protocol_says_in_any_order() -> None:
    one, other = (
        replace(PROTOCOLS["edm2"], weights=weights) for weights in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    )
    assert one.sha256() == other.sha256()
    changes = {"n": 5, "seeds": None, "repeat": 2, "labels": "given", "decoder": "a", "weights": {"a": "1"}}
    hashes = {replace(one, **{name: value}).sha256() for name, value in changes.items()}
    assert len(hashes | {one.sha256()}) == len(changes) + 1


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(EdmDistillError, match="there is no protocol 'fid'; choose one of digits, "):
        get_protocol("fid")


def test_a_standard_brings_its_reference_or_asks_for_one() -> None:
    found = open_reference(None, PROTOCOLS["digits"])
    assert isinstance(found, Dataset)
    assert (found.name, found.split) == ("digits", "train")
    with pytest.raises(DatasetError, match="the protocol adm measures against ADM's reference batch"):
        open_reference(None, PROTOCOLS["adm"])
    for other in (open_dataset("digits", split="test"), "tiles"):
        with pytest.raises(
            DatasetError, match=r"measures against digits \(train\), but the reference is \w+ \(\w+\); leave"
        ):
            open_reference(other, PROTOCOLS["digits"])


def test_an_official_name_is_a_file_here_or_else_the_official_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("fetched.npz", **MOMENTS)
    monkeypatch.setattr(module, "is_official", lambda name: name == "official")
    monkeypatch.setattr(module, "find_fetched", lambda name: Path("fetched.npz"))
    found = open_reference("official", PROTOCOLS["edm"])
    assert isinstance(found, ReferenceStatistics)
    assert found.path == Path("fetched.npz")
    Path("official").mkdir()
    with pytest.raises(DatasetError, match="official holds no images"):
        open_reference("official", PROTOCOLS["edm"])


def test_latents_are_no_reference(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 4, 4), np.float32))
    with pytest.raises(DatasetError, match="holds latents, but pixels are needed"):
        open_reference(tmp_path, PROTOCOLS["edm"])


def test_the_record_of_a_reference(tmp_path: Path) -> None:
    """By its own name, without the folders on the way, which are nobody's business."""
    about = {"n": 5, "weights": {"pixels": None}, "source": "set.zip", "split": "test", "sha256": "ab",
             "fingerprint": "cd", "version": "1"}  # fmt: skip
    np.savez(tmp_path / "own.npz", about=json.dumps(about), mu_pixels=np.zeros(2), sigma_pixels=np.eye(2))
    own = describe_reference(open_statistics(tmp_path / "own.npz"))
    assert own == Reference(source="set.zip", split="test", n=5, sha256="ab")
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"num_images": 9, "fid": MOMENTS}, 4))
    statistics = open_statistics(tmp_path / "edm2.pkl")
    assert describe_reference(statistics) == Reference(source="edm2.pkl", n=9, sha256=statistics.sha256)
    pixels = np.zeros((1, 4, 4), np.uint8)
    data = Dataset(str(tmp_path / "set.zip"), "test", ["0", "1"], lambda i: pixels)
    assert describe_reference(data) == Reference(source="set.zip", split="test", n=2)
