"""Every launch of the Triton backend, and the bytes that it requests from memory.

Bytes are counted in Triton's interpreter.

`requested` counts an address once for every load or store of a program that has it, whichever cache
would serve it; `least` counts it once for a whole launch when read and once when written. Where the
two agree nothing is read twice. ``python -m bench.gpu.traffic ARCHITECTURE`` prints JSON, by `key`;
it has to be a process of its own, because TRITON_INTERPRET decides when kernels are imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.harness.machine import ROOT
from ift_kernels.backends import contract
from ift_kernels.backends import triton as backend
from ift_kernels.backends.triton import launch
from ift_kernels.common.transform import LogitTransform

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PLAIN, FULL = LogitTransform(), LogitTransform(0.7, 5.0, 1.3)
HEAD = (256, 512, 256)  # enough for every product to be formed in several tiles


def launches(
    dtype: torch.dtype, full: bool, head: tuple[int, int, int] = (256, 4096, 1024)
) -> None:
    """Make every launch of the backend once for each class of shapes; those of products on `head`.

    On whole tiles with rows on cache lines, as the schedules form them; few rows, to save memory.
    """
    for columns in (1024, 4096):
        _epilogues(dtype, full, columns)
        _whole_operations(dtype, columns)
    _products(dtype, full, *head)


def irregular_launches() -> None:
    """Float16, and rows of odd sizes that begin anywhere, as those of a caller's own head may."""
    _epilogues(torch.float16, False, 4096)
    _epilogues(torch.float16, False, 1021, 1)
    _whole_operations(torch.bfloat16, 1021)


