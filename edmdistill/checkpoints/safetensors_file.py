"""Writes files in the format of safetensors, whose library reads them.

The library's own writer hands tensors to the system whole. Linux then takes pages of 2 MB for the file, which a virtual
machine may have to fetch from its host: see docs/performance.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of the format, in the library's order, which it writes from the end: the widest numbers are aligned first."""
WRITE = 2**18
"""Bytes that are handed to the system at a time."""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata into a new file, of which no part is copied in memory.

    Args:
        tensors: on the CPU, contiguous, of the dtypes above.
    Raises: OSError: the disk refuses.
    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order, end = list(DTYPES), 0
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    numbers: Iterator[Any] = (tensors[name].reshape(-1).view(torch.uint8).numpy() for name in names)
    with path.open("wb", buffering=0) as file:
        for piece in (len(text).to_bytes(8, "little"), text, *numbers):
            rest = memoryview(piece)
            while len(rest):
                rest = rest[file.write(rest[:WRITE]) :]
