"""What changed: ``python -m bench compare A.json B.json`` and ``… run --base REV SUITE …``.

A cell became slower when its median grew by more than the tolerance *and* its fastest sample is
above the slowest one before. Where the bare GEMMs of the same case changed with it, the machine is
slower, not the code: the growth of the floor is divided out, unless that makes ours seem worse.
Memory is compared by the tolerance alone, beyond a MiB. Only what is ours decides the exit code.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bench.harness.machine import ROOT
from bench.report.tables import OURS, SCHEMA, Report, Table, duration, size, terminal, write

TOLERANCE = 0.05
PAGES = 2**20  # bytes of memory that differ from run to run
EXTENSION = ("csrc", "setup.py")  # what the compiled extension is built from
COMMAND = (sys.executable, "-m", "bench")


class Change(NamedTuple):
    """One cell in both reports."""

    group: str
    case: str
    implementation: str
    before: Report
    after: Report
    seconds: float  # after over before, without what the floor explains; 1.0 where none has a time
    memory: float
    verdict: str  # slower, faster, more memory, less memory, broken, fixed, or nothing


def load(path: Path) -> Report:
    """A report from its file.

    Raises:
        ValueError: something else is in it.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a report: {error}") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a report of schema {SCHEMA}, as --json writes it")
    return report


def cells(report: Report) -> dict[tuple[str, str, str], Report]:
    """By group, case and implementation."""
    return {
        (group["name"], cell["case"], cell["implementation"]): cell
        for group in report["groups"]
        for cell in group["cells"]
    }


def changes(before: Report, after: Report, tolerance: float = TOLERANCE) -> list[Change]:
    """What both reports have, in the order of the second."""
    old, new = cells(before), cells(after)
    found = []
    for key, cell in new.items():
        if key not in old:
            continue
        floor = _floor(old, new, key)
        seconds = _ratio(old[key]["seconds"], cell["seconds"])
        # A floor that became faster must raise no alarm: it is not our code.
        seconds /= max(floor, 1.0) if seconds > 1 else min(floor, 1.0)
        memory = _ratio(old[key]["extra_bytes"], cell["extra_bytes"])
        verdict = _verdict(old[key], cell, floor, seconds, memory, tolerance)
        found.append(Change(*key, old[key], cell, seconds, memory, verdict))
    return found


def _verdict(
    before: Report, after: Report, floor: float, seconds: float, memory: float, tolerance: float
) -> str:
    if bool(before["samples"]) != bool(after["samples"]):
        return "fixed" if after["samples"] else "broken"
    if before["samples"]:
        apart = min(after["samples"]) > max(floor, 1.0) * max(before["samples"])
        if seconds > 1 + tolerance and apart:
            return "slower"
        apart = max(after["samples"]) < min(floor, 1.0) * min(before["samples"])
        if seconds < 1 / (1 + tolerance) and apart:
            return "faster"
    sizes = before["extra_bytes"], after["extra_bytes"]
    if None not in sizes and abs(sizes[1] - sizes[0]) > PAGES:
        if memory > 1 + tolerance:
            return "more memory"
        if memory < 1 / (1 + tolerance):
            return "less memory"
    return ""


def _floor(
    old: dict[tuple[str, str, str], Report], new: dict[tuple[str, str, str], Report],
    key: tuple[str, str, str],
) -> float:  # fmt: skip
    """How much slower the bare GEMMs of this case became; 1.0 without them."""
    names = [(*key[:2], name) for name in ("floor", "floor-t")]
    both = [_ratio(old[n]["seconds"], new[n]["seconds"]) for n in names if n in old and n in new]
    return min(both, default=1.0) or 1.0


def _ratio(before: float | None, after: float | None) -> float:
    return after / before if before and after and before > 0 and after > 0 else 1.0


def show(found: list[Change], console: Console) -> int:
    """Print what changed, the worst first; how many changes for the worse are ours."""
    bad = ("broken", "slower", "more memory")
    worse = [c for c in found if c.verdict in bad and c.implementation in OURS]
    some = sorted((c for c in found if c.verdict), key=lambda c: (c.verdict not in bad, -c.seconds))
    rows, styles = [], []
    for c in some:
        b, a = c.before, c.after
        sizes = (
            ""
            if b["extra_bytes"] is None
            else (f"{size(b['extra_bytes'])} → {size(a['extra_bytes'])}")
        )
        rows.append([
            c.group, c.case, c.implementation,
            *(duration(x["seconds"]) or "–" for x in (b, a)), f"{c.seconds:.2f}×", sizes,
            c.verdict,
        ])  # fmt: skip
        styles.append("red" if c in worse else "" if c.verdict in bad else "green")
    head = ("group", "case", "", "before", "after", "time", "memory", "")
    if some:
        console.print(terminal(Table("", head, rows, styles=styles)))
    console.print(f"{len(found)} cells in both, {len(some)} changed, {len(worse)} of ours for the "
                  "worse", highlight=False)  # fmt: skip
    return len(worse)


