"""How tensors come from a GPU, which the host imitates: all of them, in order, through a little pinned memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from edmdistill import transfer
from edmdistill.transfer import ALIGNMENT, Constant, host_block, staged, to_host

CPU = torch.device("cpu")


def mixed() -> list[Tensor]:
    """Of several dtypes, some of no whole number of words, one of none, and one larger than all memory for staging."""
    torch.manual_seed(0)
    return [
        torch.tensor(7, dtype=torch.int64),
        torch.randn(3).bfloat16(),
        torch.randn(2, 5, dtype=torch.float64),
        torch.randn(0, 4),
        torch.randint(256, (301,), dtype=torch.uint8),
        torch.randn(1),
        *(torch.randn(16) for _ in range(7)),
    ]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Takes the CPU for a GPU; returns what was waited for."""
    waited: list[torch.device] = []
    empty = torch.empty

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(transfer, "is_gpu", lambda device: True)
    monkeypatch.setattr(transfer, "wait_for", waited.append)
    monkeypatch.setattr(transfer, "STAGING", 4 * ALIGNMENT)
    return waited


def test_all_tensors_come_in_order_through_little_memory(waits: list[torch.device]) -> None:
    tensors, at = mixed(), 0
    for turn, (first, some) in enumerate(staged(tensors), 1):
        assert first == at
        assert len(waits) >= turn  # what the caller gets has arrived
        assert len(some) == 1 or sum(tensor.nbytes for tensor in some) <= transfer.STAGING
        for mine, theirs in zip(some, tensors[first:], strict=False):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() % mine.element_size() == 0
        at += len(some)
    assert at == len(tensors)
    assert turn == 4  # four until the large one, it, and eight of 64 bytes by fours


def test_copies_in_the_host_s_memory_are_copies() -> None:
    tensors = mixed()
    copies = to_host(tensors)
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, mixed(), strict=True))


def test_a_block_has_room_for_each_tensor_in_its_layout() -> None:
    like = [*mixed(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    made = host_block(like, CPU)
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    for number, (tensor, asked) in enumerate(zip(made, like, strict=True)):
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (asked.dtype, asked.shape, asked.stride())
        assert bool((tensor == number).all())
        assert tensor.storage_offset() % ALIGNMENT == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == len({tensor.dtype for tensor in like})


def test_a_constant_is_copied_once_for_each_device_and_dtype() -> None:
    values = torch.tensor([1.5, 2.5])
    constant = Constant(values)
    assert constant.on(CPU) is values
    double = constant.on(CPU, torch.float64)
    assert double.tolist() == [1.5, 2.5]
    assert double.dtype == torch.float64
    assert constant.on(CPU, torch.float64) is double
    meta = torch.device("meta")
    assert constant.on(meta) is not constant.on(meta)  # every pass of a plan has it
