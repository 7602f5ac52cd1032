"""Pictures of a report: bars of time against the bare GEMMs, and of memory against naive."""

from __future__ import annotations

import importlib.util
import os
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import Report, duration, size, times

# Colours that stay apart in greyscale and for colour-blind readers (Okabe and Ito).
COLOURS = {"ours": "#0072B2", "naive": "#D55E00", "active": "#009E73"}
OTHER, LINE = "#A7B1BC", "#222222"
STYLE: Any = {
    "figure.dpi": 120,
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
}
CUT = 4.0  # a bar longer than this many units is cut, and says how long it is
BEHIND: Any = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}  # of text
COLUMNS = 6  # panels side by side, at most
# Inches: names on the left, a panel, a bar, and what stands above and below a row of panels.
NAMES, PANEL, BAR, ABOVE, BELOW, HEAD = 2.1, 2.15, 0.2, 0.5, 0.3, 0.5


class Row(NamedTuple):
    """Panels that share their implementations."""

    group: Report
    cases: list[str]
    implementations: list[str]

    @property
    def height(self) -> float:
        """Inches of its bars."""
        return BAR * len(self.implementations)


def available() -> bool:
    """Is matplotlib installed?"""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Report, path: str | Path) -> list[Path]:
    """Draw times to `path` and, where memory was measured, that to ``…-memory.png`` beside it.

    Returns:
        What was written.
    """
    path = Path(path)
    pictures = {path: "seconds", path.with_name(f"{path.stem}-memory.png"): "extra_bytes"}
    return [file for file, quantity in pictures.items() if _picture(report, file, quantity)]


def _picture(report: Report, path: Path, quantity: str) -> bool:
    """One PNG; False if there is nothing to show."""
    rows = [row for group in report["groups"] for row in _rows(group, quantity, report["names"])]
    if not rows:
        return False

    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = NAMES + PANEL * max(3, *(len(row.cases) for row in rows)) + 0.1
    height = HEAD + sum(ABOVE + row.height + BELOW for row in rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        about, what = report["provenance"], {"seconds": "Time", "extra_bytes": "Peak memory"}
        where = f"{about['device']}, {about['threads']} threads, {about['date'][:10]}"
        figure.text(0.1 / width, 1 - 0.22 / height, f"{what[quantity]}, shorter is better",
                    fontsize=11, weight="bold", va="center")  # fmt: skip
        figure.text(0.1 / width, 1 - 0.42 / height, where, fontsize=8, va="center", color="#555555")
        bottom = height - HEAD
        for row in rows:
            bottom -= ABOVE + row.height
            for column, case in enumerate(row.cases):
                place = ((NAMES + PANEL * column) / width, bottom / height,
                         (PANEL - 0.12) / width, row.height / height)  # fmt: skip
                names = report["names"] if column == 0 else None
                _panel(figure.add_axes(place), row, case, quantity, names)
            top = (bottom + row.height + 0.3) / height
            figure.text(0.1 / width, top, row.group["name"], weight="bold", fontsize=9.5)
            bottom -= BELOW
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    return True


def _cells(group: Report, case: str, quantity: str) -> dict[str, Report]:
    """What a panel shows, by implementation."""
    return {
        c["implementation"]: c for c in group["cells"]
        if c["case"] == case and c["samples"] and c[quantity] is not None
        and not c["implementation"].startswith("floor")
    }  # fmt: skip


def _rows(group: Report, quantity: str, names: dict[str, str]) -> list[Row]:
    """The cases of a group; those of many implementations and of few do not share a row."""
    shown = {case: _cells(group, case, quantity) for case in group["titles"]}
    rows = []
    for _, cases in groupby((c for c in shown if shown[c]), key=lambda c: len(shown[c]) > 2):
        every = list(cases)
        for at in range(0, len(every), COLUMNS):
            some = every[at : at + COLUMNS]
            has = [name for name in names if any(name in shown[case] for case in some)]
            rows.append(Row(group, some, has))
    return rows


def _panel(axes: Any, row: Row, case: str, quantity: str, names: dict[str, str] | None) -> None:
    """Bars of one case, in bare GEMMs; memory, and time without a floor, in naive forms."""
    cells = _cells(row.group, case, quantity)
    ratio, unit = "of_floor", "bare GEMMs"
    if quantity == "extra_bytes" or not any(cell["of_floor"] for cell in cells.values()):
        ratio, unit = "memory_of_naive" if quantity == "extra_bytes" else "of_naive", "naive"
    known = [cell[ratio] for cell in cells.values() if cell[ratio] is not None]
    cut = min(CUT, max([*known, 1.5]))
    for y, implementation in enumerate(row.implementations):
        cell = cells.get(implementation)
        if cell is None:
            axes.text(0.02, y, "–", va="center", color="#888888")
            continue
        value = cell[ratio]
        label = duration(cell["seconds"]) if quantity == "seconds" else size(cell["extra_bytes"])
        if value is None:
            axes.text(0.02 * cut, y, label, va="center", fontsize=7.5)
            continue
        colour = COLOURS.get(implementation.split("-")[0], OTHER)
        axes.barh(y, min(value, cut), color=colour, height=0.74)
        text = times(value)
        cut_off = value > cut
        end = (1.03 if cut_off else 0.03) * cut + (0 if cut_off else value)
        if cut_off:
            axes.text(
                0.97 * cut, y, f"{text} ▸", va="center", ha="right", fontsize=7.5, weight="bold",
                color="white" if colour != OTHER else "black",
            )  # fmt: skip
        else:
            axes.text(end, y, text, va="center", fontsize=7.5, weight="bold", bbox=BEHIND)
        axes.annotate(
            label, (end, y), xytext=(0 if cut_off else 32, 0), textcoords="offset points",
            va="center", fontsize=7.5, color="#555555", bbox=BEHIND,
        )  # fmt: skip
    axes.axvline(1, color=LINE, linewidth=1.1, linestyle="-" if ratio == "of_floor" else ":")
    axes.set_xlim(0, cut * 1.72)
    axes.set_ylim(len(row.implementations) - 0.5, -0.5)
    axes.set_xticks([x for x in (0, 1, 2, 3, 4) if x <= cut])
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    titles = [] if names is None else [names[name] for name in row.implementations]
    axes.set_yticks(range(len(row.implementations)), titles or [""] * len(row.implementations))
    axes.set_title(f"{case}  (1 = {unit})", loc="left", fontsize=8, pad=3)
