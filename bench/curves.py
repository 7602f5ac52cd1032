"""Pictures of what was measured along an axis: time and memory against rows, or ignored targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.plots import COLOURS, WIDE, Layout, pairs
from bench.report import Report

GREY = "#66717D"
# Lines that are neither ours nor naive nor the floor, told apart by dash and mark.
OTHERS = (("--", "s"), (":", "^"), ("-.", "D"), ("--", "v"), (":", "P"), ("-.", "X"), ("--", "*"))
QUANTITIES = {"seconds": ("time, ms", 1e3), "extra_bytes": ("peak memory, MiB", 2.0**-20)}
Line = list[tuple[float, float]]


def draw(report: Report, path: str | Path, layout: Layout = WIDE) -> list[Path]:
    """Draw every group that has axes: of each axis time beside memory, or in one column below.

    Returns:
        What was written: `path`, or nothing where no group has axes.
    """
    rows = [
        (group, axis) for group in report["groups"] for axis in group.get("axes", ())
        if any(_lines(group, axis, "seconds").values())
    ]  # fmt: skip
    if not rows:
        return []

    path = Path(path)
    with pairs(path, len(rows), 3.0, layout) as panels:
        for (left, right), (group, axis) in zip(panels, rows, strict=True):
            _panel(left, group, axis, "seconds", report["names"])
            _panel(right, group, axis, "extra_bytes", report["names"])
    return [path]


def _lines(group: Report, axis: Report, quantity: str) -> dict[str, Line]:
    """Points by implementation; the faster of the floors is one line."""
    found: dict[str, dict[float, float]] = {}
    for cell in group["cells"]:
        value = cell[quantity]
        if cell["case"] in axis["points"] and cell["samples"] and value is not None and value > 0:
            name = "floor" if cell["implementation"].startswith("floor") else cell["implementation"]
            line = found.setdefault(name, {})
            at = axis["points"][cell["case"]]
            line[at] = min(value, line.get(at, value))
    return {name: sorted(line.items()) for name, line in found.items()}


def _panel(axes: Any, group: Report, axis: Report, quantity: str, names: dict[str, str]) -> None:
    lines = _lines(group, axis, quantity)
    if not lines:
        axes.set_visible(False)
        return
    label, scale = QUANTITIES[quantity]
    others = iter(OTHERS * len(lines))
    for name, line in lines.items():
        x, y = [at for at, _ in line], [value * scale for _, value in line]
        title = names.get(name, name)
        if name == "floor":
            axes.plot(x, y, color="#222222", linewidth=1.1, marker=".", label=title)
        elif name in COLOURS:
            axes.plot(x, y, color=COLOURS[name], linewidth=1.8, marker="o", markersize=4,
                      label=title)  # fmt: skip
        else:
            dash, mark = next(others)
            axes.plot(x, y, dash, color=GREY, marker=mark, markersize=3.5,
                      linewidth=1, label=title)  # fmt: skip
    if axis["axis"] != "ignored":  # sizes double
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(x, [f"{at:g}" for at in x])
        axes.minorticks_off()
    else:
        axes.set_ylim(0, None)
    axes.set(xlabel=axis["unit"], ylabel=label)
    axes.set_title(f"{group['name']}: {axis['case']}", loc="left", fontsize=9, weight="bold")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, framealpha=0.85, edgecolor="none")
