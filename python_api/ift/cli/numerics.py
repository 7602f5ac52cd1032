"""``ift numerics``: errors of every operation against fp64, and what results do not depend on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ift.cli.doctor import cpu_name, version_of
from ift.cli.errors import CliError


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, or JSON; exit code 1 if a bound or an invariance does not hold."""
    plot = None if arguments.plot is None else Path(arguments.plot)
    if plot is not None and not plot.resolve().parent.is_dir():
        raise CliError("--plot", f"expected a file in a folder that exists, got {plot}")
    import torch

    from ift import plotting
    from ift.numerics import invariance, measure, page, peers

    if plot is not None and not plotting.available():
        raise CliError("--plot", 'needs matplotlib: pip install "ift-kernels[train]"')
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    report = measure.measure(device, quick=arguments.quick, progress=_progress)
    print("\r\x1b[K" if sys.stderr.isatty() else "", end="", file=sys.stderr)
    report["machine"] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {
            name: version_of(name)
            for name in ("ift-kernels", "torch", *peers.DISTRIBUTIONS.values())
        },
    }
    if plot is not None:
        page.draw(report, plot)
    if arguments.json:
        text = json.dumps(report, ensure_ascii=False, allow_nan=False)
        print(text.replace("], [", "],\n ["))  # a line for each row
    else:
        print(page.as_text(report))
    ours = [row for row in measure.rows(report) if row["implementation"] == "ift"]
    within = all(row["share"] is not None and row["share"] <= 1 for row in ours)
    fixed = all(invariance.holds(report["invariance"], dtype) for dtype in invariance.DTYPES)
    return 0 if within and fixed else 1


def _progress(share: float, what: str) -> None:
    """One line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{100 * share:3.0f} %  {what}", end="", file=sys.stderr, flush=True)
