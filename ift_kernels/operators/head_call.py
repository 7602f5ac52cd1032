"""A call of an operator on a head: its valid rows, the head, the problem to plan for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels import backends
from ift_kernels.backends.contract import Backend, Selected
from ift_kernels.common import checks, sync_free
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.common.head_rows import is_dense
from ift_kernels.common.transform import LogitTransform
from ift_kernels.operators.adapter import AdapterTensors, Needs
from ift_kernels.schedule import deterministic, device, plan
from ift_kernels.schedule.accumulate import accum_dtype, operand_dtype
from ift_kernels.schedule.active import ActiveHidden
from ift_kernels.schedule.adapter import Adapter
from ift_kernels.schedule.head import Head, pad_row_stride, pad_rows


class Options(NamedTuple):
    """What every operator on a head takes beside tensors."""

    ignore_index: int
    scale: float
    softcap: float
    temperature: float
    workspace: int  # bytes
    dtype: torch.dtype  # of the products
    deterministic: bool  # tiles of one size: see `schedule.deterministic`


class SavedBuffers:
    """Tensors kept from forward to the first backward, counted against later calls' workspace."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors
        self._leave = [plan.ledger.enter(tensor) for tensor in tensors]

    def release(self) -> None:
        for leave in self._leave:
            leave()

    def gradients(
        self, upstream: Tensor, valid: Tensor, of_rows: tuple[int, ...] = (0,)
    ) -> tuple[Tensor, ...]:
        """The buffers, gradients formed in forward, times `upstream`, in place; releases them.

        Those `of_rows`, as the first, that of hidden, stay 0 in rows that are not `valid` (N,).
        """
        self.release()
        if upstream.device.type == "cpu" and float(upstream) == 1.0:
            return self.tensors
        for gradient in self.tensors:
            if gradient.numel():
                backends.get(gradient).scale_(gradient, upstream)
        for gradient in (self.tensors[at] for at in of_rows):
            if gradient.numel():  # 0 times an infinity is NaN
                gradient.masked_fill_(~valid[:, None], 0)
        return self.tensors


class ValidRows(NamedTuple):
    """Which rows of a call are computed: all of them unless `ids` is given."""

    mask: Tensor | None  # (N,) bool, in sync-free mode, where every row stays
    ids: Tensor | None = None  # (n,)

    @staticmethod
    def of(valid: Tensor) -> ValidRows:
        """Those in the mask (N,). Their number decides sizes, so the host waits for it, once."""
        if sync_free.on():
            return ValidRows(valid)
        return ValidRows.among(valid.nonzero()[:, 0], len(valid))

    @staticmethod
    def among(ids: Tensor, rows: int) -> ValidRows:
        return ValidRows(None, None if len(ids) == rows else ids)


