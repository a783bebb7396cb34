"""Numbers of PyTorch and NumPy in a pickle: read as they were written, and never from outside their storage."""

import io
import mmap
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edmdistill.pickles import Unpickler, Unreadable
from edmdistill.stored_tensors import (
    NUMPY,
    Array,
    Dtype,
    Storage,
    read_buffer,
    read_scalar,
    read_storage,
    rebuild_tensor,
)

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def blob(storage: torch.TypedStorage | torch.UntypedStorage, **options: object) -> memoryview:
    file = io.BytesIO()
    torch.save(storage, file, _use_new_zipfile_serialization=False, **options)  # type: ignore[arg-type]
    return memoryview(file.getvalue())


def stored(tensor: torch.Tensor) -> memoryview:
    return blob(torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_storage_as_torch_writes_it(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    storage = read_storage(stored(tensor))
    whole = rebuild_tensor(storage, 0, (3, 4), (4, 1))
    assert torch.equal(whole.tensor(), tensor)
    assert whole.nbytes == tensor.nbytes
    part = tensor.t()[1:, 2]
    again = rebuild_tensor(storage, part.storage_offset(), tuple(part.shape), part.stride())
    assert torch.equal(again.tensor(), part)
    assert again.tensor().untyped_storage().nbytes() == part.numel() * part.element_size()  # no more than its own
    assert rebuild_tensor(storage, 5, (), ()).tensor() == tensor[1, 1]
    assert torch.equal(again.tensor(torch.float64), part.double())


def test_storage_is_refused() -> None:
    good = bytes(stored(torch.arange(4.0)))
    head = good[: -16 - 8]
    cases = {
        "declares": [good[:-1], good + b"\0", head + struct.pack("<Q", 2**40) + good[-16:]],
        "unknown format": [good.replace(b"M\xe9\x03.", b"M\xea\x03.", 1), b"\x80\x02K\x01." * 3],
        "big-endian": [good.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89", 1)],
        "ends too early": [good[:20], head],
        "'os.system'": [good.replace(b"ctorch\nFloatStorage\n", b"cos\nsystem\n")],
        "damaged": [good.replace(b"storageq", b"storagfq"), good.replace(b"Ntq", b"K\x01tq")],  # a view of another
    }
    for why, programs in cases.items():
        for program in programs:
            with pytest.raises(Unreadable, match=why):
                read_storage(memoryview(program))
    for wrong in (good, None, "x"):
        with pytest.raises(TypeError):
            read_storage(wrong)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells how much memory a process has")
def test_memory_is_given_back(tmp_path: Path) -> None:
    """A mapped file takes no memory once it is copied, nor does a copy once it is freed."""

    def resident(kind: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(kind)[2].split()[0]) * 1024

    size = 2**25
    (tmp_path / "file").write_bytes(bytes(size))
    with (tmp_path / "file").open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    files, anonymous = resident("RssFile:"), resident("RssAnon:")
    parts = [
        rebuild_tensor(Storage("float16", size // 8, data[i * size // 4 :][: size // 4]), 0, (size // 8,), (1,))
        for i in range(4)
    ]
    copies = [part.tensor(torch.float32) for part in parts]
    assert resident("RssFile:") - files < size / 4
    assert resident("RssAnon:") - anonymous > 1.9 * size
    del copies
    assert resident("RssAnon:") - anonymous < size / 2


integers = st.integers(-3, 30) | st.integers(-(2**70), 2**70)


@unhurried
@given(integers, st.lists(st.tuples(integers, integers), max_size=9))
def test_tensors_stay_inside_their_storage(offset: int, axes: list[tuple[int, int]]) -> None:
    storage = Storage("float32", 24, memoryview(bytes(96)))
    shape, stride = tuple(n for n, _ in axes), tuple(step for _, step in axes)
    try:
        tensor = rebuild_tensor(storage, offset, shape, stride).tensor()
    except (Unreadable, TypeError):
        return
    assert 0 < tensor.numel() <= 24
    assert tensor.sum() == 0


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (4, 3), (3, 1)), (-1, (2,), (1,)), (0, (5,), (0,)), (0, (2,), (-1,)), (0, (0,), (1,)), (4, (), ())],
)
def test_tensor_bounds(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    with pytest.raises(Unreadable, match="storage of 4 numbers"):
        rebuild_tensor(Storage("float32", 4, memoryview(bytes(16))), offset, shape, stride)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_as_numpy_pickles_them(protocol: int) -> None:
    """In either order, and of every kind that a checkpoint holds; scalars too."""
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
    arrays = [np.arange(-3, 3).reshape(2, 3).astype(kind, order=order) for kind in kinds for order in ("C", "F")]
    scalars = [array.flat[0] for array in arrays]
    read = Unpickler(memoryview(pickle.dumps([*arrays, *scalars], protocol)), NUMPY).run()
    assert isinstance(read, list)
    for found, array in zip(read, arrays, strict=False):
        assert found.numbers.dtype == array.dtype
        np.testing.assert_array_equal(found.numbers, array)
    assert read[len(arrays) :] == scalars


def test_arrays_of_objects_or_of_other_byte_order_are_refused() -> None:
    for array in (np.array([None]), np.zeros(2, ">f4"), np.array(["x"])):
        with pytest.raises(Unreadable, match=r"damaged|asks for"):
            Unpickler(memoryview(pickle.dumps(array)), NUMPY).run()
    with pytest.raises(TypeError):
        read_buffer(memoryview(bytes(4)), Dtype("f4"), (1,), "A")


def test_numpy() -> None:
    dtype, array = Dtype("f4", False, True), Array()
    dtype.set_state((3, "<", None, None, None, -1, -1, 0))
    array.set_state((1, (2, 1), dtype, False, memoryview(struct.pack("<2f", 1, 2))))
    assert array.numbers.tolist() == [[1], [2]]
    array.set_state((1, (2, 2), dtype, True, memoryview(struct.pack("<4f", 1, 2, 3, 4))))
    assert array.numbers.tolist() == [[1, 3], [2, 4]]
    assert read_scalar(Dtype("i8"), memoryview(struct.pack("<q", -5))) == -5
    with pytest.raises(TypeError):
        dtype.set_state((3, ">", None, None, None, -1, -1, 0))
    with pytest.raises(TypeError):
        Dtype("O8")
    with pytest.raises(ValueError):
        read_scalar(Dtype("f8"), memoryview(bytes(16)))
    with pytest.raises(ValueError):
        array.set_state((1, (2**40,), dtype, False, memoryview(bytes(8))))
