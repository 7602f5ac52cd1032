"""``python -m bench report``: one HTML page, and the generated blocks of README and docs.

All of it comes from the committed JSON alone, so that every figure can be traced. A block is the
text between ``<!-- generated: NAME -->`` and ``<!-- end -->``; `BLOCKS` has what goes there.
The HTML page holds its pictures and needs nothing else; devices are side by side.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from bench.harness import data
from bench.harness.machine import RESULTS, ROOT
from bench.report import headline, numerics, pictures, ranking, tables
from bench.report.ranking import ABOUT, ORDER, Case
from bench.report.tables import Report, Source, Table, escape, web
from ift import plotting

HTML = ROOT / "build" / "benchmarks.html"
Values = dict[str, Any]

# --- blocks of README and docs --------------------------------------------------------------------

BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
DEVICE = "epyc-zen4-2-threads"  # of the blocks with results of one device


def _block(
    title: str, head: str, pattern: str, row: Callable[[Values], list[float | None]]
) -> Callable[[Sequence[Source], str], str]:
    """A block with a line for every group of the files that match, and links to the files.

    Args:
        title: of the first column.
        head: of the others, with a format in parentheses: 2 digits, or percent with so many.
        row: values of a group, from {(case, implementation): cell} and the shares of bare products.
    """
    columns = [re.findall(r"(.*) \((.*)\)", part)[0] for part in head.split(" | ")]

    def block(sources: Sequence[Source], results: str) -> str:
        rows = []
        some = [s for s in sources if s.device == DEVICE and re.fullmatch(pattern, s.path.name)]
        for source in some:
            for group in source.report["groups"]:
                cells = {f"{c['case']} {c['implementation']}": c
                         for c in group["cells"] if c["samples"]}  # fmt: skip
                name = " × ".join(map(str, group["shape"])) + f", {group['dtype']}"
                values = zip(row(cells), columns, strict=True)
                rows.append([name, *(_shown(value, form) for value, (_, form) in values)])
        links = ", ".join(ranking.link(source.label, results) for source in some)
        return (
            tables.markdown(Table("", [title, *(name for name, _ in columns)], rows))
            + f"\n\nFrom {links}."
        )

    return block


def _shown(value: float | None, form: str) -> str:
    """As a number of so many digits or as percent; a dash is what was not measured."""
    if value is None:
        return "–"
    return f"{100 * value:.{form[1:]}f} %" if form.startswith("%") else f"{value:.{form}f}"


def _floor(cells: Values, case: str) -> float | None:
    """Seconds of the bare products."""
    names = [f"{case} {name}" for name in ("floor", "floor-t")]
    return min((cells[name]["seconds"] for name in names if name in cells), default=None)


def _of(cells: Values, name: str, to: float | None, field: str = "seconds") -> float | None:
    return tables.ratio(cells[name][field], to) if name in cells else None


def _error(cells: Values, name: str, of: str) -> float | None:
    return cells[name]["errors"].get(of) if name in cells else None


def _best(cells: Values, case: str) -> float | None:
    peers = [cells[f"{case} {name}"]["seconds"] for name in ("cce", "compile", "naive")
             if f"{case} {name}" in cells]  # fmt: skip
    return tables.ratio(min(peers, default=None), _floor(cells, "per-token"))


def active_times(cells: Values) -> list[float | None]:
    """Over the three bare products, also with a frozen head."""
    floor, frozen = _floor(cells, "per-token"), "per-token-frozen"
    return [
        _error(cells, f"{frozen} active", "share"),
        *(_of(cells, f"{frozen} {name}", floor) for name in ("ours", "active")),
        _best(cells, frozen),
        *(_of(cells, f"per-token {name}", floor) for name in ("ours", "active")),
        _best(cells, "per-token"),
    ]  # fmt: skip


def active_costs(cells: Values) -> list[float | None]:
    """A scalar loss, memory, and errors of dh."""
    frozen, floor = "per-token-frozen", _floor(cells, "scalar")
    naive = cells[f"{frozen} naive"]["extra_bytes"] if f"{frozen} naive" in cells else None
    return [
        *(_of(cells, f"scalar {name}", floor) for name in ("ours", "active")),
        *(_of(cells, f"{frozen} {name}", naive, "extra_bytes") for name in ("ours", "active")),
        *(_error(cells, f"{frozen} {name}", "d hidden") for name in ("ours", "active")),
    ]  # fmt: skip


def active_flat(cells: Values) -> list[float | None]:
    """Over the three bare products."""
    floor = _floor(cells, "per-token")
    exact, active = (_of(cells, f"per-token {name}", floor) for name in ("ours", "active"))
    return [exact, active, tables.ratio(active, exact)]


def active_tail(sources: Sequence[Source], results: str) -> str:
    """Errors of dh in a trained head, by what replaces its tail."""
    real = _training()["real_head"]
    errors = [real["errors"][f"{tail} d hidden"] for tail in ("active", "uniform", "dropped")]
    shown = [_shown(real["share"], "2"), _shown(real["tail_mean"], "2"),
             *(_shown(error, "%1") for error in errors)]  # fmt: skip
    head = ("head", "k", "tail mass", "error of dh", "tail uniform", "tail dropped")
    row = [f"trained, V = {real['vocabulary']}", *shown]
    return tables.markdown(Table("", head, [row]))


def active_training(sources: Sequence[Source], results: str) -> str:
    """Mean held-out losses, and their spread over seeds."""
    rows, beyond = [], 0
    for run in sorted(_training()["summary"], key=lambda run: run["of"]):
        head = "head frozen" if run["frozen"] else "head trained"
        tokens = ", rarest tenth of tokens" if run["of"] == "held_out_rare" else ""
        values = (run["mean"]["exact"], run["spread"], run["mean"]["active"])
        beyond += abs(values[2] - values[0]) >= values[1]
        rows.append([f"{run['loss'].upper()}, {head}{tokens}", *(f"{v:.3f}" for v in values)])
    table = Table("", ("", "exact", "spread of exact", "active"), rows)
    link = ranking.link(f"{DEVICE}/training.json", results)
    return (
        f"{tables.markdown(table)}\n\nFrom {link}; {len(rows) - beyond} of {len(rows)} means of "
        "active gradients are within the spread of exact ones over seeds."
    )


def _training() -> Report:
    return json.loads((RESULTS / DEVICE / "training.json").read_text(encoding="utf-8"))


def figures(sources: Sequence[Source], results: str) -> str:
    """Figures of the data beside those that were published."""
    name = f"{DEVICE}/head-152k-bf16.json"
    (source,) = (s for s in sources if s.label == name)
    (found,) = (g["data"] for g in source.report["groups"] if g["shape"][2] == 151936)
    titles = ("probabilities above 2⁻¹²", "128 × 128 tiles with one of them",
              "the same, vocabulary permuted")  # fmt: skip
    rows = [
        [title, _shown(published, form), _shown(found[key], form)]
        for title, form, (key, published) in zip(titles, ("%3", "%1", "%1"),
                                                 data.PUBLISHED.items(), strict=True)
    ]  # fmt: skip
    table = Table("", ("", "published", f"first 128 tokens of {ranking.link(name, results)}"), rows)
    return tables.markdown(table)


BLOCKS: dict[str, Callable[[Sequence[Source], str], str]] = {
    "benchmarks": ranking.benchmarks,
    "headline": lambda sources, results: headline.table(sources, DEVICE, results),
    "data": figures,
    "active-times": _block(
        "N × D × V, dtype",
        "k (3) | head frozen: exact (2) | active (2) | best peer (2) "
        "| head trained: exact (2) | active dh (2) | best peer (2)",
        r"active-\d.*\.json", active_times,
    ),
    "active-costs": _block(
        "N × D × V, dtype",
        "scalar loss, head trained: exact (2) | active dh (2) "
        "| memory of naive, head frozen: exact (2) | active (2) | error of dh: exact (%2) "
        "| active (%2)",
        r"active-\d.*\.json", active_costs,
    ),
    "active-flat": _block("flat data, N × D × V, dtype",
                          "exact (2) | active dh (2) | active dh of exact (2)", r"flat\.json",
                          active_flat),
    "active-tail": active_tail,
    "active-training": active_training,
    **numerics.BLOCKS,
}  # fmt: skip


def pages() -> list[Path]:
    """Pages that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, page: Path, sources: Sequence[Source]) -> str:
    """The text of a page with its blocks as the results have them.

    Raises:
        ValueError: a block that `BLOCKS` does not have.
    """
    results = Path(os.path.relpath(RESULTS, page.parent)).as_posix()

    def replace(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"{page.name}: no block {name!r}, expected one of {', '.join(BLOCKS)}")
        return f"{start}{BLOCKS[name](sources, results)}\n{end}"

    return BLOCK.sub(replace, text)


