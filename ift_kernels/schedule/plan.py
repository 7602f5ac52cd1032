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
  blocks on a CPU (1.22), three on a GPU (1.41), one with ``weight_grad_sum="float32"``. With more
  blocks dW is a float32 sum: on a CPU where half of the workspace can hold that, on a GPU where it
  is the fastest. Half of it is in the 16-bit dW itself. Where even the rest is too large a GPU sums
  a share s of the columns, and forms the products of the others again for their dW: 4 − s.
* ``recompute``: ``keep`` with s = 0.

On a CPU the plan counts products: epilogues cost a few percent of one and memory traffic less, and
a tile stays in cache. On a GPU it takes the choice that `cost` gives the least time for.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from ift_kernels.common import checks, sync_free
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.common.active_set import options as active_options
from ift_kernels.common.settings import Setting
from ift_kernels.schedule import deterministic as same_size
from ift_kernels.schedule import device as devices
from ift_kernels.schedule import gpu_plan
from ift_kernels.schedule.device import Device
from ift_kernels.schedule.problem import (
    ALIGN,
    CPU_COLUMNS,
    MIN_COLUMNS,
    Memory,
    can_form_in_forward,
    in_backward,
    in_forward,
    keep_columns,
    max_blocks,
)
from ift_kernels.schedule.problem import TILE_BYTES as TILE_BYTES
from ift_kernels.schedule.problem import Plan as Plan
from ift_kernels.schedule.problem import Problem as Problem
from ift_kernels.schedule.problem import tile as tile

MIN_SUMMED_ROWS = 512  # of a block of `forward` whose dW is added to a float32 sum
# Of a block of `forward` whose dW is a sum as it is: more would leave a tile fewer columns than
# rows, and what is summed for each row would leave the cache.
MAX_UNROUNDED_ROWS = 2048
SCHEDULES = ("recompute", "keep", "forward")
WEIGHT_SUMS = ("auto", "float32")

_forced = Setting[str | None]("ift_schedule", None)


