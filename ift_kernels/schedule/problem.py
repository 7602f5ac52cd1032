"""What is planned, what a plan is, and what one takes in bytes, whoever plans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ift_kernels.common.active_set import ActiveSet
from ift_kernels.schedule.device import CPU, Device
from ift_kernels.schedule.head import slices

TILE_BYTES = CPU.tile_bytes
MAX_COLUMNS = 1 << 18  # few tokens: one product of the whole vocabulary, as memory allows
ALIGN = 64  # columns: every row of a tile starts on a cache line
MIN_COLUMNS = 256  # of a tile, if memory allows: vendor products want as many
# Rather than fewer a CPU's tile leaves the cache, up to twice its size: float32 products of 16384
# rows are 14 % slower with 256.
CPU_COLUMNS = 512
# Of a chunk of the head that a CPU casts to float32, and of its dW: in cache, as a tile.
CAST_BYTES = 8 << 20
ACTIVE_COLUMNS = 16384  # inner size of a GPU's product of active columns, at most
# Of a tile of products that read head rows where they lie; programs that share one.
GATHERED_ROWS, GATHERED_COLUMNS, MAX_PARTS = 128, 256, 4
MIN_KEEP = 1024  # columns: less is not worth a second code path
# Blocks of tokens whose sum is rounded to 16 bits after each of them.
MAX_ROUNDED, MAX_ROUNDED_GPU = 2, 3


@dataclass(frozen=True)
class Problem:
    """One call: `rows` valid tokens, and the gradients that are needed."""

    rows: int
    vocabulary: int
    width: int
    dtype: torch.dtype  # of the products
    workspace: int
    need_hidden: bool = False
    need_weight: bool = False
    need_bias: bool = False
    grads_in_forward: bool = False  # gradients can be formed in forward
    same_dtype: bool = True  # head weight (and its gradient) in the dtype of the products
    transpose: bool = False  # the backend wants the gradient of a tile transposed as well
    active: ActiveSet | None = None  # that dh is formed from; None: dh is exact
    device: Device = CPU
    same_hidden_dtype: bool = True  # hidden (and its gradient) in the dtype of the products
    fp32_weight_sum: bool = False  # sums of dW over blocks of rows are float32, whatever its dtype
    deterministic: bool = False  # products of one size: `rows` is padded, see `deterministic`
    operand_dtype: torch.dtype | None = None  # 16 bits of which products are float32; None: dtype
    reads_head_rows: bool = False  # of active columns, where they lie: `add_active_products`
    need_adapter: bool = False  # a gradient of any part of it

    @property
    def any_gradient(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias or self.need_adapter

    @property
    def operands(self) -> torch.dtype:
        """The dtype of hidden, weight and gradients of tiles in products."""
        return self.operand_dtype or self.dtype

    @property
    def rounded_size(self) -> int:
        """Bytes of an element of a tile's gradient once more, as an operand; 0: where it is."""
        return 0 if self.operands == self.dtype else self.operands.itemsize

    @property
    def unrounded_blocks(self) -> bool:
        """Whether dW, if there is any, holds sums over blocks of rows as they are."""
        return not self.need_weight or (self.same_dtype and self.operands.itemsize >= 4)

    @property
    def by_tiles(self) -> bool:
        """Whether dh takes a product for each tile: its gradient, or the head's chunk, is cast."""
        return not self.same_dtype or self.rounded_size > 0

    @property
    def gradients(self) -> int:
        """Products for gradients, of a tile that is there."""
        return self.need_hidden + (self.need_weight or self.need_bias)


@dataclass(frozen=True)
class Plan:
    """How a call is carried out. `explain` shows one."""

    schedule: str
    tile_rows: int
    tile_columns: int
    keep_columns: int  # columns whose products are kept until backward
    products: float  # in units of N·V·D multiply-adds, forward and backward together
    # Rows whose float32 sum of dh is held at once; fewer than N: dh in a pass of its own.
    hidden_rows: int
    kept_bytes: int  # kept from forward to backward
    peak_bytes: int  # of work memory, at most
    # Of `forward`, unless 0: rows of a first block that is larger than `tile_rows`, and of how many
    # columns its products are in the workspace. The others wait in dW, which is not yet written.
    first_rows: int = 0
    first_columns: int = 0
    # Of `forward`, unless 0: the first columns whose dW is a float32 sum over blocks, cast at the
    # end. dW of the others, if any, is written once, from products formed again: see `rest`.
    sum_columns: int = 0
    rest: Plan | None = None
    active: bool = False  # dh is formed from the active set, where the problem has one
    product_rows: int = 0  # of every product, unless 0: see `deterministic`

    def blocks(self, rows: int) -> list[slice]:
        """The blocks of so many rows in `forward`."""
        first = min(self.first_rows, rows)
        later = range(first, rows, self.tile_rows)
        found = [slice(start, min(start + self.tile_rows, rows)) for start in later]
        return [slice(0, first), *found] if first else found

    def product_slices(self, rows: int) -> Iterator[slice]:
        """The rows of each product that has some of `rows` kept rows: all, unless of one size."""
        return slices(0, rows, self.product_rows or max(rows, 1))

    def __str__(self) -> str:
        return (
            f"{self.schedule}: {self.products:.2f} products of N*V*D, tiles of {self.tile_rows} x "
            f"{self.tile_columns}, {self.keep_columns} columns kept ({self.kept_bytes / 2**20:.0f} "
            f"MiB), work memory {self.peak_bytes / 2**20:.0f} MiB"
            f", dh summed over {self.hidden_rows} rows at a time"
        )


