"""``python -m bench SUITE``: measure; ``python -m bench --list``: what there is to measure.

``report`` makes a page of what was measured, ``compare A.json B.json`` and ``run --base REV SUITE``
find what became slower, ``counts`` what became more, and ``tour`` runs a short form of every suite.
``static``, ``tune``, ``backends`` and ``gpu`` measure nothing about peers: kernels compiled for
GPUs that are not here, launch configurations, our backends beside each other, and everything that a
machine with a GPU should run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import active, curves, e2e, head, losses, masked, ops, overhead, plots, report, scaling
from bench.clock import Budget
from bench.harness import Settings
from bench.peers import PEERS
from bench.provenance import load, provenance

# A suite has `add_arguments`, `run`, `CASES` (by name, with a title) and says what it is about.
SUITES: dict[str, Any] = {
    "head": head, "active": active, "ops": ops, "losses": losses, "masked": masked,
    "scaling": scaling, "overhead": overhead, "e2e": e2e,
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
    if options.plot and not plots.available():
        raise SystemExit("python -m bench: --plot needs matplotlib")
    settings = Settings(
        options.threads, options.rounds, options.limit, options.keep_freed, Budget(options.minutes)
    )
    about = provenance(torch.device(options.device), options.threads)
    groups: list[report.Report] = []
    interrupted = False
    with report.Progress(Console(stderr=True)) as progress:
        try:
            for group in SUITES[options.suite].run(options, settings, progress):
                report.compare(group)
                groups.append(group)
        except KeyboardInterrupt:
            interrupted = True
    done = {
        "schema": report.SCHEMA,
        "suite": options.suite,
        "provenance": about,
        "load_at_end": load(),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "plot", "list")},
        "names": names(),
        "groups": groups,
    }
    report.show(done, console)
    if interrupted:
        console.print("interrupted: only complete groups are in this report", style="red")
    if options.json:
        report.write(done, options.json)
    if options.plot:
        plots.draw(active.without_sweeps(done), options.plot)
        if options.suite == "active":
            active.draw(done, Path(options.plot).with_name(f"{Path(options.plot).stem}-sweeps.png"))
        curves.draw(done, Path(options.plot).with_name(f"{Path(options.plot).stem}-curves.png"))
    refused = [
        c for g in groups for c in g["cells"] if c["implementation"] == "ours" and c["reason"]
    ]
    return 130 if interrupted else 1 if refused else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--list", action="store_true", help="suites, cases and implementations")
    suites = parser.add_subparsers(dest="suite", metavar="SUITE")
    for name, module in SUITES.items():
        about = module.__doc__.split(": ", 1)[1].strip()
        suite = suites.add_parser(name, help=about.replace("%", "%%"), description=about)
        module.add_arguments(suite)
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
        suite.add_argument("--json", metavar="FILE", help="write everything measured")
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
    return (
        head.FLOORS
        | {name: peer.title for name, peer in PEERS.items()}
        | active.NAMES
        | {"shared": "ift-kernels, prompts shared"}
    )


def show_list(console: Console) -> None:
    """Print what can be measured here."""
    for name, module in SUITES.items():
        about = module.__doc__.split(": ", 1)[1].strip()
        console.print(f"[bold]{name}[/]: {about}", highlight=False)
        for case in module.CASES.values():
            console.print(f"  {case.name:<20}{case.title}", highlight=False)
    console.print("[bold]implementations[/]", highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, title in names().items():
        peer = PEERS.get(name)
        reason = peer.unavailable(device, torch.bfloat16) if peer else ""
        console.print(f"  {name:<20}{title}" + (f" — not here: {reason}" if reason else ""),
                      highlight=False)  # fmt: skip