def make(
    problem: Problem,
    reserved_bytes: int = 0,
    schedule: str | None = None,
    kept_bytes: int = 0,
) -> Plan:
    """The cheapest plan that fits; `schedule` forces one (as far as it can serve the call).

    Args:
        reserved_bytes: what calls before their backward keep, beside which this one keeps its own.
        kept_bytes: in backward, what this call has kept: its tiles fit beside it.
    """
    if problem.deterministic:
        return same_size.make(problem, reserved_bytes, schedule, kept_bytes)
    if problem.device.is_gpu:
        # Numbers of valid rows differ from step to step; few plans serve them all.
        unit = 256 if problem.rows > 2048 else 32
        rows = max(-(-problem.rows // unit), 1) * unit
        return gpu_plan.make(replace(problem, rows=rows), reserved_bytes, schedule, kept_bytes)
    return _by_rules(problem, reserved_bytes, schedule, kept_bytes)


@functools.lru_cache(maxsize=256)  # a training step asks for the same plans again and again
def _by_rules(problem: Problem, reserved_bytes: int, schedule: str | None, kept_bytes: int) -> Plan:
    """On a CPU: tiles that stay in cache, and the fewest products."""
    p, memory = problem, Memory(problem)
    n, itemsize, budget = max(p.rows, 1), p.dtype.itemsize, memory.budget
    if not p.any_gradient:
        most = memory.max_columns(memory.cast)
        rows, columns = tile(n, most, itemsize, budget, memory.cast)
        peak = memory.statistics(rows, columns)
        return Plan("statistics", rows, columns, 0, 1.0, n, 0, peak)
    hidden_rows = n
    if n * memory.per_row > budget - budget // 8:
        hidden_rows = max(1, budget // 2 // memory.per_row)
    sums = hidden_rows * memory.per_row
    size = itemsize * memory.copies
    most = memory.max_columns(memory.per_column)
    wide = CPU_COLUMNS if itemsize == 4 else 0
    rows, columns = tile(
        n, most, size, (budget - sums) // 2, memory.per_column, memory.tile_bytes, wide
    )
    keep = 0
    if kept_bytes:  # beside them forward may have had narrower tiles
        fit = (budget - sums - kept_bytes) // memory.per_tile_column(rows) // ALIGN * ALIGN
        columns = min(columns, max(fit, ALIGN))
    if schedule != "recompute" and hidden_rows == n and rows == n:
        free = budget - reserved_bytes - memory.gradients(rows, columns, hidden_rows)
        keep = keep_columns(p, free, columns)
    if (
        reserved_bytes == 0
        # Its sums over blocks cost more than recomputing a tenth of the vocabulary.
        and (schedule == "forward" or (schedule is None and keep < 0.9 * p.vocabulary))
        and can_form_in_forward(p)
    ):
        _, across = tile(min(n, 1024), most, itemsize, budget // 4, memory.cast)
        # The last quarter of the workspace buys a pass or two less over dW: not worth having.
        for space in (budget // 4 * 3, budget):
            block = max(0, space - memory.block_fixed(across)) // memory.block_token(across)
            if p.unrounded_blocks and itemsize == 4:
                block = min(block, MAX_UNROUNDED_ROWS)
            blocks = -(-n // max(block, 1))
            if block >= min(n, 128) and blocks <= max_blocks(p):
                block = -(-n // blocks)  # of even size: a small last one would be slow
                if itemsize == 4:
                    _, fit = tile(block, most, itemsize, budget // 4, memory.cast, wide=wide)
                    across = min(across, fit)
                return in_forward(p, memory, block, across)
        # More blocks than dW may be rounded for: a float32 sum, where half of the workspace has it.
        sum_bytes = memory.weight_sum(across, p.vocabulary)
        block = max(0, budget - sum_bytes - memory.block_fixed(across)) // memory.block_token(
            across
        )
        if sum_bytes <= budget // 2 and block >= min(n, MIN_SUMMED_ROWS):
            block = -(-n // -(-n // block))
            return in_forward(p, memory, block, across, sum_columns=p.vocabulary)
    if 0 < keep < p.vocabulary:  # narrower tiles, where all products can be kept beside them
        left = budget - reserved_bytes - sums - memory.kept(p.vocabulary)
        narrow = left // memory.per_tile_column(rows) // ALIGN * ALIGN
        if narrow >= MIN_COLUMNS:
            keep, columns = p.vocabulary, narrow
    return in_backward(p, memory, rows, columns, keep, hidden_rows)


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
    weight_grad_sum: str = "auto",
    gradient: str | ActiveSet = "exact",
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
    device: str | torch.device | Device = "cpu",
) -> Plan:
    """The plan that a call of this size would follow: schedule, tiles, products, bytes.

    Args:
        rows, vocabulary, width: N (targets that are not ignored), V, D.
        dtype: of hidden and weight.
        need_hidden, need_weight: which inputs require gradients, not through entropy or mean_logit.
        scalar: the loss is `linear_cross_entropy` with reduction "mean" or "sum".
        weight_grad_sum: "auto" or "float32", as there.
        gradient: "exact" or "active" (an `ActiveSet` for its options), as in `linear_logprobs`. How
            many columns are active depends on data, so `products` counts all of them: the most.
            The plan of a GPU is `active` only where that is faster than an exact gradient.
        logits_dtype, deterministic, workspace: as the operations.
        device: a torch device of this machine, or the record of any, as
            `ift_kernels.schedule.device.H200`. Plans of a GPU are those of the Triton backend.

    Raises:
        TypeError, ValueError: a `weight_grad_sum`, `gradient`, `logits_dtype` or `workspace` that
            does not fit, a `device` that is not there.

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
    checks.one_of("weight_grad_sum", weight_grad_sum, WEIGHT_SUMS)
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
    product = dtype if logits_dtype is None else checks.float32_logits(logits_dtype, dtype)
    operand = dtype if record.fp32_out and dtype.itemsize == 2 else product
    budget = checks.workspace_bytes(
        workspace, torch.device("cuda" if record.is_gpu else "cpu"), product
    )
    exact = sync_free.on() or operand != product  # as `head_call`
    problem = Problem(
        rows, vocabulary, width, product, budget, need_hidden, need_weight, False,
        scalar or not need_weight, dtype == operand,
        transpose=not record.is_gpu and product.itemsize == 2,
        active=active if need_hidden and not exact else None, device=record,
        same_hidden_dtype=dtype == operand, fp32_weight_sum=weight_grad_sum == "float32",
        deterministic=deterministic, operand_dtype=operand,
        reads_head_rows=record.is_gpu and operand.itemsize == 2 and dtype == product,
    )  # fmt: skip
    if deterministic:  # of a record no product can be formed, to see which sizes would do
        here = torch.device("meta" if isinstance(device, Device) else device)
        problem = replace(problem, rows=same_size.padded_rows(problem, here))
        same_size.check_workspace(problem)
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
