"""The clock of the benchmark, read in one place: a test that needs a time puts a counter there."""

from __future__ import annotations

import time

now = time.perf_counter  # seconds since an arbitrary start; called as `clock.now()`


class Budget:
    """Seconds to spend, counted from here on.

    Args:
        minutes: how much.
    """

    def __init__(self, minutes: float) -> None:
        self._end = now() + 60 * minutes

    def left(self) -> float:
        """Seconds that are left; below 0 once they are spent."""
        return self._end - now()
