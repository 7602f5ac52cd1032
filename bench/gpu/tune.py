"""Launch configurations of the Triton backend: measured, and written to its table.

Every candidate is checked before it is timed: its result must be that of the committed
configuration. What counts most comes first: kernels by their share of a training step at 8192
tokens, width 4096 and 128256 ids, and of each the committed configuration and those next to it. A
round takes one candidate of every kernel, and the table is written after each measurement, so the
best so far is safe whenever the time is over.

``--dry-run`` goes the whole way without a GPU, in Triton's interpreter, on shapes so small that the
times mean nothing, and writes only where ``--output`` says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ift_kernels
from bench.harness import data, machine
from bench.harness.machine import provenance
from bench.harness.measure import Subject, seconds
from ift.files import write_text
from ift_kernels import backends as installed
from ift_kernels.backends import contract, reference
from ift_kernels.backends.reference.active import bucket_counts, tail_sums
from ift_kernels.common.transform import LogitTransform

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
    on: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(rows, columns, **on).bfloat16()
    target = torch.arange(rows, device=device) % columns
    norm = torch.stack([x.float().amax(1), torch.full((rows,), 3.0, device=device)])
    coef = torch.ones(4, rows, device=device)
    state = contract.new_state(rows, device)
    y, half = x.clone(), torch.tensor(0.5, device=device)
    row_gradient = contract.RowGradient(target, norm, coef)
    values = torch.full((rows, 2), -torch.inf, device=device)
    ids = torch.full((rows, 2), -1, device=device)
    best, logit = torch.full((2, rows), -torch.inf, device=device)
    drawn = torch.zeros_like(target)
    row_weights = torch.rand(rows, **on)
    sequence = torch.randn(rows, columns, **on)
    table = x[: max(rows // 4, 1)]
    tokens = torch.arange(rows, device=device)[None] % len(table)
    grad = torch.randn(1, rows, columns, **on).bfloat16()
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
    weights, counts = torch.rand(columns, **on), [len(range(0, columns, 8))] * len(few)
    gradients = contract.Chunk(x.float())
    reference.dlogits_(gradients, row_gradient)
    tails = tail_sums(gradients.x, few, block, bucket, weights)
    marked = contract.ActiveColumns(few, bucket_counts(few, bucket), tails)
    take = marked, block, bucket, weights, active, counts, row_gradient
    # Of every row up to 64 ids, from one end of the vocabulary to the other.
    some_ids = torch.arange(0, columns, max(columns // 64, 1), device=device)[:64]
    some_ids = some_ids.expand(rows, -1).contiguous()
    of_ids = torch.zeros(some_ids.shape, device=device)
    selected, moved_ids = contract.Selected(some_ids, of_ids), some_ids.numel() * 14

    def mark(some: Tensor | None) -> list[Tensor]:
        # Not the rest: a backend may count other parts, and leave the tail to `take_active`.
        return [backend.mark_active(chunk, row_gradient, -2.0, block, bucket, some).mask]

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
        "scale_": Call(2 * moved, lambda: backend.scale_(y, half), lambda: [y],
                       lambda: y.copy_(x)),
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
        "take_selected": Call(
            moved_ids, lambda: backend.take_selected(contract.Chunk(y), selected),
            lambda: [y, of_ids], lambda: y.copy_(x)),
        "put_selected": Call(
            moved_ids, lambda: backend.put_selected(contract.Chunk(y), selected),
            lambda: [y], lambda: (y.copy_(x), of_ids.fill_(0.5))),
        "mark_active": returning(lambda: mark(weights), moved),
        "mark_active, mask alone": returning(lambda: mark(None), moved),
        "take_active": Call(
            moved + moved // 8, lambda: backend.take_active(contract.Chunk(y), *take),
            lambda: [active], lambda: y.copy_(x),
        ),
        "bucket_sums": returning(lambda: [backend.bucket_sums(x, 64, row_weights)], moved),
        "scan": returning(lambda: [backend.scan(sequence, None, None, 0.95, True)], 4 * moved),
        "residual": returning(lambda: [backend.residual(table, *mixing)], 3 * moved),
        "residual_grad": returning(
            lambda: [backend.residual_grad(grad, *mixing, len(table))], moved + moved // 4
        ),
    }  # fmt: skip


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether two results agree but for rounding; ids may differ where logits nearly tie."""
    for a, b in zip(found, wanted, strict=True):
        if a.is_floating_point():
            if not torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2, equal_nan=True):
                return False
        elif float((a != b).double().mean()) > 0.01:
            return False
    return True


