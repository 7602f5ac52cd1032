"""The tables and the picture of ``ift numerics``, for a terminal and for docs/numerics.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ift import plotting
from ift.numerics import bounds
from ift.numerics.measure import Row, rows
from ift.text import number, table

OURS = {None: "ift-kernels", "float32": "ift-kernels, fp32 logits"}


class Table(NamedTuple):
    """Text in rows and columns."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def errors(report: dict[str, Any], result: str, measure: str = "max") -> list[Table]:
    """A table for each dtype: implementations by inputs, of a result of `linear_logprobs`.

    Of ours the largest over backends and schedules.
    """
    kinds = list(report["inputs"])
    tables = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows(report)):
        by_name = implementations(report, result, dtype)
        lines = [
            [name, *(_cell([r for r in some if r["inputs"] == k], measure) for k in kinds)]
            for name, some in by_name.items()
        ]
        missing = {name: why for name, why in report["absent"].items() if name not in by_name}
        lines += [[name, why, *[""] * (len(kinds) - 1)] for name, why in missing.items()]
        tables.append(Table(f"{result}, {dtype}", ["", *kinds], lines))
    return tables


def implementations(report: dict[str, Any], result: str, dtype: str) -> dict[str, list[Row]]:
    """The rows of a result of `linear_logprobs`, by who has computed it."""
    found: dict[str, list[Row]] = {}
    for row in rows(report):
        same = row["operation"] == "linear_logprobs" and row["result"] == result
        if same and row["dtype"] == dtype:
            name = row["implementation"]
            name = OURS[row["logits_dtype"]] if name == "ift" else name
            found.setdefault(name, []).append(row)
    return found


def _cell(some: list[Row], measure: str) -> str:
    if not some:
        return "–"
    values = [row[measure] for row in some]
    return "not finite" if None in values else number(max(values))


def shares(report: dict[str, Any]) -> Table:
    """The largest share of its bound that any result of an operation used, by dtype."""
    ours = [row for row in rows(report) if row["implementation"] == "ift"]
    columns = dict.fromkeys((row["dtype"], row["logits_dtype"]) for row in ours)
    lines = []
    for operation in dict.fromkeys(row["operation"] for row in ours):
        some = [row for row in ours if row["operation"] == operation]
        cells = [
            _largest(row["share"] for row in some if (row["dtype"], row["logits_dtype"]) == column)
            for column in columns
        ]
        lines.append([f"`{operation}`", *cells])
    head = ["", *(f"{dtype}, fp32 logits" if wide else dtype for dtype, wide in columns)]
    return Table("share of the bound", head, lines)


def _largest(values: Iterable[float | None]) -> str:
    found = list(values)
    return "beyond" if None in found else f"{max(v for v in found if v is not None):.2f}"


def invariance(report: dict[str, Any]) -> Table:
    """Pass, or the number of elements that differ."""
    found = report["invariance"]
    dtypes = list(next(iter(found.values())))
    lines = [[name, *(_verdict(row[dtype]) for dtype in dtypes)] for name, row in found.items()]
    return Table("deterministic=True", ["results do not depend on", *dtypes], lines)


def _verdict(count: int | str) -> str:
    return count if isinstance(count, str) else f"{count} differ" if count else "pass"


def unit_table() -> Table:
    """`bounds.UNITS` as powers of two."""
    lines = []
    for (dtype, logits_dtype), row in bounds.UNITS.items():
        if dtype == logits_dtype:
            continue  # asks for what it is anyway
        name = str(dtype).removeprefix("torch.") + (", fp32 logits" if logits_dtype else "")
        units = (row.logit, row.dlogit, row.sum, row.result)
        lines.append([name, *(bounds.power(unit) for unit in units)])
    return Table("units", ["inputs", "a logit", "its gradient", "sums", "a gradient"], lines)


def as_text(report: dict[str, Any]) -> str:
    """Everything, for a terminal."""
    size = report["size"]
    parts = [f"{size['rows']} tokens × {size['width']} × {size['vocabulary']}; largest errors"]
    tables = [*errors(report, "logprob"), *errors(report, "d hidden"), shares(report),
              invariance(report)]  # fmt: skip
    for one in tables:
        parts.append(f"\n{one.title}")
        parts.append(table([list(one.head), *map(list, one.rows)]))
    return "\n".join(parts)


def _ours_last(name: str) -> bool:
    return name in OURS.values()


def draw(report: dict[str, Any], path: str | Path) -> None:
    """Largest errors of log-probabilities, a panel for each kind of inputs."""
    kinds = report["inputs"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows(report)))
    by_dtype = {dtype: implementations(report, "logprob", dtype) for dtype in dtypes}
    # Ours last, which is on top.
    names = sorted({name: 0 for some in by_dtype.values() for name in some}, key=_ours_last)
    with plotting.picture(path, 1, len(kinds), width=2.5 * len(kinds) + 1.5, height=3.4) as (
        figure, panels,
    ):  # fmt: skip
        figure.suptitle("Largest error of a log-probability against fp64")
        for axes, kind in zip(panels, kinds, strict=True):
            for dtype, color, marker in zip(dtypes, plotting.COLORS, "osD", strict=False):
                found = by_dtype[dtype]
                points = [
                    (max(r["max"] or 0.0 for r in found[name] if r["inputs"] == kind), at)
                    for at, name in enumerate(names)
                    if any(r["inputs"] == kind for r in found.get(name, ()))
                ]
                axes.scatter(
                    [max(x, 1e-9) for x, _ in points], [y for _, y in points], color=color,
                    marker=marker, s=22, label=dtype, alpha=0.85,
                )  # fmt: skip
            axes.set(title=kind, xscale="log", ylim=(-0.5, len(names) - 0.5))
            axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
