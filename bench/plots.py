"""Pictures of a report: bars of time against the bare GEMMs, and of memory against naive."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import textwrap
from collections.abc import Iterator
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
WHOLE = 1.85  # a panel is so many times as wide as its longest bar: there is text on the right
BEHIND: Any = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # of text
# Inches: a panel, what stands below and above a row of panels, a heading, and that of all of them.
PANEL, BELOW, ABOVE, NAME, HEAD = 2.15, 0.26, 0.24, 0.26, 0.5


class Layout(NamedTuple):
    """How wide a picture may be."""

    columns: int  # panels side by side, at most
    names: float  # inches on the left
    letters: int  # of a name, in a line
    bar: float  # inches
    diagram: float  # inches of one with curves; two are side by side, at most
    dpi: int


WIDE = Layout(columns=4, names=2.1, letters=40, bar=0.2, diagram=4.75, dpi=120)
# Shown at the width of a phone, where letters of a wide picture would be too small.
NARROW = Layout(columns=1, names=1.4, letters=23, bar=0.25, diagram=3.9, dpi=170)


class Row(NamedTuple):
    """Panels that share their implementations."""

    group: Report
    cases: list[str]
    implementations: list[str]
    first: bool  # of its group: has a heading

    def above(self) -> float:
        """Inches."""
        return ABOVE + (NAME if self.first else 0)


def available() -> bool:
    """Is matplotlib installed?"""
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Report, path: str | Path, layout: Layout = WIDE) -> list[Path]:
    """Draw times to `path` and, where memory was measured, that to ``…-memory.png`` beside it.

    Returns:
        What was written.
    """
    path = Path(path)
    pictures = {path: "seconds", path.with_name(f"{path.stem}-memory.png"): "extra_bytes"}
    return [file for file, quantity in pictures.items() if _picture(report, file, quantity, layout)]


def _picture(report: Report, path: Path, quantity: str, layout: Layout) -> bool:
    """One PNG; False if there is nothing to show."""
    names = {name: textwrap.fill(title, layout.letters, break_long_words=False,
                                 break_on_hyphens=False)
             for name, title in report["names"].items()}  # fmt: skip
    rows = [row for g in report["groups"] for row in _rows(g, quantity, names, layout.columns)]
    if not rows:
        return False

    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max(min(3, layout.columns), *(len(row.cases) for row in rows))
    width = layout.names + PANEL * most + 0.1
    height = HEAD + sum(r.above() + layout.bar * len(r.implementations) + BELOW for r in rows)
    with rc_context(STYLE | {"figure.dpi": layout.dpi}):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        about, what = report["provenance"], {"seconds": "Time", "extra_bytes": "Peak memory"}
        where = f"{about['device']}, {about['threads']} threads, {about['date'][:10]}"
        figure.text(0.1 / width, 1 - 0.22 / height, f"{what[quantity]}, shorter is better",
                    fontsize=11, weight="bold", va="center")  # fmt: skip
        figure.text(0.1 / width, 1 - 0.42 / height, where, fontsize=8, va="center", color="#555555")
        bottom = height - HEAD
        for row in rows:
            bars = layout.bar * len(row.implementations)
            bottom -= row.above() + bars
            for column, case in enumerate(row.cases):
                place = ((layout.names + PANEL * column) / width, bottom / height,
                         (PANEL - 0.12) / width, bars / height)  # fmt: skip
                axes = figure.add_axes(place)
                _panel(axes, row, case, quantity, names, named=not column)
            if row.first:
                top = (bottom + bars + 0.3) / height
                figure.text(0.1 / width, top, row.group["name"], weight="bold", fontsize=9.5)
            bottom -= BELOW
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    return True


@contextlib.contextmanager
def pairs(path: Path, count: int, height: float, layout: Layout) -> Iterator[Any]:
    """Room for `count` pairs of panels, side by side or one below the other; saved at the end."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}):
        columns = min(layout.columns, 2)
        deep = count * 2 // columns
        figure = Figure(figsize=(layout.diagram * columns, height * deep), dpi=layout.dpi,
                        layout="constrained")  # fmt: skip
        FigureCanvasAgg(figure)
        yield figure.subplots(deep, columns, squeeze=False).reshape(-1, 2)
        figure.savefig(path, format="png")


