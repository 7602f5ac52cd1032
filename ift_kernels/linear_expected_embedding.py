"""The mean embedding under a linear head's prediction, without its logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ift_kernels import backends
from ift_kernels.backends import contract, reference
from ift_kernels.common import checks
from ift_kernels.common.transform import LogitTransform
from ift_kernels.operators import library
from ift_kernels.schedule import accumulate, device, plan, products
from ift_kernels.schedule.accumulate import accum_dtype, operand_dtype
from ift_kernels.schedule.head import Head, empty_padded, pad_row_stride


def linear_expected_embedding(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    embedding: Tensor,  # (V, E)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Expected embedding of the next token, differentiable in every tensor.

    With ``z`` the logits as in `linear_logprobs`, equals::

        softmax(z / temperature, -1) @ embedding        # (..., E)

    The vocabulary is read once in forward, with a running maximum, and once in backward.

    Args:
        embedding: (V, E), any float dtype; cast to the dtype of the products chunk by chunk.
        The rest: as `linear_logprobs`.

    Returns:
        (..., E) in the dtype of `embedding`.

    Raises:
        TypeError, ValueError: as `linear_logprobs`; `embedding` that does not fit `weight`.
        RuntimeError: differentiated twice, in forward mode, or by torch.func.

    >>> hidden, weight = torch.randn(3, 16), torch.randn(100, 16)
    >>> soft = linear_expected_embedding(hidden, weight, weight)
    >>> torch.allclose(soft, (hidden @ weight.T).softmax(-1) @ weight, atol=1e-5)
    True
    """
    checks.head_arguments(hidden, weight, bias)
    checks.floating("embedding", embedding)
    if embedding.dim() != 2 or embedding.shape[0] != weight.shape[0]:
        raise ValueError(
            f"embedding: expected shape (V, E) with V={weight.shape[0]}, "
            f"got {tuple(embedding.shape)}"
        )
    if embedding.device != hidden.device:
        raise ValueError(
            f"embedding: expected on {hidden.device} like hidden, got {embedding.device}"
        )
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    dtype = checks.compute_dtype(hidden, weight, logits_dtype)
    soft, _ = torch.ops.ift_kernels.linear_expected_embedding(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        embedding,
        transform.scale,
        transform.softcap,
        transform.temperature,
        checks.workspace_bytes(workspace, hidden.device, dtype),
        dtype,
    )
    return cast(Tensor, soft.view(*hidden.shape[:-1], embedding.shape[1]).to(embedding.dtype))


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor embedding"
_OPTIONS = "float scale, float softcap, float temperature, int workspace, ScalarType dtype"


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[float, float, float, int, torch.dtype],
) -> Head:
    scale, softcap, temperature, _, dtype = options
    bias = None if bias is None else bias.to(accum_dtype(dtype)).contiguous()
    backend = backends.get(hidden, dtype)
    transform = LogitTransform(scale, softcap, temperature)
    operands = pad_row_stride(hidden.to(operand_dtype(hidden, weight, dtype)))
    return Head(backend, operands, weight, bias, transform, dtype)


