"""Pictures and a page of the curves of a probe set."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ift import pages, plotting
from ift.dynamics.monitor import before_and_after
from ift.dynamics.probes import in_order
from ift.files import write_text
from ift.text import number

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, one for a family of types; with the dashes they differ in greyscale.
STYLES = {
    "chosen": {"color": "#0072B2"},
    "rejected": {"color": "#D55E00"},
    "sample": {"color": "#009E73"},
    "chosen_semantic": {"color": "#0072B2", "linestyle": "--"},
    "chosen_format": {"color": "#0072B2", "linestyle": ":"},
    "rejected_semantic": {"color": "#D55E00", "linestyle": "--"},
    "rejected_format": {"color": "#D55E00", "linestyle": ":"},
    "other_train": {"color": "#CC79A7"},
    "unrelated": {"color": "#CC79A7", "linestyle": "--"},
    "fluent": {"color": "#CC79A7", "linestyle": ":"},
    "permuted": {"color": "#E69F00", "linestyle": "-."},
    "random_words": {"color": "#555555", "linestyle": ":"},
}
PANELS = {
    "mean_logprob": "log-probability of a token",
    "greedy_logprob": "log-probability of the greedy token",
    "off_argmax": "mass off the argmax",
    "entropy": "entropy (nats)",
    "distance": "‖p − e_y‖",
    "energy": "energy: 1 − p of the token",
    "a_norm": "‖A‖",
}


def label(name: str) -> str:
    """A name as matplotlib shows it: no formula between dollars, no entry hidden for its "_"."""
    return (" " * name.startswith("_")) + name.replace("$", r"\$")


def ordered_types(records: Records) -> list[str]:
    """The types of a log, in the order of legends."""
    return in_order(type_ for record in records for type_ in record["types"])


def _points(records: Records, type_: str, key: str) -> list[dict[str, Any]]:
    return [
        {"step": r["step"], key: r["types"][type_].get(key)} for r in records if type_ in r["types"]
    ]


def plot_curves(records: Records, path: str | Path, title: str = "") -> None:
    """Draw every type's curves over the steps, and the monitor's changes.

    Args:
        records: lines of ``curves.jsonl``.
        path: the PNG; it is replaced in one step.
        title: above the picture.
    """
    types = ordered_types(records)
    with plotting.picture(path, 2, 4, width=16.0, height=6.6) as (figure, axes):
        figure.suptitle(label(title))
        panels = [axes[i, j] for i in range(2) for j in range(4)]
        for panel, (key, name) in zip(panels, PANELS.items(), strict=False):
            for type_, other in zip(types, plotting.styles(len(types)), strict=True):
                style: dict[str, Any] = STYLES.get(type_) or other
                plotting.draw(panel, _points(records, type_, key), key, label=label(type_), **style)
            panel.set(title=name, xlabel="step")
        flags = [r["step"] for r in records if r.get("squeeze", {}).get("flag")]
        squeeze = [{"step": r["step"], **r.get("squeeze", {})} for r in records]
        last = panels[-1]
        plotting.draw(last, squeeze, "chosen", label="chosen", color=plotting.BLUE)
        plotting.draw(last, squeeze, "greedy", label="greedy token", color=plotting.ORANGE)
        last.axhline(0, color="#888888", linewidth=0.7)
        last.set(title="change since the first evaluation (nats/token)", xlabel="step")
        if flags:
            last.axvline(flags[0], color="#555555", linestyle=":", label="squeezing flagged")
        if last.get_legend_handles_labels()[0]:
            last.legend()
        handles, labels = panels[0].get_legend_handles_labels()
        columns = max(1, min(8, len(labels)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def comparison(
    runs: Mapping[str, Records], styles: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    """Runs over one another: by type a PNG, the log-probability and dotted the greedy token's.

    Args:
        runs: name → lines of its ``curves.jsonl``.
        styles: of matplotlib, one for each run.
    """
    found = {}
    for type_ in ordered_types([record for records in runs.values() for record in records]):
        with plotting.png(title=label(type_)) as (panel, made):
            for (name, records), style in zip(runs.items(), styles, strict=True):
                points = _points(records, type_, "mean_logprob")
                plotting.draw(panel, points, "mean_logprob", label=label(name), **style)
                greedy = _points(records, type_, "greedy_logprob")
                dotted = {**style, "linestyle": ":", "alpha": 0.7}
                plotting.draw(panel, greedy, "greedy_logprob", **dotted)
        found[type_] = made.getvalue()
    return found


def changes(runs: Mapping[str, Records]) -> tuple[list[str], list[list[float]]]:
    """What each run did to each type: the types, and by run the change of log π per token.

    From the first evaluation to the last; NaN where a run does not have the type.
    """
    types = ordered_types([record for records in runs.values() for record in records])
    rows = []
    for records in runs.values():
        ends = [[(r["types"].get(t) or {}).get("mean_logprob") for t in types]
                for r in (records[0], records[-1])]  # fmt: skip
        rows.append([math.nan if a is None or b is None else b - a
                     for a, b in zip(*ends, strict=True)])  # fmt: skip
    return types, rows


def plot_heat_map(
    path: str | Path | BytesIO,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    title: str,
    *,
    signed: bool = True,
) -> None:
    """Draw a table of numbers as colours with the numbers in them.

    Args:
        path: the PNG; it is replaced in one step.
        rows, columns: names; what is trained, and what is observed.
        values: row by row; NaN is left white.
        title: above the picture.
        signed: colours for both signs, white at 0; else from white to the largest value.
    """
    known = [abs(v) for row in values for v in row if math.isfinite(v)]
    top = max(known, default=0.0) or 1.0
    size = {"width": 2.6 + 0.62 * len(columns), "height": 2.0 + 0.36 * len(rows)}
    with plotting.picture(path, 1, 1, **size) as (figure, axes):
        axes.grid(False)
        cmap, bottom = ("RdBu", -top) if signed else ("Blues", 0.0)
        shown = axes.imshow(values, cmap=cmap, vmin=bottom, vmax=top, aspect="auto")
        axes.set_xticks(range(len(columns)), map(label, columns), rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), map(label, rows))
        axes.set(title=label(title), xlabel="observed", ylabel="trained")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    color = "white" if abs(value) > 0.6 * top else "#222222"
                    place = {"ha": "center", "va": "center", "fontsize": 7}
                    axes.text(j, i, number(value), color=color, **place)
        figure.colorbar(shown, ax=axes, shrink=0.8)


def table(records: Records) -> list[list[str]]:
    """First and last evaluation by type, with a header row."""
    first, last = records[0], records[-1]
    head = ["type", "probes"]
    head += [f"{name}, step {r['step']}" for name in ("logp/token", "greedy", "off argmax")
             for r in (first, last)]  # fmt: skip
    rows = [head]
    for type_ in ordered_types(records):
        row = [type_, f"{last['types'].get(type_, {}).get('count', 0):.0f}"]
        for key in ("mean_logprob", "greedy_logprob", "off_argmax"):
            for record in (first, last):
                value = record["types"].get(type_, {}).get(key)
                row.append("" if value is None else f"{value:.3f}")
        rows.append(row)
    return rows


def write_html(records: Records, path: str | Path, image: str | Path, title: str = "") -> None:
    """Write a page of its own: the picture, the monitor's line, first and last numbers.

    Args:
        records: lines of ``curves.jsonl``, at least one.
        path: the page; it is replaced in one step.
        image: a PNG, which goes into the page.
        title: of the page.
    """
    picture = pages.image(Path(image).read_bytes(), "curves of the probe set")
    line = f"<p>{html.escape(before_and_after(records))}</p>"
    parts = [picture, line, pages.table(table(records))]
    write_text(Path(path), pages.page(title or "Learning dynamics", parts))