class Call:
    """The valid rows of one call, its head and its problem, whichever operator it came through."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        valid: ValidRows,
        options: Options,
        needs: Needs,
        grads_in_forward: bool = False,
        active: ActiveHidden | None = None,
        fp32_weight_sum: bool = False,
        selected: Selected | None = None,
        adapter: AdapterTensors | None = None,
        adapter_needs: Needs = (False, False, False),
    ) -> None:
        _, scale, softcap, temperature, workspace, dtype, _ = options
        self.dtype = dtype
        self.all_rows = hidden.shape[0]
        self.valid_mask, self.rows = valid
        self._adapter, self._adapter_needs = adapter, adapter_needs
        hidden = self._valid(hidden)
        self.problem = problem(
            hidden, weight, bias, options, needs, grads_in_forward, active, fp32_weight_sum,
            adapter, adapter_needs,
        )  # fmt: skip
        self.count = len(hidden)
        hidden = pad_rows(hidden, self.problem.rows)
        # Copies count, but the products keep a quarter of the budget: less would crawl.
        copies = (self.rows is not None or len(hidden) > self.count) * hidden.element_size()
        operands = self.problem.operands
        copies += (hidden.dtype != operands) * operands.itemsize
        padded = pad_row_stride(plain := hidden.to(operands))
        copies += (padded is not plain) * operands.itemsize
        self.head = Head(
            backends.get(hidden, dtype),
            padded,
            weight,
            None if bias is None else bias.to(accum_dtype(dtype)).contiguous(),
            LogitTransform(scale, softcap, temperature),
            dtype,
            None if selected is None else self._selected(selected),
            None if adapter is None or not adapter.given else self._adapter_of(adapter),
        )
        workspace = max(workspace - hidden.numel() * copies, workspace // 4)
        if self.problem.deterministic:
            workspace = max(workspace, deterministic.least_bytes(self.problem))
        self.problem = replace(self.problem, workspace=workspace)
        if active is not None and self.problem.active is not None:
            active.serve(self.problem)

    def _valid(self, matrix: Tensor) -> Tensor:
        """The valid rows of (N, width); zeros where others stay."""
        if self.valid_mask is not None:
            matrix = sync_free.masked_rows(self.valid_mask, matrix)
        return matrix if self.rows is None else matrix.index_select(0, self.rows)

    def _adapter_of(self, adapter: AdapterTensors) -> Adapter:
        hidden, weight, scale = adapter
        if hidden is not None:
            hidden = pad_rows(self._valid(hidden), self.problem.rows)
        return Adapter.of(hidden, weight, scale, self.dtype)

    def add_adapter_sums(self) -> None:
        """Before gradients are formed: what those of the adapter are added to."""
        if self.head.adapter is not None:
            adapter = self.head.adapter.with_sums(self._adapter_needs)
            self.head = replace(self.head, adapter=adapter)

    def adapter_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the adapter's tensors, empty where there are none."""
        empty = self.head.hidden.new_empty
        given, formed = self._adapter, self.head.adapter
        if given is None or formed is None:
            return empty(0), empty(0), empty(0)
        found = [
            empty(0) if value is None or like is None else value.to(like.dtype)
            for value, like in zip(formed.results(), given, strict=True)
        ]
        if found[0].numel() or formed.d_hidden is not None:
            found[0] = self.scatter_hidden(found[0])
        return found[0], found[1], found[2]

    def select(self, value: Tensor) -> Tensor:
        """The valid rows of (..., N), and 0 for those that only fill products."""
        value = value if self.rows is None else value.index_select(-1, self.rows)
        missing = self.problem.rows - self.count
        return torch.nn.functional.pad(value, (0, missing)) if missing else value

    def _selected(self, selected: Selected) -> Selected:
        """The selected columns of the valid rows, none of those that only fill products."""
        rows, missing = self.rows, self.problem.rows - self.count
        found = (value if rows is None else value.index_select(0, rows) for value in selected)
        pad, below = torch.nn.functional.pad, (0, 0, 0, missing)
        filled = zip(found, (-1, 0), strict=True)
        return Selected(*(pad(each, below, value=value).contiguous() for each, value in filled))

    def drop(self, value: Tensor, rows: slice) -> Tensor:
        """`value` (..., n) of these rows, 0 where they are not valid, whatever was there."""
        if self.valid_mask is not None:
            value = value.masked_fill(~self.select(self.valid_mask)[rows], 0)
        if rows.stop > self.count:
            value = value.clone()
            value[..., max(self.count - rows.start, 0) :] = 0
        return value

    def scatter(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., n) back to all rows, 0 elsewhere."""
        value = value[..., : self.count]
        if self.valid_mask is not None:
            value = value.masked_fill(~self.valid_mask, 0)
        if self.rows is None:
            return value.to(dtype)
        out = torch.zeros((*value.shape[:-1], self.all_rows), dtype=dtype, device=value.device)
        return out.index_copy_(-1, self.rows, value.to(dtype))

    def scatter_hidden(self, d_hidden: Tensor) -> Tensor:
        d_hidden = d_hidden[: self.count]
        if self.valid_mask is not None:
            return sync_free.masked_rows(self.valid_mask, d_hidden)
        if self.rows is None:
            return d_hidden
        out = d_hidden.new_zeros((self.all_rows, d_hidden.shape[1]))
        return out.index_copy_(0, self.rows, d_hidden)


def problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    needs: Needs,
    grads_in_forward: bool,
    active: ActiveHidden | None = None,
    fp32_weight_sum: bool = False,
    adapter: AdapterTensors | None = None,
    adapter_needs: Needs = (False, False, False),
) -> plan.Problem:
    """What `plan` needs of a call all of whose rows of hidden are valid.

    `grads_in_forward`: its gradients are known in forward, up to factors. `active`: None: dh is
    exact, as of 16-bit operands of float32 products.
    """
    half, dtype = gives_half((hidden, weight, bias), needs), options.dtype
    half = half or (adapter is not None and gives_half(adapter, adapter_needs))
    operands = operand_dtype(hidden, weight, dtype)
    transpose = backends.get(hidden, dtype).wants_transpose(dtype)
    found = plan.Problem(
        hidden.shape[0], weight.shape[0], weight.shape[1], dtype, options.workspace, *needs,
        grads_in_forward and not half, is_dense(weight, operands), transpose,
        None if active is None or operands != dtype else active.options, device.of(hidden.device),
        hidden.dtype == operands, fp32_weight_sum, options.deterministic, operands,
        reads_head_rows(backends.get(hidden, dtype), weight, dtype), any(adapter_needs),
    )  # fmt: skip
    if not options.deterministic:
        return found
    found = replace(found, rows=deterministic.padded_rows(found, hidden.device))
    deterministic.check_workspace(found)
    return found


def reads_head_rows(backend: Backend, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether active columns are multiplied by head rows where they lie."""
    there = hasattr(backend, "add_active_products") and dtype.itemsize == 2
    return there and is_dense(weight, dtype) and weight.stride(1) == 1