# --- the HTML page --------------------------------------------------------------------------------

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
h3 { font-size: 17px; margin: 28px 0 6px; }
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


def html_page(sources: Sequence[Source]) -> str:
    """The HTML page, with its pictures inside."""
    found = {suite: ranking.suite_tables(sources, suite) for suite in ORDER}
    suites = [suite for suite in ORDER if found[suite]]
    nav = " ".join(f'<a href="#{name}">{name}</a>' for name in (*suites, "provenance"))
    parts = [web(ranking.summary(sources))]
    for suite in suites:
        parts.append(f'<h2 id="{suite}">{suite}</h2><p>{escape(ABOUT[suite])}</p>')
        some = [source for source in sources if source.report["suite"] == suite]
        for group, cases in ranking.by_group(sources, suite).items():
            parts += [web(table) for table in found[suite][group]]
            parts += drawn(group, cases, some)
        absent = ranking.not_run(sources, suite)
        parts += [web(absent, "text")] if absent.rows else []
        parts += [
            _details(f"all of {source.label}", "".join(
                web(tables.cells(group, source.report["names"]))
                for group in source.report["groups"]
            ))
            for source in some
        ]  # fmt: skip
    parts.append('<h2 id="provenance">Where it comes from</h2>')
    parts.append(web(ranking.provenance_table(sources)._replace(title="")))
    for source in sources:
        about = {name: source.report[name] for name in ("provenance", "options")}
        text = escape(json.dumps(about, indent=1, ensure_ascii=False))
        parts.append(_details(source.label, f"<pre>{text}</pre>"))
    terms = "".join(f"<li><b>{term}</b>: {escape(text)}.</li>" for term, text in ranking.READ)
    how = escape(re.sub(r"\[.*?\]\((.*?)\)", r"docs/\1", f"{ranking.RATIOS} {ranking.HOW}"))
    what = re.sub(r"\*(.*?)\*", r"<b>\1</b>", escape(ranking.WHAT))
    read = f"<p>{what}</p><ul>{terms}</ul><p>{how}</p>"
    return PAGE.substitute(read=read, nav=nav, body="\n".join(parts))


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def drawn(group: str, cases: dict[str, dict[str, Case]], sources: Sequence[Source]) -> list[str]:
    """Figures with data URIs, each in two widths; none without matplotlib.

    Bars are of the cells that the table shows. Curves and sweeps are of one file each.
    """
    if not plotting.available():
        return []
    found = []
    for device in dict.fromkeys(device for by_device in cases.values() for device in by_device):
        chosen = [by_device[device] for by_device in cases.values() if device in by_device]
        report, files = _merged(group, chosen), dict.fromkeys(c.source.label for c in chosen)
        label = f"{group}, from {', '.join(files)}"
        for what, quantity in (("time", "seconds"), ("memory", "extra_bytes")):
            draw = functools.partial(pictures.bars, quantity=quantity)
            found += _figure(f"{what}: {label}", draw, report)
    for source in sources:
        groups = [g for g in source.report["groups"] if g["name"] == group]
        report, label = source.report | {"groups": groups}, f"{group}, from {source.label}"
        found += _figure(f"curves: {label}", pictures.curves, report)
        found += _figure(f"sweeps: {label}", pictures.sweeps, report)
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


