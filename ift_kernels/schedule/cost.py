"""How long a plan takes on a GPU: a model of products in waves, bytes of epilogues and gaps.

It follows `products`, `gradients` and `accumulate`: which products, epilogues and sums there are
for every tile. It ranks plans; its seconds are a model, not a measurement.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ift_kernels.schedule.problem import (
    GATHERED_COLUMNS,
    GATHERED_ROWS,
    Plan,
    Problem,
    active_columns,
    inner_parts,
    rest_problem,
    united_blocks,
)
from ift_kernels.schedule.seconds import WAVE
from ift_kernels.schedule.seconds import Cost as Cost
from ift_kernels.schedule.seconds import gemm as gemm

ROWS_AT_ONCE = 8  # rows that a multiprocessor's epilogues work on at once
ROW = 1e-6  # seconds that a row takes beside its bytes
L2_RATE = 1.5  # of the bandwidth, for a tile that is still in the L2 cache
# Above this share of active columns a dense product costs no more than gathering the columns.
DENSE_SHARE = 0.8
# Of the vendor's rate, what the product of active columns with head rows where they lie is taken to
# reach, in tiles of 128 x 256: what the L2 cache can serve without sharing between tiles.
GATHERED_SHARE = 0.6
PAIR_BYTES = 4  # moved for each (block, column): the mask twice, ids of active columns
SECTOR = 32  # bytes that memory reads at once
READ = 20e-6  # seconds that the device waits until the host has read a value, and launched again
# For plans: the share of the vocabulary that is active in a block of 128 rows, and the power of the
# rows with which that of a larger block grows, of LM-like data.
SHARE_OF_128, SHARE_POWER = 0.1, 0.57
ROW_OPERATIONS = 24  # small launches on values per row: coefficients, row values, masks
CALL_OPERATIONS = 16  # the same once a call
TAIL_OPERATIONS = 30  # for tail weights, once a call


class _Model:
    """Costs of the parts of a schedule, for one problem."""

    def __init__(self, problem: Problem) -> None:
        self.p, self.device, self.size = problem, problem.device, problem.operands.itemsize
        self.tile_size = problem.dtype.itemsize  # of an element of a tile

    def product(self, m: int, n: int, k: int, added: float = 0.0, result: int = 0) -> Cost:
        """A product; `added` bytes are read and written by its epilogue for a sum."""
        gap, extra = self.device.launch_gap, added / self.device.bandwidth
        seconds = gemm(self.device, self.p.operands, m, n, k, result)
        return Cost(seconds, 0.0, extra, gap, 1, added)

    def tile(self, rows: int, columns: int) -> Cost:
        """A tile of products."""
        return self.product(rows, columns, self.p.width, 0.0, self.tile_size)

    def epilogue(self, rows: int, columns: int, passes: int) -> Cost:
        """Statistics (one pass over a tile) or its gradient (two)."""
        tile, device = rows * columns * self.tile_size, self.device
        state = 128 * rows
        rate = device.bandwidth * (L2_RATE if 2 * tile <= device.l2_bytes else 1.0)
        waves = math.ceil(rows / (ROWS_AT_ONCE * device.multiprocessors))
        seconds = waves * ROW + (passes * tile + state) / rate
        return Cost(0.0, seconds, 0.0, device.launch_gap, 1, passes * tile + state)

    def moved(self, bytes_: float, launches: int = 1) -> Cost:
        """Copies, casts and sums."""
        seconds = bytes_ / self.device.bandwidth
        return Cost(0.0, 0.0, seconds, launches * self.device.launch_gap, launches, bytes_)

    def cast(self, columns: int) -> Cost:
        """A chunk of the head in the dtype of the products."""
        if self.p.same_dtype:
            return Cost()
        return self.moved(columns * self.p.width * (4 + self.size))

    def only(self, hidden: bool, weight: bool) -> _Model:
        """Of a pass for some of the gradients."""
        needs = weight and self.p.need_weight, weight and self.p.need_bias
        return _Model(replace(self.p, need_hidden=hidden, need_weight=needs[0], need_bias=needs[1]))

    def gradient(self, rows: int, columns: int, added: bool = False) -> Cost:
        """A tile's gradient, and from that dW's columns, `added` or written, and the bias."""
        p, cost = self.p, self.epilogue(rows, columns, 2)
        if p.rounded_size:  # to 16 bits, in memory of its own
            cost += self.moved(rows * columns * (self.tile_size + self.size))
        if p.need_weight:
            result = columns * p.width
            cost += self.product(columns, p.width, rows, 2 * result * self.size * added)
            if not p.same_dtype or p.rounded_size:  # a float32 sum, cast into dW
                cost += self.moved(result * (4 + self.size))
        if p.need_bias:
            cost += self.moved(rows * columns * self.tile_size, 2)
        return cost

    def summed(self, rows: int, columns: int) -> Cost:
        """DW of a tile's columns, added to a float32 sum."""
        size = columns * self.p.width
        if self.device.fp32_out:
            return self.product(columns, self.p.width, rows, 8 * size)
        return self.product(columns, self.p.width, rows) + self.moved((8 + self.size) * size)

    def added(self, size: int, terms: int, blocks: int = 1) -> Cost:
        """Beside products: a float32 sum of `size` elements over `terms`, see `accumulate.Sum`.

        Without `fp32_out` all but the first of the terms, each of `blocks` products, are added.
        """
        if terms < 2:
            return Cost()
        if self.size >= 4:  # by the products themselves, in the result
            return self.moved(8 * size * (terms - 1), 0)
        result = self.moved((4 + self.size) * size)
        if self.device.fp32_out:  # begins with zeros
            return self.moved((8 * terms + 4) * size, 1) + result
        first = result  # is cast once there is another
        return first + self.moved(10 * size * (terms - 1), blocks * (terms - 1)) + result

    def gathered(self, rows: int, block: int, inner: int) -> Cost:
        """One launch: in every block of rows, a product with `inner` head rows where they lie.

        Each block reads its head rows from memory, whatever others have read.
        """
        p, device, blocks = self.p, self.device, math.ceil(rows / block)
        tiles = blocks * math.ceil(min(block, rows) / GATHERED_ROWS)
        tiles *= math.ceil(p.width / GATHERED_COLUMNS)
        parts = inner_parts(p, rows, block)
        rate = device.flops(p.dtype) / device.multiprocessors * GATHERED_SHARE
        wave = 2 * GATHERED_ROWS * GATHERED_COLUMNS * inner / parts / rate + WAVE
        read = inner * (blocks * p.width + rows) * self.size
        waves = math.ceil(tiles * parts / device.multiprocessors)
        product = Cost(max(waves * wave, read / device.bandwidth), gaps=device.launch_gap)
        product += Cost(launches=1)
        # Sums of the other parts are written, and added.
        return product + self.moved(16 * (parts - 1) * rows * p.width, parts - 1)

    def small(self, launches: int) -> Cost:
        """Operations on values per row."""
        return self.moved(0, launches)


