"""Products of each row with head rows of its own, gathered in chunks that fit the workspace.

K·N·D multiply-adds instead of V·N·D, but each at the cost of moving a head row: for sets of ids
that are few beside the vocabulary. Gradients are torch's `embedding_bag`, which gathers nothing:
dh of a row is the sum of its head rows, dW of a head row that of the rows in whose set it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ift_kernels.common.head_rows import is_dense
from ift_kernels.schedule import cost, plan
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import Results, slices
from ift_kernels.schedule.problem import Problem

CPU_ELEMENTS = 1 << 18  # of head rows at once, in cache; a GPU wants few launches
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
    # Forward reads a head row, writes it and reads it again; dh reads it, dW a row of hidden.
    size = problem.operands.itemsize
    moved = elements * ids * (size * (3 + problem.need_hidden) + 4 * problem.need_weight)
    moved += problem.vocabulary * problem.width * 3 * size * problem.need_weight
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
        d_hidden = _d_hidden(hidden, weight, ids, d_product.to(dtype), space)
    if needs[2]:
        d_bias = d_product.new_zeros(len(weight))
        d_bias.index_add_(0, ids.flatten(), d_product.flatten())
    d_weight = _d_weight(hidden, weight, ids, d_product, space) if needs[1] else None
    return d_hidden, d_weight, d_bias


def _d_hidden(hidden: Tensor, weight: Tensor, ids: Tensor, d_product: Tensor, space: int) -> Tensor:
    if is_dense(weight, d_product.dtype):
        found = F.embedding_bag(ids, weight, mode="sum", per_sample_weights=d_product)
        return found.to(hidden.dtype)
    out = torch.empty_like(hidden)
    for rows, gathered in _head_rows(weight, ids, d_product.dtype, space):
        out[rows] = torch.bmm(d_product[rows][:, None], gathered)[:, 0].to(hidden.dtype)
    return out


def _d_weight(hidden: Tensor, weight: Tensor, ids: Tensor, d_product: Tensor, space: int) -> Tensor:
    """Sums in float32 (float64), of as much of the width as fits in that dtype."""
    (vocabulary, width), accum = weight.shape, accum_dtype(d_product.dtype)
    flat, order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(flat, torch.arange(vocabulary, device=ids.device))
    entries, factors = order // ids.shape[1], d_product.flatten()[order].to(accum)

    def sums(part: Tensor) -> Tensor:
        return F.embedding_bag(entries, part, starts, mode="sum", per_sample_weights=factors)

    if hidden.dtype == weight.dtype == accum:
        return sums(hidden)
    out = torch.empty_like(weight)
    step = max(space // 2 // ((len(hidden) + vocabulary) * accum.itemsize), 1)
    for columns in slices(0, width, step):
        out[:, columns] = sums(hidden[:, columns].to(accum))
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
