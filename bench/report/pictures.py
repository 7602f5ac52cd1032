"""Pictures of a report: bars, curves along an axis, sweeps of the active set, training runs."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from bench.report.tables import Report, duration, size, times
from ift import plotting

# Colours that differ in greyscale and for colour-blind readers (Okabe and Ito).
COLOURS = {"ours": "#0072B2", "naive": "#D55E00", "active": "#009E73"}
OTHER, LINE, GREY = "#A7B1BC", "#222222", "#66717D"
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
# Lines that are neither ours nor naive nor the floor differ by dash and mark.
OTHERS = (("--", "s"), (":", "^"), ("-.", "D"), ("--", "v"), (":", "P"), ("-.", "X"), ("--", "*"))
QUANTITIES = {"seconds": ("time, ms", 1e3), "extra_bytes": ("peak memory, MiB", 2.0**-20)}
CUT = 4.0  # a bar longer than this many units is cut, and says how long it is
WHOLE = 1.85  # a panel is so many times as wide as its longest bar: there is text on the right
BEHIND: Any = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # of text
# Inches: a panel, the space below and above a row of panels, a heading, and that of all of them.
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


def write(report: Report, path: str | Path, layout: Layout = WIDE) -> list[Path]:
    """Draw whatever a report has: times to `path`, and beside it ``…-memory.png``, ``…-curves.png``
    and ``…-sweeps.png``.

    Returns:
        What was written.
    """
    path = Path(path)
    beside = {what: path.with_name(f"{path.stem}-{what}.png")
              for what in ("memory", "curves", "sweeps")}  # fmt: skip
    drawn = {
        path: bars(report, path, "seconds", layout),
        beside["memory"]: bars(report, beside["memory"], "extra_bytes", layout),
        beside["curves"]: curves(report, beside["curves"], layout),
        beside["sweeps"]: sweeps(report, beside["sweeps"], layout),
    }
    return [file for file, whether in drawn.items() if whether]


def figure(
    path: str | Path, width: float, height: float, layout: Layout, engine: str | None = None
) -> contextlib.AbstractContextManager[Any]:
    """A figure of so many inches, saved at the end in one step."""
    style = STYLE | {"figure.dpi": layout.dpi}
    return plotting.figure(path, width, height, style, engine)


def _axes(axes: Any, title: str, **options: Any) -> None:
    """What panels with curves share."""
    axes.set(**options)
    axes.set_title(title, loc="left", fontsize=9, weight="bold")
    axes.spines["left"].set_visible(True)
    axes.grid(axis="both", alpha=0.25)
    axes.legend(fontsize=7, framealpha=0.85, edgecolor="none")


# --- bars -----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Panels that share their implementations."""

    group: Report
    cases: list[str]
    implementations: list[str]
    first: bool  # of its group: has a heading

    def above(self) -> float:
        """Inches."""
        return ABOVE + (NAME if self.first else 0)


def bars(report: Report, path: Path, quantity: str, layout: Layout = WIDE) -> bool:
    """Time against the bare GEMMs, or memory against naive; False if there is nothing to show."""
    names = {name: textwrap.fill(title, layout.letters, break_long_words=False,
                                 break_on_hyphens=False)
             for name, title in report["names"].items()}  # fmt: skip
    rows = [row for g in report["groups"] for row in _rows(g, quantity, names, layout.columns)]
    if not rows:
        return False

    most = max(min(3, layout.columns), *(len(row.cases) for row in rows))
    width = layout.names + PANEL * most + 0.1
    height = HEAD + sum(r.above() + layout.bar * len(r.implementations) + BELOW for r in rows)
    with figure(path, width, height, layout) as page:
        about, what = report["provenance"], {"seconds": "Time", "extra_bytes": "Peak memory"}
        where = f"{about['device']}, {about['threads']} threads, {about['date'][:10]}"
        page.text(0.1 / width, 1 - 0.22 / height, f"{what[quantity]}, shorter is better",
                    fontsize=11, weight="bold", va="center")  # fmt: skip
        page.text(0.1 / width, 1 - 0.42 / height, where, fontsize=8, va="center", color="#555555")
        bottom = height - HEAD
        for row in rows:
            bars = layout.bar * len(row.implementations)
            bottom -= row.above() + bars
            for column, case in enumerate(row.cases):
                place = ((layout.names + PANEL * column) / width, bottom / height,
                         (PANEL - 0.12) / width, bars / height)  # fmt: skip
                axes = page.add_axes(place)
                _panel(axes, row, case, quantity, names, named=not column)
            if row.first:
                top = (bottom + bars + 0.3) / height
                page.text(0.1 / width, top, row.group["name"], weight="bold", fontsize=9.5)
            bottom -= BELOW
    return True


