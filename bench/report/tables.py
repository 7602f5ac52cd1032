"""Reports as files and as tables: one `Table`, shown in a terminal, in Markdown or in HTML."""

from __future__ import annotations

import contextlib
import html
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ift.files import write_text

Report = dict[str, Any]
SCHEMA = 1
# What is ours, and not our default.
OPTIONS = ("active", "deterministic", "fp32-logits", "fp32-copies", "lora")
OURS = ("ours", "two-passes", *OPTIONS)  # implementations
# Short names of errors, in the order in which they are shown.
ERRORS = ("loss", "logprob", "entropy", "ids", "value", "d hidden", "d weight", "d embedding",
          "gradient", "share", "tail")  # fmt: skip
NOTES = """\
time: median, ± the largest deviation of a sample from it; n samples. of floor, of naive: time over
that of the bare GEMMs, and of the fastest naive form. memory: peak of a call over inputs and
results, and that over the leanest naive form's. Errors against float64: relative for loss and
gradients, root mean square for logprob and entropy, difference from the best logit for ids, at
most."""


# --- values ---------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """With three digits and a unit."""
    if seconds is None:
        return ""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def size(bytes_: int | None) -> str:
    """In MiB."""
    return "" if bytes_ is None else f"{_digits(max(bytes_, 0) / 2**20)} MiB"


def times(value: float | None) -> str:
    """As a multiple."""
    return "" if value is None else f"{_digits(value)}×"


