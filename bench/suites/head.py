"""Statistics, token choice and losses of a linear head, and what their cost depends on.

``head`` measures all cases at a few shapes. Three more suites vary one thing along an axis:

* ``masked``: prompts and padding have no loss. What can leave such rows out pays for the rest
  alone; the floor is the bare GEMMs on the valid rows.
* ``scaling``: one size at a time is varied around a base shape. The exponent is the slope of log
  time against log size by least squares: 1 is proportional, and less than that means that a share
  of the cost does not grow.
* ``overhead``: from one row to 64, at a width and vocabulary so small that the products take
  microseconds. Small batches, decoding and tests see this cost; large ones do not.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench.harness.measure import Records, Settings, Suite, by_name
from bench.peers.heads import PEERS
from bench.report.tables import OPTIONS
from bench.suites import grid
from bench.suites.grid import CORE, DTYPES, FEW, FLOORS, SHAPES, Case, Grid, Point, shape

IGNORED = 0.7
CASES: dict[str, Case] = by_name(
    Case("forward", "log-probability, no gradient", "logprob", everyone=True),
    Case("statistics", "log-probability, entropy, arg max, no gradient", "statistics",
         everyone=True),
    Case("greedy", "most likely token", "ids", everyone=True),
    Case("scalar", "mean cross-entropy, forward and backward", "loss", True, everyone=True),
    Case("per-token", "log-probabilities, forward and backward", "logprob", True,
         everyone=True),
    Case("scalar-frozen", "mean cross-entropy, head frozen", "loss", True, frozen=True),
    Case("per-token-frozen", "log-probabilities, head frozen", "logprob", True, frozen=True),
    Case("scalar-ignored", "mean cross-entropy, 70 % ignored", "loss", True, ignored=IGNORED),
    Case("per-token-ignored", "log-probabilities, 70 % ignored", "logprob", True,
         ignored=IGNORED),
    Case("scalar-few", "mean cross-entropy, 16 rows", "loss", True, few=True),
    Case("per-token-few", "log-probabilities, 16 rows", "logprob", True, few=True),
)  # fmt: skip
# torch's chunked loss is timed where a call takes seconds, not where it takes minutes.
CHUNKED_WORK = 1e11  # multiply-adds of a GEMM
IMPLEMENTATIONS = (*FLOORS, *(name for name in PEERS if name not in (*OPTIONS, "dropped")))
PRICED = tuple(name for name in OPTIONS if name != "active")  # only where they are asked for


def shape_arguments(
    parser: argparse.ArgumentParser, cases: Sequence[str], implementations: Sequence[str]
) -> None:
    """Options of ``head`` and ``active``."""
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxDxV",
        help="rows, width and vocabulary, or a model and rows, as llama-3-8b@4096; default: "
        "2048x1024x32000 1024x896x151936",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", choices=cases, metavar="CASE",
                        help="default: all; see --list")  # fmt: skip
    parser.add_argument("--implementations", nargs="+", choices=implementations, metavar="NAME",
                        help="default: all; see --list")  # fmt: skip
    parser.add_argument("--flat", action="store_true", help="random data, not LM-like")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    shape_arguments(parser, list(CASES), (*IMPLEMENTATIONS, *PRICED))
    parser.add_argument(
        "--everyone", action="store_true",
        help="every peer in every case; by default the variants of a case (head frozen, targets "
        "ignored, few rows) have the floor, naive and ours, and no call takes minutes",
    )  # fmt: skip


def run(
    arguments: argparse.Namespace, settings: Settings, progress: Any,
    points_at: Callable[[tuple[int, int, int], argparse.Namespace], list[Point]] | None = None,
) -> Records:  # fmt: skip
    """Measure; one record per shape and dtype. `points_at`: default `points`."""
    grids = [
        Grid(f"{grid.words(sizes)} {dtype}", (points_at or points)(sizes, arguments), dtype,
             arguments.flat)
        for sizes in arguments.shapes
        for dtype in arguments.dtype
    ]  # fmt: skip
    return grid.run(grids, arguments, settings, progress)


def points(sizes: tuple[int, int, int], arguments: argparse.Namespace) -> list[Point]:
    """The cases that make sense at this shape, each with the implementations that it has."""
    n, d, v = sizes
    found = []
    for case in CASES.values():
        if (arguments.cases and case.name not in arguments.cases) or (case.few and n <= FEW):
            continue
        names = [
            name for name in (*IMPLEMENTATIONS, *PRICED)
            if name in (arguments.implementations or IMPLEMENTATIONS)
            and (case.everyone or arguments.everyone or name in (*CORE, *PRICED))
        ]  # fmt: skip
        slow = not arguments.everyone and (case.kind != "loss" or n * d * v > CHUNKED_WORK)
        absent = {"torch-chunked": "may take minutes: only with --everyone"} if slow else {}
        found.append(Point(sizes, case, names, absent))
    return found


# --- along an axis --------------------------------------------------------------------------------

KINDS = ("scalar", "per-token")
Record = dict[str, Any]


def variant(kind: str, name: str, title: str, **changes: Any) -> Case:
    """A case of `head`, changed."""
    return replace(CASES[kind], name=f"{kind} {name}", title=f"{CASES[kind].title}, {title}",
                   **changes)  # fmt: skip


def axis(name: str, case: str, unit: str, points: dict[str, float]) -> Record:
    """A line of a picture: the place of each case on it."""
    return {"axis": name, "case": case, "unit": unit, "points": points}


def axis_arguments(
    parser: argparse.ArgumentParser, kinds: Sequence[str], asked: Sequence[str],
    implementations: Sequence[str],
) -> None:  # fmt: skip
    """Options that every suite of this module has; the defaults of kinds and implementations."""
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=list(asked))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--implementations", nargs="+", choices=[*IMPLEMENTATIONS, "active"],
                        metavar="NAME", default=list(implementations),
                        help=f"default: {' '.join(implementations)}")  # fmt: skip


# --- masked ---------------------------------------------------------------------------------------

SHARES = (0, 30, 60, 90)  # percent
MASKED = {
    (kind, share): variant(kind, f"{share} %", f"{share} % of the targets ignored",
                           ignored=share / 100)
    for kind in KINDS
    for share in SHARES
}  # fmt: skip


def masked_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``masked``."""
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES[:1], metavar="NxDxV")
    axis_arguments(parser, KINDS, KINDS, (*FLOORS, "ours", "active", "naive", "naive-float",
                  "compile", "cce", "quack", "verl", "flash", "trl", "liger"))  # fmt: skip


