"""GPUs, by their data sheets: memory, and how fast they multiply."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """memory: bytes.  half: dense bf16 and fp16 on tensor cores; single: fp32 without them; operations a second."""

    memory: float
    half: float
    single: float


# Source: NVIDIA's data sheets of each; without sparsity.
CARDS = {
    "rtx4090": Card(24e9, 165.2e12, 82.6e12),
    "a100-40": Card(40e9, 312e12, 19.5e12),
    "l40s": Card(48e9, 362e12, 91.6e12),
    "a100-80": Card(80e9, 312e12, 19.5e12),
    "h100": Card(80e9, 989e12, 67e12),
    "h200": Card(141e9, 989e12, 67e12),
}
