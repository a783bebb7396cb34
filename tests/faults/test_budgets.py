"""What a file may cost: one budget of steps and bytes for all that is in it, by its own size."""

import gzip
import lzma
import resource
from pathlib import Path

import pytest
import torch

from edmdistill.archives import Archive
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.openai import read_openai
from edmdistill.checkpoints.persistence import PersistentObject, state_dict
from edmdistill.errors import CheckpointError
from edmdistill.pickles import MAX_STEPS, SLACK, Budget, Unpickler, Unreadable
from edmdistill.stored_tensors import Storage, StoredTensor

CASES = Path(__file__).parent.parent / "cases"


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("name", "why"),
    [("shared-storage-20MB.pkl", "unfolds to more than"), ("storage-time-x20.pkl", "unfolds|steps")],
)
def test_cases(name: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(lzma.decompress((CASES / f"{name}.xz").read_bytes()))
    before = peak()
    with pytest.raises(CheckpointError, match=why):
        _ = read_official(path).tensors
    assert peak() - before < 6 * path.stat().st_size


def test_nested_pickles_share_the_steps() -> None:
    budget, program = Budget(100), memoryview(b"\x80\x02" * (MAX_STEPS // 2) + b"N.")
    Unpickler(program, {}, budget=budget).run()
    with pytest.raises(Unreadable, match=f"more than {MAX_STEPS:,} steps"):
        Unpickler(program, {}, budget=budget).run()


def test_honest_files_have_room() -> None:
    """Every storage is read once as a nested pickle and copied once as a tensor."""
    for size in (10, 2**34):
        budget = Budget(size)
        budget.take(2 * size + SLACK)
        budget.step(MAX_STEPS)
        for one_more in (budget.take, budget.step):
            with pytest.raises(Unreadable):
                one_more(1)


def test_a_tensor_takes_its_own_range() -> None:
    storage = Storage("float32", 2**20, memoryview(bytes(2**22)))
    for offset, shape, stride in ((5, (2, 3), (3, 1)), (0, (3,), (2**19 - 1,)), (2**20 - 1, (), ())):
        tensor = StoredTensor(storage, offset, shape, stride).tensor()
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


def test_one_tensor_under_many_names(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    weight = torch.zeros(2**20)
    torch.save({f"w{number}": weight for number in range(20)}, path)
    with pytest.raises(CheckpointError, match="unfolds to more than"):
        read_openai(path, "")


def test_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "edm.pkl.gz"
    path.write_bytes(gzip.compress(bytes(2**27), 1))
    before = peak()
    with pytest.raises(CheckpointError, match="grows beyond measure"):
        read_official(path)
    assert peak() - before < 2**28


def test_shared_tables_are_not_walked_for_ever() -> None:
    """Modules that share one table are many steps in few bytes."""
    shared: dict[str, object] = dict.fromkeys(map(str, range(2000)))
    none: dict[str, object] = {"_buffers": {}, "_modules": {}}
    modules = {f"m{number}": PersistentObject("Linear", {"_parameters": shared} | none) for number in range(600)}
    root = PersistentObject("ModuleDict", {"_parameters": {}, "_buffers": {}, "_modules": modules})
    with pytest.raises(Unreadable, match="steps"):
        list(state_dict(root, set(), Budget(0)))


def test_archives_have_one_budget(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(4)}, path)
    archive = Archive(path)
    for _ in range(3):
        archive.load("data.pkl", "data", {})
    assert archive.budget.steps < MAX_STEPS - 60