def tile(
    rows: int,
    columns: int,
    itemsize: int,
    budget: int,
    per_column: int = 0,
    tile_bytes: int = TILE_BYTES,
    wide: int = 0,
) -> tuple[int, int]:
    """Rows and columns of a tile: all rows if that leaves `MIN_COLUMNS`.

    Of up to twice the bytes for `wide` columns, unless 0.

    `per_column` bytes go beside each column of a tile: cast weights, sums of their gradients.
    """
    limit = min(columns, MAX_COLUMNS)
    if per_column:
        limit = min(limit, max(ALIGN, budget // 4 // per_column // ALIGN * ALIGN))
        budget -= limit * per_column
    wanted = min(rows * min(limit, wide) * itemsize, 2 * tile_bytes)
    elements = max(min(budget, max(tile_bytes, wanted)) // itemsize, ALIGN)
    fits = rows * min(limit, MIN_COLUMNS) <= elements
    least = MIN_COLUMNS if fits else max(wide, MIN_COLUMNS)
    tile_rows = max(1, min(rows, elements // min(limit, least)))
    tile_columns = min(elements // tile_rows, limit)
    if tile_columns < columns:
        tile_columns = max(ALIGN, tile_columns // ALIGN * ALIGN)
    return tile_rows, min(tile_columns, columns)


class Memory:
    """Bytes of work memory of one problem."""

    def __init__(self, problem: Problem) -> None:
        p = problem
        self._n, self._size = max(p.rows, 1), p.dtype.itemsize
        n, itemsize = self._n, p.operands.itemsize
        # Beside the products: what is known of every row, and what the vendor's products take.
        self.budget = p.workspace - min(256 * n, p.workspace // 32)
        # Where the weight is of another dtype: its chunk cast, its gradient summed before the cast.
        self.cast = 0 if p.same_dtype else p.width * itemsize
        # Of the active set, a tile's active columns once more, in whole blocks of rows, and for
        # each column a head row and what the tail takes. A mask is a byte for `block` products.
        missing, gathered, active_row = 0, 0, 0
        if p.active is not None:
            block = min(p.active.block, -(-n // 32) * 32)
            missing = -n % block
            gathered = p.width * itemsize + 8 * p.width // min(p.active.tail_bucket, 512) + 8
            # Blocks that do not fill the last one; for each block and column the mask, ids of a
            # share, and what is counted of blocks that may be united.
            per_pair = 9 if p.reads_head_rows and block >= GATHERED_ROWS else 24
            if p.reads_head_rows:
                gathered -= p.width * itemsize
            if p.any_gradient:
                self.budget -= tail_bytes(p)
            if p.device.is_gpu:  # whatever the tile: once for all products that are there
                columns = active_columns(p, 0)
                taken = columns * (gathered + block * itemsize)
                taken += parts_bytes(p) * p.reads_head_rows
                self.budget = max(self.budget - taken, p.workspace // 4)  # products need some
                active_row = columns * itemsize * 9 // 8 + p.vocabulary * per_pair // block
                missing = gathered = 0
        # dh as a float32 sum over chunks of the vocabulary, beside the product that is added to it
        # unless the vendor does that.
        self._on_gpu, self._fp32_out = p.device.is_gpu, p.device.fp32_out
        part = 0 if p.device.fp32_out else itemsize
        self.per_row = p.width * (4 + part) if p.need_hidden and itemsize < 4 else 0
        self.per_row += active_row
        # A tile, its transpose, its active columns, and what goes with each column.
        self._transposed = p.transpose and p.need_weight
        self.copies = 1 + self._transposed + (p.active is not None and not p.device.is_gpu)
        self._rounded = p.rounded_size * p.any_gradient
        # What is in cache for the epilogues: active columns are few.
        self.tile_bytes = TILE_BYTES * self.copies // (1 + self._transposed)
        sums = p.width * (itemsize + 4 * (itemsize < 4)) if self.cast and p.need_weight else 0
        self.per_column = self.cast + sums + gathered + missing * itemsize
        if self._transposed and n < 256:  # whole cache lines weigh: see `gradients.Transposed`
            self.per_column += 31 * itemsize
        # dW of a tile that has some of the rows is a float32 sum, and of any tile whose gradient is
        # rounded, see `accumulate.common_factor`. A CPU has such tiles only where memory is so
        # short that few columns are left.
        row_tile_sums = p.need_weight and p.same_dtype and (p.device.is_gpu or p.deterministic)
        self._row_tile_sums = p.width * (part + 4) * row_tile_sums
        rounded_sums = self._row_tile_sums * (p.rounded_size > 0)
        if p.active is not None and n > p.active.block and not p.device.is_gpu:
            missing = p.active.block - 1  # whatever the rows of a block of `forward`
        self._block_column = self.cast + sums + gathered + rounded_sums
        self._block_column += (missing + 64 * self._transposed) * itemsize
        self._vocabulary, self._weight_width = p.vocabulary, p.width * p.need_weight
        # A CPU's `forward` of float32 has hidden once more, see `exponentials`; a GPU's forms dh of
        # a block in one product, where it is returned.
        again = p.need_weight and p.unrounded_blocks and itemsize == 4 and not p.device.is_gpu
        self._block_row = self.per_row + p.width * itemsize * again
        if p.device.is_gpu and p.active is None and not p.by_tiles:
            self._block_row = 0 if p.same_hidden_dtype else p.need_hidden * p.width * itemsize

    def max_columns(self, per_column: int) -> int:
        """Columns of a tile, at most, where so many bytes go beside each."""
        if not self.cast or self._size < 4 or self._on_gpu:
            return self._vocabulary
        return min(self._vocabulary, max(MIN_COLUMNS, CAST_BYTES // per_column // ALIGN * ALIGN))

    def statistics(self, rows: int, columns: int) -> int:
        """Of tiles whose products are read once."""
        return columns * (rows * self._size + self.cast)

    def gradients(self, rows: int, columns: int, hidden_rows: int) -> int:
        """Of tiles that become gradients, and dh's sum over them, of `hidden_rows` at a time."""
        return hidden_rows * self.per_row + columns * self.per_tile_column(rows)

    def per_tile_column(self, rows: int) -> int:
        """The same for each column of a tile, without dh's sum."""
        sums = self._row_tile_sums if rows < self._n or self._rounded else 0
        return rows * (self._size * self.copies + self._rounded) + self.per_column + sums

    def kept(self, columns: int) -> int:
        """Of products of all rows that stay until backward."""
        return columns * self._n * self._size

    def block_token(self, columns: int) -> int:
        """For each row of a block of `forward`, in tiles of so many columns."""
        copied = columns * (self._size * (self.copies - 1) + self._rounded)
        return self._vocabulary * self._size + self._block_row + copied

    def weight_sum(self, columns: int, summed: int) -> int:
        """Of a float32 sum of `summed` columns of dW over blocks, and the product of a tile that
        is added to it unless the vendor does that.

        As much of the sum as the 16-bit dW can hold is there; plans of a CPU were measured
        without that.
        """
        part = 0 if self.cast else self._size * columns  # as of a CPU's `block_fixed`
        if self._on_gpu:
            summed -= min(summed, self._vocabulary // 2)
            part *= not self._fp32_out
        return self._weight_width * (4 * summed + part)

    def block_fixed(self, columns: int) -> int:
        """Beside that: a tile's transpose is 64 rows wider, and what goes with each column."""
        return columns * self._block_column


def active_columns(p: Problem, tile_columns: int) -> int:
    """Active columns of a block of rows that are multiplied at once: those of a tile on a CPU.

    On a GPU as many as products want, but their head rows take a quarter of the workspace.
    """
    if not p.device.is_gpu:
        return tile_columns
    fit = p.workspace // 4 // (p.width * p.dtype.itemsize)
    return min(ACTIVE_COLUMNS, max(32, 1 << (max(fit, 1).bit_length() - 1)))


def count_columns(p: Problem) -> int:
    """Columns whose active ones are counted together on a GPU: a bucket, but no more than fit."""
    assert p.active is not None
    return min(p.active.tail_bucket, active_columns(p, 0))


def united_blocks(p: Problem, block: int, count: int) -> list[int]:
    """How many of `count` blocks may share their active columns, beside one; of a GPU.

    More rows than a product has of its own only where head rows are gathered for every block.
    """
    if not p.device.is_gpu:
        return []
    most = GATHERED_ROWS // block if p.reads_head_rows else count
    even = {-(-count >> bits) for bits in range(count.bit_length())} - {1}
    # At most an eighth of the rows of all blocks is not there.
    return sorted(size for size in even if size <= most and -count % size * 8 <= count)


def inner_parts(p: Problem, rows: int, block: int) -> int:
    """Programs among which each tile of a product with head rows where they lie divides its inner
    size, where tiles alone would leave multiprocessors idle. Each but the first has a sum of its
    own, `parts_bytes` together at most.
    """
    tiles = -(-rows // block) * -(-block // GATHERED_ROWS) * -(-p.width // GATHERED_COLUMNS)
    most = 1 + parts_bytes(p) // max(rows * p.width * 4, 1)
    return max(1, min(p.device.multiprocessors // max(tiles, 1), MAX_PARTS, most))


def parts_bytes(p: Problem) -> int:
    """Of the sums of all `inner_parts` but the first."""
    of_wave = p.device.multiprocessors * GATHERED_ROWS * GATHERED_COLUMNS * 4
    return min(of_wave * (MAX_PARTS - 1) // MAX_PARTS, p.workspace // 16)


def tail_bytes(problem: Problem) -> int:
    """Bytes of tail gradients, tail weights and sums of head rows that may wait to be added.

    Two of each: they are gathered at the end. Buckets begin anew with every tile of products.
    """
    p = problem
    assert p.active is not None
    bucket = count_columns(p) if p.device.is_gpu else min(p.active.tail_bucket, 512)
    per_column = 8 * (p.rows + p.width) // bucket + 8
    return min(p.vocabulary * per_column, p.workspace // 16)


def keep_columns(p: Problem, space: int, columns: int) -> int:
    """Columns whose products of all rows may stay in `space` bytes: whole tiles, or all."""
    keep = max(0, space) // (max(p.rows, 1) * p.dtype.itemsize)
    keep = p.vocabulary if keep >= p.vocabulary else keep // columns * columns
    return 0 if keep < min(MIN_KEEP, p.vocabulary) else keep


def can_form_in_forward(p: Problem) -> bool:
    """Whether `forward` serves the problem."""
    return (
        p.grads_in_forward
        # Gradients would be rounded to float16 before a loss scale lifts them off its underflow.
        and p.operands != torch.float16
        # On a CPU a 16-bit dW may be a float32 sum of float32 products.
        and (
            not p.need_weight or p.same_dtype or (p.dtype == torch.float32 and not p.device.is_gpu)
        )
    )


def max_blocks(p: Problem) -> int:
    """Blocks that `forward` may take: each rounds a 16-bit dW once more."""
    if p.unrounded_blocks:
        return max(p.rows, 1)
    if p.fp32_weight_sum or not p.same_dtype:
        return 1
    return MAX_ROUNDED_GPU if p.device.is_gpu else MAX_ROUNDED


def rest_problem(p: Problem, summed: int) -> Problem:
    """DW of the columns after the `summed` ones, from products that are formed again."""
    return replace(
        p, vocabulary=p.vocabulary - summed, need_hidden=False, need_bias=False, active=None,
        grads_in_forward=False,
    )  # fmt: skip


def in_forward(
    p: Problem,
    memory: Memory,
    rows: int,
    columns: int,
    sum_columns: int = 0,
    rest: Plan | None = None,
) -> Plan:
    """`forward`, in blocks of `rows`."""
    peak = rows * memory.block_token(columns) + memory.block_fixed(columns)
    products, n = 1.0 + p.gradients, max(p.rows, 1)
    if sum_columns:
        peak += memory.weight_sum(columns, sum_columns)
    if rest is not None:
        products += 1.0 - sum_columns / p.vocabulary
        peak = max(peak, rest.peak_bytes)
    return Plan(
        "forward", rows, columns, p.vocabulary, products, n, 0, peak,
        sum_columns=sum_columns, rest=rest, active=p.active is not None,
    )  # fmt: skip


def in_backward(
    p: Problem, memory: Memory, rows: int, columns: int, keep: int, hidden_rows: int
) -> Plan:
    """`keep` or `recompute`; dh in a pass of its own where its sum is not of all rows."""
    passes = 2 if hidden_rows < p.rows and p.gradients == 2 else 1
    products = 1.0 + (1.0 - keep / p.vocabulary) * passes + p.gradients
    kept = memory.kept(keep)
    peak = kept + memory.gradients(rows, columns, hidden_rows)
    name = "keep" if keep else "recompute"
    # A GPU would wait for the number of active columns of every tile that is formed again.
    active = p.active is not None and (keep > 0 or not p.device.is_gpu)
    return Plan(name, rows, columns, keep, products, hidden_rows, kept, peak, active=active)
