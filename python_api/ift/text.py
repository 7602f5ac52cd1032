"""Numbers, durations, sizes and tables as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None) -> str:
    """Three significant digits: 2.31, 0.470, 9876, 12.3k, 5e-7; None is a value that is not finite.

    >>> [number(x) for x in (2.3, 0.47, 0, 999.7, 12345, 999_960, 5e-7, None)]
    ['2.30', '0.470', '0.00', '1000', '12.3k', '1.00M', '5e-7', 'not finite']
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    rounded = float(f"{value:.2e}")  # first: 999.96k is 1.00M
    size = abs(rounded)
    if 0 < size < 1e-4:
        return f"{rounded:.3g}".replace("e-0", "e-")
    if size < 1e4:
        return f"{rounded:.0f}" if size >= 1000 else f"{rounded:#.3g}".removesuffix(".")
    scale, unit = next((scale, unit) for scale, unit in UNITS if size >= scale)
    return f"{rounded / scale:#.3g}".removesuffix(".") + unit


def duration(seconds: float) -> str:
    """In the unit that gives a short number: 4 ms, 0.4 s, 40 s, 2 min, 2.2 h, 3.5 days.

    >>> [duration(s) for s in (0.004, 0.4, 40, 130, 8000, 3e5)]
    ['4 ms', '0.4 s', '40 s', '2 min', '2.2 h', '3.5 days']
    """
    if seconds < 0.095:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def size(count: float) -> str:
    """Bytes, in decimal units.

    >>> [size(n) for n in (512, 45_300, 14.5e9, 3e12)]
    ['512 B', '45.3 kB', '14.5 GB', '3.0 TB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width each: the first to the left, the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def one_line(text: str, width: int, *, end: bool = False) -> str:
    """One line of at most `width` characters; with `end` the end of a longer text.

    >>> one_line("one two three", 8), one_line("one two three", 8, end=True)
    ('one two…', '…o three')
    """
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    return "…" + line[1 - width :] if end else line[: width - 1] + "…"
