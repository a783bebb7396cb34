"""The lines of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

Measures = dict[str, float]


class Window:
    """Means over the rounds since the last line.

    Args: what `progress` gave, to go on from there; the time between two processes does not count.
    """

    def __init__(
        self, sums: Mapping[str, float] | None = None, rounds: int = 0, seconds: float = 0.0, before: float = 0.0
    ) -> None:
        self.sums = dict(sums or {})
        self.rounds = rounds
        self.seconds = seconds
        self.before = before  # seconds up to the last line
        self._clock = time.perf_counter()

    def add(self, measures: Measures) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        for name, value in measures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.rounds += 1

    def line(self, images: int, batch: int) -> dict[str, float]:
        """images, step, seconds (since the run began), images_per_second, and every mean; a new window begins."""
        self.before += self.seconds
        speed = self.rounds * batch / self.seconds
        line = {"images": images, "step": images // batch, "seconds": self.before, "images_per_second": speed}
        line |= {name: total / self.rounds for name, total in self.sums.items()}
        self.sums, self.rounds, self.seconds = {}, 0, 0.0
        return {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in line.items()}

    def progress(self) -> dict[str, Any]:
        """Plain values from which a window goes on."""
        return {"sums": self.sums, "rounds": self.rounds, "seconds": self.seconds, "before": self.before}
