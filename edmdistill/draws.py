"""Random numbers tied to the rows of a batch: the same on every device and for every split of the batch.

The generator is counter-based: each row has a SplitMix stream of 2^64 words of 64 bits, and a word depends on its
position alone. Word i of the stream with key k is

    mix(k + (i + 1) gamma),    mix: twice z = (z ^ (z >> 32)) c, and once more z ^ (z >> 32)

Each use of a stream (a call of Draws, a layer's dropout) has its own piece of 2^40 words.

Words and uniform numbers are computed in integers and agree bit for bit on all devices. Normal numbers are computed
from them in float64, where log, sin and cos of two libraries may differ in the last bits. In float32 that is one ulp
of rare numbers: by estimate one in 10^8, by test fewer than one in 10^5.

Source: Steele, Lea & Flood 2014 (SplitMix), figure 16; Steele & Vigna 2021 (LXM), figure 2, for the mixer, lea64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
INVERSE = pow(GAMMA, -1, 2**64)
MULTIPLIER = 0xDABA0B6EB09322E3
PIECE = 2**40
"""Words reserved for one use of a stream."""
CALLS = 2**23
"""Pieces reserved for the calls of Draws; later ones are for dropout."""
LAYERS = 2**12
"""Pieces reserved for the layers of one forward pass."""


def words(keys: Tensor, n: int, piece: int = 0) -> Tensor:
    """Returns the first n words of a piece of each key's stream.  [rows] int64 -> [rows,n] int64"""
    # k + (i + 1) gamma, multiplied last: inductor would compute a product of the indices alone without wrap-around.
    z = (keys * _signed(INVERSE) + _signed(piece * PIECE + 1))[:, None] + torch.arange(n, device=keys.device)
    z *= _signed(GAMMA)
    low, high = _halves(z)  # views: low ^= high is z ^= z >> 32
    for _ in range(2):
        low ^= high
        z *= _signed(MULTIPLIER)
    low ^= high
    return z


def _signed(n: int) -> int:
    """Returns the int64 with the bits of n modulo 2^64, the modulus of torch's int64 arithmetic."""
    return (n + 2**63) % 2**64 - 2**63


def _halves(words: Tensor) -> tuple[Tensor, ...]:
    """Returns the lower and the upper 32 bits, as views."""
    return words.view(torch.int32).view(*words.shape, 2).unbind(-1)


def uniform(words: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns one number in [0, 1) per word, with as many random bits as the dtype holds."""
    bits = 53 if dtype == torch.float64 else 24
    numbers: Tensor = ((words >> (64 - bits)) + 2 ** (bits - 1)).to(dtype)
    return numbers * 2.0**-bits


def normal(words: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns two standard normal numbers per word, by the Box-Muller method.  [rows,n] -> [rows,2n]"""
    low, high = _halves(words)
    radius = (low.double() * 2.0**-32 + (0.5 + 2.0**-33)).log_().mul_(-2).sqrt_()  # of a number in (0, 1)
    angle = high.double() * (2 * math.pi * 2.0**-32)
    return torch.cat([(angle.cos() * radius).to(dtype), (angle.sin_() * radius).to(dtype)], dim=1)


class Draws:
    """Random numbers for rows of a batch, the same for every split into processes and micro-batches.

    A row's numbers depend on the entropy, its index in the batch, and the order of the calls.

    Args:
        entropy: identifies the batch: seed, round, turn ...
        batch: number of rows in the whole batch.
        rows: the rows to draw for.
        device: of the numbers; "meta" gives shapes only.
    Attributes:
        batch, rows: as given.
    """

    def __init__(
        self,
        entropy: Sequence[int] | int,
        batch: int,
        rows: slice = slice(None),
        device: torch.device | str = "cpu",
    ) -> None:
        start, stop, _ = rows.indices(batch)
        self.batch, self.rows = batch, slice(start, stop)
        seeds = np.random.SeedSequence(entropy)
        self.device = torch.device(device)
        root = _signed(int(seeds.generate_state(1, np.uint64)[0]) + start * GAMMA)
        self._keys = words(torch.full((1,), root, device=self.device), stop - start)[0]
        self._calls = self._passes = 0
        self._common = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(0,)))

    def __len__(self) -> int:
        return len(self._keys)

    def common(self) -> float:
        """Draws one number from [0, 1) for the whole batch; on the meta device returns .5, a typical value."""
        return 0.5 if self.device.type == "meta" else float(self._common.random())

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draws from [0, 1).  [rows,*shape]"""
        return uniform(self._words(math.prod(shape)), dtype).reshape(len(self), *shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draws from the standard normal distribution.  [rows,*shape]"""
        n = math.prod(shape)
        return normal(self._words(-(-n // 2)), dtype)[:, :n].reshape(len(self), *shape)

    def normal_like(self, x: Tensor, std: float = 1.0) -> Tensor:
        """Draws Gaussian noise with the shape and dtype of x [rows,...]."""
        return self.normal(*x.shape[1:], dtype=x.dtype) * std

    def in_batch(self, values: Tensor) -> Tensor:
        """Returns values of these rows in the place of theirs, [rows] -> [batch], times batch / rows; 0 elsewhere.

        So the mean over all micro-batches, each with the weight of its rows, holds the values of the whole batch.
        """
        whole = values.new_zeros(self.batch)
        whole[self.rows] = values * (self.batch / len(self))
        return whole

    def dropout(self, advance: bool = True, times: int = 1) -> Tensor:
        """Returns the rows' dropout keys for a forward pass, for kernels.dropout.  [times rows] int64

        Args:
            advance: give the next pass other keys.
            times: how often the rows are repeated in the pass, one batch after the other; each has keys of its own.
        """
        firsts = [CALLS + (self._passes + number) * LAYERS for number in range(times)]
        self._passes += advance * times
        return torch.cat([self._keys + _signed(first * PIECE * GAMMA) for first in firsts])

    def _words(self, n: int) -> Tensor:
        self._calls += 1
        return words(self._keys, n, self._calls - 1)
