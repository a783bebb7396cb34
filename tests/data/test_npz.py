"""Arrays of an untrusted .npz: whole, of a bounded size, and without objects."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edmdistill.data.npz import Npz
from edmdistill.errors import DatasetError

ARRAYS = {
    "mu": np.arange(6.0).reshape(2, 3),
    "images": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
    "count": np.array(7),
    "half": np.ones((2, 1), ">f2"),
}


def written(path: Path, arrays: dict[str, np.ndarray], compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_read_as_numpy_reads_them(compressed: bool, tmp_path: Path) -> None:
    file = Npz(written(tmp_path / "a.npz", ARRAYS, compressed))
    assert file.names == ARRAYS.keys()
    for name, array in ARRAYS.items():
        found = file.read(name, array.size)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)


def test_what_is_larger_than_expected_is_not_read(tmp_path: Path) -> None:
    file = Npz(written(tmp_path / "a.npz", ARRAYS))
    with pytest.raises(DatasetError, match=r"a\.npz: mu cannot be read \(it has 6 entries, and at most 5 are read\)"):
        file.read("mu", 5)


@pytest.mark.parametrize("name", ["sigma", "mu.npy", ""])
def test_what_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"a\.npz: {name} is missing; write the file again"):
        Npz(written(tmp_path / "a.npz", ARRAYS)).read(name, 10)


def test_objects_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.npz", {"mu": np.array([{}], object)})
    with pytest.raises(DatasetError, match="Object arrays cannot be read: they are pickles"):
        Npz(path).read("mu", 10)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    """With its suffix or without, which numpy takes for one."""
    content = io.BytesIO()
    np.save(content, ARRAYS["mu"])
    for second in ("mu.npy", "mu"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for name in ("mu.npy", second):
                archive.writestr(name, content.getvalue())
        with pytest.raises(DatasetError, match=r"a\.npz holds mu twice; write it again"):
            Npz(tmp_path / "a.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_numbers_of_another_crc_are_refused(method: int, tmp_path: Path) -> None:
    path, content = tmp_path / "a.npz", io.BytesIO()
    np.save(content, np.random.default_rng(0).normal(size=10**5))
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("mu.npy", content.getvalue())
    whole = bytearray(path.read_bytes())
    whole[whole.rindex(b"PK\1\2") + 16] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DatasetError, match=r"a\.npz: mu cannot be read \(Bad CRC-32 for file 'mu\.npy'\); write it ag"):
        Npz(path).read("mu", 10**5)


def test_fewer_numbers_than_the_header_says_are_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, ARRAYS["mu"])
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", content.getvalue()[:-8])
    with pytest.raises(DatasetError, match=r"mu is not a readable array \(its header claims 48 bytes, but there"):
        Npz(tmp_path / "a.npz").read("mu", 10)
