"""``python -m bench masked``: time and memory against the share of ignored targets, 0 to 90 %.

Prompts and padding have no loss. What can leave such rows out pays for the rest alone; the floor
is the bare GEMMs on the rows that count.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench import grid, head
from bench.harness import Settings
from bench.shapes import SHAPES, shape

SHARES = (0, 30, 60, 90)  # percent
KINDS = ("scalar", "per-token")
CASES = {
    case.name: case
    for kind in KINDS
    for share in SHARES
    for case in [
        replace(head.CASES[kind], name=f"{kind} {share} %", ignored=share / 100,
                title=f"{head.CASES[kind].title}, {share} % of the targets ignored")
    ]
}  # fmt: skip
IMPLEMENTATIONS = ("floor", "floor-t", "ours", "active", "naive", "naive-float", "compile", "cce",
                   "quack", "verl", "flash", "trl", "liger")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES[:1], metavar="NxDxV")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    grid.add_arguments(parser, IMPLEMENTATIONS)


def run(
    arguments: argparse.Namespace, settings: Settings, progress: Any
) -> Iterator[dict[str, Any]]:
    """Measure; one record per shape and dtype."""
    pairs = [(shape, dtype) for shape in arguments.shapes for dtype in arguments.dtype]
    for done, (size, dtype) in enumerate(pairs):
        cases = [case for name, case in CASES.items() if name.split()[0] in arguments.kinds]
        record = grid.run(
            f"masked {'x'.join(map(str, size))} {dtype}",
            [grid.Point(size, case) for case in cases],
            dtype, arguments, settings, progress, parts=(len(pairs) - done, len(pairs)),
        )  # fmt: skip
        record["axes"] = [
            {
                "axis": "ignored", "case": kind, "unit": "% of the targets ignored",
                "points": {case.name: 100 * case.ignored for case in cases
                           if case.name.split()[0] == kind},
            }
            for kind in arguments.kinds
        ]  # fmt: skip
        yield record
