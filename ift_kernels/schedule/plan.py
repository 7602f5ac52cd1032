"""Which schedule a call takes, with which tiles, inside how much memory: the planner.

The schedules, cheapest first wherever they fit, in products of N·V·D multiply-adds:

* ``statistics``: no gradient asked for. 1 product.
* ``keep``: products stay in the workspace until backward as far as they fit, a share s of the
  vocabulary; the rest is recomputed. 1 + (1 − s) products, +1 for each of dh and dW.
* ``forward``: gradients are formed in forward, one block of tokens at a time, so nothing is
  recomputed: of scalar losses, whose upstream gradient is known, and of a frozen head, where it is
  two factors a row, applied in backward. 1 product, +1 for each of dh and dW. Sums over blocks go
  straight into dW, which must have the dtype of the products. In 16 bits that rounds dW once for
  every block, and R roundings of growing sums err by sqrt((R + 1)/2) of a single one: at most two
  blocks on a CPU (1.22), three on a GPU (1.41).
* ``recompute``: ``keep`` with s = 0.

On a CPU the plan counts products: epilogues cost a few percent of one and memory traffic less, and
a tile stays in cache. On a GPU it takes the choice that `cost` gives the least time for.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ift_kernels.common import checks, sync_free
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.common.active_set import options as active_options
from ift_kernels.common.settings import Setting
from ift_kernels.schedule import cost
from ift_kernels.schedule import device as devices
from ift_kernels.schedule.device import CPU, Device
from ift_kernels.schedule.memory import Memory

SCHEDULES = ("recompute", "keep", "forward")

TILE_BYTES = CPU.tile_bytes
MAX_COLUMNS = 1 << 18  # few tokens: one product of the whole vocabulary, as memory allows
ALIGN = 64  # columns: every row of a tile starts on a cache line
MIN_KEEP = 1024  # columns: less is not worth a second code path
# Blocks of tokens whose sum is rounded to 16 bits after each of them.
MAX_ROUNDED, MAX_ROUNDED_GPU = 2, 3
GPU_COLUMNS = tuple(1 << bits for bits in range(10, 16))  # of tiles, and whole waves near them
MIN_TILE_ROWS = 4096  # of a GPU, unless there are no more
BLOCK_ROWS = 128  # of a GPU's `forward`: a tile of vendor products

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
    device: Device = CPU
    same_hidden_dtype: bool = True  # hidden (and its gradient) in the dtype of the products

    @property
    def any_gradient(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias

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

    def blocks(self, rows: int) -> list[slice]:
        """The blocks of so many rows in `forward`."""
        first = min(self.first_rows, rows)
        later = range(first, rows, self.tile_rows)
        found = [slice(start, min(start + self.tile_rows, rows)) for start in later]
        return [slice(0, first), *found] if first else found

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
) -> tuple[int, int]:
    """Rows and columns of a tile: all rows if that leaves 256 columns, which vendor GEMMs want.

    `per_column` bytes go beside each column of a tile: cast weights, sums of their gradients.
    """
    limit = min(columns, MAX_COLUMNS)
    if per_column:
        limit = min(limit, max(ALIGN, budget // 4 // per_column // ALIGN * ALIGN))
        budget -= limit * per_column
    elements = max(min(budget, tile_bytes) // itemsize, ALIGN)
    tile_rows = max(1, min(rows, elements // min(limit, 256)))
    tile_columns = min(elements // tile_rows, limit)
    if tile_columns < columns:
        tile_columns = max(ALIGN, tile_columns // ALIGN * ALIGN)
    return tile_rows, min(tile_columns, columns)


def make(
    problem: Problem,
    reserved_bytes: int = 0,
    schedule: str | None = None,
    kept_bytes: int = 0,
) -> Plan:
    """The cheapest plan that fits; `schedule` forces one (as far as it can serve the call).

    Args:
        reserved_bytes: what calls before their backward keep, beside which this one keeps its own.
        kept_bytes: in backward, what this call has kept: a GPU's tiles fit beside it. Those of a
            CPU do anyway.
    """
    if problem.device.is_gpu:
        # Numbers of valid rows differ from step to step; few plans serve them all.
        unit = 256 if problem.rows > 2048 else 32
        rows = max(-(-problem.rows // unit), 1) * unit
        return _by_model(replace(problem, rows=rows), reserved_bytes, schedule, kept_bytes)
    return _by_rules(problem, reserved_bytes, schedule)


@functools.lru_cache(maxsize=256)  # a training step asks for the same plans again and again
def _by_rules(problem: Problem, reserved_bytes: int, schedule: str | None) -> Plan:
    """On a CPU: tiles that stay in cache, and the fewest products."""
    p, memory = problem, Memory(problem)
    n, itemsize, budget = max(p.rows, 1), p.dtype.itemsize, memory.budget
    if not p.any_gradient:
        rows, columns = tile(n, p.vocabulary, itemsize, budget, memory.cast)
        peak = memory.statistics(rows, columns)
        return Plan("statistics", rows, columns, 0, 1.0, n, 0, peak)
    hidden_rows = n
    if n * memory.per_row > budget - budget // 8:
        hidden_rows = max(1, budget // 2 // memory.per_row)
    sums = hidden_rows * memory.per_row
    size = itemsize * memory.copies
    rows, columns = tile(n, p.vocabulary, size, (budget - sums) // 2, memory.per_column)
    work = memory.gradients(rows, columns, hidden_rows)
    keep = 0
    if schedule != "recompute" and hidden_rows == n and rows == n:
        keep = _keep_columns(p, budget - reserved_bytes - work, columns)
    if (
        reserved_bytes == 0
        # Its sums over blocks cost more than recomputing a tenth of the vocabulary.
        and (schedule == "forward" or (schedule is None and keep < 0.9 * p.vocabulary))
        and _can_form_in_forward(p)
    ):
        _, across = tile(min(n, 1024), p.vocabulary, itemsize, budget // 4, memory.cast)
        # The last quarter of the workspace buys a pass or two less over dW: not worth having.
        for room in (budget // 4 * 3, budget):
            block = max(0, room - memory.block_fixed(across)) // memory.block_token(across)
            blocks = -(-n // max(block, 1))
            if block >= min(n, 128) and blocks <= _max_blocks(p):
                block = -(-n // blocks)  # of even size: a small last one would be slow
                return _in_forward(p, memory, block, across)
    return _in_backward(p, memory, rows, columns, keep, hidden_rows)


@functools.lru_cache(maxsize=256)
def _by_model(problem: Problem, reserved_bytes: int, schedule: str | None, kept_bytes: int) -> Plan:
    """On a GPU: of all choices that fit, the one that takes the least time by the model."""
    p, memory = problem, Memory(problem)
    n, budget = p.rows, memory.budget
    found: list[Plan] = []
    if not p.any_gradient:
        for rows, columns in _gpu_tiles(p, budget, lambda rows: memory.statistics(rows, 1)):
            peak = memory.statistics(rows, columns)
            found.append(Plan("statistics", rows, columns, 0, 1.0, n, 0, peak))
        return _fastest(p, found)
    for hidden_rows in _hidden_rows(n, memory.per_row, budget):
        room = budget - kept_bytes - hidden_rows * memory.per_row
        for rows, columns in _gpu_tiles(p, room, memory.per_tile_column):
            found.append(_in_backward(p, memory, rows, columns, 0, hidden_rows))
            if schedule != "recompute" and hidden_rows == n and rows == n:
                free = budget - reserved_bytes - memory.gradients(rows, columns, hidden_rows)
                if keep := _keep_columns(p, free, columns):
                    found.append(_in_backward(p, memory, rows, columns, keep, hidden_rows))
    if schedule in (None, "forward") and reserved_bytes == 0 and _can_form_in_forward(p):
        formed = []
        for columns in _gpu_columns(n, p.vocabulary, p.device):
            fit = (budget - memory.block_fixed(columns)) // memory.block_token(columns)
            for rows in _block_rows(n, fit):
                if -(-n // rows) <= _max_blocks(p):
                    formed.append(_in_forward(p, memory, rows, columns))
                formed += _parked(p, memory, rows, columns)
        found = formed if formed and schedule == "forward" else found + formed
    return _fastest(p, found)


def _fastest(p: Problem, found: list[Plan]) -> Plan:
    def time(plan: Plan) -> tuple[float, float]:
        taken = cost.seconds(p, plan)
        return taken.seconds, taken.device

    return min(found, key=time)


def _gpu_tiles(p: Problem, room: int, per_column: Callable[[int], int]) -> list[tuple[int, int]]:
    """Rows and columns of tiles that fit into `room` bytes, `per_column(rows)` for each column.

    All rows or an even share of them, in columns that products want; few where neither fits.
    """
    found = []
    for parts in (1, 2, 4, 8):
        rows = min(p.rows, _even(p.rows, parts, 256))
        most = room // per_column(rows)
        columns = _gpu_columns(rows, p.vocabulary, p.device)
        found += [(rows, c) for c in columns if c <= most]
        if rows < 2 * MIN_TILE_ROWS:
            break
    if found:
        return found
    beside = per_column(0)
    return [tile(p.rows, p.vocabulary, p.dtype.itemsize, room, beside, tile_bytes=room)]


def _gpu_columns(rows: int, vocabulary: int, device: Device) -> list[int]:
    """Columns of a tile: round numbers, whole waves of products of 128 x 256, and even shares."""
    strips, found = -(-rows // 128), {vocabulary} if vocabulary <= MAX_COLUMNS else set()
    for columns in GPU_COLUMNS:
        waves = max(1, round(columns / 256 * strips / device.multiprocessors))
        for near in (columns, waves * device.multiprocessors // strips * 256):
            found |= {near, _even(vocabulary, -(-vocabulary // max(near, 1)), 256)}
    return sorted(c for c in found if 0 < c <= vocabulary)


def _hidden_rows(n: int, per_row: int, budget: int) -> list[int]:
    """Rows whose sum of dh is held at once: all, or shares that leave half of the budget."""
    if 2 * n * per_row <= budget:
        return [n]
    blocks = -(-2 * n * per_row // budget)
    some = min(n, _even(n, blocks, BLOCK_ROWS))
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


def _keep_columns(p: Problem, room: int, columns: int) -> int:
    """Columns whose products of all rows may stay in `room` bytes: whole tiles, or all."""
    keep = max(0, room) // (max(p.rows, 1) * p.dtype.itemsize)
    keep = p.vocabulary if keep >= p.vocabulary else keep // columns * columns
    return 0 if keep < min(MIN_KEEP, p.vocabulary) else keep


def _can_form_in_forward(p: Problem) -> bool:
    return (
        p.grads_in_forward
        # Gradients would be rounded to float16 before a loss scale lifts them off its underflow.
        and p.dtype != torch.float16
        and (not p.need_weight or p.same_dtype)
    )


def _max_blocks(p: Problem) -> int:
    if not p.need_weight or p.dtype.itemsize >= 4:
        return max(p.rows, 1)
    return MAX_ROUNDED_GPU if p.device.is_gpu else MAX_ROUNDED


def _in_forward(p: Problem, memory: Memory, rows: int, columns: int) -> Plan:
    peak = rows * memory.block_token(columns) + memory.block_fixed(columns)
    products = 1.0 + p.gradients
    return Plan("forward", rows, columns, p.vocabulary, products, max(p.rows, 1), 0, peak)


def _parked(p: Problem, memory: Memory, rows: int, columns: int) -> Iterator[Plan]:
    """Plans whose first block is larger than `rows`: part of its products wait in dW."""
    if not p.need_weight or p.active is not None or p.vocabulary % ALIGN or p.width % ALIGN:
        return
    for blocks in range(1, min(_max_blocks(p), MAX_ROUNDED_GPU) + 1):
        first = p.rows - (blocks - 1) * rows
        if not rows < first <= p.width:
            continue
        sums = first * memory.per_row
        kept = (memory.budget - sums) // (first * p.dtype.itemsize) // columns * columns
        if not 0 < kept < p.vocabulary:
            continue
        plan = _in_forward(p, memory, rows, columns)
        peak = max(sums + first * kept * p.dtype.itemsize, (blocks > 1) * plan.peak_bytes)
        yield replace(plan, peak_bytes=peak, first_rows=first, first_columns=kept)


def _in_backward(
    p: Problem, memory: Memory, rows: int, columns: int, keep: int, hidden_rows: int
) -> Plan:
    """`keep` or `recompute`; dh in a pass of its own where its sum is not of all rows."""
    passes = 2 if hidden_rows < p.rows and p.gradients == 2 else 1
    products = 1.0 + (1.0 - keep / p.vocabulary) * passes + p.gradients
    kept = memory.kept(keep)
    peak = kept + memory.gradients(rows, columns, hidden_rows)
    name = "keep" if keep else "recompute"
    return Plan(name, rows, columns, keep, products, hidden_rows, kept, peak)


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
    device: str | torch.device | Device = "cpu",
) -> Plan:
    """The plan that a call of this size would follow: schedule, tiles, products, bytes.

    Args:
        rows, vocabulary, width: N (targets that are not ignored), V, D.
        dtype: of hidden and weight.
        need_hidden, need_weight: which inputs require gradients, not through entropy or mean_logit.
        scalar: the loss is `linear_cross_entropy` with reduction "mean" or "sum".
        gradient: "exact" or "active" (an `ActiveSet` for its options), as in `linear_logprobs`. How
            many columns are active depends on data, so `products` counts all of them: the most.
        workspace: as the operations.
        device: a torch device of this machine, or the record of any, as
            `ift_kernels.schedule.device.H200`.

    Raises:
        TypeError, ValueError: a `gradient` or `workspace` that does not fit, a `device` that is
            not there.

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
    if isinstance(device, Device):
        record = device
    else:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device: expected a device of this machine or a Device, such as "
                f"ift_kernels.schedule.device.H200; got {device}, but torch sees no GPU"
            )
        record = devices.of(place)
    budget = checks.workspace_bytes(
        workspace, torch.device("cuda" if record.is_gpu else "cpu"), dtype
    )
    problem = Problem(
        rows, vocabulary, width, dtype, budget, need_hidden, need_weight, False,
        scalar or not need_weight,
        transpose=not record.is_gpu and dtype.itemsize == 2,
        # As `head_call`: gradients are exact where no size may depend on data.
        active=active if need_hidden and not sync_free.on() else None,
        device=record,
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