def _figure(label: str, draw: Callable[..., bool], report: Report) -> list[str]:
    """Two forms of the same picture, of which the browser takes what fits; none without content."""
    images, text = [], escape(label)
    for layout in (pictures.WIDE, pictures.NARROW):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "picture.png")
            if not draw(report, file, layout=layout):
                return []
            images.append(_data(file))
    return [
        f'<figure><picture><source media="(max-width: 700px)" srcset="{images[1]}">'
        f'<img alt="{text}" src="{images[0]}"></picture><figcaption>{text}</figcaption></figure>'
    ]


def _data(file: Path) -> str:
    """With a palette: a third of the bytes. The octree keeps rare colours, of a line or a mark."""
    from PIL import Image  # comes with matplotlib

    small = io.BytesIO()
    image = Image.open(file).convert("RGB")
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(small, "png")
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="default: the committed ones, which also go into README and docs",
    )
    parser.add_argument("--html", type=Path, default=HTML, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the same as Markdown")
    options = parser.parse_args(arguments)
    sources = tables.collect(options.results)
    if not sources:
        parser.error(
            f"--results: no report in {options.results}; python -m bench SUITE --json FILE"
        )
    texts = {options.html: html_page(sources)}
    if options.markdown:
        found = os.path.relpath(options.results, options.markdown.parent)
        texts[options.markdown] = f"# Benchmarks\n\n{ranking.benchmarks(sources, found)}\n"
    for page in pages() if options.results == RESULTS else ():
        text = page.read_text(encoding="utf-8")
        if (new := filled(text, page, sources)) != text:
            texts[page] = new
    if options.results == RESULTS and plotting.available():
        headline.draw(sources, DEVICE)
        print(f"written: {headline.PICTURE}")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"written: {path}")
    return 0
