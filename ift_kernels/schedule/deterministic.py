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
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ift_kernels.schedule.head import multiply
from ift_kernels.schedule.problem import Memory, Plan, Problem, can_form_in_forward, in_backward
from ift_kernels.schedule.problem import in_forward as forward_plan

# Rows of a product: on a CPU, fewer are slower; on a GPU, what fills one.
ROWS, ROWS_GPU = 512, 1024
SMALL = (64, 128, 256)  # rows that the last product may have, where that changes nothing
COLUMNS, COLUMNS_GPU = 4096, 8192
CHUNK = 1 << 24  # elements of a chunk of the head, at most


def columns(p: Problem) -> int:
    """Columns of a product."""
    most = COLUMNS_GPU if p.device.is_gpu else COLUMNS
    while most > 256 and most * p.width > CHUNK:
        most //= 2
    return min(most, p.vocabulary)


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
    dtypes, threads = (p.operands, p.dtype), torch.get_num_threads()
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
    options = {"generator": seeded, "device": place, "dtype": torch.float32}
    with torch.inference_mode(False), torch.no_grad():
        hidden = torch.randn(rows, width, **options).to(dtype)  # type: ignore[call-overload]
        weight = torch.randn(columns, width, **options).to(dtype)  # type: ignore[call-overload]
        logits = _product(hidden, weight, product)
        wide = logits.new_zeros(rows, columns + 64)
        order = torch.arange(rows, device=place).roll(rows // 3)
        for what, same in (
            ("its place", _same(_product(hidden[order], weight, product), logits[order])),
            ("strides", _same(multiply(hidden, weight.T, wide[:, :columns]), logits)),
        ):
            if not same:
                raise _refusal(what, place, dtype)
        if threads > 1 and place.type == "cpu":
            first = _three(hidden, weight, logits)
            with _one_thread(threads):
                again = _three(hidden, weight, torch.mm(hidden, weight.T))
            if not all(_same(a, b) for a, b in zip(first, again, strict=True)):
                raise _refusal("the number of threads", place, dtype)
        return tuple(n for n in SMALL if _same(_product(hidden[:n], weight, product), logits[:n]))


def _product(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    out = hidden.new_empty((len(hidden), len(weight)), dtype=dtype)
    return multiply(hidden, weight.T, out)


def _three(hidden: Tensor, weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three products of a tile."""
    return logits, torch.mm(logits, weight), torch.mm(logits.T, hidden)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def _refusal(what: str, place: torch.device, dtype: torch.dtype) -> RuntimeError:
    return RuntimeError(
        f"deterministic: expected products of a row that depend on it alone; those in {dtype} on "
        f"{place} depend on {what} here"
    )


@contextlib.contextmanager
def _one_thread(threads: int) -> Iterator[None]:
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make(p: Problem, reserved_bytes: int, schedule: str | None, kept_bytes: int) -> Plan:
    """The plan with products of one size that has the fewest products and fits.

    Raises:
        ValueError: the workspace does not hold one product.
    """
    memory, n = Memory(p), max(p.rows, 1)
    most = ROWS_GPU if p.device.is_gpu else ROWS
    rows, across = min(most, n), columns(p)
    budget = memory.budget
    if not p.any_gradient:
        peak = memory.statistics(rows, across)
        return _fits(p, Plan("statistics", rows, across, 0, 1.0, n, 0, peak, product_rows=rows))
    hidden_rows = n
    if n * memory.per_row > budget - budget // 8:
        hidden_rows = max(budget // 2 // memory.per_row // most, 1) * most
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
    return _fits(p, replace(plan, product_rows=rows), kept_bytes)


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


def _fits(p: Problem, plan: Plan, kept_bytes: int = 0) -> Plan:
    needed = plan.peak_bytes + kept_bytes
    if needed > p.workspace:
        raise ValueError(
            f"workspace: expected at least {needed} bytes with deterministic=True, whose products "
            f"are of {plan.tile_rows} x {plan.tile_columns}; got {p.workspace}"
        )
    return plan
