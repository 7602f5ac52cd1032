"""The plan of a GPU: of all choices that fit, the one that takes the least time by `cost`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from ift_kernels.schedule import cost
from ift_kernels.schedule.problem import (
    ALIGN,
    MAX_COLUMNS,
    MAX_ROUNDED_GPU,
    Memory,
    Plan,
    Problem,
    can_form_in_forward,
    count_columns,
    in_backward,
    in_forward,
    keep_columns,
    max_blocks,
    rest_problem,
    tile,
)

GPU_COLUMNS = tuple(1 << bits for bits in range(10, 16))  # of tiles, and whole waves near them
MIN_TILE_ROWS = 4096  # of a GPU, unless there are no more
BLOCK_ROWS = 128  # of a GPU's `forward`: a tile of vendor products
# Where dW is a float32 sum over blocks: columns of tiles, and the least share of columns. Half of
# them fit into dW itself.
SUMMED_COLUMNS, SUMMED_EIGHTHS = GPU_COLUMNS[2:], 4


@functools.lru_cache(maxsize=256)
def make(problem: Problem, reserved_bytes: int, schedule: str | None, kept_bytes: int) -> Plan:
    """On a GPU: of all choices that fit, the one that takes the least time by the model.

    Of the active set only where that is faster than the exact gradient.
    """
    exact = replace(problem, active=None)
    best = _best(exact, reserved_bytes, schedule, kept_bytes)
    if problem.active is None:
        return best
    other = _best(problem, reserved_bytes, schedule, kept_bytes)
    if not kept_bytes:
        return _fastest(problem, [best, other])
    # In backward: gradients of what forward kept, and the rest formed again. Exact if forward was.
    fits = kept_bytes + other.peak_bytes <= Memory(problem).budget
    if not fits or not make(problem, 0, None, 0).active:
        return best
    keep = min(kept_bytes // (max(problem.rows, 1) * problem.dtype.itemsize), problem.vocabulary)
    found = (best, replace(other, active=True))
    return min(found, key=lambda plan: _time(problem, replace(plan, keep_columns=keep)))


def _best(p: Problem, reserved_bytes: int, schedule: str | None, kept_bytes: int) -> Plan:
    """The same, of the active set wherever the problem has one."""
    memory = Memory(p)
    n, budget = p.rows, memory.budget
    found: list[Plan] = []
    if not p.any_gradient:
        for rows, columns in _gpu_tiles(p, budget, lambda rows: memory.statistics(rows, 1)):
            peak = memory.statistics(rows, columns)
            found.append(Plan("statistics", rows, columns, 0, 1.0, n, 0, peak))
        return _fastest(p, found)
    for hidden_rows in _hidden_rows(n, memory.per_row, budget):
        space = budget - kept_bytes - hidden_rows * memory.per_row
        for rows, columns in _gpu_tiles(p, space, memory.per_tile_column):
            found.append(in_backward(p, memory, rows, columns, 0, hidden_rows))
            if schedule != "recompute" and hidden_rows == n and rows == n:
                free = budget - reserved_bytes - memory.gradients(rows, columns, hidden_rows)
                if keep := keep_columns(p, free, columns):
                    found.append(in_backward(p, memory, rows, columns, keep, hidden_rows))
    if schedule in (None, "forward") and reserved_bytes == 0 and can_form_in_forward(p):
        formed = []
        for columns in _gpu_columns(p, n):
            fit = (budget - memory.block_fixed(columns)) // memory.block_token(columns)
            for rows in _block_rows(n, fit):
                if -(-n // rows) <= max_blocks(p):
                    formed.append(in_forward(p, memory, rows, columns))
                formed += _parked(p, memory, rows, columns)
        formed += _summed(p, memory)
        found = formed if formed and schedule == "forward" else found + formed
    return _fastest(p, found)


def _fastest(p: Problem, found: list[Plan]) -> Plan:
    """Of plans that fit, if any does; where the host takes longer, the least work of the device."""

    return min(found, key=lambda plan: _time(p, plan))


def _time(p: Problem, plan: Plan) -> tuple[bool, float, float]:
    taken = cost.seconds(p, plan)
    return plan.peak_bytes > p.workspace, taken.seconds, taken.device


def _gpu_tiles(p: Problem, space: int, per_column: Callable[[int], int]) -> list[tuple[int, int]]:
    """Rows and columns of tiles that fit into `space` bytes, `per_column(rows)` for each column.

    All rows or an even share of them, in columns that products want; few where neither fits.
    """
    found = []
    for parts in (1, 2, 4, 8):
        rows = min(p.rows, _even(p.rows, parts, 256))
        most = space // per_column(rows)
        found += [(rows, c) for c in _gpu_columns(p, rows) if c <= most]
        if rows < 2 * MIN_TILE_ROWS:
            break
    if found:
        return found
    beside = per_column(0)
    size = p.dtype.itemsize + p.rounded_size
    return [tile(p.rows, p.vocabulary, size, space, beside, tile_bytes=space)]


def _gpu_columns(p: Problem, rows: int) -> list[int]:
    """Columns of a tile: round numbers, whole waves of products of 128 x 256, and even shares.

    Of the active set, all or what it counts together.
    """
    vocabulary, device = p.vocabulary, p.device
    strips, found = -(-rows // 128), {vocabulary} if vocabulary <= MAX_COLUMNS else set()
    for columns in GPU_COLUMNS:
        waves = max(1, round(columns / 256 * strips / device.multiprocessors))
        for near in (columns, waves * device.multiprocessors // strips * 256):
            found |= {near, _even(vocabulary, -(-vocabulary // max(near, 1)), 256)}
    unit = 1 if p.active is None else count_columns(p)
    return sorted(c for c in found if 0 < c <= vocabulary and (c == vocabulary or not c % unit))


def _hidden_rows(n: int, per_row: int, budget: int) -> list[int]:
    """Rows whose sum of dh is held at once: all, or shares that leave half of the budget."""
    if 2 * n * per_row <= budget:
        return [n]
    blocks = -(-2 * n * per_row // budget)
    some = max(1, min(budget // 2 // per_row, _even(n, blocks, BLOCK_ROWS)))
    return [n, some] if n * per_row <= budget - budget // 8 else [some]


def _block_rows(n: int, fit: int) -> set[int]:
    """Rows of a block of `forward`, of which `fit` fit: few blocks, and tiles that are full."""
    if fit >= n:
        return {n}
    if fit < BLOCK_ROWS:
        return set()
    fewest = -(-n // fit)
    even = (_even(n, blocks, BLOCK_ROWS) for blocks in range(fewest, fewest + 4))
    full = fit // BLOCK_ROWS * BLOCK_ROWS, 1 << (fit.bit_length() - 1)
    return {rows for rows in (*even, *full) if rows <= fit}


def _even(total: int, parts: int, unit: int) -> int:
    """The size of parts of about the same size, in whole units."""
    return -(-total // parts // unit) * unit


def _parked(p: Problem, memory: Memory, rows: int, columns: int) -> Iterator[Plan]:
    """Plans whose first block is larger than `rows`: part of its products wait in dW."""
    if not p.need_weight or p.active is not None or p.vocabulary % ALIGN or p.width % ALIGN:
        return
    if p.rounded_size:  # they would not fit
        return
    for blocks in range(1, min(max_blocks(p), MAX_ROUNDED_GPU) + 1):
        first = p.rows - (blocks - 1) * rows
        if not rows < first <= p.width:
            continue
        sums = first * memory.per_row
        kept = (memory.budget - sums) // (first * p.dtype.itemsize) // columns * columns
        if not 0 < kept < p.vocabulary:
            continue
        plan = in_forward(p, memory, rows, columns)
        peak = max(sums + first * kept * p.dtype.itemsize, (blocks > 1) * plan.peak_bytes)
        yield replace(plan, peak_bytes=peak, first_rows=first, first_columns=kept)


def _summed(p: Problem, memory: Memory) -> Iterator[Plan]:
    """Plans whose dW is a float32 sum over blocks, of any number of them.

    Of all columns or, in less memory, of some: dW of the others takes products formed again.
    """
    if p.unrounded_blocks:
        return
    for eighths in range(SUMMED_EIGHTHS, 9):
        summed, rest = p.vocabulary * eighths // 8 // ALIGN * ALIGN, None
        if eighths == 8:
            summed = p.vocabulary
        elif summed:
            rest = _best(rest_problem(p, summed), 0, "recompute", 0)
        for columns in {min(c, p.vocabulary) for c in SUMMED_COLUMNS if summed}:
            space = memory.budget - memory.weight_sum(columns, summed) - memory.block_fixed(columns)
            for rows in _block_rows(p.rows, space // memory.block_token(columns)):
                yield in_forward(p, memory, rows, columns, summed, rest)
