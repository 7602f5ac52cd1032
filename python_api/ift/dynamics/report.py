"""Pictures and a page of the curves of a probe set."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ift import plotting
from ift.dynamics.monitor import before_and_after
from ift.dynamics.probes import TYPES
from ift.files import write_text

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours; with the dashes they stay apart in greyscale.
STYLES = (
    {"color": "#0072B2"}, {"color": "#D55E00"}, {"color": "#009E73"},
    {"color": "#0072B2", "linestyle": "--"}, {"color": "#D55E00", "linestyle": "--"},
    {"color": "#CC79A7"}, {"color": "#56B4E9"}, {"color": "#E69F00", "linestyle": "-."},
    {"color": "#555555", "linestyle": ":"},
)  # fmt: skip
PANELS = {
    "mean_logprob": "log-probability of a token",
    "greedy_logprob": "log-probability of the greedy token",
    "off_argmax": "mass off the argmax",
    "entropy": "entropy (nats)",
    "distance": "‖p − e_y‖",
}


def label(name: str) -> str:
    """A name as matplotlib shows it: no formula between dollars, no entry hidden for its "_"."""
    return (" " * name.startswith("_")) + name.replace("$", r"\$")


def ordered_types(records: Records) -> list[str]:
    """The types of a log, those of `TYPES` first, in their order."""
    seen = dict.fromkeys(type_ for record in records for type_ in record["types"])
    return [t for t in TYPES if t in seen] + [t for t in seen if t not in TYPES]


def _points(records: Records, type_: str, key: str) -> list[dict[str, Any]]:
    return [
        {"step": r["step"], key: r["types"][type_][key]} for r in records if type_ in r["types"]
    ]


def plot_curves(records: Records, path: str | Path, title: str = "") -> None:
    """Draw every type's curves over the steps, and the monitor's changes.

    Args:
        records: lines of ``curves.jsonl``.
        path: the PNG; it is replaced in one step.
        title: above the picture.
    """
    types = ordered_types(records)
    with plotting.picture(path, 2, 3, width=12.5, height=6.6) as (figure, axes):
        figure.suptitle(label(title))
        panels = [axes[i, j] for i in range(2) for j in range(3)]
        for panel, (key, name) in zip(panels, PANELS.items(), strict=False):
            for i, type_ in enumerate(types):
                style = STYLES[i % len(STYLES)]
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
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))


def plot_comparison(runs: Mapping[str, Records], path: str | Path) -> None:
    """Draw runs over one another, a panel per type: log-probability, and dotted the greedy token's.

    Args:
        runs: name → lines of its ``curves.jsonl``.
        path: the PNG; it is replaced in one step.
    """
    types = ordered_types([record for records in runs.values() for record in records])
    colors = list(dict.fromkeys(style["color"] for style in STYLES))  # dotted: greedy tokens
    columns = min(3, len(types))
    rows = math.ceil(len(types) / columns)
    with plotting.picture(path, rows, columns, width=4.2 * columns, height=3.2 * rows) as made:
        figure, axes = made
        panels = list(getattr(axes, "flat", [axes]))
        for panel, type_ in zip(panels, types, strict=False):
            for i, (name, records) in enumerate(runs.items()):
                color = colors[i % len(colors)]
                points = _points(records, type_, "mean_logprob")
                plotting.draw(panel, points, "mean_logprob", label=label(name), color=color)
                greedy = _points(records, type_, "greedy_logprob")
                plotting.draw(panel, greedy, "greedy_logprob", color=color, linestyle=":")
            panel.set(title=label(type_), xlabel="step")
        for panel in panels[len(types) :]:
            panel.remove()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))


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
    title = html.escape(title or "Learning dynamics")
    data = base64.b64encode(Path(image).read_bytes()).decode()
    head, *rows = table(records)
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>'
        "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:75em}img{width:100%}"
        "td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}</style>"
        f'<h1>{title}</h1><img alt="curves of the probe set" src="data:image/png;base64,{data}">'
        f"<p>{html.escape(before_and_after(records))}</p>"
        f"<table><tr>{cells}</tr>{body}</table></html>\n"
    )
    write_text(Path(path), text)
