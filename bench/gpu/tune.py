"""Kernels on this GPU: the backends beside each other, and launch configurations of Triton.

``backends``: every function of the backends that serve a device. Time on a large shape, as a share
of the bandwidth of a copy of the same size; and what a call costs the host on 16 rows, below the
operators that users call. What is faster goes to the table `FASTER` of
ift_kernels/backends/selection.py.

``tune``: launch configurations of the Triton backend, measured and written to its table. Every
candidate is checked before it is timed: its result must be that of the committed configuration.

``--dry-run`` goes the whole way without a GPU, in Triton's interpreter, on shapes so small that the
times mean nothing; ``tune`` then writes only where ``--output`` says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

import ift_kernels
from bench.harness import data, machine
from bench.harness.machine import provenance, synchronize
from bench.report.tables import Table, percent, terminal
from ift_kernels import backends as installed
from ift_kernels.backends import contract
from ift_kernels.common.transform import LogitTransform

CLEARLY = 0.97  # of the time of the backend that comes first
PLAIN = LogitTransform()
Configs = list[dict[str, int]]


class Call(NamedTuple):
    """A function with its arguments; what it changes, it may change again and again."""

    bytes: int  # that have to be moved
    run: Callable[[], Any]
    results: Callable[[], list[Tensor]]  # of the last run
    reset: Callable[[], Any] = lambda: None  # before a run whose results are compared

    def fresh(self) -> list[Tensor]:
        """Copies of what a run from the start gives."""
        self.reset()
        self.run()
        return [tensor.clone() for tensor in self.results()]


def returning(function: Callable[[], list[Tensor]], moved: int = 0) -> Call:
    """A call of a function that returns its results."""
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = function()

    return Call(moved, run, lambda: kept)


def calls(
    backend: contract.Backend, device: torch.device, rows: int, columns: int
) -> dict[str, Call]:
    """By name of the function; bfloat16 logits, float32 sequences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).to(device, torch.bfloat16)
    target = torch.arange(rows, device=device) % columns
    level = x.float().amax(1) - 2
    norm = torch.stack([x.float().amax(1), torch.full((rows,), 3.0, device=device)])
    coef = torch.ones(4, rows, device=device)
    state = contract.new_state(rows, device)
    y = x.clone()
    row_gradient = contract.RowGradient(target, norm, coef)
    values = torch.full((rows, 2), -torch.inf, device=device)
    ids = torch.full((rows, 2), -1, device=device)
    best, logit = torch.full((2, rows), -torch.inf, device=device)
    drawn = torch.zeros_like(target)
    row_weights = torch.rand(rows, generator=generator).to(device)
    sequence = torch.randn(rows, columns, generator=generator).to(device)
    table = x[: max(rows // 4, 1)]
    tokens = torch.arange(rows, device=device)[None] % len(table)
    grad = torch.randn(1, rows, columns, generator=generator).to(device, torch.bfloat16)
    chunk, moved = contract.Chunk(x), x.numel() * x.element_size()
    two = contract.Chunk(x.flip(0)), "jsd", 0.5, torch.stack([norm, norm])  # teacher and options
    *sums, zero = torch.zeros(3, rows, dtype=torch.float64, device=device)
    d_prob = x.float()
    mixing = (tokens, tokens.roll(1, 1), tokens, None, 0.2, -100)
    # Every eighth column is active, in blocks and buckets of the default size.
    block, bucket, width = 128, 2048, -(-len(range(0, columns, 8)) // 32) * 32
    few = (torch.arange(columns, device=device) % 8 == 0).to(torch.uint8)
    few = few.expand(-(-rows // block), -1).contiguous()
    active = x.new_zeros(block * len(few) * width)
    tails = torch.zeros(-(-columns // bucket), rows, device=device)
    tail_weights = torch.rand(columns, generator=generator).to(device)

    def new_state() -> None:
        for tensor, first in zip(state, contract.new_state(rows, device), strict=True):
            tensor.copy_(first)

    def no_values() -> None:
        values.fill_(-torch.inf)
        ids.fill_(-1)

    def no_best() -> None:
        best.fill_(-torch.inf)
        drawn.zero_()

    def statistics_of(track: int) -> Call:
        return Call(
            moved, lambda: backend.stats_update(chunk, target, state, track),
            lambda: [state.values[:3 if track > 1 else 2], state.argmax], new_state,
        )  # fmt: skip

    return {
        "stats_update": statistics_of(contract.TRACK_ARGMAX),
        "stats_update, all": statistics_of(contract.TRACK_ALL),
        "dlogits_": Call(2 * moved, lambda: backend.dlogits_(contract.Chunk(y), row_gradient),
                         lambda: [y], lambda: y.copy_(x)),
        "probabilities_": Call(2 * moved, lambda: backend.probabilities_(contract.Chunk(y), norm),
                               lambda: [y], lambda: y.copy_(x)),
        "softmax_gradient_": Call(
            4 * moved, lambda: backend.softmax_gradient_(contract.Chunk(y), d_prob, norm, norm[1]),
            lambda: [y], lambda: (y.copy_(x), d_prob.copy_(x))),
        "divergence_terms": Call(2 * moved, lambda: backend.divergence_terms(chunk, *two, *sums),
                                 lambda: sums, lambda: [s.zero_() for s in sums]),
        "divergence_gradient_": Call(
            3 * moved, lambda: backend.divergence_gradient_(contract.Chunk(y), *two, zero, norm[1]),
            lambda: [y], lambda: y.copy_(x)),
        "top_k_update": Call(moved, lambda: backend.top_k_update(chunk, values, ids),
                             lambda: [values, ids], no_values),
        "gumbel_update": Call(
            moved, lambda: backend.gumbel_update(chunk, 1, target, best, logit, drawn),
            lambda: [best, drawn], no_best,
        ),
        "active_mask": returning(lambda: [backend.active_mask(chunk, target, level, 32)], moved),
        "split_active": Call(
            moved + moved // 8,
            lambda: backend.split_active(x, few, block, bucket, tail_weights, tails, active),
            lambda: [tails, active],
        ),
        "bucket_sums": returning(lambda: [backend.bucket_sums(x, 64, row_weights)], moved),
        "scan": returning(lambda: [backend.scan(sequence, None, None, 0.95, True)], 4 * moved),
        "residual": returning(lambda: [backend.residual(table, *mixing)], 3 * moved),
        "residual_grad": returning(
            lambda: [backend.residual_grad(grad, *mixing, len(table))], moved + moved // 4
        ),
    }  # fmt: skip


def seconds(
    run: Callable[[], Any], device: torch.device, samples: int, repeats: int = 1, wait: bool = True
) -> float:
    """Median time of a call; without `wait` that of the host alone."""
    run()
    times = []
    for _ in range(samples):
        synchronize(device)
        start = machine.now()
        for _ in range(repeats):
            run()
        if wait:
            synchronize(device)
        times.append((machine.now() - start) / repeats)
        synchronize(device)
    return statistics.median(times)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether two results agree but for rounding; ids may differ where logits nearly tie."""
    for a, b in zip(found, wanted, strict=True):
        if a.is_floating_point():
            if not torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2, equal_nan=True):
                return False
        elif float((a != b).double().mean()) > 0.01:
            return False
    return True


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """Options of both commands."""
    found = argparse.ArgumentParser(prog=f"python -m bench {name}", description=about)
    found.add_argument("--dry-run", action="store_true", help="in the interpreter; no GPU needed")
    return found


def interpreted(name: str, dry: bool, arguments: Sequence[str]) -> torch.device:
    """The device to measure; a dry run starts again in a new process, and this one ends with it.

    TRITON_INTERPRET decides when kernels are loaded.
    """
    if not dry and not torch.cuda.is_available():
        raise SystemExit(f"python -m bench {name}: torch sees no GPU; --dry-run goes without one")
    if dry and os.environ.get("TRITON_INTERPRET") != "1":
        again = [sys.executable, "-m", "bench", name, *arguments]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        raise SystemExit(subprocess.run(again, env=env).returncode)
    return torch.device("cpu") if dry else torch.device("cuda", 0)


# --- backends -------------------------------------------------------------------------------------


def compare(device: torch.device, dry: bool) -> dict[str, Any]:
    """Rows of the report, the bandwidth of a copy, and the table of what is faster."""
    serving = {
        name: module
        for name, module in installed.BACKENDS.items()
        if not module.unsupported_reason(device, torch.bfloat16)
    }
    large, small = ((5, 96), (3, 40)) if dry else ((8192, 32000), (16, 1024))
    samples, repeats = (1, 1) if dry else (5, 20)
    source = torch.zeros(large, dtype=torch.bfloat16, device=device)
    goal = torch.empty_like(source)
    copy = seconds(lambda: goal.copy_(source), device, samples, repeats)
    copy_rate = 2 * source.numel() * source.element_size() / copy
    reference = calls(installed.BACKENDS["reference"], device, *large)
    expected = {name: call.fresh() for name, call in reference.items()}
    del reference
    rows: list[dict[str, Any]] = []
    for backend_name, backend in serving.items():
        few = calls(backend, device, *small)
        for name, call in calls(backend, device, *large).items():
            row: dict[str, Any] = {"function": name, "backend": backend_name}
            rows.append(row)
            if not same(call.fresh(), expected[name]):
                row["refused"] = "another result than the reference"
                continue
            row["seconds"] = seconds(call.run, device, samples, repeats)
            row["of_copy"] = call.bytes / row["seconds"] / copy_rate
            row["overhead"] = seconds(few[name].run, device, samples, 10 * repeats, wait=False)
    rows.sort(key=lambda row: list(expected).index(row["function"]))
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


def backends(arguments: Sequence[str]) -> int:
    """``python -m bench backends``: every function of the backends beside each other."""
    options_of = parser("backends", backends.__doc__ or "")
    options_of.add_argument("--json", type=Path, help="write everything measured")
    options = options_of.parse_args(arguments)
    device = interpreted("backends", options.dry_run, arguments)
    found = compare(device, options.dry_run)
    rows = [
        [row["function"], row["backend"], row["refused"], "", ""] if "refused" in row else
        [row["function"], row["backend"], f"{1e6 * row['seconds']:.1f}",
         percent(row["of_copy"], 0), f"{1e6 * row['overhead']:.1f}"]
        for row in found["rows"]
    ]  # fmt: skip
    head = ("function", "backend", "µs", "of copy", "µs on the host, 16 rows")
    Console(width=110).print(terminal(Table("", head, rows)))
    print(f"faster, for ift_kernels/backends/selection.py: {found['faster']}")
    if options.json:
        about = {"provenance": provenance(device, torch.get_num_threads())}
        options.json.write_text(json.dumps(about | found, indent=2) + "\n", encoding="utf-8")
    return 1 if any("refused" in row for row in found["rows"]) else 0


# --- tune -----------------------------------------------------------------------------------------


def grid(**values: tuple[int, ...]) -> Configs:
    """Every combination."""
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


ROWWISE = grid(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8))
# Kernel → the function that launches it, and candidates.
EPILOGUES = {
    "stats": ("stats_update", ROWWISE), "dlogits": ("dlogits_", ROWWISE),
    "divergence": ("divergence_terms", ROWWISE),
    "top_k": ("top_k_update", ROWWISE), "gumbel": ("gumbel_update", ROWWISE),
    "scan": ("scan", ROWWISE), "residual": ("residual", ROWWISE),
    "mask": ("active_mask", grid(ROWS=(16, 32), BLOCK=(64, 128), num_warps=(2, 4, 8))),
    "split": ("split_active", grid(ROWS=(8, 16, 32), BLOCK=(64, 128, 256), num_warps=(4, 8))),
    "segments": ("bucket_sums", grid(ITEMS=(4, 8, 16), BLOCK=(128, 256, 512), num_warps=(2, 4))),
}  # fmt: skip
CANDIDATES: dict[str, Configs] = {name: some for name, (_, some) in EPILOGUES.items()} | {
    "fused": grid(ROWS=(64, 128), COLUMNS=(16, 32, 64, 128), INNER=(32, 64), num_warps=(4, 8),
                  num_stages=(2, 3, 4)),
    "forward": grid(FUSED=(0, 1)),
}  # fmt: skip


def subjects(dry: bool, device: torch.device) -> Iterator[tuple[str, str, Call]]:
    """(kernel, class of shapes, call that uses it), on data of the size that matters."""
    backend, rows = installed.BACKENDS["triton"], 3 if dry else 8192
    for kind, columns in (("narrow", 200 if dry else 1024), ("wide", 2100 if dry else 8192)):
        found = calls(backend, device, rows, columns)
        for kernel, (function, _) in EPILOGUES.items():
            yield kernel, kind, found[function]
        yield "stats", f"{kind}-all", found["stats_update, all"]
    for kind, dtype in (("half", torch.bfloat16), ("single", torch.float32)):
        yield from _products(kind, dtype, dry, device)


def _products(
    kind: str, dtype: torch.dtype, dry: bool, device: torch.device
) -> Iterator[tuple[str, str, Call]]:
    """The same of kernels with products, and of the choice between schedules."""
    from ift_kernels.backends.triton.fused import fused_statistics  # imports Triton

    n, d, v = (20, 16, 300) if dry else (8192, 4096, 32000)
    made = data.generate(n, d, v, dtype=dtype)
    hidden, weight, target = (t.to(device) for t in (made.hidden, made.weight, made.target))

    def fused(track: int) -> list[Tensor]:
        state = contract.new_state(n, device)
        fused_statistics(hidden, weight, None, PLAIN, target, state, track)
        return [state.values[:3]]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            logprob = ift_kernels.linear_logprobs(hidden, weight, target).logprob
        assert logprob is not None
        return [logprob]

    yield "fused", kind, returning(lambda: fused(contract.TRACK_ARGMAX))
    yield "fused", f"{kind}-all", returning(lambda: fused(contract.TRACK_ALL))
    yield "forward", kind, returning(forward)


def measure(device: torch.device, dry: bool, only: list[str] | None) -> dict[str, Any]:
    """What is fastest: {kernel: {class: configuration}}, and all times."""
    from ift_kernels.backends.triton import launch  # imports Triton

    best: dict[str, dict[str, Any]] = {}
    times: list[dict[str, Any]] = []
    for kernel, kind, call in subjects(dry, device):
        if only and kernel not in only:
            continue
        wanted, some = call.fresh(), CANDIDATES[kernel]
        results = []
        for values in some[:: max(1, len(some) // 2)] if dry else some:
            row: dict[str, Any] = {"kernel": kernel, "class": kind, "config": values}
            with launch.use_config(kernel, values):
                try:
                    if same(call.fresh(), wanted):
                        row["seconds"] = seconds(call.run, device, 1 if dry else 30)
                        results.append((row["seconds"], values))
                    else:
                        row["refused"] = "another result"
                except Exception as error:  # more shared memory than there is, say
                    row["refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
            times.append(row)
        if results:
            best.setdefault(kernel, {})[kind] = min(results, key=lambda r: r[0])[1]
    return {"best": best, "times": times}


def write(path: Path, architecture: str, found: dict[str, Any], about: dict[str, Any]) -> None:
    """Put what was found into the table, beside what other architectures have."""
    table = json.loads(path.read_text(encoding="utf-8"))
    of_arch = table["architectures"].setdefault(architecture, {})
    for kernel, kinds in found["best"].items():
        of_arch.setdefault(kernel, {}).update(kinds)
    table["measured"][architecture] = {"provenance": about, "times": found["times"]}
    path.write_text(format_table(table), encoding="utf-8")


def format_table(table: dict[str, Any]) -> str:
    """JSON with one configuration a line."""
    rows = []
    for architecture, kernels in table["architectures"].items():
        lines = []
        for kernel, kinds in sorted(kernels.items()):
            some = (f'        "{kind}": {json.dumps(values)}' for kind, values in kinds.items())
            lines.append(f'      "{kernel}": {{\n' + ",\n".join(some) + "\n      }")
        rows.append(f'    "{architecture}": {{\n' + ",\n".join(lines) + "\n    }")
    measured = json.dumps(table["measured"], indent=2).replace("\n", "\n  ")
    head = f'{{\n  "schema": {table["schema"]},\n  "measured": {measured},\n  "architectures": {{\n'
    return head + ",\n".join(rows) + "\n  }\n}\n"


def tune(arguments: Sequence[str]) -> int:
    """``python -m bench tune``: launch configurations of the Triton backend."""
    options_of = parser("tune", tune.__doc__ or "")
    options_of.add_argument("--kernels", nargs="+", choices=CANDIDATES, help="default: all")
    options_of.add_argument("--output", type=Path, help="default: the committed table")
    options = options_of.parse_args(arguments)
    device = interpreted("tune", options.dry_run, arguments)
    from ift_kernels.backends.triton import launch  # imports Triton

    with ift_kernels.use_backend("triton"):
        found = measure(device, options.dry_run, options.kernels)
    for row in found["times"]:
        what = f"{row['seconds'] * 1e6:10.1f} µs" if "seconds" in row else row["refused"]
        print(f"{row['kernel']:10} {row['class']:8} {json.dumps(row['config']):50} {what}")
    output = options.output or (None if options.dry_run else launch.TABLE)
    if output is not None:
        if not output.exists():
            output.write_text(launch.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
        about = provenance(device, torch.get_num_threads())
        write(output, launch.architecture(device.index), found, about)
        print(f"written: {output}")
    return 0 if found["best"] else 1
