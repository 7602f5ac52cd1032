"""``python -m bench SUITE``: measure; ``python -m bench --list``: what there is to measure.

``report`` makes pages of what was measured, ``compare A.json B.json`` and ``run --base REV SUITE``
find what became slower, ``counts`` what became more, ``training`` compares gradients by what they
train, and ``quick`` runs a short form of every suite. ``device`` is for a machine with a GPU: all
that is to be known of it, the most telling first; ``tune`` finds launch configurations there.
``static``, ``cuda-static`` and ``roofline`` need no GPU: kernels compiled for one, plans by a
model.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from bench.harness.machine import ROOT, Budget, load, provenance
from bench.harness.measure import Settings
from bench.peers.heads import PEERS
from bench.report import pages, pictures, tables
from bench.suites import active, e2e, head, losses, ops
from bench.suites.grid import FLOORS
from ift import plotting

SUITES = {
    **head.SUITES, "active": active.SUITE, "ops": ops.SUITE, "losses": losses.SUITE,
    "e2e": e2e.SUITE,
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run a suite; exit code 1 if a result of ours was refused, 130 after Ctrl-C."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.list:
        show_list(console)
        return 0
    if options.suite is None:
        raise SystemExit("python -m bench: expected a suite, one of " + ", ".join(SUITES))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("python -m bench: --device cuda, but torch sees no GPU")
    if options.plot and not plotting.available():
        raise SystemExit("python -m bench: --plot needs matplotlib")
    log = Path(options.json).with_suffix(".jsonl") if options.json else None
    if log is not None:
        log.unlink(missing_ok=True)
    settings = Settings(
        options.threads, options.rounds, options.limit, options.keep_freed, Budget(options.minutes),
        in_process=options.device == "cuda", log=log,
    )  # fmt: skip
    about = provenance(torch.device(options.device), options.threads)
    groups: list[tables.Report] = []
    done = {
        "schema": tables.SCHEMA,
        "suite": options.suite,
        "provenance": about,
        "load_at_end": load(),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "plot", "list")},
        "names": names(),
        "groups": groups,
    }
    interrupted = False
    with tables.progress(Console(stderr=True)) as progress:
        try:
            for group in SUITES[options.suite].run(options, settings, progress):
                tables.compare(group)
                groups.append(group)
                done["load_at_end"] = load()
                if options.json:  # what is measured is safe, whatever stops the next group
                    tables.write(done, options.json)
        except KeyboardInterrupt:
            interrupted = True
    tables.show(done, console)
    if interrupted:
        rest = f"; what else was measured is in {log}" if log is not None else ""
        console.print(f"interrupted: only complete groups are in this report{rest}", style="red")
    elif log is not None:
        log.unlink(missing_ok=True)
    if options.json:
        tables.write(done, options.json)
    if options.plot:
        pictures.write(done, Path(options.plot))
    refused = [
        c for g in groups for c in g["cells"] if c["implementation"] == "ours" and c["reason"]
    ]
    return 130 if interrupted else 1 if refused else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--list", action="store_true", help="suites, cases and implementations")
    suites = parser.add_subparsers(dest="suite", metavar="SUITE")
    for name, found in SUITES.items():
        about = found.about.replace("%", "%%")
        suite = suites.add_parser(name, help=about, description=about)
        found.add_arguments(suite)
        suite.add_argument("--rounds", type=int, default=5, help="samples of a cell, at most (5)")
        suite.add_argument(
            "--minutes", type=float, default=8.0,
            help="time budget (8): cells get fewer samples to meet it, never none",
        )  # fmt: skip
        suite.add_argument("--limit", type=float, default=60.0,
                           help="seconds after which a call is given up (60)")  # fmt: skip
        suite.add_argument("--threads", type=int, default=torch.get_num_threads(),
                           help="CPU threads (default: torch's)")  # fmt: skip
        suite.add_argument("--keep-freed", action="store_true",
                           help="time processes that keep freed memory")  # fmt: skip
        suite.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        suite.add_argument(
            "--json",
            metavar="FILE",
            help="write everything measured; FILE.jsonl "
            "has it line by line until the suite is through",
        )
        suite.add_argument("--plot", metavar="FILE", help="draw it, as PNG")
    options = parser.parse_args(arguments)
    if options.suite:
        for name in ("rounds", "threads"):
            if getattr(options, name) < 1:
                parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
        if (options.plot or "x.png").rpartition(".")[2] != "png":
            parser.error(f"--plot: expected a file name that ends in .png, got {options.plot!r}")
    return options


def names() -> dict[str, str]:
    """What readers see for each implementation."""
    titles = {name: peer.title for name, peer in PEERS.items()}
    return FLOORS | titles | {"two-passes": "ift-kernels, two full passes"}


def show_list(console: Console) -> None:
    """Print what can be measured on this machine."""
    for name, found in SUITES.items():
        console.print(f"[bold]{name}[/]: {found.about}", highlight=False)
        for case in found.cases.values():
            console.print(f"  {case.name:<20}{case.title}", highlight=False)
    console.print("[bold]implementations[/]", highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, title in names().items():
        peer = PEERS.get(name)
        reason = peer.unavailable(device, torch.bfloat16) if peer else ""
        console.print(f"  {name:<20}{title}" + (f" — not available: {reason}" if reason else ""),
                      highlight=False)  # fmt: skip


# --- every suite in short -------------------------------------------------------------------------

OUTPUT = ROOT / "build" / "bench"
SHARE = 0.85  # of the minutes: processes start, data is made, pages are drawn
LAST = 0.95  # of the minutes: what is not measured by then is left out
PATIENCE = 20.0  # seconds for a suite that is interrupted to write what it has
INTERRUPTED = (130, -signal.SIGINT)


class Part(NamedTuple):
    """One suite, and its share of the time."""

    suite: str
    share: float
    options: str = ""


# Without what compiles (minutes by itself), in bfloat16, and small: every cell is called at least
# four times in a process of its own, and a long start leaves nothing for the end.
PARTS = (
    Part("head", 0.14, "--shapes 512x896x32000 --dtype bf16 --cases statistics scalar per-token "
         "--implementations floor floor-t ours naive trl"),
    Part("active", 0.11, "--shapes 512x896x32000 --dtype bf16 --cases per-token per-token-frozen "
         "--implementations floor floor-t ours active naive"),
    Part("losses", 0.15, "--shape 4x64x896x32000 --cases sft ift dpo orpo grpo"),
    Part("masked", 0.13, "--shapes 512x896x32000 --implementations floor ours active naive "
         "--kinds per-token"),
    Part("scaling", 0.11, "--base 512x256x8192"),
    Part("ops", 0.12, "--shape 256x256x16000 --implementations floor ours naive"),
    Part("overhead", 0.09, "--implementations ours naive"),
    Part("e2e", 0.15, "--rows 2 --hidden 128 --layers 2"),
)  # fmt: skip


def run_short(parts: Sequence[Part], out: Path, minutes: float, threads: int) -> dict[str, str]:
    """Measure all parts into `out`, and write the page.

    Returns:
        Suites that are not whole, each with the reason: failed, out of time, interrupted.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"):
        old.unlink()  # of an earlier run: the page has one
    missing: dict[str, str] = {}
    measuring, last = Budget(SHARE * minutes), Budget(LAST * minutes)
    for at, part in enumerate(parts):
        if last.left() <= 0:
            missing[part.suite] = "out of time"
            continue
        left = sum(later.share for later in parts[at:])
        seconds = max(measuring.left(), 0.0) * part.share / left
        file = out / f"{part.suite}.json"
        command = [sys.executable, "-m", "bench", part.suite, *part.options.split(),
                   "--rounds", "3", "--threads", str(threads), "--minutes", f"{seconds / 60:.3f}",
                   "--json", str(file)]  # fmt: skip
        if plotting.available():
            command += ["--plot", str(file.with_suffix(".png"))]
        print(f"{part.suite}, about {seconds:.0f} s", flush=True)
        code = run_suite(command, last.left())
        if code in INTERRUPTED and last.left() > 0:
            missing |= dict.fromkeys((later.suite for later in parts[at:]), "interrupted")
            break
        if code:
            missing[part.suite] = "out of time" if code in INTERRUPTED else "failed"
    if tables.collect(out):
        pages.main(["--results", str(out), "--html", str(out / "report.html")])
    return missing


def run_suite(command: list[str], seconds: float) -> int:
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


def quick(arguments: Sequence[str]) -> int:
    """``python -m bench quick``: every suite in short, with nine minutes to share, and its page.

    Enough to see where the package ranks on this machine; samples are few, so read ratios and not
    digits. A suite that fails is named, and the rest goes on. A suite measures every case once,
    however small its share: on a slow machine what the time did not suffice for is named, and the
    page is of the rest. Ctrl-C ends in that page too.
    """
    parser = argparse.ArgumentParser(prog="python -m bench quick", description=quick.__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="of everything (9)")
    parser.add_argument("--suites", nargs="+", choices=[part.suite for part in PARTS],
                        help="default: all")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes}")
    parts = [p for p in PARTS if not options.suites or p.suite in options.suites]
    missing = run_short(parts, options.output.resolve(), options.minutes, options.threads)
    for suite, reason in missing.items():
        print(f"{suite}: {reason}", file=sys.stderr)
    return 130 if "interrupted" in missing.values() else int("failed" in missing.values())
