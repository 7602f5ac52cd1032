"""What a reader sees: a progress bar with the time left, tables, and the JSON behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

Report = dict[str, Any]
SCHEMA = 1
# Short names of errors, in the order in which they are shown.
ERRORS = ("loss", "logprob", "entropy", "ids", "value", "d hidden", "d weight", "d embedding",
          "gradient", "share", "tail")  # fmt: skip


class Progress:
    """A bar with the time left in a terminal, nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(), BarColumn(20), TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}", style="dim"),
        )  # fmt: skip
        quiet = not console.is_terminal
        self._bars = Bars(*columns, console=console, transient=True, disable=quiet)
        self._task = self._bars.add_task("", total=1.0, left="")

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

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()


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
            cell["of_floor"] = _ratio(cell["seconds"], floor)
            cell["of_naive"] = _ratio(cell["seconds"], naive)
            cell["memory_of_naive"] = _ratio(cell["extra_bytes"], memory)
            full = whole.get((case.removesuffix("-ignored"), cell["implementation"]))
            cell["of_full"] = _ratio(cell["seconds"], full) if case.endswith("-ignored") else None


def _least(cells: list[Report], kind: str, field: str) -> float | None:
    values = [c[field] for c in cells if c["implementation"].startswith(kind) and c["samples"]]
    return min((value for value in values if value is not None), default=None)


def _ratio(value: float | None, to: float | None) -> float | None:
    return max(value, 0) / to if value is not None and to else None


def show(report: Report, console: Console) -> None:
    """Print everything that a report holds."""
    about = report["provenance"]
    console.print(
        f"{about['device']}, {about['cores']} cores, {about['threads']} threads, {about['isa']}; "
        f"torch {about['versions'].get('torch')}; revision {about['revision']}; {about['date']}; "
        f"load {about['load']} at the start, {report['load_at_end']} at the end",
        highlight=False,
    )  # fmt: skip
    for group in report["groups"]:
        console.print()
        console.print(_table(group, report["names"]))
        lines = [(_data(group), "dim")] if group["data"] else []
        lines += [(line, "") for line in (*_fits(group), *_steps(group, report["names"]))]
        lines += [
            (f"  plan: {plan} ({cases})", "dim") for cases, plan in _merged(group["plans"].items())
        ]
        for line, style in lines + _reasons(group, report["names"]):
            console.print(line, style=style, highlight=False, markup=False)
    if report["groups"]:
        console.print()
        console.print(_summary(report["groups"]))
    titles = {c: t for group in report["groups"] for c, t in group["titles"].items()}
    for case, title in titles.items():
        console.print(f"{case}: {title}", style="dim", highlight=False)
    console.print(NOTES, style="dim", highlight=False)


NOTES = """\
time: median, ± the largest deviation of a sample from it; n samples. floor, naive: time over that
of the bare GEMMs, and of the fastest naive form. memory: peak of a call over inputs and results,
and that over the leanest naive form's. Errors against float64: relative for loss and gradients,
root mean square for logprob and entropy, difference from the best logit for ids, at most."""


def _table(group: Report, names: dict[str, str]) -> Table:
    table = Table(title=group["name"], title_justify="left", title_style="bold", box=None,
                  padding=(0, 1), header_style="dim")  # fmt: skip
    table.add_column("", no_wrap=True)
    for name in ("time", "±", "floor", "naive", "memory", "naive", "n", "errors"):
        table.add_column(name, justify="left" if name == "errors" else "right", no_wrap=True)
    for case in group["titles"]:
        cells = [c for c in group["cells"] if c["case"] == case and c["samples"]]
        if not cells:
            continue
        table.add_row(Text(case, style="bold cyan"))
        for cell in sorted(cells, key=lambda c: c["seconds"]):
            style = {"ours": "bold", "floor": "green"}.get(cell["implementation"].split("-")[0], "")
            table.add_row(
                f"  {names[cell['implementation']]}",
                duration(cell["seconds"]),
                f"{cell['spread']:.0%}" if len(cell["samples"]) > 1 else "",
                times(cell["of_floor"]),
                times(cell["of_naive"]),
                size(cell["extra_bytes"]),
                times(cell["memory_of_naive"]),
                str(len(cell["samples"])),
                ", ".join(f"{e} {cell['errors'][e]:.1e}" for e in ERRORS if e in cell["errors"]),
                style=style,
            )
    return table


