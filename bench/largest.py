"""The largest batch whose step fits a given memory, by steps in fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.harness import Settings, Subject, look
from bench.worker import Failed


def largest(
    prepare: Callable[..., Subject],
    arguments: Callable[[int], tuple[Any, ...]],
    memory: int,
    settings: Settings,
    *,
    most: int,
    least: int = 2,
) -> dict[str, Any]:
    """The most rows, even, whose call takes at most `memory` bytes over its inputs.

    Rows double until a call no longer fits; then the gap is halved. Every count is a call that was
    made, none is extrapolated.

    Args:
        arguments: of `prepare`, for a number of rows.
        most: rows at which to stop though more would fit.

    Returns:
        ``rows`` (0: not even `least`), ``capped`` (more than `most` might fit), ``tried`` (rows →
        bytes, or the reason why there are none) and ``bytes``, the limit.
    """
    tried: dict[int, int | str] = {}

    def fits(rows: int) -> bool:
        try:
            found = look(prepare, arguments(rows), settings)
        except Failed as failure:
            tried[rows] = str(failure)
            return False
        tried[rows] = found
        return found <= memory

    good, bad = 0, least
    while bad <= most and fits(bad):
        good, bad = bad, min(2 * bad, most) if bad < most else most + 2
    while bad <= most and bad - good > 2:
        middle = (good + bad) // 4 * 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {"rows": good, "capped": good == most, "bytes": memory,
            "tried": {str(rows): value for rows, value in sorted(tried.items())}}  # fmt: skip
