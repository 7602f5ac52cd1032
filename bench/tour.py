"""``python -m bench tour``: every suite in short, with nine minutes to share, and the page of it.

Enough to see where the package stands on this machine; samples are few, so read ratios and not
digits. A suite that fails is named, and the rest goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import page, plots
from bench.provenance import ROOT

OUTPUT = ROOT / "build" / "bench"
SHARE = 0.85  # of the minutes: processes start, data is made, pages are drawn


@dataclass(frozen=True)
class Stop:
    """One suite, and its share of the time."""

    suite: str
    share: float
    options: tuple[str, ...] = ()


# Without what compiles (minutes by itself); the suites have it.
STOPS = (
    Stop("head", 0.24, ("--shapes", "1024x896x32000", "--dtype", "bf16", "fp32", "--cases",
                        "statistics", "greedy", "scalar", "per-token", "--implementations",
                        "floor", "floor-t", "ours", "naive", "naive-float", "trl")),
    Stop("active", 0.12, ("--shapes", "1024x896x32000", "--dtype", "bf16", "--cases", "per-token",
                          "per-token-frozen", "--implementations", "floor", "floor-t", "ours",
                          "active", "naive")),
    Stop("losses", 0.14, ("--shape", "4x64x896x32000", "--cases", "sft", "ift", "dpo", "orpo",
                          "grpo")),
    Stop("masked", 0.12, ("--shapes", "1024x896x32000", "--implementations", "floor", "ours",
                          "active", "naive", "--kinds", "per-token")),
    Stop("scaling", 0.12, ("--base", "1024x256x8192",)),
    Stop("ops", 0.10, ("--shape", "512x512x16000", "--implementations", "floor", "ours", "naive")),
    Stop("overhead", 0.04, ("--implementations", "ours", "naive")),
    Stop("e2e", 0.12, ("--rows", "2", "--hidden", "128", "--layers", "2")),
)  # fmt: skip


def run(stops: tuple[Stop, ...], out: Path, minutes: float, threads: int) -> list[str]:
    """Measure all stops into `out`, and write the page; the suites that failed."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"):
        old.unlink()  # of another tour: the page has one
    failed = []
    end = time.monotonic() + 60 * SHARE * minutes
    for at, stop in enumerate(stops):
        left = sum(later.share for later in stops[at:])
        budget = max(end - time.monotonic(), 0.0) * stop.share / left
        file = out / f"{stop.suite}.json"
        command = [sys.executable, "-m", "bench", stop.suite, *stop.options, "--rounds", "3",
                   "--threads", str(threads), "--minutes", f"{budget / 60:.3f}",
                   "--json", str(file)]  # fmt: skip
        if plots.available():
            command += ["--plot", str(file.with_suffix(".png"))]
        print(f"{stop.suite}, about {budget:.0f} s", flush=True)
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL)
        if done.returncode:
            failed.append(stop.suite)
            if done.returncode in (130, -2):  # Ctrl-C: the page of what is there
                break
    if page.collect(out):
        page.main(["--results", str(out), "--html", str(out / "report.html")])
    return failed


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench tour", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="of everything (9)")
    parser.add_argument("--suites", nargs="+", choices=[stop.suite for stop in STOPS],
                        help="default: all")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    options: Any = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes}")
    stops = tuple(s for s in STOPS if not options.suites or s.suite in options.suites)
    failed = run(stops, options.output.resolve(), options.minutes, options.threads)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
