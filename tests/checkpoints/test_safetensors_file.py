"""Files of the safetensors format: the library's own bytes, and nothing lost on a full disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from edmdistill.checkpoints import safetensors_file, store
from edmdistill.checkpoints.safetensors_file import DTYPES, write_safetensors
from edmdistill.checkpoints.store import load_tensors, save_tensors

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


def test_tensors_round_trip(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "b": shared, "c": shared.t(), "d": torch.ones([], dtype=torch.bfloat16)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"images": "7"})
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]
    read, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"images": "7"}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    read["a"].zero_()  # in memory of its own: neither the file nor its twin follows
    assert torch.equal(read["b"], shared)
    assert torch.equal(load_tensors(tmp_path / "t.safetensors")[0]["a"], shared)
    save_tensors(tmp_path / "none.safetensors", {})  # of a network without weights
    assert load_tensors(tmp_path / "none.safetensors") == ({}, {})


def test_tensors_are_written_from_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one storage too, which in copies would be in memory a second time."""
    written: dict[str, Tensor] = {}

    def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        path.touch()
        written.update(tensors)

    monkeypatch.setattr(store, "write_safetensors", write)
    whole = torch.arange(6.0)
    save_tensors(tmp_path / "a", {"head": whole[:2], "tail": whole[2:], "again": whole})
    places = {name: tensor.data_ptr() - whole.data_ptr() for name, tensor in written.items()}
    assert places == {"head": 0, "tail": 8, "again": 0}
