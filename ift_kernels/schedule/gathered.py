"""Products of each row with head rows of its own: gathered, in chunks that fit the workspace.

K·N·D multiply-adds instead of V·N·D, but each at the cost of moving a head row: for sets of ids
that are few beside the vocabulary. dW is a float32 sum, block by block of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ift_kernels.schedule import cost, plan
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import Results, slices
from ift_kernels.schedule.problem import Problem

CPU_ELEMENTS = 1 << 20  # of head rows at once, in cache; a GPU wants few launches
# Multiply-adds of a large product in the time in which a CPU gathers an element and multiplies it:
# 15 to 50 in float32 on a machine with AVX-512, fewer in 16 bits, whose products are no faster.
CPU_ELEMENT = 32


def is_cheaper(problem: Problem, ids: int) -> bool:
    """Whether gathering `ids` head rows a row takes less time than products with all of them.

    Not where those of one row are more than may be gathered at once.
    """
    if ids * problem.width * problem.dtype.itemsize > problem.workspace // 4:
        return False
    passes = 1 + problem.need_hidden + (problem.need_weight or problem.need_bias)
    dense = plan.make(problem)
    if not problem.device.is_gpu:
        return CPU_ELEMENT * passes * ids < dense.products * problem.vocabulary
    elements = max(problem.rows, 1) * problem.width
    # A head row is read, written and read again; for dW a float32 term as well, and its sum.
    moved = elements * ids * (3 * problem.operands.itemsize * passes + 12 * problem.need_weight)
    moved += problem.vocabulary * problem.width * 12 * problem.need_weight
    return moved / problem.device.bandwidth < cost.seconds(problem, dense).device


def products(hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, space: int) -> Tensor:
    """``hidden @ weight[ids].T`` of every row, (N, K), rounded to `dtype`."""
    out = hidden.new_empty(ids.shape, dtype=dtype)
    for rows, gathered in _head_rows(weight, ids, dtype, space):
        torch.bmm(gathered, hidden[rows].to(dtype)[..., None], out=out[rows][..., None])
    return out


def gradients(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,  # (N, K), any id where d_product is 0
    d_product: Tensor,  # (N, K)
    needs: tuple[bool, bool, bool],
    dtype: torch.dtype,
    space: int,
) -> Results:
    """Gradients of hidden, weight and bias (float32, or float64)."""
    d_hidden, d_bias = None, None
    if needs[0]:
        d_hidden = torch.empty_like(hidden)
        rounded = d_product.to(dtype)
        for rows, gathered in _head_rows(weight, ids, dtype, space):
            d_hidden[rows] = torch.bmm(rounded[rows][:, None], gathered)[:, 0].to(hidden.dtype)
    if needs[2]:
        d_bias = d_product.new_zeros(len(weight))
        d_bias.index_add_(0, ids.flatten(), d_product.flatten())
    d_weight = _d_weight(hidden, weight, ids, d_product, space) if needs[1] else None
    return d_hidden, d_weight, d_bias


def _d_weight(hidden: Tensor, weight: Tensor, ids: Tensor, d_product: Tensor, space: int) -> Tensor:
    vocabulary, width = weight.shape
    accum = accum_dtype(d_product.dtype)
    flat, order = ids.flatten().sort()
    block = max(space // 2 // (width * accum.itemsize), 1)
    starts = torch.arange(0, vocabulary + block, block, device=ids.device)
    ends: list[int] = torch.searchsorted(flat, starts).tolist()
    out = torch.empty_like(weight)
    step = max(_elements(ids, space, accum.itemsize) // width, 1)
    for number, columns in enumerate(slices(0, vocabulary, block)):
        total = out.new_zeros((columns.stop - columns.start, width), dtype=accum)
        for some in slices(ends[number], ends[number + 1], step):
            entry = order[some]
            terms = hidden.index_select(0, entry // ids.shape[1]).to(accum)
            terms *= d_product.view(-1)[entry, None]
            total.index_add_(0, flat[some] - columns.start, terms)
        out[columns] = total
    return out


def _head_rows(
    weight: Tensor, ids: Tensor, dtype: torch.dtype, space: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and the head rows (n, K, D) of their ids."""
    step = max(_elements(ids, space, dtype.itemsize) // (ids.shape[1] * weight.shape[1]), 1)
    for rows in slices(0, len(ids), step):
        found = weight.index_select(0, ids[rows].flatten()).to(dtype)
        yield rows, found.view(-1, ids.shape[1], weight.shape[1])


def _elements(ids: Tensor, space: int, size: int) -> int:
    """How many elements may be gathered at once."""
    elements = space // 4 // size
    return min(elements, CPU_ELEMENTS) if ids.device.type == "cpu" else elements