def _shown(group: Report, case: str, quantity: str) -> dict[str, Report]:
    """What a panel shows, by implementation."""
    return {
        c["implementation"]: c for c in group["cells"]
        if c["case"] == case and not swept(case) and c["samples"] and c[quantity] is not None
        and not c["implementation"].startswith("floor")
    }  # fmt: skip


def _rows(group: Report, quantity: str, names: dict[str, str], columns: int) -> list[Row]:
    """The cases of a group; those of many implementations and of few do not share a row."""
    shown = {case: _shown(group, case, quantity) for case in group["titles"]}
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
    cells = _shown(row.group, case, quantity)
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


def swept(case: str) -> bool:
    """Does a case belong to a sweep, which has curves instead of bars?"""
    return case.startswith(("threshold-", "block-", "tail-"))


# --- curves ---------------------------------------------------------------------------------------


def _pairs(path: Path, rows: Sequence[Any], height: float, layout: Layout, draw: Any) -> bool:
    """A pair of panels for each row, side by side or one below the other; False without rows."""
    if not rows:
        return False
    columns = min(layout.columns, 2)
    deep = len(rows) * 2 // columns
    width = layout.diagram * columns
    with figure(path, width, height * deep, layout, "constrained") as page:
        panels = page.subplots(deep, columns, squeeze=False).reshape(-1, 2)
        for (left, right), row in zip(panels, rows, strict=True):
            draw(left, right, row)
    return True


def curves(report: Report, path: Path, layout: Layout = WIDE) -> bool:
    """Along each axis of a group time and memory; False where no group has axes."""
    rows = [
        (group, axis) for group in report["groups"] for axis in group.get("axes", ())
        if any(_lines(group, axis, "seconds").values())
    ]  # fmt: skip

    def draw(left: Any, right: Any, row: Any) -> None:
        _curve(left, *row, "seconds", report["names"])
        _curve(right, *row, "extra_bytes", report["names"])

    return _pairs(path, rows, 3.0, layout, draw)


def _lines(group: Report, axis: Report, quantity: str) -> dict[str, list[tuple[float, float]]]:
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


def _curve(axes: Any, group: Report, axis: Report, quantity: str, names: dict[str, str]) -> None:
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
        from matplotlib import ticker

        axes.set(xscale="log", yscale="log")
        axes.set_xticks(x, [f"{at:g}" for at in x])
        low, high = axes.get_ylim()
        widened = max(4.0 / (high / low), 1.0) ** 0.5  # two ticks, at least
        axes.set_ylim(low / widened, high * widened)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    else:
        axes.set_ylim(0, None)
    _axes(axes, f"{group['name']}: {axis['case']}", xlabel=axis["unit"], ylabel=label)


# --- the active set -------------------------------------------------------------------------------


def raised(number: int) -> str:
    """As an exponent."""
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def sweeps(report: Report, path: Path, layout: Layout = WIDE) -> bool:
    """Time against active share, and error against threshold, of every group that has sweeps."""
    groups = [g for g in report["groups"] if any(swept(c["case"]) for c in g["cells"])]

    def draw(left: Any, right: Any, group: Report) -> None:
        _sweep_times(left, group)
        _sweep_errors(right, group)

    return _pairs(path, groups, 3.1, layout, draw)


def _swept(group: Report, kind: str, implementation: str) -> list[tuple[int, Report]]:
    """The value of the option and the cell, of one kind of sweep."""
    return sorted(
        ((int(c["case"].split("-")[1]), c) for c in group["cells"]
         if c["case"].startswith(f"{kind}-") and c["implementation"] == implementation
         and c["errors"]),
        key=lambda pair: pair[0],
    )  # fmt: skip


