"""Tune: launch configurations of the Triton backend, measured on this GPU and written to its table.

Every candidate is checked before it is timed: its result must be that of the committed
configuration. ``--dry-run`` goes the whole way without a GPU, in Triton's interpreter, on shapes so
small that the times mean nothing; it writes only where ``--output`` says.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ift_kernels
from bench import clock, lmlike
from bench.memory import synchronize
from bench.provenance import provenance

Call = Callable[[], list[Tensor]]
Configs = list[dict[str, int]]


def grid(**values: tuple[int, ...]) -> Configs:
    """Every combination."""
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


ROWWISE = grid(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8))
TILE = {
    "COLUMNS": (16, 32, 64, 128),
    "INNER": (32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
SQUARE = grid(ROWS=(16, 32), BLOCK=(64, 128), num_warps=(2, 4, 8))
CANDIDATES: dict[str, Configs] = {
    "stats": ROWWISE, "dlogits": ROWWISE, "top_k": ROWWISE, "gumbel": ROWWISE, "scan": ROWWISE,
    "residual": ROWWISE, "marks": SQUARE,
    "collect": grid(ROWS=(16, 32), BLOCK=(32, 64), num_warps=(2, 4, 8)),
    "rows": grid(ROWS=(8, 16, 32), BLOCK=(64, 128, 256), num_warps=(4, 8)),
    "segments": grid(ITEMS=(4, 8, 16), BLOCK=(128, 256, 512), num_warps=(2, 4)),
    "gradient": grid(ITEMS=(8, 16, 32), ROWS=(32, 64), num_warps=(4, 8)),
    "fused": grid(ROWS=(64, 128), **TILE), "fused-mark": grid(**TILE),
    "products": grid(ITEMS=(16, 32, 64), INNER=(32, 64), num_warps=(4, 8), num_stages=(2, 3, 4)),
    "hidden": grid(ITEMS=(16, 32, 64), WIDTH=(64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)),
    "weight": grid(IDS=(16, 32, 64), WIDTH=(64, 128), num_warps=(4, 8), num_stages=(2, 3)),
    "forward": grid(FUSED=(0, 1)), "active": grid(FUSED=(0, 1)),
}  # fmt: skip
KERNELS = [name for name in CANDIDATES if name != "fused-mark"]
BLOCK, TILE_OF_TAIL = 128, 2048  # as `ActiveSet` has them


def subjects(dry: bool, device: torch.device) -> Iterator[tuple[str, str, Call]]:
    """(kernel, class of shapes, call that uses it), on data of the size that matters."""
    from ift_kernels.backends import triton as backend
    from ift_kernels.transform import LogitTransform

    dtype, rows = torch.bfloat16, 3 if dry else 8192
    plain = LogitTransform()
    generator = torch.Generator().manual_seed(0)
    for kind, columns in (("narrow", 200 if dry else 1024), ("wide", 2100 if dry else 8192)):
        x = torch.randn(rows, columns, generator=generator).to(device, dtype)
        target = torch.arange(rows, device=device)
        norm = torch.stack([x.float().amax(1), torch.full((rows,), 3.0, device=device)])
        coef = torch.ones(4, rows, device=device)
        here = x, None, plain

        def stats(track: int, here: Any = here, target: Tensor = target) -> list[Tensor]:
            state, argmax = backend.new_state(len(target), device)
            backend.stats_update(*here, target, 0, state, argmax, track)
            return [state[:3], argmax]

        def dlogits(here: Any = here, rest: Any = (target, 0, norm, coef)) -> list[Tensor]:
            y = here[0].clone()
            backend.dlogits_(y, *here[1:], *rest)
            return [y]

        def top_k(here: Any = here) -> list[Tensor]:
            n = len(here[0])
            values = torch.full((n, 2), -torch.inf, device=device)
            ids = torch.full((n, 2), -1, device=device)
            backend.top_k_update(*here, 0, values, ids)
            return [values, ids]

        def gumbel(here: Any = here, target: Tensor = target) -> list[Tensor]:
            best, logit = torch.full((2, len(target)), -torch.inf, device=device)
            ids = torch.zeros_like(target)
            backend.gumbel_update(*here, 0, 1, target, best, logit, ids)
            return [best, ids]

        level = x.float().amax(1) - 2

        def marks(here: Any = here, target: Tensor = target, level: Tensor = level) -> list[Tensor]:
            return [backend.active_marks(*here, target, 0, level, 32)]

        found = marks()[0]
        spread = torch.rand(x.shape[1], generator=generator).to(device)

        def collect(here: Any = here, found: Tensor = found, level: Tensor = level) -> list[Tensor]:
            n, c = here[0].shape
            store = here[0].new_empty(int(found.sum()), 32)
            sums = torch.empty(3, -(-c // 64), n, device=device)
            backend.active_collect(*here, found, level, 64, store, sums)
            return [store, sums]

        def apart(x: Tensor = x, found: Tensor = found, spread: Tensor = spread) -> list[Tensor]:
            mean = torch.empty(-(-x.shape[1] // 64), len(x), device=device)
            widths = (found.sum(1) + 31) // 32 * 32
            active = x.new_zeros(32 * int(widths.sum()))  # rows beyond the last stay as they are
            backend.active_rows(x, found, 32, 64, spread, mean, active)
            return [mean, active]

        def scan(x: Tensor = x) -> list[Tensor]:
            return [backend.scan(x, None, None, 0.95, True)]

        ids = torch.arange(16 if dry else 8192, device=device).view(2, -1) % rows

        def residual(x: Tensor = x, ids: Tensor = ids) -> list[Tensor]:
            return [backend.residual(x, ids, ids, ids, None, 0.2, -100)]

        share = torch.rand(len(x), generator=generator).to(device)

        def segments(x: Tensor = x, share: Tensor = share) -> list[Tensor]:
            return [backend.tile_sums(x, 64, share)]

        yield "rows", kind, apart
        yield "stats", kind, functools.partial(stats, 1)
        yield "stats", f"{kind}-all", functools.partial(stats, 31)
        for call in (dlogits, top_k, gumbel, marks, collect, scan, residual, segments):
            yield call.__name__, kind, call
    for kind, single in (("half", torch.bfloat16), ("single", torch.float32)):
        yield from _products(kind, single, dry, device)


def _products(
    kind: str, dtype: torch.dtype, dry: bool, device: torch.device
) -> Iterator[tuple[str, str, Call]]:
    """The same of kernels with products, and of the choice between schedules."""
    from ift_kernels.backends import triton as backend
    from ift_kernels.backends.triton import fused, gathered
    from ift_kernels.transform import LogitTransform

    plain, generator = LogitTransform(), torch.Generator().manual_seed(0)
    n, d, v = (20, 16, 300) if dry else (8192, 4096, 32000)
    block, tile = (32, 128) if dry else (BLOCK, TILE_OF_TAIL)
    # Random logits would leave the schedule of the active set nothing to do.
    data = lmlike.generate(n, d, v, dtype=dtype)
    hidden, weight, at = (t.to(device) for t in (data.hidden, data.weight, data.target))

    def statistics(track: int, mark: bool) -> list[Tensor]:
        state, argmax = backend.new_state(n, device)
        marks = torch.empty((-(-n // block), v), dtype=torch.uint8, device=device)
        tails = torch.zeros((4, -(-v // tile), n), device=device)
        marking = fused.Marking(marks, tails) if mark else None
        here = hidden, weight, None, plain, at, state, argmax, track
        fused.fused_statistics(*here, marking, block, tile, math.log(1e-3))
        return [state[:3]]  # marks are a superset of the true ones, which blocks decide about

    for mark in (False, True):
        for track, all_ in ((1, ""), (31, "-all")):
            name = f"{kind}-{'mark' if mark else 'plain'}{all_}"
            yield "fused", name, functools.partial(statistics, track, mark)

    # A tenth of the columns, in every block.
    marks = (torch.rand(-(-n // block), v, generator=generator) < 0.1).to(device, torch.uint8)
    items = gathered.Items.of(marks, int(marks.sum()), block)
    padded = len(marks) * block
    norm = torch.stack([torch.zeros(padded), torch.full((padded,), 10.0)]).to(device)
    coef = torch.ones(4, padded, device=device)
    base = torch.zeros(-(-v // tile), padded, device=device)
    profile = torch.rand(v, generator=generator).to(device)

    def products() -> list[Tensor]:
        rows = norm, coef, base
        return [items.gradients(hidden, weight, None, plain, at, 0, *rows, tile, profile)]

    store = products()[0]

    def gradient() -> list[Tensor]:
        again = store.clone()
        rest = at, 0, norm, coef, base, tile, profile
        backend.active_gradient_(again, items.pairs, n, None, plain, *rest)
        return [again]

    def to_hidden() -> list[Tensor]:
        out = torch.zeros(n, d, device=device)
        items.add_to_hidden(store, weight, out)
        return [out]

    def to_weight() -> list[Tensor]:
        out, common = torch.empty_like(weight), torch.zeros(-(-v // tile), d, device=device)
        items.weight_gradient(store, hidden, common, tile, profile, out)
        return [out]

    yield "products", kind, products
    yield "hidden", kind, to_hidden
    yield "weight", kind, to_weight
    if kind == "half":
        yield "gradient", "all", gradient

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [ift_kernels.linear_logprobs(hidden, weight, at).logprob]

    yield "forward", kind, forward
    if kind == "half":
        chosen = ift_kernels.ActiveSet(block=block, tail_tile=tile, dW="active")
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def active() -> list[Tensor]:
            loss = ift_kernels.linear_cross_entropy(*leaves, at, gradient=chosen)
            # The schedules keep the same columns or more, so gradients agree in their larger part.
            return [loss.detach(), torch.autograd.grad(loss, leaves[0])[0]]

        yield "active", "all", active


def seconds(call: Call, device: torch.device, rounds: int) -> float:
    """Median time of a call, after one that compiles."""
    call()
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = clock.now()
        call()
        synchronize(device)
        times.append(clock.now() - start)
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


def tune(device: torch.device, dry: bool, only: list[str] | None) -> dict[str, Any]:
    """What is fastest: {kernel: {class: configuration}}, and all times."""
    from ift_kernels.backends.triton import launch

    best: dict[str, dict[str, Any]] = {}
    times: list[dict[str, Any]] = []
    for kernel, kind, call in subjects(dry, device):
        if only and kernel not in only:
            continue
        wanted = call()
        # A kernel that marks takes as many rows as a block has.
        several = CANDIDATES["fused-mark" if "mark" in kind else kernel]
        candidates = several[:: max(1, len(several) // 2)] if dry else several
        results = []
        for values in candidates:
            row: dict[str, Any] = {"kernel": kernel, "class": kind, "config": values}
            with launch.use_config(kernel, values):
                try:
                    if same(call(), wanted):
                        row["seconds"] = seconds(call, device, 1 if dry else 30)
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


def main(arguments: list[str]) -> int:
    """``python -m bench tune``."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="in the interpreter; no GPU needed")
    parser.add_argument("--output", type=Path, help="default: the committed table")
    options = parser.parse_args(arguments)
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        # It decides when kernels are loaded: a new process.
        again = [sys.executable, "-m", "bench", "tune", *arguments]
        return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run goes without one")
    from ift_kernels.backends.triton import launch

    device = torch.device("cpu" if options.dry_run else "cuda", None if options.dry_run else 0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ift_kernels.use_backend("triton"))
        found = tune(device, options.dry_run, options.kernels)
    for row in found["times"]:
        what = f"{row['seconds'] * 1e6:10.1f} µs" if "seconds" in row else row["refused"]
        print(f"{row['kernel']:10} {row['class']:8} {json.dumps(row['config']):50} {what}")
    output = options.output or (None if options.dry_run else launch.TABLE)
    if output is not None:
        if not output.exists():
            output.write_text(launch.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
        index = device.index if device.type == "cuda" else None
        write(
            output, launch.architecture(index), found, provenance(device, torch.get_num_threads())
        )
        print(f"written: {output}")
    return 0 if found["best"] else 1
