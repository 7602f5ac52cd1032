"""Static: what every kernel of the Triton backend takes on GPUs that need not be here.

Each is compiled as the backend launches it, in every committed configuration, for NVIDIA and AMD
architectures, and held against committed limits: registers, no spills, 16-byte loads and stores of
global memory, the matrix instructions of the architecture where there is a product, and bytes that
are asked for against the least that could be (`bench.traffic`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from bench import offline, traffic
from ift_kernels.backends import triton as backend
from ift_kernels.backends.triton import active_schedule, fused, gathered, launch
from ift_kernels.transform import LogitTransform

LIMITS = Path(__file__).with_name("static_limits.json")
PLAIN, FULL = LogitTransform(), LogitTransform(0.7, 5.0, 1.3)
# Reads bytes, single flags or lists of ids; nothing to gain from wide accesses.
NARROW = {"marks", "merge", "list", "collect"}
# Touch every element once, so what they ask for may hardly exceed the least; but for a bias, which
# every row reads again from a cache.
STREAMING = {
    "stats",
    "dlogits",
    "probabilities",
    "top_k",
    "gumbel",
    "scan",
    "residual",
    "tile_sums",
}
MOST = 1.1
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
PRODUCTS = {"fused", "products", "hidden", "weight"}


def launches(
    dtype: torch.dtype, full: bool, head: tuple[int, int, int] = (256, 4096, 1024)
) -> None:
    """Make every launch of the backend once for each class of shapes; those of products on `head`.

    On whole tiles with rows on cache lines, as the schedules form them; few rows, for the memory.
    """
    for columns in (1024, 4096):
        _epilogues(dtype, full, columns)
        _whole_operations(dtype, columns)
    _products(dtype, full, *head)


def _epilogues(dtype: torch.dtype, full: bool, c: int) -> None:
    n, transform = 64, FULL if full else PLAIN
    x, target = torch.zeros(n, c, dtype=dtype), torch.zeros(n, dtype=torch.int64)
    norm, coef, bias = torch.zeros(2, n), torch.zeros(4, n), torch.zeros(c) if full else None
    here = x, bias, transform
    state, argmax = backend.new_state(n, x.device)
    for track in (31,) if full else (0, 1):
        for rows in (2, n):  # split or not
            part = here[0][:rows], bias, transform
            rest = target[:rows], 0, state[:, :rows], argmax[:rows], track
            backend.stats_update(*part, *rest)
    backend.dlogits_(*here, target, 0, norm, coef)
    backend.probabilities_(*here, norm)
    k = 64 if full else 2
    backend.top_k_update(*here, 0, torch.zeros(n, k), torch.zeros(n, k, dtype=torch.int64))
    best = torch.zeros(n)
    backend.gumbel_update(*here, 0, 3, target, best, best.clone(), target.clone())
    marks = backend.active_marks(*here, target, 0, best, 32).zero_()
    store = torch.zeros(48, 32, dtype=dtype)
    backend.active_collect(*here, marks, best, 64, store, torch.zeros(3, c // 64, n))
    marks[:, ::20] = 1
    active = torch.zeros(n * (c // 16), dtype=dtype)
    profile = torch.zeros(c)
    backend.active_rows(x, marks, 32, 2048, profile, torch.zeros(-(-c // 2048), n), active)
    pairs, base = torch.zeros(48, 2, dtype=torch.int64), torch.zeros(c // 64, n)
    gradient = target, 0, norm, coef, base, 64, profile
    backend.active_gradient_(store, pairs, n, *here[1:], *gradient)


def _whole_operations(dtype: torch.dtype, width: int) -> None:
    at = torch.zeros(48, dtype=torch.int64)
    table, profile = torch.zeros(128, width, dtype=dtype), torch.zeros(128)
    for accumulate in (False, True):
        common = torch.zeros(2, width)
        backend.combine_rows(table[:48], at, common, 64, profile, table, accumulate)
    backend.tile_sums(table, 64, profile)
    values = torch.zeros(4, width, dtype=dtype)
    ids = torch.arange(64).view(4, 16)
    predicted = ids + 64
    for left in (False, True):
        backend.scan(values, None, None, 0.9, left)
        backend.scan(values[:1], values[:1] == 0, at[:3], 0.9, left)
    backend.residual(table, ids, predicted, ids, None, 0.2, -100)
    grad = torch.zeros(4, 16, width, dtype=dtype)
    backend.residual_grad(grad, ids, predicted, ids, None, 0.2, -100, 128)


def _products(dtype: torch.dtype, full: bool, n: int, v: int, d: int) -> None:
    hidden, weight = torch.zeros(n, d, dtype=dtype), torch.zeros(v, d, dtype=dtype)
    bias, transform = (torch.zeros(v), FULL) if full else (None, PLAIN)
    target = torch.zeros(n, dtype=torch.int64)
    marks, tails = torch.zeros(n // 128, v, dtype=torch.uint8), torch.zeros(4, 2, n)
    state, argmax = backend.new_state(n, hidden.device)
    here = hidden, weight, bias, transform, target, state, argmax
    for track in (31,) if full else (0, 1):
        fused.fused_statistics(*here, track)
        fused.fused_statistics(*here, track, fused.Marking(marks, tails))
    marks[:, ::100] = 1
    items = gathered.Items.of(marks, 96, 128)
    rows = torch.zeros(2, n), torch.zeros(4, n), torch.zeros(2, n)
    tile, profile = 2048, torch.zeros(v)
    store = items.gradients(hidden, weight, bias, transform, target, 0, *rows, tile, profile)
    items.add_to_hidden(store, weight, torch.zeros(n, d))
    items.weight_gradient(store, hidden, torch.zeros(2, d), tile, profile, weight)
    active_schedule._add_bias(torch.zeros(v), store, items)


def variants(
    architecture: str,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
    fullness: tuple[bool, ...] = (False, True),
) -> list[offline.Variant]:
    """Every kernel as the backend would have it compiled for the architecture."""
    with offline.taken_down(architecture) as found:
        for dtype in dtypes:
            for full in fullness:
                launches(dtype, full)
    return found


def complaints(
    which: offline.Variant,
    found: offline.Resources,
    architecture: str,
    limit: int | None,
    moved: traffic.Bytes | None = None,
) -> list[str]:
    """What is wrong with a kernel; empty if nothing is. `limit` of registers."""
    wrong = []
    if found.spills:
        wrong.append(f"spills {found.spills} bytes")
    if limit is None:
        wrong.append("no committed limit")
    elif found.registers > limit:
        wrong.append(f"{found.registers} registers, limit {limit}")
    if found.programs < 1:
        wrong.append("does not fit on a multiprocessor")
    constants = dict(which.constants)
    # Documents start anywhere; a bias is one element wide.
    anywhere = constants.get("PACKED") or constants.get("width") == 1
    if not found.wide_loads and which.name not in NARROW and not anywhere:
        wrong.append("no 16-byte loads")
    half = any(t in ("*bf16", "*fp16") for _, t in which.signature)
    if which.name in PRODUCTS and half and found.matrix != MATRIX[architecture]:
        wrong.append(f"{found.matrix or 'no matrix instructions'}, not {MATRIX[architecture]}")
    once = which.name in STREAMING and not constants.get("HAS_BIAS") and not anywhere
    if once and moved is not None and moved.ratio > MOST:
        wrong.append(f"{moved.ratio:.2f} of the least bytes")
    return wrong


def digest(architecture: str, which: list[offline.Variant]) -> str:
    """Of everything that decides what comes out: sources, constants, configurations, compiler."""
    parts = sorted(f"{v.source().hash()} {v.options}" for v in which)
    whole = "\n".join([architecture, triton.__version__, *parts])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def committed() -> dict[str, Any]:
    """Limits and digests of the last complete run that found nothing wrong."""
    loaded: dict[str, Any] = json.loads(LIMITS.read_text(encoding="utf-8"))
    return loaded


def run(architectures: list[str], console: Console, write: bool = False) -> int:
    """Compile, print the table, and return how many kernels are not as they should be."""
    known = committed()
    bad = 0
    for architecture in architectures:
        limits: dict[str, int] = {} if write else known["registers"].get(architecture, {})
        some = variants(architecture)
        found = [(which, offline.compile_for(which, architecture)) for which in some]
        bytes_ = traffic.measure(architecture)
        if write:
            for which, used in found:
                limits[which.name] = max(used.registers, limits.get(which.name, 0))
        table = Table(title=architecture)
        for column in (
            "kernel", "variant", "registers", "spills", "shared", "programs", "occupancy",
            "16-byte loads", "stores", "matrix", "bytes", "least", "",
        ):  # fmt: skip
            table.add_column(column, overflow="fold")
        wrong_here = 0
        for which, used in found:
            moved = bytes_.get(traffic.key(which.name, which.about))
            wrong = complaints(which, used, architecture, limits.get(which.name), moved)
            wrong_here += bool(wrong)
            table.add_row(
                which.name, which.about, str(used.registers), str(used.spills), str(used.shared),
                str(used.programs), f"{used.occupancy:.0%}", str(used.wide_loads),
                str(used.wide_stores), used.matrix,
                *(("", "") if moved is None else (f"{value:.2f}" for value in moved)),
                "; ".join(wrong),
            )  # fmt: skip
        console.print(table)
        bad += wrong_here
        if write and not wrong_here:
            known = committed()  # again: another run may have written its architecture
            known["registers"][architecture] = limits
            known["digest"][architecture] = digest(architecture, some)
            known["triton"] = triton.__version__
            text = json.dumps(known, indent=2, sort_keys=True) + "\n"
            LIMITS.write_text(text, encoding="utf-8")
    return bad


def main(arguments: list[str]) -> int:
    """``python -m bench static``."""
    parser = argparse.ArgumentParser(prog="python -m bench static", description=__doc__)
    parser.add_argument("--architectures", nargs="+", choices=offline.TARGETS,
                        default=list(offline.TARGETS))  # fmt: skip
    parser.add_argument(
        "--write",
        action="store_true",
        help="commit to what comes out, where nothing is wrong with it",
    )
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    console = Console(width=170)
    return 1 if run(options.architectures, console, options.write) else 0
