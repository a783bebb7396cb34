"""The shapes of a checkpoint, without its numbers."""

from pathlib import Path

import pytest
from golden_set import NETWORKS

from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.load import load_model, outline


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_the_networks(golden: Path, name: str) -> None:
    expected, found = load_model(golden / name).flow, outline(golden / name)
    assert found.preconditioning == expected.preconditioning
    own = found.network.state_dict()
    assert {key: tensor.shape for key, tensor in own.items()} == {
        key: tensor.shape for key, tensor in expected.network.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in own.values())


def test_of_a_folder(golden: Path, tmp_path: Path) -> None:
    convert(golden / "edm-tiny-cond.pkl", tmp_path / "out")
    assert outline(tmp_path / "out").two_time
