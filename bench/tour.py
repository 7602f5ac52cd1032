"""``python -m bench tour``: every suite in short, with nine minutes to share, and the page of it.

Enough to see where the package stands on this machine; samples are few, so read ratios and not
digits. A suite that fails is named, and the rest goes on. A suite measures every case once, however
small its share: on a slow machine what the time did not suffice for is named, and the page is of
the rest. Ctrl-C ends in that page too.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import page, plots
from bench.clock import Budget
from bench.provenance import ROOT

OUTPUT = ROOT / "build" / "bench"
SHARE = 0.85  # of the minutes: processes start, data is made, pages are drawn
LAST = 0.95  # of the minutes: what is not measured by then is left out
PATIENCE = 20.0  # seconds for a suite that is interrupted to write what it has
INTERRUPTED = (130, -signal.SIGINT)


@dataclass(frozen=True)
class Stop:
    """One suite, and its share of the time."""

    suite: str
    share: float
    options: tuple[str, ...] = ()


# Without what compiles (minutes by itself), in bfloat16, and small: every cell is called at least
# four times in a process of its own, and a long start leaves nothing for the end.
STOPS = (
    Stop("head", 0.14, ("--shapes", "512x896x32000", "--dtype", "bf16", "--cases", "statistics",
                        "scalar", "per-token", "--implementations", "floor", "floor-t", "ours",
                        "naive", "trl")),
    Stop("active", 0.11, ("--shapes", "512x896x32000", "--dtype", "bf16", "--cases", "per-token",
                          "per-token-frozen", "--implementations", "floor", "floor-t", "ours",
                          "active", "naive")),
    Stop("losses", 0.15, ("--shape", "4x64x896x32000", "--cases", "sft", "ift", "dpo", "orpo",
                          "grpo")),
    Stop("masked", 0.13, ("--shapes", "512x896x32000", "--implementations", "floor", "ours",
                          "active", "naive", "--kinds", "per-token")),
    Stop("scaling", 0.11, ("--base", "512x256x8192",)),
    Stop("ops", 0.12, ("--shape", "256x256x16000", "--implementations", "floor", "ours", "naive")),
    Stop("overhead", 0.09, ("--implementations", "ours", "naive")),
    Stop("e2e", 0.15, ("--rows", "2", "--hidden", "128", "--layers", "2")),
)  # fmt: skip


def run(stops: tuple[Stop, ...], out: Path, minutes: float, threads: int) -> dict[str, str]:
    """Measure all stops into `out`, and write the page.

    Returns:
        Suites that are not whole, each with the reason: failed, out of time, interrupted.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"):
        old.unlink()  # of another tour: the page has one
    missing: dict[str, str] = {}
    measuring, last = Budget(SHARE * minutes), Budget(LAST * minutes)
    for at, stop in enumerate(stops):
        if last.left() <= 0:
            missing[stop.suite] = "out of time"
            continue
        left = sum(later.share for later in stops[at:])
        seconds = max(measuring.left(), 0.0) * stop.share / left
        file = out / f"{stop.suite}.json"
        command = [sys.executable, "-m", "bench", stop.suite, *stop.options, "--rounds", "3",
                   "--threads", str(threads), "--minutes", f"{seconds / 60:.3f}",
                   "--json", str(file)]  # fmt: skip
        if plots.available():
            command += ["--plot", str(file.with_suffix(".png"))]
        print(f"{stop.suite}, about {seconds:.0f} s", flush=True)
        code = measure(command, last.left())
        if code in INTERRUPTED and last.left() > 0:
            missing |= dict.fromkeys((later.suite for later in stops[at:]), "interrupted")
            break
        if code:
            missing[stop.suite] = "out of time" if code in INTERRUPTED else "failed"
    if page.collect(out):
        page.main(["--results", str(out), "--html", str(out / "report.html")])
    return missing


def measure(command: list[str], seconds: float) -> int:
    """The exit code of a suite; after `seconds` it is interrupted, and reports complete groups."""
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass  # a terminal interrupts both
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return INTERRUPTED[0]


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
    missing = run(stops, options.output.resolve(), options.minutes, options.threads)
    for suite, reason in missing.items():
        print(f"{suite}: {reason}", file=sys.stderr)
    return 130 if "interrupted" in missing.values() else int("failed" in missing.values())
