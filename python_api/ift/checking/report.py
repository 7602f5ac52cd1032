"""`CheckReport`: what `ift.check` found, as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ift.checking.cause import Cause

WIDTHS = (36, 14, 14, 10, 10)


@dataclass(frozen=True)
class CheckRow:
    """One line of the table.

    Attributes:
        what: is compared.
        fused, naive: figures of both; None where there is only a difference.
        error: relative; infinite where shapes or inputs differ. None: for information.
        limit: the largest error that passes.
        where: the worst parameter, token or argument.
    """

    what: str
    fused: float | None = None
    naive: float | None = None
    error: float | None = None
    limit: float = 0.0
    where: str = ""

    @property
    def ok(self) -> bool:
        """Whether it passes; NaN does not."""
        return self.error is None or self.error <= self.limit

    def __str__(self) -> str:
        cells = [self.what, *(_figure(x) for x in (self.fused, self.naive))]
        if self.error is not None:
            cells += [f"{self.error:.1e}", f"{self.limit:.0e}", "ok" if self.ok else "WRONG"]
        line = "  ".join(
            cell.ljust(width) for cell, width in zip(cells, (*WIDTHS, 5), strict=False)
        )
        return f"{line}  {self.where}".rstrip()


@dataclass(frozen=True)
class CheckReport:
    """Result of `ift.check`. ``str()`` is a table and a verdict.

    Attributes:
        ok: every row passes. False, too, for what is refused or cannot be decided.
        rows: what was compared; none where the fused forward did not run.
        cause: what differs first and where to look; empty if `ok`.
        stage: one word or two for it, a `ift.checking.cause.Stage`.
        model, objective, dtype: as in `ift.checking.Comparison`.
        processes: that took part.
        notes: warnings, of the package and about the batch.
    """

    ok: bool
    rows: tuple[CheckRow, ...]
    cause: str
    stage: str = ""
    model: str = ""
    objective: str = ""
    dtype: str = ""
    processes: int = 1
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        titles = ("", "fused", "full logits", "error", "limit")
        head = "  ".join(t.ljust(w) for t, w in zip(titles, WIDTHS, strict=True)).rstrip()
        several = f", {self.processes} processes" if self.processes > 1 else ""
        lines = [f"{self.model}, {self.objective}, {self.dtype}{several}"]
        lines += [head, *map(str, self.rows)] if self.rows else []
        lines += [f"note: {note}" for note in self.notes]
        verdict = f"wrong: {self.cause}" if self.stage != "refused" else self.cause
        lines.append("right: the fused loss is that of the full logits" if self.ok else verdict)
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes None."""
        from ift.files import finite

        rows = [asdict(row) | {"ok": row.ok} for row in self.rows]
        found: dict[str, Any] = finite(asdict(self) | {"rows": rows, "notes": list(self.notes)})
        return found


def refused(about: dict[str, Any], cause: Cause, rows: tuple[CheckRow, ...] = ()) -> CheckReport:
    """A report of what did not run."""
    return CheckReport(False, rows, str(cause), cause.stage, **about)


def worst_of(rows: list[tuple[CheckRow, ...]]) -> tuple[CheckRow, ...]:
    """Row by row that of the process with the largest error."""

    def size(row: CheckRow) -> float:
        error = -1.0 if row.error is None else row.error
        return math.inf if math.isnan(error) else error

    return tuple(max(same, key=size) for same in zip(*rows, strict=True))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"