def _summary(groups: list[Report]) -> Table:
    """Ours alone: what it takes of the floor, of the fastest other one, and of naive's memory."""
    table = Table(title="ours", title_justify="left", title_style="bold", box=None,
                  padding=(0, 1), header_style="dim")  # fmt: skip
    table.add_column("", no_wrap=True)
    for name in ("time", "floor", "naive", "best other", "memory", "of none ignored"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        cells = [c for c in group["cells"] if c["samples"]]
        ours = [c for c in cells if c["implementation"] == "ours"]
        if ours:
            table.add_row(Text(group["name"], style="bold cyan"))
        for cell in ours:
            others = [
                c["seconds"] for c in cells
                if c["case"] == cell["case"]
                and c["implementation"] != "ours"
                and not c["implementation"].startswith("floor")
            ]  # fmt: skip
            table.add_row(
                f"  {cell['case']}",
                duration(cell["seconds"]),
                times(cell["of_floor"]),
                times(cell["of_naive"]),
                times(_ratio(cell["seconds"], min(others, default=None))),
                times(cell["memory_of_naive"]),
                times(cell["of_full"]),
            )
    return table


def _data(group: Report) -> str:
    """What the inputs look like."""
    figures = group["data"]
    if not figures:
        return ""
    return (
        f"  data: {figures['above']:.3%} of probabilities above 2⁻¹², in {figures['k']:.1%} of the "
        f"columns of a block of 128 tokens, mean loss {figures['loss']:.2f}; reference: "
        f"{figures['reference']}"
    )


def _fits(group: Report) -> list[str]:
    """Exponents of time and memory, where sizes were varied."""
    return [
        f"  {fit['case']} against {fit['axis']}, {fit['implementation']}: time grows as "
        f"{fit['axis']}^{fit['seconds']:.2f}"
        + (f", memory as {fit['axis']}^{fit['extra_bytes']:.2f}" if fit["extra_bytes"] else "")
        for fit in group.get("fits", ()) if fit["seconds"] is not None
    ]  # fmt: skip


def _steps(group: Report, names: dict[str, str]) -> list[str]:
    """Tokens per second of training steps, and the largest batch that fits."""
    found = []
    for cell in group["cells"]:
        if cell.get("tokens_per_second"):
            text = f"  {cell['case']}, {names[cell['implementation']]}: "
            text += f"{cell['tokens_per_second']:.0f} tokens/s"
            if most := cell.get("largest"):
                text += f"; most rows in {most['bytes'] / 2**30:g} GiB: {rows_that_fit(most)}"
            found.append(text)
    return found


def rows_that_fit(most: Report) -> str:
    """Of a search: a number, with ≥ where the search ended before memory did."""
    return f"{'≥ ' if most['capped'] else ''}{most['rows']}"


def _merged(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(case, text) with the cases of equal texts joined."""
    cases: dict[str, list[str]] = {}
    for case, text in pairs:
        cases.setdefault(text, []).append(case)
    return [(", ".join(names), text) for text, names in cases.items()]


def _reasons(group: Report, names: dict[str, str]) -> list[tuple[str, str]]:
    """Who has no time, and why; with a style."""
    absent = [
        (case, f"{names[implementation]}: {reason}")
        for case, reasons in group["absent"].items()
        for implementation, reason in reasons.items()
    ]
    refused = [
        (c["case"], f"{names[c['implementation']]}: {c['reason']}")
        for c in group["cells"] if c["reason"]
    ]  # fmt: skip
    return [(f"  not run, {text} ({cases})", "dim") for cases, text in _merged(absent)] + [
        (f"  refused, {text} ({cases})", "red") for cases, text in _merged(refused)
    ]


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def size(bytes_: int | None) -> str:
    """In MiB."""
    return "" if bytes_ is None else f"{_digits(max(bytes_, 0) / 2**20)} MiB"


def _digits(value: float) -> str:
    """Three digits, and thousandths at most."""
    return (
        f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.0995 else 3}f}"
    )


def times(value: float | None) -> str:
    """As a multiple."""
    return "" if value is None else f"{_digits(value)}×"


def write(report: Report, path: str | Path) -> None:
    """As JSON, in one step."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)
