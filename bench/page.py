"""``python -m bench report``: one HTML page, and docs/benchmarks.md, of everything measured.

Both come from the committed JSON alone, so that every figure on them can be traced. The HTML page
holds its pictures and needs nothing else; results of different devices stand side by side.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from bench import active, curves, plots, standing
from bench.provenance import ROOT
from bench.report import SCHEMA, duration, rows_that_fit, size, times
from bench.standing import Case, Source

RESULTS, MARKDOWN = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md"
HTML = ROOT / "build" / "benchmarks.html"
ORDER = ("e2e", "losses", "masked", "head", "active", "scaling", "ops", "overhead")
ABOUT = {
    "e2e": "Whole training steps of small random models: tokens per second, memory over weights "
    "and optimizer, and the most rows that fit.",
    "losses": "Every loss from hidden states and head, against the form that holds the logits.",
    "masked": "Time and memory against the share of targets that are ignored.",
    "head": "Log-probabilities, statistics, token choice and cross-entropy of a linear head.",
    "active": "The active-set backward, whose gradients are approximate, against exact ones.",
    "scaling": "Cost against rows, width and vocabulary, with fitted exponents.",
    "ops": "Token choice, expected embedding, temporal residual and scans.",
    "overhead": "What a call costs where there is next to nothing to compute.",
}
READ = """\
Ratios are within one run: *floor* is time over that of the bare matrix products of the case,
*naive* time over that of the fastest form that holds the logits, *memory* the peak of a call over
inputs and results, and its ratio to the leanest such form. *Fastest* says whether ours is the
fastest of all that were measured beside it, and of how many, or within 3 % of that; where it is
not, it names what is faster and by how much. *Leanest* says the same of memory, among those that
give a gradient of its own per token. Of ours it is the exact gradient that is judged. A dash is
what was not measured. How it is measured: [benchmarking.md](benchmarking.md)."""


class Table(NamedTuple):
    """What both pages show, as plain text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def collect(folder: Path) -> list[Source]:
    """Every report below `folder`, by path; other JSON is let be."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report, dict) and report.get("schema") == SCHEMA and report.get("groups"):
            found.append(Source(path, report))
    return found


def tables(sources: Sequence[Source], suite: str) -> list[Table]:
    """Ours beside the fastest other, one table per group, devices side by side."""
    devices = list(dict.fromkeys(source.device for source in sources))
    found = []
    for group, cases in standing.by_group(sources, suite).items():
        shown = [d for d in devices if any(d in case for case in cases.values())]
        head = ["case"]
        for device in shown:
            prefix = f"{device}: " if len(devices) > 1 else ""
            head += [f"{prefix}time", "floor", "naive", "memory", "of naive", "fastest", "leanest"]
        rows = []
        for name, by_device in cases.items():
            row = [name]
            for device in shown:
                row += _standing(by_device.get(device))
            rows.append(row)
        found.append(Table(group, head, rows))
        found += _extra(group, cases, shown)
    return found


def _standing(case: Case | None) -> list[str]:
    if case is None or case.ours is None:
        return ["–"] * 7
    cell = case.ours
    values = [
        duration(cell["seconds"]), times(cell.get("of_floor")), times(cell.get("of_naive")),
        size(cell["extra_bytes"]), times(cell.get("memory_of_naive")), case.fastest, case.leanest,
    ]  # fmt: skip
    return [value or "–" for value in values]


def _extra(group: str, cases: dict[str, dict[str, Case]], devices: list[str]) -> list[Table]:
    """Tokens per second and exponents, where a group has them."""
    steps, fits = [], []
    for device in devices:
        here = [case[device] for case in cases.values() if device in case]
        for case in here:
            for cell in case.cells:
                if cell.get("tokens_per_second"):
                    most = cell.get("largest")
                    steps.append([
                        device, case.name, case.names[cell["implementation"]],
                        f"{cell['tokens_per_second']:.0f}", size(cell["extra_bytes"]) or "–",
                        rows_that_fit(most) if most else "–",
                        f"{most['bytes'] / 2**30:g} GiB" if most else "–",
                    ])  # fmt: skip
        for fit in here[0].group.get("fits", ()) if here else ():
            values = [f"{fit[q]:.2f}" if fit[q] is not None else "–"
                      for q in ("seconds", "extra_bytes")]  # fmt: skip
            name = here[0].names[fit["implementation"]]
            fits.append([device, fit["case"], fit["axis"], name, *values])
    found = []
    if steps:
        head = ["device", "step", "", "tokens/s", "memory", "most rows", "in"]
        found.append(Table(f"{group}: steps", head, steps))
    if fits:
        head = ["device", "case", "against", "", "time, exponent", "memory, exponent"]
        found.append(Table(f"{group}: exponents", head, fits))
    return found


def provenance_table(sources: Sequence[Source]) -> Table:
    """Where each file comes from."""
    rows = []
    for source in sources:
        about = source.report["provenance"]
        rows.append([
            f"{source.path.parent.name}/{source.path.name}", about["device"], about["isa"],
            str(about["threads"]), about["versions"].get("torch", "–"), about["revision"],
            about["date"][:10], f"{about['load']} / {source.report['load_at_end']}",
        ])  # fmt: skip
    head = ["file", "device", "ISA", "threads", "torch", "revision", "date", "load"]
    return Table("Where it comes from", head, rows)


# --- Markdown -------------------------------------------------------------------------------------


def markdown(sources: Sequence[Source], results: str = "../bench/results") -> str:
    """docs/benchmarks.md; `results`: the folder of the files, seen from it."""
    parts = ["# Benchmarks: what was measured", "",
             "<!-- Written by `python -m bench report` from bench/results; edits are lost. -->", "",
             READ, ""]  # fmt: skip
    for suite in ORDER:
        some = tables(sources, suite)
        if not some:
            continue
        parts += [f"## {suite}", "", ABOUT[suite], ""]
        for table in some:
            parts += [f"**{table.title}**", "", *_markdown(table), ""]
        for source in sources:
            if source.report["suite"] == suite:
                for picture in sorted(source.path.parent.glob(f"{source.path.stem}*.png")):
                    stem = picture.stem.removeprefix(source.path.stem)
                    if stem in ("", "-memory", "-curves", "-sweeps"):
                        at = f"{results}/{picture.parent.name}/{picture.name}"
                        parts += [f"[{picture.parent.name}/{picture.name}]({at})", ""]
    table = provenance_table(sources)
    linked = [[f"[{row[0]}]({results}/{row[0]})", *row[1:]] for row in table.rows]
    parts += [f"## {table.title}", "", *_markdown(table._replace(rows=linked)), ""]
    return "\n".join(parts)


def _markdown(table: Table) -> list[str]:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


# --- HTML -----------------------------------------------------------------------------------------

PAGE = Template("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ift-kernels: benchmarks</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; margin: 0 auto; max-width: 1240px;
       padding: 0 16px 48px; }
h1 { font-size: 26px; } h2 { border-bottom: 2px solid #0072B2; margin-top: 40px; }
h3 { font-size: 16px; margin: 24px 0 6px; }
nav a { margin-right: 14px; } a { color: #0072B2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: right; white-space: nowrap; }
th { color: #5b6875; font-weight: 600; border-bottom: 1px solid #c9d1d9; }
td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f5f7f9; }
td.yes { color: #00734f; } td.no { color: #b34700; }
figure { margin: 12px 0; } img { display: block; height: auto; max-width: 100%; }
figcaption, summary { color: #5b6875; font-size: 13px; }
pre { font-size: 12px; overflow-x: auto; background: #f5f7f9; padding: 8px; }
@media (max-width: 700px) { img { max-width: none; width: 900px; } body { padding: 0 10px 32px; } }
</style></head><body>
<h1>ift-kernels: benchmarks</h1>
<p>$read</p>
<nav>$nav</nav>
$body
</body></html>
""")


