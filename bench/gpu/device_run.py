"""The process of ``python -m bench device`` that measures: its log, its guard, its reports.

A line is written before a measurement and one after it. Where the second is missing, the process
did not come back: `faulthandler` ends it after the time that a measurement may take, from a thread
that needs neither the interpreter nor the GPU. The next process then closes the open line.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import bench
import ift
import ift_kernels
from bench.gpu import device_cells
from bench.gpu.device import DONE, FAILED, RENEW, UNUSABLE
from bench.gpu.device_cells import Phase
from bench.harness.machine import RESULTS, ROOT, Budget, load, provenance, synchronize
from bench.harness.measure import Cell, Settings, measure
from bench.report import pictures, tables
from bench.suites.command import names
from ift.files import JsonlLog

LIMIT, COMPILED_LIMIT = 90.0, 240.0  # seconds after which a measurement hangs
COMPILES = 30.0  # seconds, a guess
SLICE = 10.0  # seconds for the samples of a cell, at most
CLEARLY = 0.97  # of the time of the backend that comes first
Row = dict[str, Any]
Key = tuple[str, ...]


def main(options: argparse.Namespace) -> int:
    """Measure until `options.until`; an exit code of `bench.gpu.device`."""
    if not options.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU; --dry-run (make gpu DRY=1) goes without one", file=sys.stderr)
        return UNUSABLE
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may be fetched
    device = torch.device("cpu" if options.dry_run else "cuda")
    budget = Budget((options.until - time.time()) / 60)
    with guard(LIMIT):
        about = provenance(device, torch.get_num_threads()) | {"sources": sources(device)}
        phases = device_cells.phases(options.dry_run)
    gc.freeze()  # modules: collections between measurements would walk through them all
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    out = options.output or (ROOT / "build/device" if options.dry_run else RESULTS / name)
    out.mkdir(parents=True, exist_ok=True)
    log = JsonlLog(out / "device.jsonl")
    code = run(device_cells.ordered(phases), log, about, budget, options.after)
    if code in (DONE, FAILED):
        write(phases, results(log, about), about, out, options.plot)
        print(f"results: {out.relative_to(ROOT) if out.is_relative_to(ROOT) else out}")
    return code


@contextlib.contextmanager
def guard(seconds: float) -> Any:
    """End this process if the ``with`` block takes longer, whatever it waits for."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def sources(device: torch.device) -> str:
    """A digest of what results depend on: code, extensions, torch, device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    digest = hashlib.sha256(f"{name} {torch.__version__}".encode())
    for package in (bench, ift, ift_kernels):
        for path in sorted(Path(package.__path__[0]).rglob("*")):
            if path.suffix in (".py", ".so", ".json") and RESULTS not in path.parents:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- the log --------------------------------------------------------------------------------------


def key(row: Row) -> Key:
    """What a line is about."""
    return tuple(row[name] for name in ("phase", "group", "case", "implementation"))


def results(log: JsonlLog, about: Row) -> dict[Key, Row]:
    """The last result of each measurement of these sources."""
    found, same = {}, False
    for row in log.read():
        if row["phase"] == "run":
            same = row["sources"] == about["sources"]
        elif same and "begun" not in row:
            found[key(row)] = row
    return found


def settled(log: JsonlLog, about: Row, after: int | None) -> set[Key] | None:
    """What is not to be measured again: what has a result, and what failed in this run.

    Begins a run in the log, or closes what was open when a process of it ended with code `after`.
    None: that was not during a measurement, so a new process would end likewise.
    """
    log.rewind(sys.maxsize)  # without a line that a dying machine has cut off
    rows = log.read()
    if after is None:
        log.append({"step": 0, "phase": "run", **about})
    elif rows and rows[-1].pop("begun", False):
        how = f"was killed by signal {-after}" if after < 0 else "hung and was ended"
        log.append(rows[-1] | {"seconds": None, "samples": [], "reason": f"its process {how}"})
    elif after != RENEW:
        return None
    failed: set[Key] = set()
    for row in log.read():
        if row["phase"] == "run":
            failed.clear()
        elif row.get("reason"):
            failed.add(key(row))
    return failed | {k for k, row in results(log, about).items() if not row["reason"]}


def run(
    cells: Sequence[tuple[Phase, Cell]], log: JsonlLog, about: Row, budget: Budget,
    after: int | None = None, limits: tuple[float, float] = (LIMIT, COMPILED_LIMIT),
) -> int:  # fmt: skip
    """Measure what is left, in order, while there is time; an exit code of `bench.gpu.device`."""
    known = settled(log, about, after)
    if known is None:
        print(f"the process that measures ended with {after} before it measured", file=sys.stderr)
        return UNUSABLE
    late, last = 0, ""
    with tables.progress(Console(stderr=True)) as progress:
        for step, (phase, cell) in enumerate(cells, 1):
            row = {"step": step, "phase": phase.name, "group": cell.group, "case": cell.case,
                   "implementation": cell.implementation}  # fmt: skip
            if key(row) in known:
                continue
            if budget.left() < 1 + 5 * cell.estimate + COMPILES * cell.compiled:
                late += 1
                continue
            log.append(row | {"begun": True})
            settings = Settings(
                torch.get_num_threads(), phase.rounds, limits[0], in_process=True,
                budget=Budget(min(SLICE, budget.left()) / 60),
            )  # fmt: skip
            with guard(limits[cell.compiled]):  # all that may wait for a GPU
                if phase.name != last:
                    device_cells.release_inputs()
                measure([cell], settings, progress)
                usable, last = answers(), phase.name
            log.append(row | cell.record())
            found = cell.reason or tables.duration(cell.seconds) or "right"
            print(f"{phase.name}: {cell.case}, {cell.implementation}: {found}", flush=True)
            if not usable:
                return RENEW
    if late:
        print(f"no time was left for {late} measurements; run this again to go on")
    failed = any(row["reason"] for row in results(log, about).values())
    return FAILED if late or failed else DONE


def answers() -> bool:
    """Can this process still use its GPU? Not after a kernel has crashed."""
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_initialized():
            synchronize(torch.device("cuda"))
        return True
    return False


# --- reports --------------------------------------------------------------------------------------


def write(
    phases: Sequence[Phase], found: dict[Key, Row], about: Row, out: Path, plot: bool
) -> None:
    """Print everything; a file for each suite that has such cells, which `bench report` reads."""
    every: list[Row] = []
    for phase in phases:
        cells = [row for k, row in found.items() if k[:2] == (phase.name, phase.record["name"])]
        for cell in cells if "tokens" in phase.record else ():
            cell["tokens_per_second"] = cell["seconds"] and phase.record["tokens"] / cell["seconds"]
        if cells:
            every.append(phase.record | {"cells": cells, "suite": phase.suite})
            tables.compare(every[-1])
        if phase.name == "epilogues":
            print(f"faster, for ift_kernels/backends/selection.py: {faster(cells)}")
    done = {"schema": tables.SCHEMA, "provenance": about, "load_at_end": load(), "options": {},
            "names": names() | device_cells.NAMES}  # fmt: skip
    tables.show(done | {"groups": every}, Console(width=160))
    for suite in sorted({group["suite"] for group in every} - {""}):
        one = done | {"suite": suite, "groups": [g for g in every if g["suite"] == suite]}
        tables.write(one, out / f"{suite}.json")
        if plot:
            pictures.bars(one, out / f"{suite}.png", "seconds")


def faster(cells: Sequence[Row]) -> dict[str, str]:
    """By function, the backend that clearly beats the one that would serve without a table."""
    found = {}
    for case in dict.fromkeys(cell["case"] for cell in cells):
        timed = [c for c in cells if c["case"] == case and c["samples"]]
        timed = [c for c in timed if c["implementation"] != "floor-copy"]
        best = min(timed, key=lambda c: c["seconds"], default=None)
        if best and best["seconds"] < CLEARLY * timed[0]["seconds"]:
            found[case] = best["implementation"]
    return found
