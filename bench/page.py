"""``python -m bench report``: one HTML page, and docs/benchmarks.md, of everything measured.

Both come from the committed JSON alone, so that every figure on them can be traced. The HTML page
holds its pictures and needs nothing else; results of different devices stand side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import tables, web
from bench.provenance import ROOT
from bench.report import SCHEMA
from bench.standing import Source
from bench.tables import Table

RESULTS, MARKDOWN = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md"
HTML = ROOT / "build" / "benchmarks.html"


def collect(folder: Path) -> list[Source]:
    """Every report below `folder`, by path; other JSON is let be."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report, dict) and report.get("schema") == SCHEMA and report.get("groups"):
            found.append(Source(path, report))
    return found


def markdown(sources: Sequence[Source], results: str = "../bench/results") -> str:
    """docs/benchmarks.md; `results`: the folder of the files, seen from it."""
    parts = ["# Benchmarks: what was measured", "",
             "<!-- Written by `python -m bench report` from bench/results; edits are lost. -->", "",
             tables.WHAT, "", *(f"- *{term}*: {meaning}." for term, meaning in tables.READ), "",
             f"{tables.RATIOS} {tables.HOW}", ""]  # fmt: skip
    table = tables.summary(sources)
    parts += [f"**{table.title}**", "", *_markdown(table), ""]
    for suite in tables.ORDER:
        groups = tables.tables(sources, suite)
        if not groups:
            continue
        parts += [f"## {suite}", "", tables.ABOUT[suite], ""]
        notes: dict[str, str] = {}
        for some in groups.values():
            notes |= some[0].notes or {}
        parts += ["; ".join(f"`{name}`: {note}" for name, note in notes.items()) + ".", ""]
        for table in (table for some in groups.values() for table in some):
            parts += [f"**{table.title}**", "", *_markdown(table), ""]
        absent = tables.not_run(sources, suite)
        if absent.rows:
            parts += [f"**{absent.title}**", "", *_markdown(absent), ""]
        for source in sources:
            if source.report["suite"] == suite:
                for picture in sorted(source.path.parent.glob(f"{source.path.stem}*.png")):
                    stem = picture.stem.removeprefix(source.path.stem)
                    if stem in ("", "-memory", "-curves", "-sweeps"):
                        at = f"{results}/{picture.parent.name}/{picture.name}"
                        parts += [f"[{picture.parent.name}/{picture.name}]({at})", ""]
    table = tables.provenance_table(sources)
    linked = [[f"[{row[0]}]({results}/{row[0]})", *row[1:]] for row in table.rows]
    parts += [f"## {table.title}", "", *_markdown(table._replace(rows=linked)), ""]
    return "\n".join(parts)


def _markdown(table: Table) -> list[str]:
    """One line of headings: what stands above some columns goes before the first of them."""
    head, at = list(table.head), 0
    for text, columns in table.over:
        head[at] = f"{text}: {head[at]}" if text else head[at]
        at += columns
    lines = [head, ["---"] * len(head), *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--html", type=Path, default=HTML, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE",
                        help="default: docs/benchmarks.md, for the committed results")  # fmt: skip
    options: Any = parser.parse_args(arguments)
    sources = collect(options.results)
    if not sources:
        parser.error(
            f"--results: no report in {options.results}; python -m bench SUITE --json FILE"
        )
    target = options.markdown or (MARKDOWN if options.results == RESULTS else None)
    if target is not None:
        target.write_text(markdown(sources), encoding="utf-8")
        print(f"written: {target}")
    options.html.parent.mkdir(parents=True, exist_ok=True)
    options.html.write_text(web.page(sources), encoding="utf-8")
    print(f"written: {options.html}")
    return 0