# --- tune -----------------------------------------------------------------------------------------


def grid(**values: tuple[int, ...]) -> Configs:
    """Every combination."""
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


ROWWISE = grid(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8))
# Kernel → the function that launches it, and candidates; by their share of a training step.
EPILOGUES = {
    "dlogits": ("dlogits_", ROWWISE), "stats": ("stats_update", ROWWISE),
    "divergence": ("divergence_terms", ROWWISE),
    "mark": ("mark_active", grid(ROWS=(128,), BLOCK=(32, 64), num_warps=(4, 8, 16))),
    "take": ("take_active", grid(ROWS=(8, 16, 32), BLOCK=(64, 128, 256), num_warps=(4, 8))),
    "list": ("take_active", grid(BLOCK=(256, 512, 1024, 2048), num_warps=(2, 4))),
    "mask": ("mark_active, mask alone",
             grid(ROWS=(16, 32), BLOCK=(64, 128), num_warps=(2, 4, 8))),
    "segments": ("bucket_sums", grid(ITEMS=(4, 8, 16), BLOCK=(128, 256, 512), num_warps=(2, 4))),
    "residual": ("residual", ROWWISE), "scan": ("scan", ROWWISE),
    "top_k": ("top_k_update", ROWWISE), "gumbel": ("gumbel_update", ROWWISE),
}  # fmt: skip
CANDIDATES: dict[str, Configs] = {name: some for name, (_, some) in EPILOGUES.items()} | {
    "fused": grid(ROWS=(64, 128), COLUMNS=(16, 32, 64, 128), INNER=(32, 64), num_warps=(4, 8),
                  num_stages=(2, 3, 4)),
    "gathered": grid(ROWS=(64, 128), COLUMNS=(128, 256), INNER=(32, 64), num_warps=(4, 8),
                     num_stages=(3, 4, 5)),
    "forward": grid(FUSED=(0, 1)),
}  # fmt: skip
FLAGSHIP = ("wide", "wide-all", "half")  # classes of its tiles, and of 16-bit products


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
    from ift_kernels.backends.triton.gathered import add_active_products

    n, d, v = (20, 16, 300) if dry else (8192, 4096, 32000)
    made = data.generate(n, d, v, dtype=dtype, device=str(device))
    hidden, weight, target = made.hidden, made.weight, made.target

    def fused(track: int) -> list[Tensor]:
        state = contract.new_state(n, device)
        fused_statistics(hidden, weight, None, PLAIN, target, state, track)
        return [state.values[:3]]

    def gathered() -> list[Tensor]:
        total = torch.zeros(n, d, device=device)
        add_active_products(active, counts, 128, ids, weight, total)
        return [total]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            logprob = ift_kernels.linear_logprobs(hidden, weight, target).logprob
        assert logprob is not None
        return [logprob]

    if kind == "half":  # every eighth column is active, shifted from block to block
        mask = (torch.arange(-(-n // 128) * v, device=device).view(-1, v) % 8 == 0).to(torch.uint8)
        ids, counts = mask.nonzero()[:, 1], mask.sum(1, dtype=torch.int32)
        active = torch.ones(128 * len(mask) * (-(-v // 8) + 32), dtype=dtype, device=device)
        yield "gathered", kind, returning(gathered)
    yield "fused", kind, returning(lambda: fused(contract.TRACK_ARGMAX))
    yield "fused", f"{kind}-all", returning(lambda: fused(contract.TRACK_ALL))
    yield "forward", kind, returning(forward)


def candidates(kernel: str, committed: dict[str, int]) -> Configs:
    """The committed configuration, then the others, the nearest first."""

    def distance(values: dict[str, int]) -> float:
        steps = (max(v, 1) / max(committed.get(name, v), 1) for name, v in values.items())
        return sum(abs(math.log2(step)) for step in steps)

    return [committed, *sorted((c for c in CANDIDATES[kernel] if c != committed), key=distance)]


def measure(
    device: torch.device, dry: bool, only: list[str] | None, budget: machine.Budget
) -> Iterator[dict[str, Any]]:
    """The rows of the table of times, one by one: a configuration each, in rounds of kernels."""
    from ift_kernels.backends.triton import launch  # imports Triton

    def attempts(kernel: str, kind: str, call: Call) -> Iterator[dict[str, Any]]:
        committed = launch.config(kernel, kind, device)
        wanted = call.fresh()
        timed = Subject(call.run, call.run, lambda result: {}, device)
        some = candidates(kernel, committed)
        for values in some[:2] if dry else some:
            row: dict[str, Any] = {"kernel": kernel, "class": kind, "config": values}
            with launch.use_config(kernel, values):
                try:
                    if same(call.fresh(), wanted):
                        row["seconds"] = seconds(timed, 1 if dry else 9)
                    else:
                        row["refused"] = "another result"
                except Exception as error:  # more shared memory than there is, say
                    row["refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
            yield row

    found = [s for s in subjects(dry, device) if not only or s[0] in only]
    found.sort(key=lambda s: (s[1] not in FLAGSHIP, list(CANDIDATES).index(s[0])))
    waiting = [attempts(*subject) for subject in found]
    while waiting:
        for each in tuple(waiting):
            if budget.left() <= 0:
                return
            row = next(each, None)
            if row is None:
                waiting.remove(each)
            else:
                yield row


def write(
    path: Path, table: dict[str, Any], architecture: str, rows: list[dict[str, Any]],
    about: dict[str, Any],
) -> None:  # fmt: skip
    """Put what was found into the table, beside what other architectures have."""
    of_arch = table["architectures"].setdefault(architecture, {})
    for row in sorted((r for r in rows if "seconds" in r), key=lambda r: -r["seconds"]):
        of_arch.setdefault(row["kernel"], {})[row["class"]] = row["config"]  # the fastest is last
    table["measured"][architecture] = {"provenance": about, "times": rows}
    write_text(path, format_table(table))


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
    options_of = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    options_of.add_argument("--dry-run", action="store_true", help="in the interpreter; no GPU")
    options_of.add_argument("--kernels", nargs="+", choices=CANDIDATES, help="default: all")
    options_of.add_argument("--minutes", type=float, default=8.0, help="time budget (8)")
    options_of.add_argument("--output", type=Path, help="default: the committed table")
    options = options_of.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        options_of.error("torch sees no GPU; --dry-run goes without one")
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    from ift_kernels.backends.triton import launch  # imports Triton

    output = options.output or (None if options.dry_run else launch.TABLE)
    source = output if output is not None and output.exists() else launch.TABLE
    table = json.loads(source.read_text(encoding="utf-8"))
    about, rows = provenance(device, torch.get_num_threads()), []
    with ift_kernels.use_backend("triton"):
        budget = machine.Budget(options.minutes)
        for row in measure(device, options.dry_run, options.kernels, budget):
            rows.append(row)
            if output is not None:
                write(output, table, launch.architecture(device.index), rows, about)
            what = f"{row['seconds'] * 1e6:10.1f} µs" if "seconds" in row else row["refused"]
            print(f"{row['kernel']:10} {row['class']:8} {json.dumps(row['config']):50} {what}",
                  flush=True)  # fmt: skip
    return 0 if any("seconds" in row for row in rows) else 1
