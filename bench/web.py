"""The HTML page: tables, and pictures drawn from the same cells, in one file without scripts."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from string import Template

from bench import active, curves, plots, standing, tables
from bench.report import Report, duration, size, times
from bench.standing import Case, Source
from bench.tables import Table

# Images are on white in both colour schemes. 700 px: where a wide picture becomes hard to read.
PAGE = Template("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ift-kernels: benchmarks</title>
<style>
:root { color-scheme: light dark; --text: #1c2733; --paper: #ffffff; --dim: #54616d;
  --line: #c9d1d9; --stripe: #f4f6f8; --link: #00609a; --yes: #00694a; --no: #a63f00; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ed; --paper: #14191f; --dim: #9fabb7;
  --line: #3c4855; --stripe: #1d242c; --link: #6db9ec; --yes: #57d0a3; --no: #ff9d61; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper);
  margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; }
p, ul { max-width: 820px; } ul { padding-left: 20px; }
h1 { font-size: 28px; } h2 { border-bottom: 2px solid var(--link); margin-top: 48px; }
h2 small { color: var(--dim); font-weight: 400; } h3 { font-size: 17px; margin: 28px 0 6px; }
nav a { display: inline-block; margin: 0 14px 4px 0; } a { color: var(--link); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 7px; text-align: right; vertical-align: top; white-space: nowrap;
  background: var(--paper); }
th { color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--line); }
th.over { text-align: left; border-left: 1px solid var(--line); padding-left: 16px; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; }
td small { display: block; color: var(--dim); font-size: 12px; line-height: 1.3;
  white-space: normal; width: 170px; }
tbody tr:nth-child(even) td { background: var(--stripe); }
td.yes { color: var(--yes); } td.no { color: var(--no); }
td.yes, td.no { white-space: normal; min-width: 84px; }
table.text td, table.text th { text-align: left; white-space: normal; min-width: 90px; }
figure { margin: 16px 0; }
img { display: block; height: auto; max-width: 100%; background: #ffffff; border-radius: 4px; }
figcaption, summary { color: var(--dim); font-size: 14px; }
summary { padding: 4px 0; overflow-wrap: anywhere; }
pre { font-size: 13px; overflow-x: auto; background: var(--stripe); padding: 8px; }
@media (max-width: 700px) { body { padding: 0 12px 32px; } td small { width: 110px; }
  td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 110px;
    max-width: 130px; }
  img { width: 100%; } td.yes, td.no { white-space: nowrap; } }
</style></head><body>
<h1>ift-kernels: benchmarks</h1>
$read
<nav>$nav</nav>
$body
</body></html>
""")