def merge(reports: list[Report]) -> Report:
    """Runs of one revision as one report: samples together, the least memory."""
    whole = reports[0]
    mine = cells(whole)
    for report in reports[1:]:
        for key, cell in cells(report).items():
            if key not in mine:
                continue
            known = mine[key]
            known["samples"] = known["samples"] + cell["samples"]
            known["reason"] = known["reason"] or cell["reason"]
            sizes = [x for x in (known["extra_bytes"], cell["extra_bytes"]) if x is not None]
            known["extra_bytes"] = min(sizes, default=None)
    for cell in mine.values():
        cell["seconds"] = statistics.median(cell["samples"]) if cell["samples"] else None
    return whole


# --- another revision -----------------------------------------------------------------------------


def run(base: str, suite: list[str], repeats: int, keep: Path | None) -> tuple[Report, Report]:
    """Measure `suite` at `base` and here, in turn; both reports.

    Raises:
        RuntimeError: `base` is no revision, or a run failed; the message has its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "base")
        _git("worktree", "add", "--detach", "--force", str(there), base)
        try:
            _extension(there, base)
            both: dict[Path, list[Report]] = {there: [], ROOT: []}
            for turn in range(repeats):
                for root in (there, ROOT) if turn % 2 == 0 else (ROOT, there):
                    out = Path(folder, f"{root.name}-{turn}.json")
                    _checked([*COMMAND, *suite, "--json", str(out)], root)
                    both[root].append(load(out))
        finally:
            _git("worktree", "remove", "--force", str(there))
    before, after = merge(both[there]), merge(both[ROOT])
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for name, report in (("base", before), ("here", after)):
            write(report, keep / f"{name}.json")
    return before, after


def _extension(there: Path, base: str) -> None:
    """The compiled extension of `base`: ours where the sources are the same, else built."""
    same = subprocess.run(
        ["git", "-C", str(ROOT), "diff", "--quiet", base, "--", *EXTENSION], capture_output=True
    )
    built = list((ROOT / "ift_kernels").glob("_cpu*.so"))
    if same.returncode == 0:
        for file in built:
            (there / "ift_kernels" / file.name).write_bytes(file.read_bytes())
    elif built:
        _checked([sys.executable, "setup.py", "build_ext", "--inplace"], there)


def _checked(command: list[str], root: Path) -> None:
    path = os.pathsep.join([str(root), str(root / "python_api")])
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        last = " | ".join(done.stdout.strip().splitlines()[-3:])
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {last}")


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")


def compare(arguments: list[str]) -> int:
    """``python -m bench compare``."""
    parser = _parser("compare")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options: Any = parser.parse_args(arguments)
    return _judge(parser, options, lambda: (load(options.before), load(options.after)))


def run_base(arguments: list[str]) -> int:
    """``python -m bench run``."""
    parser = _parser("run")
    parser.add_argument("--base", required=True, metavar="REV", help="what to compare with")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, in turn (2)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write both reports there")
    parser.add_argument("suite", nargs=argparse.REMAINDER, help="and its options")
    options: Any = parser.parse_args(arguments)
    if not options.suite:
        parser.error("expected a suite after --base REV")
    if options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    measured = functools.partial(run, options.base, options.suite, options.repeats, options.keep)
    return _judge(parser, options, measured)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=__doc__)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE,
                        help="growth of a time or of memory that is accepted (0.05)")  # fmt: skip
    return parser


def _judge(
    parser: argparse.ArgumentParser, options: Any, get: Callable[[], tuple[Report, Report]]
) -> int:
    """Exit code 1 if anything of ours became worse."""
    if options.tolerance < 0:
        parser.error(f"--tolerance: expected at least 0, got {options.tolerance}")
    try:
        both = get()
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    found = changes(*both, options.tolerance)
    if not found:
        parser.error("the reports have no cell in common")
    devices = {report["provenance"]["device"] for report in both}
    console = Console(width=None if sys.stdout.isatty() else 160)
    if len(devices) > 1:
        console.print(f"different devices: {', '.join(sorted(devices))}", style="red")
    return 1 if show(found, console) else 0
