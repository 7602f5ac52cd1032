"""Products of one size, so that what is made of a row depends on no other row.

A vendor's GEMM sums in an order that depends on the shapes of its operands. With ``deterministic``
every product is of `ROWS` rows and of the same columns whatever the call, its workspace and its
schedule; rows that are missing are zeros. The last product of a call may have fewer rows, of a size
whose results were found to be the same. What a vendor promises nowhere is checked: once for every
shape and number of threads in a process, see `sizes`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ift_kernels.schedule.head import multiply
from ift_kernels.schedule.problem import (
    ALIGN,
    Memory,
    Plan,
    Problem,
    can_form_in_forward,
    in_backward,
)
from ift_kernels.schedule.problem import in_forward as forward_plan

# Rows of a product: on a CPU, fewer are slower; on a GPU, what fills one.
ROWS, ROWS_GPU = 1024, 1024
# Rows that the last product may have, where that changes nothing.
SMALL = (64, *range(128, 1024, 128))
COLUMNS, COLUMNS_GPU = 2048, 8192
CHUNK = 1 << 24  # elements of a chunk of the head, at most
_changing_threads = threading.Lock()


def columns(p: Problem) -> int:
    """Columns of a product."""
    most = COLUMNS_GPU if p.device.is_gpu else COLUMNS
    while most > 256 and most * p.width > CHUNK:
        most //= 2
    parts = -(-p.vocabulary // most)  # of about the same size: of few columns vendors sum otherwise
    return min(-(-p.vocabulary // parts // ALIGN) * ALIGN, p.vocabulary)


def padded_rows(p: Problem, place: torch.device) -> int:
    """Rows of a call once zeros are added."""
    most = ROWS_GPU if p.device.is_gpu else ROWS
    whole, rest = divmod(p.rows, most)
    if rest:
        rest = next(size for size in (*_small(p, place, most), most) if size >= rest)
    return whole * most + rest


def _small(p: Problem, place: torch.device, most: int) -> tuple[int, ...]:
    if place.type == "meta" or not p.rows:
        return ()
    width = columns(p)
    widths = (width,) if p.vocabulary % width == 0 else (width, p.vocabulary % width)
    dtypes = p.operands, p.dtype
    threads = torch.get_num_threads() if place.type == "cpu" else 0
    found = [sizes(place, dtypes, p.width, of, most, threads) for of in widths]
    return tuple(size for size in SMALL if all(size in each for each in found))


@functools.cache
def sizes(
    place: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    width: int,
    columns: int,
    rows: int,
    threads: int,
) -> tuple[int, ...]:
    """Numbers of rows whose products are those of `rows` rows, to the bit.

    `dtypes`: of operands and of products.

    Raises:
        RuntimeError: a row's product depends on its place, on where the result is written, or on
            the number of threads.
    """
    dtype, product = dtypes
    seeded = torch.Generator(place).manual_seed(1)
    options: Any = {"generator": seeded, "device": place, "dtype": torch.float32}
    where = f"{dtype} matrices, D={width}, {columns} columns, on {place}"
    with (
        torch.inference_mode(False), torch.no_grad(), torch.autocast(place.type, enabled=False),
    ):  # fmt: skip
        hidden = torch.randn(rows, width, **options).to(dtype)
        weight = torch.randn(columns, width, **options).to(dtype)
        order = torch.arange(rows, device=place).roll(rows // 3)
        with _one_thread(threads):
            first = _three(hidden, weight, product)
            logits = first[0]
            wide = logits.new_zeros(rows, columns + 64)
            if not torch.equal(_product(hidden[order], weight, product), logits[order]):
                raise _refusal("its place", where)
            if not torch.equal(multiply(hidden, weight.T, wide[:, :columns]), logits):
                raise _refusal("strides", where)
            found = _sizes_like(logits, hidden, weight)
        # As with one thread, or the number of threads would decide how rows are filled up.
        if threads > 1:
            again = _three(hidden, weight, product)
            same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            if not same or not {*found} <= {*_sizes_like(logits, hidden, weight)}:
                raise _refusal("the number of threads", where)
        return found


def _sizes_like(logits: Tensor, hidden: Tensor, weight: Tensor) -> tuple[int, ...]:
    dtype = logits.dtype
    return tuple(n for n in SMALL if torch.equal(_product(hidden[:n], weight, dtype), logits[:n]))


def _product(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    out = hidden.new_empty((len(hidden), len(weight)), dtype=dtype)
    return multiply(hidden, weight.T, out)


def _three(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The three products of a tile."""
    logits = _product(hidden, weight, dtype)
    gradient = logits.to(hidden.dtype)
    return logits, torch.mm(gradient, weight), torch.mm(gradient.T, hidden)