def _sweep_times(axes: Any, group: Report) -> None:
    """Time over the bare GEMMs of a frozen head, against the active share."""
    timed = {c["implementation"]: c["seconds"] for c in group["cells"]
             if c["case"] == "per-token-frozen" and c["seconds"]}  # fmt: skip
    if "floor" not in timed:
        axes.set_visible(False)
        return
    styles = {"threshold": ("o-", "#0072B2"), "block": ("s", "#009E73"), "tail": ("^", "#CC79A7")}
    for kind, (style, colour) in styles.items():
        found = [(value, c) for value, c in _swept(group, kind, "active")
                 if c["seconds"] and "share" in c["errors"]]  # fmt: skip
        points = sorted((c["errors"]["share"], c["seconds"] / timed["floor"], value)
                        for value, c in found)  # fmt: skip
        title = kind if kind == "threshold" else f"{kind} {', '.join(str(v) for v, _ in found)}"
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], style, color=colour,
                  markersize=4, linewidth=1.2, label=title)  # fmt: skip
        for x, y, value in points if kind == "threshold" else ():
            axes.annotate(f"2⁻{raised(value)}", (x, y), xytext=(0, 6), fontsize=7, ha="center",
                          textcoords="offset points")  # fmt: skip
    if "ours" in timed:
        exact = timed["ours"] / timed["floor"]
        axes.axhline(exact, color=COLOURS["naive"], linewidth=1, label="exact gradient")
    axes.axhline(1, color=LINE, linewidth=1, linestyle=":", label="two bare GEMMs")
    _axes(axes, f"{group['name']}: time", xlabel="active share k", ylabel="time / two bare GEMMs",
          ylim=(0, None))  # fmt: skip


def _sweep_errors(axes: Any, group: Report) -> None:
    """Relative error of dh against the threshold, with the tail's sums and without the tail."""
    for name, style, title in (("active", "o-", "tail as sums"), ("dropped", "x-", "tail dropped")):
        points = _swept(group, "threshold", name)
        axes.plot([-value for value, _ in points], [c["errors"]["d hidden"] for _, c in points],
                  style, color=COLOURS["ours" if name == "active" else "naive"], markersize=4,
                  linewidth=1.2, label=f"{title}, dh")  # fmt: skip
    _axes(axes, f"{group['name']}: error", yscale="log", xlabel="log₂ threshold",
          ylabel="relative error against fp64")  # fmt: skip


def training(runs: Sequence[Report], path: str | Path) -> None:
    """Held-out loss of every run; lines join what started from the same seed."""
    panels = sorted({(r["loss"], r["frozen"]) for r in runs}, reverse=True)
    names = ("exact", "active")
    with figure(path, 2.6 * len(panels), 5.2, WIDE, "constrained") as page:
        rows = page.subplots(2, len(panels), squeeze=False)
        for axes_of_row, what in zip(rows, ("held_out", "held_out_rare"), strict=True):
            for axes, (loss, frozen) in zip(axes_of_row, panels, strict=True):
                some = {(r["seed"], r["gradient"]): r[what] for r in runs
                        if (r["loss"], r["frozen"]) == (loss, frozen)}  # fmt: skip
                for seed in sorted({seed for seed, _ in some}):
                    y = [some[seed, name] for name in names]
                    axes.plot(range(2), y, color="#BBBBBB", linewidth=1, zorder=1)
                    colours = [COLOURS["naive"], COLOURS["ours"]]
                    axes.scatter(range(2), y, c=colours, s=22, zorder=2)
                axes.set_xticks(range(2), names, fontsize=7.5)
                axes.set_xlim(-0.4, 1.4)
                tokens = "all tokens" if what == "held_out" else "rarest tenth of tokens"
                head = "head frozen" if frozen else "head trained"
                axes.set_title(f"{loss.upper()}, {head}\n{tokens}", fontsize=8, loc="left")
            axes_of_row[0].set_ylabel("held-out loss", fontsize=8)
