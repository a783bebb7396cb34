"""Random numbers that belong to the rows of a batch, not to the process that draws them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Rows that share a stream: one call of the generator serves them all."""


class Draws:
    """Random numbers for some rows of a batch: the same numbers however processes and micro-batches share the rows.

    Every block of 64 rows has a stream of its own; who has some of its rows draws for all and keeps theirs. Each call
    goes on in the streams, so what a row gets hangs on the entropy, its place, and the order of the calls.

    Args:
        entropy: what names the batch: seed, round, turn ...
        batch: rows of the whole batch.
        rows: those wanted.
        device: where the streams live; "meta" gives shapes without numbers.
    Attributes:
        seed: of whatever else is random about these rows, such as dropout.
    """

    def __init__(
        self,
        entropy: Sequence[int] | int,
        batch: int,
        rows: slice = slice(None),
        device: torch.device | str = "cpu",
    ) -> None:
        start, stop, _ = rows.indices(batch)
        seeds = np.random.SeedSequence(entropy).generate_state(batch, np.uint64)
        first = start - start % BLOCK
        self.seed = int(seeds[start])
        self.device = torch.device(device)
        self._wanted = slice(start - first, stop - first)
        self._blocks: list[tuple[int, torch.Generator | None]] = []
        for block in range(first, stop, BLOCK):
            meta = self.device.type == "meta"
            stream = None if meta else torch.Generator(self.device).manual_seed(int(seeds[block]))
            self._blocks.append((min(BLOCK, batch - block), stream))
        self._rows = stop - start
        self._common = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(0,)))

    def __len__(self) -> int:
        return self._rows

    def common(self) -> float:
        """From [0, 1), the same for every row of the batch; on the meta device .5, what is usual."""
        return 0.5 if self.device.type == "meta" else float(self._common.random())

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """From [0, 1).  [rows,*shape]"""
        return self._rows_of(
            [torch.rand(n, *shape, generator=g, device=self.device, dtype=dtype) for n, g in self._blocks]
        )

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Of mean 0 and variance 1.  [rows,*shape]"""
        return self._rows_of(
            [torch.randn(n, *shape, generator=g, device=self.device, dtype=dtype) for n, g in self._blocks]
        )

    def normal_like(self, x: Tensor, std: float = 1.0) -> Tensor:
        """Gaussian noise with the shape and dtype of x [rows,...]."""
        return self.normal(*x.shape[1:], dtype=x.dtype) * std

    def _rows_of(self, blocks: list[Tensor]) -> Tensor:
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return whole[self._wanted]