def _steps(total: int, step: int) -> list[tuple[int, int]]:
    """(size, how many) of the slices of `total`."""
    whole, rest = divmod(total, step)
    return [(size, count) for size, count in ((step, whole), (rest, 1)) if size * count]


def _statistics(model: _Model, rows: int, plan: Plan) -> Cost:
    """Products and statistics of `rows` against the whole vocabulary."""
    total = Cost()
    for columns, count in _steps(model.p.vocabulary, plan.tile_columns):
        total += model.cast(columns) * count
        for part, parts in _steps(rows, plan.tile_rows):
            tile = model.tile(part, columns) + model.epilogue(part, columns, 1)
            total += tile * (count * parts)
    return total


def _backward(model: _Model, rows: int, plan: Plan, hidden: bool, weight: bool) -> Cost:
    """Tiles formed anew, but for those that are kept, and their gradients."""
    model = model.only(hidden, weight)
    p, kept, total = model.p, plan.keep_columns, Cost()
    row_tiles = _steps(rows, plan.tile_rows)
    blocks = sum(count for _, count in row_tiles)
    again = _steps(p.vocabulary - kept, plan.tile_columns)
    for columns, count in _steps(0 if _stays(p) else kept, plan.tile_columns):  # of all rows
        total += model.gradient(rows, columns) * count
    for columns, count in again:
        per_tile = model.cast(columns)
        for part, parts in row_tiles:
            tile = model.tile(part, columns) + model.gradient(part, columns)
            per_tile += tile * parts
        if weight:
            per_tile += model.added(columns * p.width, blocks)
        total += per_tile * count
    if not hidden:
        return total
    # dh of all kept columns is one product, unless the head or the gradient is cast by tiles.
    first = [(kept, 1)] if kept and not p.by_tiles else _steps(kept, plan.tile_columns)
    if kept and p.active is not None:
        total += _active(model, rows, kept, plan) + _tail_weights(model, kept)
        first = []
    for columns, count in first:
        total += model.product(rows, p.width, columns) * count
    for columns, count in again:
        for part, parts in row_tiles:
            total += model.product(part, p.width, columns) * (count * parts)
    terms = sum(count for _, count in first + again)
    return total + model.added(rows * p.width, terms, blocks)


