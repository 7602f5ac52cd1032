"""``python -m bench``: a command of its own module, else a suite of `bench.suites.command`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

# Name → its module and function. Only what is asked for is imported.
COMMANDS = {
    "report": ("report.pages", "main"), "quick": ("suites.command", "quick"),
    "compare": ("report.compare", "compare"), "run": ("report.compare", "run_base"),
    "counts": ("suites.counts", "main"), "training": ("suites.active", "train"),
    "device": ("gpu.device", "main"), "tune": ("gpu.tune", "tune"),
    "static": ("gpu.static", "main"), "cuda-static": ("gpu.cuda_static", "main"),
    "roofline": ("gpu.roofline", "main"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if "--dry-run" in given:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are loaded
    module, function = COMMANDS.get(name, ("suites.command", "main"))
    run = getattr(importlib.import_module(f"bench.{module}"), function)
    return int(run(given[1:] if name in COMMANDS else given))


if __name__ == "__main__":
    sys.exit(main())
