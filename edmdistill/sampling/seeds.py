"""Per-sample seeds: every image has its own random stream, whatever the batch, rank or order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError, comma_separated
from edmdistill.transfer import to_device

MAX_SEED = 2**32 - 1
MAX_SEEDS = 2_000_000
"""The longest list of seeds: 40 times what an FID takes; all 2^32 would fill the memory."""


class SeededNoise:
    """One random stream a sample; each draw returns one value or image of every stream, on the CPU.

    Args:
        seeds: taken modulo 2^32, as the official scripts do.
    Source: the official generate.py and generate_images.py, whose streams these match number for number if the
        draws come in the same order: latents, then classes, then the sampler's noise.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.streams = [torch.Generator().manual_seed(int(seed) % 2**32) for seed in seeds]

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draws unit normal noise.  [B,*shape]"""
        return torch.stack([torch.randn(*shape, generator=rng, device="cpu", dtype=dtype) for rng in self.streams])

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Draws uniform numbers in [0, 1).  float32 [B,*shape]"""
        return torch.stack([torch.rand(*shape, generator=rng, device="cpu") for rng in self.streams])

    def signs(self, shape: Sequence[int]) -> Tensor:
        """Draws -1 or 1 with equal probability.  float32 [B,*shape]"""
        bits = [torch.randint(2, tuple(shape), generator=rng, device="cpu") for rng in self.streams]
        return torch.stack(bits) * 2.0 - 1

    def integers(self, high: int) -> Tensor:
        """Draws uniform integers in [0, high).  int64 [B]"""
        return torch.stack([torch.randint(high, [], generator=rng, device="cpu") for rng in self.streams])

    def like(self, x: Tensor) -> Tensor:
        """Draws unit normal noise of the shape, dtype and device of x [B,...]."""
        return to_device(self.normal(x.shape[1:], x.dtype), x.device)


def parse_seeds(text: str) -> list[int]:
    """Returns the seeds of a list of numbers and ranges, in its order: `0-2,100` is [0, 1, 2, 100].

    Raises: EdmDistillError: a part is neither a number nor an increasing range, a seed is above 2^32 - 1 or listed
        twice, or there are more than 2,000,000.
    """
    seeds: list[int] = []
    for part in comma_separated(text, "--seeds"):
        match = re.fullmatch(r"([0-9]{1,99})(?:-([0-9]{1,99}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise EdmDistillError(
                f"--seeds {text}: {part!r} is neither a seed nor an increasing range; write seeds as in 0-63,100"
            )
        if last > MAX_SEED:
            raise EdmDistillError(f"--seeds {text}: {last} is too large; seeds run from 0 to {MAX_SEED}")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise EdmDistillError(f"--seeds {text}: more than {MAX_SEEDS:,} seeds; split them over several commands")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        twice = Counter(seeds).most_common(1)[0][0]
        raise EdmDistillError(f"--seeds {text}: seed {twice} appears twice; list each seed once")
    return seeds


def format_seeds(seeds: Sequence[int]) -> str:
    """Returns the text of seeds, as the inverse of parse_seeds: [0, 1, 2, 100] is `0-2,100`."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
