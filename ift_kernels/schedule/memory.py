"""What a choice of tiles takes in bytes: the one set of rules, whichever way a plan is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ift_kernels.schedule.plan import Problem


class Memory:
    """Bytes of work memory of one problem."""

    def __init__(self, problem: Problem) -> None:
        p = problem
        self._n, self._size = max(p.rows, 1), p.dtype.itemsize
        n, itemsize = self._n, self._size
        # Beside the products: what is known of every row, and what the vendor's products take.
        self.budget = p.workspace - min(256 * n, p.workspace // 32)
        # Where the weight is of another dtype: its chunk cast, its gradient summed before the cast.
        self.cast = 0 if p.same_dtype else p.width * itemsize
        # Of a tile's gradient its active columns once more, a mask, and their head rows; tails.
        self._copied, masks, gathered = 0, 0, 0
        if p.active is not None:
            block = min(p.active.block, -(-n // 32) * 32)
            self._copied = -(-n // block) * block  # rows: whole blocks
            masks = -(-n // 32)
            gathered = p.width * itemsize + tail_bytes_per_column(p)
            if p.any_gradient:
                self.budget -= tail_bytes(p)
        # dh as a float32 sum over chunks of the vocabulary, beside the product that is added to it.
        self.per_row = p.width * (4 + itemsize) if p.need_hidden and itemsize < 4 else 0
        # A tile, its transpose, and what goes with each column.
        self.copies = 2 if p.transpose and p.need_weight else 1
        sums = p.width * (itemsize + 4) if self.cast and p.need_weight else 0
        self.per_column = self.cast + sums + gathered + masks + self._copied * itemsize
        if self.copies == 2:  # the transpose has whole cache lines: see `gradients.Transposed`
            self.per_column += (31 + 32 * (n >= 256)) * itemsize
        # dW of a tile that has some of the rows is a float32 sum. A CPU has such tiles
        # only where memory is so short that few columns are left.
        row_tile_sums = p.need_weight and p.same_dtype and p.device.is_gpu
        self._row_tile_sums = p.width * (itemsize + 4) * row_tile_sums
        self._block_column = self.cast + gathered + masks
        self._vocabulary = p.vocabulary
        # A GPU's `forward` forms dh of a block in one product, where it is returned.
        self._block_row = self.per_row
        if p.device.is_gpu and p.same_dtype and p.active is None:
            self._block_row = 0 if p.same_hidden_dtype else p.need_hidden * p.width * itemsize

    def statistics(self, rows: int, columns: int) -> int:
        """Of tiles whose products are read once."""
        return columns * (rows * self._size + self.cast)

    def gradients(self, rows: int, columns: int, hidden_rows: int) -> int:
        """Of tiles that become gradients, and dh's sum over them, of `hidden_rows` at a time."""
        return hidden_rows * self.per_row + columns * self.per_tile_column(rows)

    def per_tile_column(self, rows: int) -> int:
        """The same for each column of a tile, without dh's sum."""
        sums = self._row_tile_sums if rows < self._n else 0
        return rows * self._size * self.copies + self.per_column + sums

    def kept(self, columns: int) -> int:
        """Of products of all rows that stay until backward."""
        return columns * self._n * self._size

    def block_token(self, columns: int) -> int:
        """For each row of a block of `forward`, in tiles of so many columns."""
        transposed = columns * self._size * (self.copies - 1)
        per_token = self._vocabulary * self._size + self._block_row + transposed
        return per_token + -(-columns * self._copied * self._size // self._n)

    def block_fixed(self, columns: int) -> int:
        """Beside that: a tile's transpose is 64 rows wider, and what goes with each column."""
        transposed = columns * self._size * (self.copies - 1)
        return columns * self._block_column + 64 * transposed


def tail_bytes(problem: Problem) -> int:
    """Bytes of tails that may wait until they are added to dh: see `tail_bytes_per_column`."""
    return min(problem.vocabulary * tail_bytes_per_column(problem), problem.workspace // 16)


def tail_bytes_per_column(p: Problem) -> int:
    """Bytes of a column for tail gradients, tail weights and sums of head rows beside them.

    Two of each: they are gathered at the end. Buckets begin anew with every tile of products.
    """
    assert p.active is not None
    return 8 * (p.rows + p.width) // min(p.active.tail_bucket, 512) + 8