def page(sources: Sequence[Source]) -> str:
    """The HTML page, with its pictures inside."""
    found = {suite: tables(sources, suite) for suite in ORDER}
    suites = [suite for suite in ORDER if found[suite]]
    nav = "".join(f'<a href="#{suite}">{suite}</a>' for suite in [*suites, "provenance"])
    parts = []
    for suite in suites:
        parts.append(f'<h2 id="{suite}">{suite}</h2><p>{_text(ABOUT[suite])}</p>')
        parts += [_table(table) for table in found[suite]]
        for source in sources:
            if source.report["suite"] == suite:
                parts += pictures(source)
                parts.append(_everything(source))
    parts.append('<h2 id="provenance">Where it comes from</h2>')
    parts.append(_table(provenance_table(sources)._replace(title="")))
    for source in sources:
        about = {name: source.report[name] for name in ("provenance", "options")}
        text = _text(json.dumps(about, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>{_label(source)}</summary><pre>{text}</pre></details>")
    read = _text(READ).replace("[benchmarking.md](benchmarking.md)", "docs/benchmarking.md")
    for word in ("floor", "naive", "memory", "Fastest", "Leanest"):
        read = read.replace(f"*{word}*", f"<b>{word}</b>")
    return PAGE.substitute(read=read, nav=nav, body="\n".join(parts))


def pictures(source: Source) -> list[str]:
    """Drawn anew from the JSON, as figures with data URIs; none without matplotlib."""
    if not plots.available():
        return []
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bars.png")
        drawn = plots.draw(active.without_sweeps(source.report), path)
        drawn += active.draw(source.report, path.with_name("sweeps.png"))
        drawn += curves.draw(source.report, path.with_name("curves.png"))
        for file in drawn:
            data = base64.b64encode(file.read_bytes()).decode()
            what = {"bars": "time", "bars-memory": "memory"}.get(file.stem, file.stem)
            label = f"{_label(source)}: {what}"
            found.append(
                f'<figure><div class="wide"><img alt="{label}" src="data:image/png;base64,{data}">'
                f"</div><figcaption>{label}</figcaption></figure>"
            )
    return found


def _everything(source: Source) -> str:
    """Every cell of a file, to be unfolded."""
    names = source.report["names"]
    parts = []
    for group in source.report["groups"]:
        rows = []
        for cell in group["cells"]:
            if cell["samples"]:
                values = [duration(cell["seconds"]), f"{cell['spread']:.0%}",
                          times(cell.get("of_floor")), times(cell.get("of_naive")),
                          size(cell["extra_bytes"]), str(len(cell["samples"])),
                          ", ".join(f"{k} {v:.1e}" for k, v in cell["errors"].items())]  # fmt: skip
            else:
                values = [cell["reason"] or "no sample", "", "", "", "", "", ""]
            rows.append([f"{cell['case']}: {names[cell['implementation']]}", *values])
        for case, reasons in group["absent"].items():
            rows += [[f"{case}: {names.get(name, name)}", f"not run: {why}", *[""] * 6]
                     for name, why in reasons.items()]  # fmt: skip
        head = ["", "time", "±", "floor", "naive", "memory", "samples", "errors against fp64"]
        parts.append(_table(Table(group["name"], head, rows)))
    return f"<details><summary>all of {_label(source)}</summary>{''.join(parts)}</details>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.head)
    rows = []
    for row in table.rows:
        cells = []
        for name, cell in zip(table.head, row, strict=True):
            judged = name in ("fastest", "leanest") and cell != "–"
            kind = ("no" if cell.startswith("no") else "yes") if judged else ""
            cells.append(f"<td{f' class={kind}' if kind else ''}>{_text(cell)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    return f'{title}<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _label(source: Source) -> str:
    return _text(f"{source.path.parent.name}/{source.path.name}")


def _text(text: str) -> str:
    return html.escape(text, quote=True)


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
    options.html.write_text(page(sources), encoding="utf-8")
    print(f"written: {options.html}")
    return 0