def _cells(group: Report, case: str, quantity: str) -> dict[str, Report]:
    """What a panel shows, by implementation."""
    return {
        c["implementation"]: c for c in group["cells"]
        if c["case"] == case and c["samples"] and c[quantity] is not None
        and not c["implementation"].startswith("floor")
    }  # fmt: skip


def _rows(group: Report, quantity: str, names: dict[str, str], columns: int) -> list[Row]:
    """The cases of a group; those of many implementations and of few do not share a row."""
    shown = {case: _cells(group, case, quantity) for case in group["titles"]}
    rows = []
    for _, cases in groupby((c for c in shown if shown[c]), key=lambda c: len(shown[c]) > 2):
        every = list(cases)
        for at in range(0, len(every), columns):
            some = every[at : at + columns]
            has = [name for name in names if any(name in shown[case] for case in some)]
            rows.append(Row(group, some, has, not rows))
    return rows


def _panel(
    axes: Any, row: Row, case: str, quantity: str, names: dict[str, str], *, named: bool
) -> None:
    """Bars of one case, in bare GEMMs; memory, and time without a floor, in naive forms.

    Where there is no naive form either, in ours.
    """
    cells = _cells(row.group, case, quantity)
    ratio, unit = "of_floor", "bare GEMMs"
    if quantity == "extra_bytes" or not any(cell["of_floor"] for cell in cells.values()):
        ratio, unit = "memory_of_naive" if quantity == "extra_bytes" else "of_naive", "naive"
    values = {name: cell[ratio] for name, cell in cells.items() if cell[ratio] is not None}
    if not values and "ours" in cells and cells["ours"][quantity] > 0:
        unit, one = names["ours"], cells["ours"][quantity]
        values = {name: max(cell[quantity], 0) / one for name, cell in cells.items()}
    cut = min(CUT, max([*values.values(), 1.5]))
    for y, implementation in enumerate(row.implementations):
        cell = cells.get(implementation)
        if cell is None:
            axes.text(0.02, y, "–", va="center", color="#888888")
            continue
        value = values.get(implementation)
        label = duration(cell["seconds"]) if quantity == "seconds" else size(cell["extra_bytes"])
        if value is None:
            axes.text(0.02 * cut, y, label, va="center", fontsize=7.5)
            continue
        colour = COLOURS.get(implementation.split("-")[0], OTHER)
        axes.barh(y, min(value, cut), color=colour, height=0.74)
        text = times(value)
        cut_off = value > cut
        if cut_off:
            axes.text(
                0.97 * cut, y, f"{text} ▸", va="center", ha="right", fontsize=7.5, weight="bold",
                color="white" if colour != OTHER else "black",
            )  # fmt: skip
        else:
            axes.text(value + 0.03 * cut, y, text, va="center", fontsize=7.5, weight="bold",
                      bbox=BEHIND)  # fmt: skip
        axes.text(WHOLE * cut, y, label, va="center", ha="right", fontsize=7.5, color="#555555")
    axes.axvline(1, color=LINE, linewidth=1.1, linestyle="-" if ratio == "of_floor" else ":")
    axes.set_xlim(0, cut * WHOLE)
    axes.set_ylim(len(row.implementations) - 0.5, -0.5)
    axes.set_xticks([x for x in (0, 1, 2, 3, 4) if x <= cut])
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    titles = [names[name] if named else "" for name in row.implementations]
    axes.set_yticks(range(len(titles)), titles)
    axes.set_title(f"{case}  (1 = {unit})", loc="left", fontsize=8, pad=3)
