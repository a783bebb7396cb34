"""Copies between the host's memory and a GPU's, of which the host waits for as few as possible.

A copy from pinned memory runs beside the host, which goes on to queue the computation; any other holds it up until
the GPU has done all that was queued before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError


def require_device(device: torch.device | str) -> None:
    """Raises: EdmDistillError: there is no such device, or torch cannot use it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).strip().splitlines()[0]
        why = "" if reason.startswith(("Expected one of", "Invalid device")) else f" ({reason})"
        raise EdmDistillError(
            f"there is no device {str(device)!r} here{why}: use cpu, cuda, or cuda:N for GPU N, from 0"
        ) from error


def is_gpu(device: torch.device) -> bool:
    """Returns whether the device computes beside the host, in memory of its own."""
    return device.type not in ("cpu", "meta")


OUT_OF_MEMORY = "out of memory", "_STATUS_ALLOC_FAILED", "ALLOCATION_FAILED"
"""Parts of the errors by which CUDA, cuBLAS (CUBLAS_STATUS_ALLOC_FAILED) and cuDNN say so, besides torch."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the GPU has no memory left, whichever library found out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OUT_OF_MEMORY)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on the device, without waiting for the copy."""
    pinned = tensor.pin_memory() if is_gpu(device) and not is_gpu(tensor.device) else tensor
    return pinned.to(device, non_blocking=True)


STAGING = 256 * 2**20
"""Bytes of pinned memory through which tensors come down at a time."""
ALIGNMENT = 64
"""Bytes or numbers, at multiples of which tensors of a block begin, where vector units like it."""


def staged(tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yields the number of a tensor, and it and those after it in the host's memory, until all were there.

    A GPU's tensors come through pinned memory, STAGING bytes at a time: while the caller works on some, the next are on
    their way. They are gone when it asks for more. Tensors that are in the host's memory are yielded as they are.

    Args:
        tensors: of one device.
    """
    first, ready = 0, list[Tensor]()
    start = 0
    while start < len(tensors) or ready:
        count, coming = _some(tensors[start:])
        if ready:
            yield first, ready
        first, ready, start = start, coming, start + count
        if any(is_gpu(tensor.device) for tensor in tensors[first:start]):
            wait_for(tensors[first].device)


def _some(tensors: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
    """Returns how many of the tensors fit into STAGING bytes, at least one, and these on their way to the host."""
    if not tensors or not is_gpu(tensors[0].device):
        return len(tensors), list(tensors)
    ends = [*accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0)]
    count = max(1, bisect_right(ends, STAGING) - 1)
    buffer = torch.empty(ends[count], dtype=torch.uint8, pin_memory=True)
    coming = []
    for tensor, start in zip(tensors[:count], ends, strict=False):
        piece = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        coming.append(piece.copy_(tensor, non_blocking=True))
    return count, coming


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies of tensors in the host's memory; some may be there already, others on one GPU."""
    left = [index for index, tensor in enumerate(tensors) if is_gpu(tensor.device)]
    host = [tensor if is_gpu(tensor.device) else tensor.clone() for tensor in tensors]
    for first, some in staged([tensors[index] for index in left]):
        for index, tensor in zip(left[first:], some, strict=False):
            host[index] = tensor.clone()
    return host


def host_block(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Returns tensors of the same shapes and layouts in the host's memory, uninitialized, in one block for each dtype.

    It is pinned if the device is a GPU, so that copies both ways run beside the host.
    """
    made = list(tensors)
    for dtype in {tensor.dtype for tensor in tensors}:
        some = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
        sizes = [-(-tensors[index].numel() // ALIGNMENT) * ALIGNMENT for index in some]
        block = torch.empty(sum(sizes), dtype=dtype, pin_memory=is_gpu(device))
        for index, start in zip(some, accumulate(sizes, initial=0), strict=False):
            like = torch.empty_like(tensors[index], device="meta")  # dense, as a part of the block is
            made[index] = block.as_strided(like.shape, like.stride(), start)
    return made


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done all that was queued; a CPU has."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


class Constant:
    """Numbers that stay the same, with a copy on every device that has asked for them: the first alone takes time.

    Args:
        values: in the host's memory.
    """

    def __init__(self, values: Tensor) -> None:
        self._copies = {(values.device, values.dtype): values}
        self._values = values

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the numbers on that device, in that dtype; None: their own."""
        key = device, dtype or self._values.dtype
        if device.type == "meta":  # made each time, so that every pass of a plan has it
            return self._values.to(*key)
        if key not in self._copies:
            self._copies[key] = self._values.to(*key)
        return self._copies[key]
