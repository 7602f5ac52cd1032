"""``python -m bench overhead``: what a call costs where there is next to nothing to compute.

From one row to 64, at a width and vocabulary so small that the products take microseconds. Small
batches, decoding and tests see this cost; large ones do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench import grid, head
from bench.harness import Settings, Subject

ROWS = (1, 4, 16, 64)
WIDTH, VOCABULARY = 16, 64
KINDS = ("forward", "greedy", "scalar", "per-token")
CASES = {
    case.name: case
    for kind in KINDS
    for rows in ROWS
    for case in [
        replace(head.CASES[kind], name=f"{kind} N={rows}",
                title=f"{head.CASES[kind].title}, {rows} rows")
    ]
}  # fmt: skip
IMPLEMENTATIONS = ("ours", "naive", "compile")


def prepare(path: str, case: head.Case, implementation: str, device: str) -> Subject:
    """A cell; its time is that until the caller goes on, on a GPU too."""
    return grid.prepare(path, case, implementation, device)._replace(host=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    grid.add_arguments(parser, IMPLEMENTATIONS)


def run(
    arguments: argparse.Namespace, settings: Settings, progress: Any
) -> Iterator[dict[str, Any]]:
    """Measure; one record per dtype."""
    for done, dtype in enumerate(arguments.dtype):
        points = [
            grid.Point((rows, WIDTH, VOCABULARY), CASES[f"{kind} N={rows}"])
            for kind in arguments.kinds
            for rows in ROWS
        ]
        left = len(arguments.dtype)
        record = grid.run(
            f"overhead {dtype}", points, dtype, arguments, settings, progress,
            flat=True, prepare=prepare, parts=(left - done, left),
        )  # fmt: skip
        record["axes"] = [
            {
                "axis": "N", "case": kind, "unit": "rows",
                "points": {f"{kind} N={rows}": rows for rows in ROWS},
            }
            for kind in arguments.kinds
        ]  # fmt: skip
        for cell in record["cells"]:
            cell["extra_bytes"] = None  # a few pages: nothing that a reader could use
        yield record