def active_hidden(active: list[float]) -> ActiveHidden | None:
    """An `ActiveHidden` from an operator's [threshold, block, tail bucket]; None for exact."""
    if not active or sync_free.on():  # how many columns are active depends on data
        return None
    threshold, block, tail_bucket = active
    return ActiveHidden(ActiveSet(threshold, int(block), int(tail_bucket)))


def gives_half(tensors: Sequence[Tensor | None], needs: Needs | list[bool]) -> bool:
    """Whether a gradient has to be float16: formed in forward, before a loss scale lifts it off its
    underflow, it would be rounded to nothing.
    """
    pairs = zip(tensors, needs, strict=True)
    return any(need and t is not None and t.dtype == torch.float16 for t, need in pairs)


def check_targets(target: Tensor, valid: Tensor, vocabulary: int, name: str = "target") -> None:
    """Refuse a target outside the vocabulary: on a CPU, elsewhere only under ``IFT_DEBUG=1``.

    There the check would stall the device's queue; without it such a log-probability is NaN, see
    `contract.new_state`. In sync-free mode the device itself asserts.
    """
    on_cpu = target.device.type == "cpu"
    if not target.numel() or not (on_cpu or checks.debugging()):
        return
    bad = valid & ((target < 0) | (target >= vocabulary))
    expected = f"{name}: expected ids in [0, {vocabulary}) or ignore_index"
    if not on_cpu and sync_free.on():
        torch._assert_async(~bad.any(), expected)
    elif bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise ValueError(f"{expected}, got {int(target[at])} at flat position {at}")


def with_filled_rows(kept: Tensor, rows: int) -> Tensor | None:
    """Kept products with the rows that only fill them, which their memory has.

    None if it has not so many: other numbers of rows do since forward.
    """
    last = kept.storage_offset() + (rows - 1) * kept.stride(0) + kept.shape[1]
    if last * kept.element_size() > kept.untyped_storage().nbytes():
        return None
    return kept.as_strided((rows, kept.shape[1]), kept.stride())
