"""Files of the safetensors format: the library's own bytes, and nothing lost on a full disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from edmdistill.checkpoints import safetensors_file
from edmdistill.checkpoints.safetensors_file import DTYPES, write_safetensors

EVERY = {f"{name.lower()}.ä": torch.arange(-7, 8).reshape(3, 5).to(dtype) for dtype, name in DTYPES.items()}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (EVERY, {"format": "pt"}),
        ({"scalar": torch.tensor(1.5), "none": torch.zeros(0, 3), "byte": torch.tensor(1, dtype=torch.uint8)}, {}),
        ({}, {}),
        ({}, {"note": 'with "quotes"\n'}),
    ],
    ids=["dtypes", "shapes", "nothing", "metadata"],
)
@pytest.mark.parametrize("write", [1, 7, 2**18])
def test_bytes_are_the_librarys(
    tensors: dict[str, Tensor], metadata: dict[str, str], write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "WRITE", write)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors, metadata)
    assert path.read_bytes() == save(tensors, metadata or None)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(Path("/dev/full"), {"x": torch.zeros(3)}, {})