def usual_share(rows: int) -> float:
    """The share of active columns of a block of so many rows that plans expect."""
    return min(SHARE_OF_128 * math.pow(max(rows, 128) / 128, SHARE_POWER), 1.0)


def dense_hidden(p: Problem, rows: int, columns: int) -> Cost:
    """dh of `rows` from a tile of gradients, in one product; of products as yet if `_stays` so."""
    model = _Model(p)
    formed = model.epilogue(rows, columns, 2) if _stays(p) else Cost()
    return model.product(rows, p.width, columns) + formed


def _stays(p: Problem) -> bool:
    """Whether kept products become gradients only where active columns are taken from them."""
    return p.active is not None and p.need_hidden and not (p.need_weight or p.need_bias)


def active_hidden(p: Problem, rows: int, columns: int, block: int, share: float) -> Cost:
    """The same in blocks of rows of which a `share` of columns is active, once they are marked."""
    model = _Model(p)
    assert p.active is not None
    inner = max(256, round(share * columns / 256) * 256)  # rounded: few sizes for the cache
    blocks, tile = -(-rows // block), rows * columns * model.size
    groups = math.ceil(inner / active_columns(p, columns))
    # Active columns are read in whole sectors, and written.
    read = tile * (1 - (1 - min(inner / columns, 1.0)) ** (SECTOR // model.size))
    taken = read + rows * inner * model.size + PAIR_BYTES * blocks * columns
    if block > min(p.active.block, rows):  # united: the tail is summed once more
        taken += tile
    total = model.moved(int(taken), 3 * groups)
    if p.reads_head_rows:
        return total + model.gathered(rows, block, -(-inner // groups)) * groups
    # As CUDA C++ has it: the gradient of a whole tile, which the tail is summed of.
    total += (model.epilogue(rows, columns, 2) if _stays(p) else Cost()) + model.moved(tile)
    total += model.small(14 * groups)
    of_block = model.moved(2 * inner * p.width * model.size, 2 * groups)  # gathered head rows
    of_block += model.product(min(block, rows), p.width, -(-inner // groups)) * groups
    return total + of_block * blocks


def _active(model: _Model, rows: int, columns: int, plan: Plan) -> Cost:
    """Marks, tail weights and dh of kept columns of `rows`, with the usual share of active ones."""
    p, total = model.p, Cost()
    assert p.active is not None
    for some, count in _steps(columns, columns if _stays(p) else plan.tile_columns):
        total += model.epilogue(rows, some, 1) * count
    block = min(p.active.block, rows)
    united = united_blocks(p, block, -(-rows // block))
    sizes = [block, *(block * together for together in united)]
    choices = [active_hidden(p, rows, columns, size, usual_share(size)) for size in sizes]
    choices.append(dense_hidden(p, rows, columns))
    best = min(choices, key=lambda cost: cost.device)
    groups = math.ceil(usual_share(block) * columns / active_columns(p, columns))
    waits = Cost(gaps=READ) + model.small(3 * len(united) + 2)
    return total + best + waits + model.added(rows * p.width, groups + 1)


def _tail_weights(model: _Model, columns: int) -> Cost:
    """Head rows, read for q and for the sums of the buckets, once a call."""
    return model.moved(2 * columns * model.p.width * model.size, TAIL_OPERATIONS)


def _in_forward(model: _Model, plan: Plan) -> Cost:
    """Blocks of rows, each against the whole vocabulary: see `gradients.in_forward`."""
    p, total = model.p, Cost()
    parked = plan.first_rows * (p.vocabulary - plan.first_columns)
    without_weight = _Model(replace(p, need_weight=False))
    if p.active is not None:
        total += _tail_weights(model, p.vocabulary)
    sizes = [(plan.first_rows, 1)] if parked else []
    sizes += _steps(p.rows - plan.first_rows, plan.tile_rows)
    for index, (rows, count) in enumerate(sizes):
        block = _statistics(model, rows, replace(plan, tile_rows=rows))
        block += model.small(ROW_OPERATIONS)
        first = index == 0  # writes dW
        groups = [(p.vocabulary, 1)]  # of columns, whose share of dh is one product
        if p.by_tiles:
            groups = _steps(p.vocabulary, plan.tile_columns)
        if first and parked:
            groups = _steps(p.vocabulary, plan.first_columns)
            tiles = math.ceil(p.vocabulary / plan.tile_columns)
            block += model.moved(2 * parked * model.size, tiles)
        if p.active is not None:
            block += _active(model, rows, p.vocabulary, plan)
        elif p.need_hidden:
            for columns, several in groups:
                block += model.product(rows, p.width, columns) * several
            terms = sum(several for _, several in groups)
            block += model.added(rows * p.width, terms)
        total += block * count
        for columns, tiles in _steps(0 if _stays(p) else p.vocabulary, plan.tile_columns):
            if plan.sum_columns:
                total += without_weight.gradient(rows, columns) * (tiles * count)
                continue
            total += model.gradient(rows, columns) * (tiles * first)
            total += model.gradient(rows, columns, added=True) * (tiles * (count - first))
        for columns, tiles in _steps(plan.sum_columns, plan.tile_columns):
            total += model.summed(rows, columns) * (tiles * count)
    if plan.sum_columns:  # begins with zeros, is cast at the end, piece by piece
        total += model.moved((8 + model.size) * plan.sum_columns * p.width, 16)
    if plan.rest is not None:
        again = _Model(rest_problem(p, plan.sum_columns))
        total += _backward(again, p.rows, plan.rest, False, True)
    # Backward: times the upstream gradient, in place, which moves nothing where that is 1, as of a
    # loss itself; a frozen head's dh from its two factors.
    if p.need_weight:
        return total + model.small(2)
    pieces = math.ceil(16 * p.rows * p.width / p.workspace)
    return total + model.moved(50 * p.rows * p.width, 10 * pieces)


def seconds(problem: Problem, plan: Plan) -> Cost:
    """What `plan` takes on the problem's device, which must be a GPU, forward and backward."""
    if problem.active is not None and not plan.active:
        problem = replace(problem, active=None)
    model, n = _Model(problem), problem.rows
    total = model.small(CALL_OPERATIONS) + Cost(peak_bytes=plan.peak_bytes)
    if plan.schedule == "forward":
        return total + _in_forward(model, plan)
    total += _statistics(model, n, plan) + model.small(ROW_OPERATIONS)
    if plan.schedule == "statistics":
        return total
    total += model.small(ROW_OPERATIONS)
    hidden, weight = problem.need_hidden, problem.need_weight or problem.need_bias
    if not hidden or plan.hidden_rows >= n:
        return total + _backward(model, n, plan, hidden, weight)
    for rows, count in _steps(n, plan.hidden_rows):
        block = _backward(model, rows, plan, True, False)
        total += (block + model.moved(2 * model.size * rows * problem.width)) * count
    return total + (_backward(model, n, plan, False, True) if weight else Cost())


def floor(problem: Problem, plan: Plan) -> float:
    """Seconds that the plan would take with its products whole and its bytes at full bandwidth.

    What is above that is lost in waves that are not full, narrow tiles and rows' latency.
    """
    p, cost = problem, seconds(problem, plan)
    hidden, weight = p.need_hidden, p.need_weight or p.need_bias
    forming = plan.products - hidden - weight
    whole = forming * gemm(p.device, p.operands, p.rows, p.vocabulary, p.width, p.dtype.itemsize)
    whole += hidden * gemm(p.device, p.operands, p.rows, p.width, p.vocabulary)
    whole += weight * gemm(p.device, p.operands, p.vocabulary, p.width, p.rows)
    return whole + cost.bytes / p.device.bandwidth + cost.gaps