def _refusal(what: str, where: str) -> RuntimeError:
    return RuntimeError(
        f"deterministic: expected products of a row that depend on it alone, but those of {where} "
        f"depend on {what} here"
    )


@contextlib.contextmanager
def _one_thread(threads: int) -> Iterator[None]:
    """The number of threads is the process's: others that begin meanwhile are slower."""
    if threads < 2:
        yield
        return
    with _changing_threads:
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def check_workspace(p: Problem) -> None:
    """Refuse a workspace that holds no product.

    Raises:
        ValueError: what `least_bytes` says does not fit.
    """
    if least_bytes(p) > p.workspace:
        raise ValueError(
            f"workspace: expected at least {least_bytes(p)} bytes with deterministic=True, whose "
            f"products have {_tile_rows(p)} rows and {columns(p)} columns; got {p.workspace}"
        )


def least_bytes(p: Problem) -> int:
    """Work memory of the plan that takes the least."""
    memory, rows, across = Memory(p), _tile_rows(p), columns(p)
    if not p.any_gradient:
        return memory.statistics(rows, across)
    return memory.gradients(rows, across, rows)


def _tile_rows(p: Problem) -> int:
    return min(ROWS_GPU if p.device.is_gpu else ROWS, max(p.rows, 1))


def make(p: Problem, reserved_bytes: int, schedule: str | None, kept_bytes: int) -> Plan:
    """The plan with products of one size that has the fewest products and fits.

    `kept_bytes` does not change it: what forward keeps leaves a tile its place.
    """
    memory, n = Memory(p), max(p.rows, 1)
    most = ROWS_GPU if p.device.is_gpu else ROWS
    rows, across, budget = _tile_rows(p), columns(p), memory.budget
    if not p.any_gradient:
        peak = memory.statistics(rows, across)
        return Plan("statistics", rows, across, 0, 1.0, n, 0, peak, product_rows=rows)
    hidden_rows, tile = n, memory.gradients(rows, across, 0)
    if n * memory.per_row > min(budget - budget // 8, p.workspace - tile):
        hidden_rows = max((p.workspace - tile) // memory.per_row // most, 1) * most
    keep = 0
    if schedule != "recompute" and hidden_rows == n:
        free = budget - reserved_bytes - memory.gradients(rows, across, n)
        keep = max(0, free) // (n * p.dtype.itemsize)
        keep = p.vocabulary if keep >= p.vocabulary else keep // across * across
    if reserved_bytes == 0 and schedule in (None, "forward") and can_form_in_forward(p):
        found = _in_forward(p, memory, across, most)
        if found is not None and (schedule == "forward" or keep < 0.9 * p.vocabulary):
            return found
    plan = in_backward(p, memory, rows, across, keep, hidden_rows)
    return replace(plan, product_rows=rows)


def _in_forward(p: Problem, memory: Memory, across: int, most: int) -> Plan | None:
    """`forward`, in blocks of whole products; a 16-bit dW of several blocks is a float32 sum."""
    for summed in (0, p.vocabulary):
        if summed and p.unrounded_blocks:
            continue
        space = memory.budget - memory.block_fixed(across)
        space -= memory.weight_sum(across, summed) if summed else 0
        block = max(space, 0) // memory.block_token(across)
        block = p.rows if block >= p.rows else block // most * most
        one_block = block >= p.rows or p.unrounded_blocks
        if block and (one_block or summed):
            plan = forward_plan(p, memory, block, across, summed)
            return replace(plan, product_rows=min(most, block))
    return None
