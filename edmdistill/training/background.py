"""Files that are written beside training, from copies of what is trained."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Does one job at a time in a thread of its own, and raises its error at the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "background")
        self._job: Future[object] | None = None

    def begin(self, act: Callable[[], object]) -> None:
        """Begins a job, once the one before has ended.  Raises: what the one before raised."""
        self.finish()
        self._job = self._thread.submit(act)

    def finish(self) -> None:
        """Waits for the job.  Raises: what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Waits for the job, without its error, and ends the thread."""
        self._thread.shutdown()