def run_masked(arguments: argparse.Namespace, settings: Settings, progress: Any) -> Records:
    """Measure; one record per shape and dtype."""
    axes = [
        axis("ignored", kind, "% of the targets ignored",
             {MASKED[kind, share].name: share for share in SHARES})
        for kind in arguments.kinds
    ]  # fmt: skip
    cases = [case for (kind, _), case in MASKED.items() if kind in arguments.kinds]
    grids = [
        Grid(f"masked {grid.words(sizes)} {dtype}",
             [Point(sizes, case, arguments.implementations) for case in cases], dtype,
             more={"axes": axes})
        for sizes in arguments.shapes
        for dtype in arguments.dtype
    ]  # fmt: skip
    return grid.run(grids, arguments, settings, progress)


# --- scaling --------------------------------------------------------------------------------------

BASE = (1024, 512, 16384)
AXES = {"N": 0, "D": 1, "V": 2}
FACTORS = (1, 2, 4, 8)  # of a quarter of the base


def along(base: tuple[int, int, int], name: str, kind: str) -> dict[Case, tuple[int, int, int]]:
    """Cases and shapes along one axis."""
    found = {}
    for factor in FACTORS:
        size = max(base[AXES[name]] * factor // 4, 8)
        n, d, v = (size if at == AXES[name] else other for at, other in enumerate(base))
        found[variant(kind, f"{name}={size}", f"{name}={size}")] = n, d, v
    return found


def exponent(sizes: list[float], seconds: list[float]) -> float | None:
    """Slope of log seconds against log size; None with less than two sizes."""
    if len(set(sizes)) < 2:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return above / sum((a - x_mean) ** 2 for a in x)


def fits(record: Record) -> list[Record]:
    """Exponents of time and of memory, for every line of a record that has `axes`."""
    found = []
    for line in record["axes"]:
        for name in dict.fromkeys(cell["implementation"] for cell in record["cells"]):
            fit: Record = {"axis": line["axis"], "case": line["case"], "implementation": name}
            for quantity in ("seconds", "extra_bytes"):
                some = [
                    (line["points"][cell["case"]], cell[quantity])
                    for cell in record["cells"]
                    if cell["implementation"] == name and cell["case"] in line["points"]
                    and cell["samples"] and (cell[quantity] or 0) > 0
                ]  # fmt: skip
                fit[quantity] = exponent([s for s, _ in some], [v for _, v in some])
            found.append(fit)
    return found


def scaling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``scaling``."""
    parser.add_argument("--base", type=shape, default=BASE, metavar="NxDxV",
                        help="each size is varied from a quarter to twice of it")  # fmt: skip
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    axis_arguments(parser, KINDS, ["per-token"], ("floor", "ours", "naive"))


def run_scaling(arguments: argparse.Namespace, settings: Settings, progress: Any) -> Records:
    """Measure; one record per dtype."""
    lines = {
        (name, kind): along(arguments.base, name, kind)
        for name in arguments.axes
        for kind in arguments.kinds
    }
    axes = [
        axis(name, kind, name, {case.name: sizes[AXES[name]] for case, sizes in line.items()})
        for (name, kind), line in lines.items()
    ]
    points = [
        Point(sizes, case, arguments.implementations)
        for line in lines.values()
        for case, sizes in line.items()
    ]
    base = grid.words(arguments.base)
    grids = [Grid(f"scaling {base} {dtype}", points, dtype, more={"axes": axes})
             for dtype in arguments.dtype]  # fmt: skip
    for record in grid.run(grids, arguments, settings, progress):
        yield record | {"fits": fits(record)}


# --- overhead -------------------------------------------------------------------------------------

ROWS = (1, 4, 16, 64)
WIDTH, VOCABULARY = 16, 64
CALLS = ("forward", "greedy", "scalar", "per-token")
OVERHEAD = {
    (kind, rows): variant(kind, f"N={rows}", f"{rows} rows", call=True)
    for kind in CALLS
    for rows in ROWS
}


def overhead_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``overhead``."""
    axis_arguments(parser, CALLS, CALLS, ("ours", "naive", "compile"))


def run_overhead(arguments: argparse.Namespace, settings: Settings, progress: Any) -> Records:
    """Measure; one record per dtype."""
    axes = [
        axis("N", kind, "rows", {OVERHEAD[kind, rows].name: rows for rows in ROWS})
        for kind in arguments.kinds
    ]
    points = [
        Point((rows, WIDTH, VOCABULARY), case, arguments.implementations)
        for (kind, rows), case in OVERHEAD.items()
        if kind in arguments.kinds
    ]
    grids = [Grid(f"overhead {dtype}", points, dtype, flat=True, more={"axes": axes})
             for dtype in arguments.dtype]  # fmt: skip
    return grid.run(grids, arguments, settings, progress)


SUITES = {
    "head": Suite("Statistics, token choice and losses of a linear head.",
                  CASES, add_arguments, run),
    "masked": Suite("Time and memory against the share of ignored targets, 0 to 90 %.",
                    by_name(*MASKED.values()), masked_arguments, run_masked),
    "scaling": Suite("Cost against rows, width and vocabulary, with fitted exponents.",
                     {kind: CASES[kind] for kind in KINDS}, scaling_arguments, run_scaling),
    "overhead": Suite("What a call costs where there is next to nothing to compute.",
                      by_name(*OVERHEAD.values()), overhead_arguments, run_overhead),
}  # fmt: skip
