"""Lines with the elapsed seconds, and the time limit of a run."""

from __future__ import annotations

import time


class Progress:
    """The clock of one run: says what happens and when, and knows when there is no time for more.

    ``limit`` is in seconds from the construction on; None is no limit.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._start = time.monotonic()
        self._limit = limit

    @property
    def remaining(self) -> float | None:
        """Seconds until the limit, never negative; None without one."""
        return None if self._limit is None else max(0.0, self._limit - self.elapsed)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def expired(self) -> bool:
        """Whether the limit is reached."""
        return self.remaining == 0.0

    def say(self, message: str) -> None:
        """Print ``message`` behind the elapsed seconds, at once."""
        print(f"[{self.elapsed:7.1f}s] {message}", flush=True)
