"""Backends: every function of the backends that serve a device, beside each other.

Time on a large shape, as a share of the bandwidth of a copy of the same size; and what a call costs
the host on 16 rows, below the operators that users call. What is faster goes to the table
`FASTER` of ift_kernels/backends/choice.py. ``--dry-run`` goes the whole way on a CPU, the Triton
kernels in their interpreter, on shapes so small that the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import clock
from bench.memory import synchronize
from bench.provenance import provenance
from bench.tune import same
from ift_kernels import backends
from ift_kernels.transform import LogitTransform

CLEARLY = 0.97  # of the time of the backend that comes first
PLAIN = LogitTransform()


class Call(NamedTuple):
    """A function on tensors that are there; what it changes it may change again and again."""

    bytes: int  # that have to be moved
    run: Callable[[], Any]
    results: Callable[[], list[Tensor]]  # after the first run


def calls(backend: Any, device: torch.device, rows: int, columns: int) -> dict[str, Call]:
    """By name of the function; bfloat16 logits, float32 sequences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).to(device, torch.bfloat16)
    target = torch.arange(rows, device=device) % columns
    level = x.float().amax(1) - 2
    norm = torch.stack([x.float().amax(1), torch.full((rows,), 3.0, device=device)])
    coef = torch.ones(4, rows, device=device)
    state, argmax = backend.new_state(rows, device)
    y, p = x.clone(), x.clone()
    values = torch.full((rows, 2), -torch.inf, device=device)
    ids = torch.full((rows, 2), -1, device=device)
    best, logit = torch.full((2, rows), -torch.inf, device=device)
    drawn = torch.zeros_like(target)
    profile = torch.rand(rows, generator=generator).to(device)
    sequence = torch.randn(rows, columns, generator=generator).to(device)
    table = x[: max(rows // 4, 1)]
    tokens = torch.arange(rows, device=device)[None] % len(table)
    grad = torch.randn(1, rows, columns, generator=generator).to(device, torch.bfloat16)
    kept: dict[str, Tensor] = {}
    here, moved = (x, None, PLAIN), x.numel() * x.element_size()

    def keep(name: str, value: Tensor) -> None:
        kept[name] = value

    mixing = (tokens, tokens.roll(1, 1), tokens, None, 0.2, -100)
    made = {
        "stats_update": (
            moved, lambda: backend.stats_update(*here, target, 0, state, argmax, 1),
            lambda: [state[:2], argmax],
        ),
        "dlogits_": (
            2 * moved, lambda: backend.dlogits_(y, None, PLAIN, target, 0, norm, coef), lambda: [y],
        ),
        "probabilities_": (
            2 * moved, lambda: backend.probabilities_(p, None, PLAIN, norm), lambda: [p],
        ),
        "top_k_update": (
            moved, lambda: backend.top_k_update(*here, 0, values, ids), lambda: [values, ids],
        ),
        "gumbel_update": (
            moved, lambda: backend.gumbel_update(*here, 0, 1, target, best, logit, drawn),
            lambda: [best, drawn],
        ),
        "active_marks": (
            moved, lambda: keep("marks", backend.active_marks(*here, target, 0, level, 32)),
            lambda: [kept["marks"]],
        ),
        "tile_sums": (
            moved, lambda: keep("sums", backend.tile_sums(x, 64, profile)),
            lambda: [kept["sums"]],
        ),
        "scan": (
            4 * moved, lambda: keep("scan", backend.scan(sequence, None, None, 0.95, True)),
            lambda: [kept["scan"]],
        ),
        "residual": (
            3 * moved, lambda: keep("mixed", backend.residual(table, *mixing)),
            lambda: [kept["mixed"]],
        ),
        "residual_grad": (
            moved + moved // 4,
            lambda: keep("grad", backend.residual_grad(grad, *mixing, len(table))),
            lambda: [kept["grad"]],
        ),
    }  # fmt: skip
    return {name: Call(*parts) for name, parts in made.items()}


def seconds(run: Callable[[], Any], device: torch.device, repeats: int, wait: bool) -> float:
    """Median time of a call; without `wait` that of the host alone."""
    times = []
    for _ in range(5 if repeats > 1 else 1):
        synchronize(device)
        start = clock.now()
        for _ in range(repeats):
            run()
        if wait:
            synchronize(device)
        times.append((clock.now() - start) / repeats)
        synchronize(device)
    return statistics.median(times)


def compare(device: torch.device, dry: bool) -> dict[str, Any]:
    """Rows of the report, the bandwidth of a copy, and the table of what is faster."""
    serving = {
        name: module
        for name, module in backends.BACKENDS.items()
        if not module.why_not(device, torch.bfloat16)
    }
    large, small = ((5, 96), (3, 40)) if dry else ((8192, 32000), (16, 1024))
    repeats = 1 if dry else 20
    wanted = calls(backends.BACKENDS["reference"], device, *large)
    source = torch.zeros(large, dtype=torch.bfloat16, device=device)
    goal = torch.empty_like(source)
    copy = seconds(lambda: goal.copy_(source), device, repeats, True)
    copy_rate = 2 * source.numel() * source.element_size() / copy
    expected = {}
    for name, call in wanted.items():
        call.run()
        expected[name] = [t.clone() for t in call.results()]
    del wanted
    rows: list[dict[str, Any]] = []
    for backend_name, backend in serving.items():
        few = calls(backend, device, *small)
        for name, call in calls(backend, device, *large).items():
            row: dict[str, Any] = {"function": name, "backend": backend_name}
            rows.append(row)
            call.run()
            if not same(call.results(), expected[name]):
                row["refused"] = "another result than the reference"
                continue
            row["seconds"] = seconds(call.run, device, repeats, True)
            row["of_copy"] = call.bytes / row["seconds"] / copy_rate
            few[name].run()
            row["overhead"] = seconds(few[name].run, device, 10 * repeats, False)
    return {"copy_bytes_per_second": copy_rate, "rows": rows, "faster": faster(rows)}


def faster(rows: list[dict[str, Any]]) -> dict[str, str]:
    """By function, the backend that clearly beats the one that would serve without a table."""
    found = {}
    for name in dict.fromkeys(row["function"] for row in rows):
        timed = [row for row in rows if row["function"] == name and "seconds" in row]
        best = min(timed, key=lambda row: row["seconds"], default=None)
        if best and best["seconds"] < CLEARLY * timed[0]["seconds"]:
            found[name] = best["backend"]
    return found


def main(arguments: list[str]) -> int:
    """``python -m bench backends``."""
    parser = argparse.ArgumentParser(prog="python -m bench backends", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU")
    parser.add_argument("--json", type=Path, help="write everything measured")
    options = parser.parse_args(arguments)
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        again = [sys.executable, "-m", "bench", "backends", *arguments]  # as in bench.tune
        return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run goes without one")
    device = torch.device("cpu" if options.dry_run else "cuda")
    found = compare(device, options.dry_run)
    table = Table("function", "backend", "µs", "of copy", "µs on the host, 16 rows")
    order = list(dict.fromkeys(row["function"] for row in found["rows"]))
    for row in sorted(found["rows"], key=lambda row: order.index(row["function"])):
        measured = row.get("refused") or f"{1e6 * row['seconds']:.1f}"
        rest = []
        if "refused" not in row:
            rest = [f"{row['of_copy']:.0%}", f"{1e6 * row['overhead']:.1f}"]
        table.add_row(row["function"], row["backend"], measured, *rest)
    Console(width=110).print(table)
    print(f"faster, for ift_kernels/backends/choice.py: {found['faster']}")
    if options.json:
        about = {"provenance": provenance(device, torch.get_num_threads())}
        options.json.write_text(json.dumps(about | found, indent=2) + "\n", encoding="utf-8")
    return 1 if any("refused" in row for row in found["rows"]) else 0