def _plan(head: Head, embedding: Tensor, workspace: int, temporaries: int, sums: int) -> plan.Plan:
    """Tiles for `temporaries` matrices of a tile's size, and `sums` columns of either table.

    In cache for the epilogues of a CPU; launches of a GPU take long beside such tiles.
    """
    (n, width), dtype, operand = head.hidden.shape, head.dtype, head.hidden.element_size()
    itemsize = accum_dtype(dtype).itemsize
    whole = plan.make(plan.Problem(n, head.vocabulary, width, dtype, workspace))
    per_column = (width + embedding.shape[1]) * (operand + sums * (itemsize + operand))
    per_element = dtype.itemsize + temporaries * itemsize + operand * (operand != dtype.itemsize)
    tile_bytes = workspace if device.of(head.hidden.device).is_gpu else plan.TILE_BYTES
    rows, columns = plan.tile(n, head.vocabulary, per_element, workspace, per_column, tile_bytes)
    return replace(whole, tile_rows=rows, tile_columns=columns)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, embedding: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    head = _head(hidden, weight, bias, options)
    n, dtype = hidden.shape[0], head.dtype
    state = contract.new_state(n, hidden.device)
    target = torch.full((n,), -1, dtype=torch.int64, device=hidden.device)
    total = torch.zeros((n, embedding.shape[1]), dtype=accum_dtype(dtype), device=hidden.device)
    reference_point = torch.zeros((2, n), dtype=total.dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for tile in products.tiles(head, _plan(head, embedding, options[3], 0, 0)):
            rows, columns, product = tile
            before = state.values[contract.MAX, rows].clone()
            products.update(head, tile, target, state, 0)
            after = state.values[contract.MAX, rows]
            reference_point[0, rows] = torch.where(after == -torch.inf, 0.0, after).to(total.dtype)
            head.backend.probabilities_(head.chunk(tile), reference_point[:, rows])
            rescale = torch.where(before == -torch.inf, 0.0, (before - after).exp())
            total[rows] *= rescale.to(total.dtype)[:, None]
            _add_product(total[rows], head, product, embedding[columns].to(head.hidden.dtype))
    top, sum_exp = state.values[contract.MAX], state.values[contract.SUM]
    soft = total / sum_exp.to(total.dtype)[:, None]
    norm = torch.stack([top, sum_exp.log()]).to(total.dtype)
    return soft, norm


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, embedding: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    dtype = accum_dtype(options[-1])
    soft = embedding.new_empty((n, embedding.shape[1]), dtype=dtype)
    return soft, hidden.new_empty((2, n), dtype=dtype)


def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    soft: Tensor,
    norm: Tensor,
    d_soft: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, needs = rest
    head = _head(hidden, weight, bias, tuple(options))
    dtype, n = head.dtype, hidden.shape[0]
    sums = accum_dtype(dtype)
    d_hidden = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=sums)
    d_weight = _ColumnSums(weight, n) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=sums) if bias is not None and needs[2] else None
    d_embedding = _ColumnSums(embedding, n) if needs[3] else None
    upstream = pad_row_stride(d_soft.to(head.hidden.dtype))
    # dz_v = p_v·(E_v·g − Σ_u p_u E_u·g), and the sum is the result's own product with g. Both in
    # float32 at least: for a nearly certain token they cancel, and their rounding must not stay.
    centre = (soft * d_soft).sum(1)
    # In plain torch the epilogue has temporaries of its own.
    temporaries = 6 if head.backend.softmax_gradient_ is reference.softmax_gradient_ else 2
    chosen = _plan(head, embedding, options[3], temporaries, 1)
    with torch.autocast(hidden.device.type, enabled=False):
        for tile in products.tiles(head, chosen):
            rows, columns, product = tile
            if any(needs[:3]):
                prob: Tensor | None = None
                if d_embedding is not None:
                    prob = empty_padded(head.backend, upstream, *product.shape)
                d_prob = empty_padded(head.backend, d_soft, *product.shape)
                torch.mm(d_soft[rows], embedding[columns].to(sums).T, out=d_prob)
                head.backend.softmax_gradient_(
                    head.chunk(tile), d_prob, norm[:, rows], centre[rows], prob
                )
            else:
                head.backend.probabilities_(head.chunk(tile), norm[:, rows])
                prob = head.rounded(product)
            if d_embedding is not None and prob is not None:
                d_embedding.add(rows, columns, prob.T, upstream[rows])
            gradient = head.rounded(product) if needs[0] or needs[1] else product
            if needs[0]:
                _add_product(d_hidden[rows], head, gradient, head.weight_chunk(columns))
            if d_weight is not None:
                d_weight.add(rows, columns, gradient.T, head.hidden[rows])
            if d_bias is not None:
                d_bias[columns] += product.sum(0, dtype=sums)
    nothing = hidden.new_empty(0)
    return (
        d_hidden.to(hidden.dtype),
        nothing if d_weight is None else d_weight.out,
        hidden.new_empty(0) if d_bias is None or bias is None else d_bias.to(bias.dtype),
        hidden.new_empty(0) if d_embedding is None else d_embedding.out,
    )


def _add_product(total: Tensor, head: Head, tile: Tensor, b: Tensor) -> None:
    """``total += tile @ b``."""
    if head.dtype == head.hidden.dtype:
        total += torch.mm(tile, b)
    else:  # not rounded, as the tile was not
        accumulate.add_fp32_product(total, head.rounded(tile), b)


class _ColumnSums:
    """``out[columns] = Σ over row tiles of a @ b``, one chunk of columns at a time, in float32."""

    def __init__(self, like: Tensor, rows: int) -> None:
        self.out = like.new_empty(like.shape) if rows else torch.zeros_like(like)
        self.rows = rows
        self.total: Tensor | None = None

    def add(self, rows: slice, columns: slice, a: Tensor, b: Tensor) -> None:
        part = torch.mm(a, b)
        if self.total is None:
            self.total = part.to(accum_dtype(part.dtype))
        else:
            self.total += part
        if rows.stop == self.rows:
            self.out[columns] = self.total.to(self.out.dtype)
            self.total = None


def _backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, embedding: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    likes = (hidden, weight, bias, embedding)
    return tuple(
        hidden.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(likes, rest[-1], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _backward(ctx: Any, d_soft: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * len(ctx.options)
    if d_soft is None:
        return (None, None, None, None, *nothing)
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.ift_kernels.linear_expected_embedding_backward(
        *ctx.saved_tensors, d_soft, *ctx.options, needs
    )
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing)


library.register(
    f"linear_expected_embedding({_HEAD}, {_OPTIONS}) -> (Tensor soft, Tensor norm)",
    _forward,
    _forward_fake,
    _backward,
    _setup_context,
)
library.register(
    f"linear_expected_embedding_backward({_HEAD}, Tensor soft, Tensor norm, Tensor d_soft,"
    f" {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_op,
    _backward_fake,
    library.no_second_derivative("linear_expected_embedding"),
)
