"""Which schedule a call takes, with which tiles, inside how much memory: the cost model.

All products of the head cost the same N·V·D multiply-adds, so the model counts them; epilogues cost
a few percent of one and memory traffic less, so neither changes the choice. The schedules, cheapest
first wherever they fit:

* ``statistics``: no gradient asked for. 1 product.
* ``keep``: products stay in the workspace until backward as far as they fit, a share s of the
  vocabulary; the rest is recomputed. 1 + (1 − s) products, +1 for each of dh and dW.
* ``forward``: gradients are formed in forward, one block of tokens at a time, so nothing is
  recomputed: of scalar losses, whose upstream gradient is known, and of a frozen head, where it is
  two factors a row, applied in backward. 1 product, +1 for each of dh and dW. Sums over blocks go
  straight into dW, which must have the dtype of the products. In bfloat16 that rounds dW once more
  for every block after the first, so there two blocks are the most: their rounding errs by at most
  sqrt(1.5) of a single rounding.
* ``recompute``: ``keep`` with s = 0.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ift_kernels.common import checks, sync_free
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.common.active_set import options as active_options
from ift_kernels.common.settings import Setting

SCHEDULES = ("recompute", "keep", "forward")

# A tile of products should still be in cache when the epilogue reads it.
TILE_BYTES = 16 << 20
MAX_COLUMNS = 1 << 18  # few tokens: one product of the whole vocabulary, as memory allows
ALIGN = 64  # columns: every row of a tile starts on a cache line
MIN_KEEP = 1024  # columns: less is not worth a second code path
MAX_ROUNDED = 2  # blocks of tokens whose sum is rounded to 16 bits after each of them

_forced = Setting[str | None]("ift_schedule", None)


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

    @property
    def any_gradient(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias


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

    def __str__(self) -> str:
        return (
            f"{self.schedule}: {self.products:.2f} products of N*V*D, tiles of {self.tile_rows} x "
            f"{self.tile_columns}, {self.keep_columns} columns kept ({self.kept_bytes / 2**20:.0f} "
            f"MiB), work memory {self.peak_bytes / 2**20:.0f} MiB"
            f", dh summed over {self.hidden_rows} rows at a time"
        )


def tile(
    rows: int, columns: int, itemsize: int, budget: int, per_column: int = 0
) -> tuple[int, int]:
    """Rows and columns of a tile: all rows if that leaves 256 columns, which vendor GEMMs want.

    `per_column` bytes go beside each column of a tile: cast weights, sums of their gradients.
    """
    limit = min(columns, MAX_COLUMNS)
    if per_column:
        limit = min(limit, max(ALIGN, budget // 4 // per_column // ALIGN * ALIGN))
        budget -= limit * per_column
    elements = max(min(budget, TILE_BYTES) // itemsize, ALIGN)
    tile_rows = max(1, min(rows, elements // min(limit, 256)))
    tile_columns = min(elements // tile_rows, limit)
    if tile_columns < columns:
        tile_columns = max(ALIGN, tile_columns // ALIGN * ALIGN)
    return tile_rows, min(tile_columns, columns)


def tail_bytes(problem: Problem) -> int:
    """Bytes of tails that may wait until they are added to dh: see `_tail_bytes_of`."""
    return min(problem.vocabulary * _tail_bytes_of(problem), problem.workspace // 16)


def _tail_bytes_of(p: Problem) -> int:
    """Bytes of a column for tail gradients, tail weights and sums of head rows beside them.

    Two of each: they are gathered at the end. Buckets begin anew with every tile of products.
    """
    assert p.active is not None
    return 8 * (p.rows + p.width) // min(p.active.tail_bucket, 512) + 8


@functools.lru_cache(maxsize=256)  # a training step asks for the same plans again and again
def make(problem: Problem, reserved_bytes: int = 0, schedule: str | None = None) -> Plan:
    """The cheapest plan that fits; `schedule` forces one (as far as it can serve the call)."""
    p = problem
    n, itemsize = max(p.rows, 1), p.dtype.itemsize
    # Beside the products: what is known of every row, and what the vendor's products take.
    budget = p.workspace - min(256 * n, p.workspace // 32)
    # Where the weight is of another dtype: its chunk cast, its gradient summed before the cast.
    cast = 0 if p.same_dtype else p.width * itemsize
    if not p.any_gradient:
        rows, columns = tile(n, p.vocabulary, itemsize, budget, cast)
        peak = columns * (rows * itemsize + cast)
        return Plan("statistics", rows, columns, 0, 1.0, n, 0, peak)
    per_gradient = p.need_hidden + (p.need_weight or p.need_bias)
    # Of a tile's gradient its active columns once more, a mask, and their head rows; tails.
    copied, masks, gathered = 0, 0, 0
    if p.active is not None:
        block = min(p.active.block, -(-n // 32) * 32)
        copied = -(-n // block) * block  # rows: whole blocks
        masks = -(-n // 32)
        gathered = p.width * itemsize + _tail_bytes_of(p)
        budget -= tail_bytes(p)
    # dh as a float32 sum over chunks of the vocabulary, beside the product that is added to it.
    per_row = p.width * (4 + itemsize) if p.need_hidden and itemsize < 4 else 0
    hidden_rows = n
    if n * per_row > budget - budget // 8:
        hidden_rows = max(1, budget // 2 // per_row)
    two_passes = hidden_rows < n and per_gradient == 2
    sums = hidden_rows * per_row
    # A tile, its transpose, and what goes with each column.
    copies = 2 if p.transpose and p.need_weight else 1
    per_column = cast + p.width * (itemsize + 4) if cast and p.need_weight else cast
    per_column += gathered + masks + copied * itemsize
    if copies == 2:  # the transpose has whole cache lines: see `gradients.Transposed`
        per_column += (31 + 32 * (n >= 256)) * itemsize
    rows, columns = tile(n, p.vocabulary, itemsize * copies, (budget - sums) // 2, per_column)
    work = sums + columns * (rows * itemsize * copies + per_column)
    keep = 0
    if schedule != "recompute" and hidden_rows == n and rows == n:
        keep = max(0, budget - reserved_bytes - work) // (n * itemsize)
        keep = p.vocabulary if keep >= p.vocabulary else keep // columns * columns
        keep = 0 if keep < min(MIN_KEEP, p.vocabulary) else keep
    if (
        p.grads_in_forward
        and reserved_bytes == 0
        # Its sums over blocks cost more than recomputing a tenth of the vocabulary.
        and (schedule == "forward" or (schedule is None and keep < 0.9 * p.vocabulary))
        # Gradients would be rounded to float16 before a loss scale lifts them off its underflow.
        and p.dtype != torch.float16
        and (not p.need_weight or p.same_dtype)
    ):
        _, across = tile(min(n, 1024), p.vocabulary, itemsize, budget // 4, cast)
        transposed = (
            across * itemsize * (copies - 1)
        )  # per token: a tile's transpose, 64 rows wider
        beside = across * (cast + gathered + masks) + 64 * transposed
        per_token = p.vocabulary * itemsize + per_row + transposed
        per_token += -(-across * copied * itemsize // n)
        most = MAX_ROUNDED if p.need_weight and itemsize < 4 else n
        # The last quarter of the workspace buys a pass or two less over dW: not worth having.
        for room in (budget // 4 * 3, budget):
            block = max(0, room - beside) // per_token
            blocks = -(-n // max(block, 1))
            if block >= min(n, 128) and blocks <= most:
                block = -(-n // blocks)  # of even size: a small last one would be slow
                peak = block * per_token + beside
                return Plan("forward", block, across, p.vocabulary, 1.0 + per_gradient, n, 0, peak)
    held = keep * n * itemsize
    share = keep / p.vocabulary
    return Plan(
        "keep" if keep else "recompute",
        rows,
        columns,
        keep,
        1.0 + (1.0 - share) * (2 if two_passes else 1) + per_gradient,
        hidden_rows,
        held,
        held + work,
    )


def use_schedule(name: str) -> AbstractContextManager[None]:
    """Force a schedule ("recompute", "keep" or "forward") inside the ``with`` block.

    One that cannot serve a call (``forward`` without a scalar loss, say) gives way to ``keep``.

    Raises:
        ValueError: `name` is none of the three.
    """
    checks.one_of("name", name, SCHEDULES)
    return _forced.use(name)


def forced() -> str | None:
    """The schedule asked for by `use_schedule`, or None."""
    return _forced.get()


def forced_or_safe() -> str:
    """The schedule asked for, "" for the cheapest, or "recompute" where nothing may be kept.

    What is kept for backward is consumed in place, which a compiled graph would have to copy; and
    where hooks pack saved tensors away (activation checkpointing, offloading) it would stay.
    """
    if torch.compiler.is_compiling() or _saved_tensor_hooks():
        return "recompute"
    return forced() or ""


def _saved_tensor_hooks() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def explain(
    rows: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    need_hidden: bool = True,
    need_weight: bool = True,
    scalar: bool = False,
    gradient: str | ActiveSet = "exact",
    workspace: int | None = None,
    device: str | torch.device = "cpu",
) -> Plan:
    """The plan that a call of this size would follow: schedule, tiles, products, bytes.

    Args:
        rows, vocabulary, width: N (targets that are not ignored), V, D.
        dtype: of hidden and weight.
        need_hidden, need_weight: which inputs require gradients, not through entropy or mean_logit.
        scalar: the loss is `linear_cross_entropy` with reduction "mean" or "sum".
        gradient: "exact" or "active" (an `ActiveSet` for its options), as in `linear_logprobs`. How
            many columns are active depends on data, so `products` counts all of them: the most.
        workspace, device: as the operations.

    Raises:
        TypeError, ValueError: a `gradient` or `workspace` that does not fit.

    >>> print(explain(2048, 32000, 1024, torch.bfloat16).schedule)
    keep
    >>> exact, active = (
    ...     explain(2048, 32000, 1024, need_weight=False, gradient=name)
    ...     for name in ("exact", "active")
    ... )
    >>> active.peak_bytes > exact.peak_bytes  # the active columns of a tile are copied
    True
    """
    active = active_options(gradient)
    device = torch.device(device)
    budget = checks.workspace_bytes(workspace, device, dtype)
    problem = Problem(
        rows, vocabulary, width, dtype, budget, need_hidden, need_weight, False,
        scalar or not need_weight,
        transpose=device.type == "cpu" and dtype.itemsize == 2,
        # As `head_call`: gradients are exact where no size may depend on data.
        active=active if need_hidden and not sync_free.on() else None,
    )  # fmt: skip
    return make(problem, ledger.reserved, forced())


class Ledger:
    """Bytes that forward calls keep for a backward that has not come yet, over all calls."""

    def __init__(self) -> None:
        # Setting and popping are atomic: calls come from any thread, releases from the collector.
        self._sizes: dict[int, int] = {}
        self._keys = itertools.count()

    @property
    def reserved(self) -> int:
        """Bytes reserved now."""
        return sum(list(self._sizes.values()))

    def enter(self, tensor: Tensor) -> Callable[[], object]:
        """Count `tensor` for as long as it lives, or until the returned function is called."""
        key = next(self._keys)
        self._sizes[key] = tensor.numel() * tensor.element_size()
        return weakref.finalize(tensor, self._sizes.pop, key, None)


ledger = Ledger()
