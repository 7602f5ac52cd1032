"""``python -m bench scaling``: cost against rows, width and vocabulary, with fitted exponents.

One size at a time is varied around a base shape, all in the same rounds. The exponent is the slope
of log time against log size by least squares: 1 is proportional, and less than that means that a
share of the cost does not grow.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench import grid, head
from bench.harness import Settings
from bench.shapes import shape

BASE = (1024, 512, 16384)
AXES = {"N": 0, "D": 1, "V": 2}
FACTORS = (1, 2, 4, 8)  # of a quarter of the base
KINDS = ("scalar", "per-token")
CASES = {kind: head.CASES[kind] for kind in KINDS}
IMPLEMENTATIONS = ("floor", "ours", "naive")


def points(base: tuple[int, int, int], axis: str, kind: str) -> dict[str, grid.Point]:
    """Names and points along one axis."""
    found = {}
    for factor in FACTORS:
        sizes = list(base)
        size = sizes[AXES[axis]] = max(base[AXES[axis]] * factor // 4, 8)
        name = f"{kind} {axis}={size}"
        case = replace(
            head.CASES[kind], name=name, title=f"{head.CASES[kind].title}, {axis}={size}"
        )
        found[name] = grid.Point((sizes[0], sizes[1], sizes[2]), case)
    return found


def exponent(sizes: list[float], seconds: list[float]) -> float | None:
    """Slope of log seconds against log size; None with less than two sizes."""
    if len(set(sizes)) < 2:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return above / sum((a - x_mean) ** 2 for a in x)


def fits(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Exponents of time and of memory, for every line of a record that has `axes`."""
    found = []
    for axis in record["axes"]:
        names = dict.fromkeys(cell["implementation"] for cell in record["cells"])
        for name in names:
            fit: dict[str, Any] = {"axis": axis["axis"], "case": axis["case"],
                                   "implementation": name}  # fmt: skip
            for quantity in ("seconds", "extra_bytes"):
                line = [
                    (axis["points"][cell["case"]], cell[quantity])
                    for cell in record["cells"]
                    if cell["implementation"] == name and cell["case"] in axis["points"]
                    and cell["samples"] and (cell[quantity] or 0) > 0
                ]  # fmt: skip
                fit[quantity] = exponent([s for s, _ in line], [v for _, v in line])
            found.append(fit)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--base", type=shape, default=BASE, metavar="NxDxV",
                        help="each size is varied from a quarter to twice of it")  # fmt: skip
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["per-token"])
    grid.add_arguments(parser, IMPLEMENTATIONS)


def run(
    arguments: argparse.Namespace, settings: Settings, progress: Any
) -> Iterator[dict[str, Any]]:
    """Measure; one record per dtype."""
    for done, dtype in enumerate(arguments.dtype):
        lines = {
            (axis, kind): points(arguments.base, axis, kind)
            for axis in arguments.axes
            for kind in arguments.kinds
        }
        left = len(arguments.dtype)
        record = grid.run(
            f"scaling {'x'.join(map(str, arguments.base))} {dtype}",
            [point for line in lines.values() for point in line.values()],
            dtype, arguments, settings, progress, parts=(left - done, left),
        )  # fmt: skip
        record["axes"] = [
            {
                "axis": axis, "case": kind, "unit": axis,
                "points": {name: point.shape[AXES[axis]] for name, point in line.items()},
            }
            for (axis, kind), line in lines.items()
        ]  # fmt: skip
        record["fits"] = fits(record)
        yield record
