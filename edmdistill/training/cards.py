"""GPUs, by their data sheets: memory, and how fast they multiply."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """memory: bytes.  half: bf16 and fp16, single: TF32, dense on tensor cores; operations a second.

    fp32 networks compute in TF32 there: it is what torch's convolutions take unless they are told otherwise.
    """

    memory: float
    half: float
    single: float


def card_of(name: str, memory: float) -> str | None:
    """The card that CUDA calls `name`, with so many bytes; None: another one."""
    flat = name.lower().replace(" ", "")
    for card, own in CARDS.items():
        word = card.removesuffix("-40").removesuffix("-80").replace("-", "")
        if word in flat and abs(memory / own.memory - 1) < 0.12:
            return card
    return None


# Source: NVIDIA's data sheets and architecture papers; SXM where there are several, without sparsity, sums in fp32.
CARDS = {
    "rtx4090": Card(24e9, 165.2e12, 82.6e12),
    "a100-40": Card(40e9, 312e12, 156e12),
    "l40s": Card(48e9, 362e12, 183e12),
    "rtx6000-ada": Card(48e9, 364.2e12, 182.1e12),
    "a100-80": Card(80e9, 312e12, 156e12),
    "h100": Card(80e9, 989.4e12, 494.7e12),
    "h200": Card(141e9, 989.4e12, 494.7e12),
    "b200": Card(180e9, 2250e12, 1100e12),
}