def percent(value: float | None, digits: int = 1) -> str:
    """As a share."""
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _digits(value: float) -> str:
    """Three digits, and thousandths at most."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.0995 else 3
    return f"{value:.{digits}f}"


def rows_that_fit(largest: Report) -> str:
    """Of a search: a number, with ≥ where the search ended before memory did."""
    return f"{'≥ ' if largest['capped'] else ''}{largest['rows']}"


# --- files ----------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A report and its file; the folder of the file names a device."""

    path: Path
    report: Report

    @property
    def device(self) -> str:
        return self.path.parent.name

    @property
    def label(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"


def write(report: Report, path: str | Path) -> None:
    """As JSON, in one step."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(Path(path), text + "\n")


def collect(folder: Path) -> list[Source]:
    """Every report below `folder`, by path; other JSON is skipped."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report, dict) and report.get("schema") == SCHEMA and report.get("groups"):
            found.append(Source(path, report))
    return found


def compare(group: Report) -> None:
    """Add to every cell of a group its ratios to the floor and to naive, where there are any.

    Both are the fastest of their kind in the same case: what can be reached, and what people have.
    Memory is compared with that of the naive form that takes least. Where targets are ignored, time
    is also compared with that of the same implementation with none ignored.
    """
    whole = {(cell["case"], cell["implementation"]): cell["seconds"] for cell in group["cells"]}
    for case in group["titles"]:
        cells = [cell for cell in group["cells"] if cell["case"] == case]
        floor = _least(cells, "floor", "seconds")
        naive, memory = _least(cells, "naive", "seconds"), _least(cells, "naive", "extra_bytes")
        for cell in cells:
            cell["of_floor"] = ratio(cell["seconds"], floor)
            cell["of_naive"] = ratio(cell["seconds"], naive)
            cell["memory_of_naive"] = ratio(cell["extra_bytes"], memory)
            full = whole.get((case.removesuffix("-ignored"), cell["implementation"]))
            cell["of_full"] = ratio(cell["seconds"], full) if case.endswith("-ignored") else None


def _least(cells: list[Report], kind: str, field: str) -> float | None:
    values = [c[field] for c in cells if c["implementation"].startswith(kind) and c["samples"]]
    return min((value for value in values if value is not None), default=None)


def ratio(value: float | None, to: float | None) -> float | None:
    """`value` over `to`; None without either."""
    return max(value, 0) / to if value is not None and to else None


# --- one table, three ways ------------------------------------------------------------------------


class Table(NamedTuple):
    """Plain text in rows and columns."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    over: Sequence[tuple[str, int]] = ()  # headings above so many columns each, if any
    notes: dict[str, str] | None = None  # what a first cell means
    styles: Sequence[str] = ()  # of rows, in a terminal


def terminal(table: Table) -> rich.table.Table:
    """For `Console.print`; numbers to the right, the first column and errors to the left."""
    shown = rich.table.Table(title=table.title or None, title_justify="left", title_style="bold",
                             box=None, padding=(0, 1), header_style="dim")  # fmt: skip
    for at, name in enumerate(table.head):
        left = not at or name in ("case", "variant", "errors", "result")
        shown.add_column(name, justify="left" if left else "right", overflow="fold")
    for at, row in enumerate(table.rows):
        style = table.styles[at] if table.styles else ""
        shown.add_row(*(cell.replace("[", "\\[") for cell in row), style=style)
    return shown


def markdown(table: Table) -> str:
    """One line of headings: what is above some columns goes before the first of them."""
    head, at = list(table.head), 0
    for text, columns in table.over:
        head[at] = f"{text}: {head[at]}" if text else head[at]
        at += columns
    lines = [head, ["---"] * len(head), *table.rows]
    rows = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    return "\n".join([*([f"**{table.title}**", ""] if table.title else []), *rows])


def web(table: Table, kind: str = "") -> str:
    """In a box that scrolls sideways; `kind` is a class of the style sheet."""
    over = "".join(
        f'<th class="over" colspan="{columns}">{escape(text)}</th>' if text else "<th></th>"
        for text, columns in table.over
    )
    lines = [over] if over else []
    lines.append("".join(f"<th>{escape(cell)}</th>" for cell in table.head))
    head = "".join(f"<tr>{line}</tr>" for line in lines)
    body = "".join(f"<tr>{''.join(_web_row(table, row))}</tr>" for row in table.rows)
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    return (
        f'{title}<div class="wide"><table{f" class={kind}" if kind else ""}>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _web_row(table: Table, row: Sequence[str]) -> list[str]:
    note = (table.notes or {}).get(row[0])
    cells = [f"<td>{escape(row[0])}{f'<small>{escape(note)}</small>' if note else ''}</td>"]
    for name, cell in zip(table.head[1:], row[1:], strict=True):
        judged = name in ("fastest", "leanest") and cell.startswith(("yes", "within", "no"))
        kind = ("no" if cell.startswith("no") else "yes") if judged else ""
        cells.append(f"<td{f' class={kind}' if kind else ''}>{escape(cell)}</td>")
    return cells


def escape(text: str) -> str:
    """For HTML."""
    return html.escape(text, quote=True)


# --- everything that a report holds ---------------------------------------------------------------


def cells(group: Report, names: dict[str, str]) -> Table:
    """Every cell with a time, by case, the fastest first."""
    rows, styles = [], []
    for case in group["titles"]:
        some = [c for c in group["cells"] if c["case"] == case and c["samples"]]
        if some:
            rows.append([case, *[""] * 8])
            styles.append("bold cyan")
        for cell in sorted(some, key=lambda c: c["seconds"]):
            rows.append([
                f"  {names[cell['implementation']]}", duration(cell["seconds"]),
                f"{cell['spread']:.0%}" if len(cell["samples"]) > 1 else "",
                times(cell["of_floor"]), times(cell["of_naive"]), size(cell["extra_bytes"]),
                times(cell["memory_of_naive"]), str(len(cell["samples"])),
                ", ".join(f"{e} {cell['errors'][e]:.1e}" for e in ERRORS if e in cell["errors"]),
            ])  # fmt: skip
            style = {"ours": "bold", "floor": "green"}
            styles.append(style.get(cell["implementation"].split("-")[0], ""))
    head = ("", "time", "±", "of floor", "of naive", "memory", "of naive", "n", "errors")
    return Table(group["name"], head, rows, styles=styles)


def ours(groups: Sequence[Report]) -> Table:
    """Ours alone: what it takes of the floor, of the fastest other one, and of naive's memory."""
    rows, styles = [], []
    for group in groups:
        timed = [c for c in group["cells"] if c["samples"]]
        mine = [c for c in timed if c["implementation"] == "ours"]
        if mine:
            rows.append([group["name"], *[""] * 6])
            styles.append("bold cyan")
        for cell in mine:
            others = [
                c["seconds"] for c in timed
                if c["case"] == cell["case"]
                and c["implementation"] not in OURS
                and not c["implementation"].startswith("floor")
            ]  # fmt: skip
            best = ratio(cell["seconds"], min(others, default=None))
            rows.append([
                f"  {cell['case']}", duration(cell["seconds"]), times(cell["of_floor"]),
                times(cell["of_naive"]), times(best), times(cell["memory_of_naive"]),
                times(cell["of_full"]),
            ])  # fmt: skip
            styles.append("")
    head = ("", "time", "of floor", "of naive", "of best other", "memory", "of none ignored")
    return Table("ours", head, rows, styles=styles)


def show(report: Report, console: Console) -> None:
    """Print everything that a report holds."""
    about, names = report["provenance"], report["names"]

    def line(text: str, style: str = "dim") -> None:
        console.print(text, style=style, highlight=False, markup=False)

    line(
        f"{about['device']}, {about['cores']} cores, {about['threads']} threads, {about['isa']}; "
        f"torch {about['versions'].get('torch')}; revision {about['revision']}; {about['date']}; "
        f"load {about['load']} at the start, {report['load_at_end']} at the end", "",
    )  # fmt: skip
    for group in report["groups"]:
        console.print()
        console.print(terminal(cells(group, names)))
        for text, style in _lines(group, names):
            line(f"  {text}", style)
    if report["groups"]:
        console.print()
        console.print(terminal(ours(report["groups"])))
    titles = {c: t for group in report["groups"] for c, t in group["titles"].items()}
    for case, title in titles.items():
        line(f"{case}: {title}")
    line(NOTES)


def _lines(group: Report, names: dict[str, str]) -> Iterable[tuple[str, str]]:
    """What a group has beside its cells; each line with a style."""
    if figures := group["data"]:
        yield (
            f"data: {figures['above']:.3%} of probabilities above 2⁻¹², in {figures['k']:.1%} of "
            f"the columns of a block of 128 tokens, mean loss {figures['loss']:.2f}; reference: "
            f"{figures['reference']}", "dim",
        )  # fmt: skip
    for fit in group.get("fits", ()):
        if fit["seconds"] is not None:
            text = f"{fit['case']} against {fit['axis']}, {fit['implementation']}: time grows as "
            text += f"{fit['axis']}^{fit['seconds']:.2f}"
            if fit["extra_bytes"]:
                text += f", memory as {fit['axis']}^{fit['extra_bytes']:.2f}"
            yield text, ""
    for cell in group["cells"]:
        if cell.get("tokens_per_second"):
            text = f"{cell['case']}, {names[cell['implementation']]}: "
            text += f"{cell['tokens_per_second']:.0f} tokens/s"
            if largest := cell.get("largest"):
                memory = f"{largest['bytes'] / 2**30:g} GiB"
                text += f"; most rows in {memory}: {rows_that_fit(largest)}"
            yield text, ""
    for cases, plan in _joined(group["plans"].items()):
        yield f"plan: {plan} ({cases})", "dim"
    absent = [(case, f"{names[who]}: {why}") for case, reasons in group["absent"].items()
              for who, why in reasons.items()]  # fmt: skip
    refused = [(c["case"], f"{names[c['implementation']]}: {c['reason']}")
               for c in group["cells"] if c["reason"]]  # fmt: skip
    for cases, text in _joined(absent):
        yield f"not run, {text} ({cases})", "dim"
    for cases, text in _joined(refused):
        yield f"refused, {text} ({cases})", "red"


def _joined(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(cases, text) with the cases of equal texts joined."""
    found: dict[str, list[str]] = {}
    for case, text in pairs:
        found.setdefault(text, []).append(case)
    return [(", ".join(names), text) for text, names in found.items()]


class Progress:
    """A bar with the time left in a terminal, nothing elsewhere."""

    def __init__(self, bars: Bars) -> None:
        self._bars, self._task = bars, bars.add_task("", total=1.0, left="")

    def at(self, what: str) -> None:
        """What happens now."""
        self._bars.update(self._task, description=what)

    def advance(self, share: float) -> None:
        """This share of everything is finished."""
        self._bars.update(self._task, advance=share)
        task = self._bars.tasks[0]
        if task.completed and task.elapsed:
            left = max(1 - task.completed, 0) * task.elapsed / task.completed
            self._bars.update(self._task, left=f"{int(left) // 60}:{int(left) % 60:02d} left")


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar as long as the ``with`` block."""
    columns = (
        SpinnerColumn(), BarColumn(20), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"), TextColumn("{task.description}", style="dim"),
    )  # fmt: skip
    quiet = not console.is_terminal
    with Bars(*columns, console=console, transient=True, disable=quiet) as bars:
        yield Progress(bars)