def page(sources: Sequence[Source]) -> str:
    """The HTML page, with its pictures inside."""
    found = {suite: tables.tables(sources, suite) for suite in tables.ORDER}
    suites = [suite for suite in tables.ORDER if found[suite]]
    links = {suite: tables.TITLES[suite] for suite in suites} | {"provenance": "Provenance"}
    nav = " ".join(f'<a href="#{at}">{_text(title)}</a>' for at, title in links.items())
    parts = [_table(tables.summary(sources))]
    for suite in suites:
        parts.append(
            f'<h2 id="{suite}">{_text(tables.TITLES[suite])} <small>{suite}</small></h2>'
            f"<p>{_text(tables.ABOUT[suite])}</p>"
        )
        here = [source for source in sources if source.report["suite"] == suite]
        for group, cases in standing.by_group(sources, suite).items():
            parts += [_table(table) for table in found[suite][group]]
            parts += pictures(group, cases, here)
        absent = tables.not_run(sources, suite)
        parts += [_table(absent, "text")] if absent.rows else []
        parts += [_everything(source) for source in here]
    parts.append('<h2 id="provenance">Where it comes from</h2>')
    parts.append(_table(tables.provenance_table(sources)._replace(title="")))
    for source in sources:
        about = {name: source.report[name] for name in ("provenance", "options")}
        text = _text(json.dumps(about, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>{_label(source)}</summary><pre>{text}</pre></details>")
    return PAGE.substitute(read=_read(), nav=nav, body="\n".join(parts))


def _read() -> str:
    """What it is about, and what the columns mean."""
    terms = (f"<li><b>{term}</b>: {_text(meaning)}.</li>" for term, meaning in tables.READ)
    how = re.sub(r"\[.*?\]\((.*?)\)", r"docs/\1", tables.HOW)
    what = re.sub(r"\*(.*?)\*", r"<b>\1</b>", _text(tables.WHAT))
    return f"<p>{what}</p><ul>{''.join(terms)}</ul><p>{_text(f'{tables.RATIOS} {how}')}</p>"


def pictures(group: str, cases: dict[str, dict[str, Case]], sources: Sequence[Source]) -> list[str]:
    """Drawn anew, as figures with data URIs; none without matplotlib.

    Bars are of the cells that the table shows. Curves and sweeps belong together: they are of one
    file each.
    """
    if not plots.available():
        return []
    found = []
    for device in dict.fromkeys(device for by_device in cases.values() for device in by_device):
        chosen = [by_device[device] for by_device in cases.values() if device in by_device]
        report = active.without_sweeps(_merged(group, chosen))
        files = dict.fromkeys(f"{c.source.path.parent.name}/{c.source.path.name}" for c in chosen)
        with tempfile.TemporaryDirectory() as folder:
            wide, narrow = (
                plots.draw(report, Path(folder, f"time-{layout.columns}.png"), layout)
                for layout in (plots.WIDE, plots.NARROW)
            )
            found += _figures(wide, narrow, f"{group}, from {', '.join(files)}")
    for source in sources:
        groups = [g for g in source.report["groups"] if g["name"] == group]
        report = source.report | {"groups": groups}
        with tempfile.TemporaryDirectory() as folder:
            wide, narrow = (
                active.draw(report, Path(folder, f"sweeps-{layout.columns}.png"), layout)
                + curves.draw(report, Path(folder, f"curves-{layout.columns}.png"), layout)
                for layout in (plots.WIDE, plots.NARROW)
            )
            found += _figures(wide, narrow, f"{group}, from {_label(source)}")
    return found


def _merged(group: str, cases: Sequence[Case]) -> Report:
    """One report of a group, of cases from several files of a device."""
    newest = max(cases, key=lambda case: str(case.source.report["provenance"]["date"]))
    record = {
        "name": group,
        "titles": {case.name: case.group["titles"][case.name] for case in cases},
        "cells": [cell for case in cases for cell in case.cells],
    }
    names = {name: title for case in cases for name, title in case.names.items()}
    return newest.source.report | {"names": names, "groups": [record]}


def _figures(wide: Sequence[Path], narrow: Sequence[Path], label: str) -> list[str]:
    """Two forms of the same pictures; the browser takes what fits."""
    found = []
    for file, small in zip(wide, narrow, strict=True):
        what = "memory" if file.stem.endswith("-memory") else file.stem.split("-")[0]
        text = f"{what}: {_text(label)}"
        found.append(
            f'<figure><picture><source media="(max-width: 700px)" srcset="{_data(small)}">'
            f'<img alt="{text}" src="{_data(file)}"></picture>'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return found


def _data(file: Path) -> str:
    """With a palette: a third of the bytes. The octree keeps rare colours, of a line or a mark."""
    from PIL import Image  # comes with matplotlib

    small = io.BytesIO()
    image = Image.open(file).convert("RGB")
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(small, "png")
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


def _everything(source: Source) -> str:
    """Every cell of a file, to be unfolded."""
    names = source.report["names"]
    parts = []
    for group in source.report["groups"]:
        rows = []
        for cell in group["cells"]:
            if cell["samples"]:
                spread = f"{cell['spread']:.0%}" if len(cell["samples"]) > 1 else ""
                values = [duration(cell["seconds"]), spread,
                          times(cell.get("of_floor")), times(cell.get("of_naive")),
                          size(cell["extra_bytes"]), str(len(cell["samples"])),
                          ", ".join(f"{k} {v:.1e}" for k, v in cell["errors"].items())]  # fmt: skip
                title = f"{cell['case']}: {names[cell['implementation']]}"
                rows.append([title, *(value or "–" for value in values)])
        head = ["", "time", "±", "of floor", "of naive", "memory", "samples", "errors against fp64"]
        parts.append(_table(Table(group["name"], head, rows)))
    return f"<details><summary>all of {_label(source)}</summary>{''.join(parts)}</details>"


def _table(table: Table, kind: str = "") -> str:
    over = "".join(
        f'<th class="over" colspan="{columns}">{_text(text)}</th>' if text else "<th></th>"
        for text, columns in table.over
    )
    lines = [over] if over else []
    lines.append("".join(f"<th>{_text(cell)}</th>" for cell in table.head))
    head = "".join(f"<tr>{line}</tr>" for line in lines)
    body = "".join(f"<tr>{''.join(_row(table, row))}</tr>" for row in table.rows)
    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    return (
        f'{title}<div class="wide"><table{f" class={kind}" if kind else ""}>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _row(table: Table, row: Sequence[str]) -> list[str]:
    note = (table.notes or {}).get(row[0])
    cells = [f"<td>{_text(row[0])}{f'<small>{_text(note)}</small>' if note else ''}</td>"]
    for name, cell in zip(table.head[1:], row[1:], strict=True):
        judged = name in ("fastest", "leanest") and cell.startswith(("yes", "within", "no"))
        kind = ("no" if cell.startswith("no") else "yes") if judged else ""
        cells.append(f"<td{f' class={kind}' if kind else ''}>{_text(cell)}</td>")
    return cells


def _label(source: Source) -> str:
    return _text(f"{source.path.parent.name}/{source.path.name}")


def _text(text: str) -> str:
    return html.escape(text, quote=True)
