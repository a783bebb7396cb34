"""NaN and infinity are found where weights enter: the file and the tensor are named, before anything is drawn."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.layout import MODEL
from edmdistill.checkpoints.load import load_model
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.checkpoints.store import load_checkpoint, load_tensors, require_finite, save_tensors
from edmdistill.cli import main
from edmdistill.errors import CheckpointError


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_in_our_own_checkpoint(golden: Path, tmp_path: Path, wrong: float) -> None:
    convert(golden / "edm-tiny-cond.pkl", tmp_path / "teacher")
    tensors = load_tensors(tmp_path / "teacher" / MODEL)[0]
    tensors["map_layer0.weight"][1, 2] = wrong
    save_tensors(tmp_path / "teacher" / MODEL, tensors)
    for read in (load_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=r"model\.safetensors holds NaN or infinity in map_layer0\.w.*, at 1"):
            read(tmp_path / "teacher")
    result = CliRunner().invoke(main, ["sample", str(tmp_path / "teacher"), "--out", str(tmp_path / "a.npz")])
    assert result.exit_code == 2
    assert "map_layer0.weight" in result.stderr
    assert not (tmp_path / "a.npz").exists()


def test_in_an_official_pickle(golden: Path) -> None:
    official = read_official(golden / "edm2-latent-cond.pkl")
    name = next(name for name, tensor in official.tensors.items() if tensor.dtype == torch.float16 and tensor.ndim == 4)
    official.tensors[name].view(-1)[-1] = torch.nan
    with pytest.raises(CheckpointError, match=r"edm2-latent-cond\.pkl holds NaN or infinity in .*, at 1 of"):
        build_official(official, tensors=official.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_numbers_are_numbers(dtype: torch.dtype) -> None:
    """Their sum is infinite, none of them is."""
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    require_finite(large, "w", "a file")
    require_finite(torch.zeros(0, dtype=dtype), "w", "a file")
    for pair in ((torch.inf, -torch.inf), (torch.nan, 1.0)):
        with pytest.raises(CheckpointError, match="a file holds NaN or infinity in w"):
            require_finite(torch.tensor(pair, dtype=dtype), "w", "a file")