def _epilogues(dtype: torch.dtype, full: bool, c: int, gap: int = 0) -> None:
    """`gap`: elements before the first row of products, and beside each."""
    n, transform = 64, FULL if full else PLAIN
    both = [torch.zeros(gap + n * (c + gap), dtype=dtype)[gap:] for _ in range(2)]
    x, y = (storage.view(n, c + gap)[:, :c] for storage in both)
    target = torch.zeros(n, dtype=torch.int64)
    norm, coef, bias = torch.zeros(2, n), torch.zeros(4, n), torch.zeros(c) if full else None
    chunk = contract.Chunk(x, bias, transform)
    state = contract.new_state(n, x.device)
    for track in (contract.TRACK_ALL,) if full else (0, contract.TRACK_ARGMAX):
        for rows in (slice(2), slice(n)):  # split or not
            part = chunk._replace(x=x[rows])
            backend.stats_update(part, target[rows], state.rows(rows), track)
    backend.dlogits_(chunk, contract.RowGradient(target, norm, coef))
    backend.probabilities_(chunk, norm)
    prob = x.clone() if full else None
    backend.softmax_gradient_(chunk, torch.zeros(n, c), norm, norm[0], prob)
    rows, norms = torch.zeros(n, dtype=torch.float64), norm.expand(2, 2, n).contiguous()
    for kind in ("jsd",) if full else contract.KINDS:
        two = chunk, chunk._replace(x=y), kind, 0.5, norms
        backend.divergence_terms(*two, rows, rows.clone())
        backend.divergence_gradient_(*two, rows, norm[0], rows if kind == "forward" else None)
    apart = contract.Selected(torch.arange(8).expand(n, 8).contiguous(), torch.zeros(n, 8))
    backend.take_selected(chunk, apart)
    backend.put_selected(chunk, apart)
    backend.scale_(x.contiguous(), torch.tensor(0.5))
    k = 64 if full else 2
    backend.top_k_update(chunk, torch.zeros(n, k), torch.zeros(n, k, dtype=torch.int64))
    best = torch.zeros(n)
    backend.gumbel_update(chunk, 3, target, best, best.clone(), target.clone())
    backend.active_mask(chunk, target, best, 32)
    few = (torch.arange(2 * c) % 8 == 0).view(2, c)  # active columns of two blocks
    active, sums = x.new_empty(n * c // 4), torch.empty(-(-c // 512), n)
    split = few.to(torch.uint8), 32, 512, torch.ones(c), sums, active
    for row_gradient in (None, contract.RowGradient(target, norm, coef)):
        backend.split_active(chunk, *split, row_gradient)


def _whole_operations(dtype: torch.dtype, width: int) -> None:
    at = torch.zeros(48, dtype=torch.int64)
    table = torch.zeros(128, width, dtype=dtype)
    backend.bucket_sums(table, 64, torch.zeros(128))
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
    state = contract.new_state(n, hidden.device)
    with launch.use_config("forward", {"FUSED": 1}):
        for track in (contract.TRACK_ALL,) if full else (0, contract.TRACK_ARGMAX):
            backend.fused_statistics(hidden, weight, bias, transform, target, state, track)
    ids = torch.arange(0, 2 * v, 8) % v  # of two blocks, every eighth
    mask = (torch.arange(2 * v) % 8 == 0).view(2, v).to(torch.uint8)
    active, total = hidden.new_zeros(n * v // 8), torch.zeros(n, d)
    backend.add_active_products(active, mask, n // 2, ids, weight, total)


class Bytes(NamedTuple):
    """Of a launch, per element of the tensor that it touches most of."""

    requested: float
    least: float

    @property
    def ratio(self) -> float:
        """How often what is needed once is requested."""
        return self.requested / self.least


def key(name: str, about: str) -> str:
    """The name of a variant: constants in capitals only, and not the precision of products."""
    types = DTYPES.values()
    kept = [
        word for word in about.split()
        if word in types or (word.partition("=")[0].isupper() and not word.startswith("PRECISION"))
    ]  # fmt: skip
    return " ".join([name, *sorted(kept)])


def measure(architecture: str) -> dict[str, Bytes]:
    """Of every launch that `launches` makes, by key; counted in another process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.traffic", architecture],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return {name: Bytes(*values) for name, values in json.loads(done.stdout).items()}


class _Counter:
    """Of one launch: which elements of which storages it reads and writes."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.requested = 0
        self.touched: dict[int, tuple[int, dict[str, Any]]] = {}  # by address: size, bitmaps
        for tensor in tensors:
            storage = tensor.untyped_storage()
            count = storage.nbytes() // tensor.element_size()
            maps = {way: np.zeros(count, dtype=bool) for way in ("read", "written")}
            self.touched[storage.data_ptr()] = tensor.element_size(), maps

    def note(self, way: str, addresses: Any) -> None:
        if not addresses.size:
            return
        distinct = np.unique(addresses.astype(np.int64))
        base = max(at for at in self.touched if at <= int(distinct[0]))
        size, maps = self.touched[base]
        maps[way][(distinct - base) // size] = True
        self.requested += size * len(distinct)

    def result(self) -> Bytes | None:
        """None where nothing was to be done."""
        least = sum(
            size * int(bits.sum()) for size, maps in self.touched.values() for bits in maps.values()
        )
        most = max(
            (size * int(bits.sum()), size)
            for size, maps in self.touched.values()
            for bits in [maps["read"] | maps["written"]]
        )
        elements = most[0] // most[1]
        return Bytes(self.requested / elements, least / elements) if elements else None


def everything() -> None:
    """All launches of bfloat16: float32 differs in the size of an element alone."""
    for full in (False, True):
        launches(torch.bfloat16, full, HEAD)


def count(architecture: str, work: Callable[[], None] = everything) -> dict[str, Bytes]:
    """Of what `work` launches; in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    from ift_kernels.backends.triton import launch

    found: dict[str, tuple[int, Bytes]] = {}
    now: list[_Counter] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    original = launch.run

    def noting_load(self: Any, at: Any, mask: Any, *rest: Any) -> Any:
        now[-1].note("read", at.data[mask.data.astype(bool)])
        return load(self, at, mask, *rest)

    def noting_store(self: Any, at: Any, value: Any, mask: Any, *rest: Any) -> Any:
        now[-1].note("written", at.data[mask.data.astype(bool)])
        return store(self, at, value, mask, *rest)

    def run(kernel: Any, programs: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensors = [a for a in (*args, *keywords.values()) if isinstance(a, Tensor)]
        now.append(_Counter(tensors))
        original(kernel, programs, args, keywords)
        counter = now.pop()
        types = dict.fromkeys(DTYPES[t.dtype] for t in tensors if t.dtype in DTYPES)
        half = [t for t in types if t != "fp32"]
        constants = [
            n if v is True else f"{n}={v}"
            for n, v in keywords.items()
            if n.isupper() and v not in (None, False)
        ]
        about = " ".join([*(half or types), *constants])
        name = key(kernel.fn.__name__.removesuffix("_kernel"), about)
        bytes_ = counter.result()
        # Of several launches the largest: the share of what is not data is the smallest there.
        if bytes_ and counter.requested > found.get(name, (0, bytes_))[0]:
            found[name] = counter.requested, bytes_

    InterpreterBuilder.create_masked_load = noting_load
    InterpreterBuilder.create_masked_store = noting_store
    launch.run = run
    try:
        with launch.use_architecture(architecture):
            work()
    finally:
        launch.run = original
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
    return {name: bytes_ for name, (_, bytes_) in found.items()}


if __name__ == "__main__":
    print(json.dumps(count(sys.argv[1]), indent=1))
