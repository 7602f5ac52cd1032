"""Temporal residual connection of Intuitive Fine-Tuning: mix predicted tokens into given ones.

Source: *Intuitive Fine-Tuning: Towards Simplifying Alignment into a Single Process*
(arXiv 2405.11870), and its released code for the shift and the mask.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ift_kernels import backends
from ift_kernels.backends.reference.temporal import mixed_in_of
from ift_kernels.common import checks
from ift_kernels.operators import library

__all__ = ["mixed_in_ids", "temporal_residual"]

Tokens: TypeAlias = tuple[Tensor, Tensor, Tensor]  # ids, predicted, labels


def mixed_in_ids(
    ids: Tensor,  # (B, T) or (T,)
    predicted: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The token that the temporal residual mixes in at each position.

    In eager torch, with ``first[t]`` where a row or a document begins::

        mixed_in = torch.where((labels != ignore_index) & ~first, predicted.roll(1, -1), ids)

    So prompt, padding and first positions keep their own token, and the first response token is
    mixed with the prediction made at the last prompt position.

    Args:
        ids: input tokens, (B, T), or (T,) for one row; int64 or int32.
        predicted: same shape: the token predicted from the logits at each position, not shifted.
        labels: same shape: `ignore_index` where the position belongs to no response, not shifted.
        ignore_index: default -100, as in torch and transformers.
        cu_seqlens: (documents + 1,) int32 or int64: documents ``[cu[i], cu[i+1])`` of the flattened
            positions; the first token of each is never mixed, nor the first of a row.

    Returns:
        int64, in the shape of `ids`.

    Raises:
        TypeError: an argument that is not an integer tensor.
        ValueError: shapes that do not match, or `cu_seqlens` that decrease or do not cover the
            positions.
    """
    rows, cu = _checked(ids, predicted, labels, cu_seqlens)
    return mixed_in_of(*rows, cu, ignore_index).reshape(ids.shape)


def temporal_residual(
    embedding: Tensor,  # (V, E)
    ids: Tensor,  # (B, T) or (T,)
    predicted: Tensor,
    labels: Tensor,
    lam: float,
    *,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Input embeddings of the second pass: the given token, a share `lam` of it the predicted one.

    In eager torch::

        mixed_in = mixed_in_ids(ids, predicted, labels, ...)
        (1 - lam) * embedding[ids] + lam * embedding[mixed_in]

    Where ``mixed_in == ids`` the row of the table is copied bit for bit, so that both passes agree
    on a prompt exactly. Pass ``embedding.detach()`` for the released behaviour, in which no
    gradient reaches the table along this path.

    Args:
        embedding: the table, (V, E); fp32, bf16, fp16 or fp64. Mixed in fp32 at least.
        ids, predicted, labels, ignore_index, cu_seqlens: as in `mixed_in_ids`. `predicted`
            is read only where it is mixed in.
        lam: share of the predicted token, in [0, 1]; the released value is 0.2.

    Returns:
        (B, T, E), or (T, E), in the dtype of `embedding`. Its gradient to `embedding` is dense
        (V, E); each row is summed in fp32 and rounded once. It may be differentiated again.

    Raises:
        TypeError: as `mixed_in_ids`; `embedding` not floating point; `lam` not a number.
        ValueError: as `mixed_in_ids`; `lam` outside [0, 1]; `embedding` not a matrix; a token
            outside the vocabulary, on GPUs only under ``IFT_DEBUG=1``: without it their kernels
            read outside the table.
    """
    lam = checks.unit_interval("lam", lam)
    checks.floating("embedding", embedding)
    if embedding.dim() != 2:
        raise ValueError(f"embedding: expected shape (V, E), got {tuple(embedding.shape)}")
    if embedding.device != ids.device:
        raise ValueError(
            f"ids: expected the device of embedding, {embedding.device}, got {ids.device}"
        )
    rows, cu = _checked(ids, predicted, labels, cu_seqlens)
    op = torch.ops.ift_kernels.temporal_residual
    out: Tensor = op(embedding, *rows, cu, lam, ignore_index)
    return out.reshape(*ids.shape, embedding.shape[1])


def _checked(
    ids: Tensor, predicted: Tensor, labels: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tokens, Tensor | None]:
    """The three token tensors as int64 (R, T), and `cu_seqlens` as int64."""
    for name, tensor in (("ids", ids), ("predicted", predicted), ("labels", labels)):
        came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        if came not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected an int64 or int32 tensor, got {came}")
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{name}: expected shape (B, T) or (T,), got {tuple(tensor.shape)}")
        checks.same_shape(name, tensor, ids, "ids")
    if cu_seqlens is not None:
        cu_seqlens = checks.seqlens(cu_seqlens, ids)
    rows = ids.shape if ids.dim() == 2 else (1, ids.numel())

    def wide(tensor: Tensor) -> Tensor:
        return tensor.long().reshape(rows)

    return (wide(ids), wide(predicted), wide(labels)), cu_seqlens


# Two operations, each the adjoint of the other in its floating point argument, so that gradients of
# any order come from the same two. `tokens` are ids, predicted, labels, all (R, T) int64.


def _readable(tokens: Tokens, cu: Tensor | None, ignore: int, size: int) -> None:
    """Refuse what would be read outside the table, or outside `tokens`, before it is read."""
    if cu is not None:
        checks.seqlens(cu, tokens[0])  # again: a compiled caller could not
    if tokens[0].device.type != "cpu" and not checks.debugging():
        return  # would stall the device's queue
    for name, values in (("ids", tokens[0]), ("predicted", mixed_in_of(*tokens, cu, ignore))):
        low, high = (int(v) for v in values.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"{name}: expected tokens in [0, {size}), the rows of embedding, "
                f"got {low if low < 0 else high}"
            )


def _forward(
    embedding: Tensor,
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu: Tensor | None,
    lam: float,
    ignore: int,
) -> Tensor:
    if ids.numel() == 0:
        return embedding.new_empty(*ids.shape, embedding.shape[1])
    _readable((ids, predicted, labels), cu, ignore, embedding.shape[0])
    backend = backends.get(embedding)
    out: Tensor = backend.residual(embedding, ids, predicted, labels, cu, lam, ignore)
    return out.contiguous()


def _adjoint(
    grad: Tensor,
    ids: Tensor,
    predicted: Tensor,
    labels: Tensor,
    cu: Tensor | None,
    lam: float,
    ignore: int,
    size: int,
) -> Tensor:
    if ids.numel() == 0:
        return grad.new_zeros(size, grad.shape[2])
    _readable((ids, predicted, labels), cu, ignore, size)
    backend = backends.get(grad)
    out: Tensor = backend.residual_grad(grad, ids, predicted, labels, cu, lam, ignore, size)
    return out.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, *tokens, cu, ctx.lam, ctx.ignore = inputs[:7]
    ctx.size = first.shape[0]  # of the table; the adjoint's own backward does not need it
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tokens, cu)


def _forward_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    out = None
    if grad is not None and ctx.needs_input_grad[0]:
        op = torch.ops.ift_kernels.temporal_residual_adjoint
        out = op(grad, *ctx.saved_tensors, ctx.lam, ctx.ignore, ctx.size)
    return out, None, None, None, None, None, None


def _adjoint_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    out = None
    if grad is not None and ctx.needs_input_grad[0]:
        op = torch.ops.ift_kernels.temporal_residual
        out = op(grad, *ctx.saved_tensors, ctx.lam, ctx.ignore)
    return out, None, None, None, None, None, None, None


_TOKENS = "Tensor ids, Tensor predicted, Tensor labels, Tensor? cu_seqlens, float lam, int ignore"
library.register(
    f"temporal_residual(Tensor embedding, {_TOKENS}) -> Tensor",
    _forward,
    lambda embedding, ids, *_: embedding.new_empty(*ids.shape, embedding.shape[1]),
    _forward_backward,
    _setup,
    linear=True,
)
library.register(
    f"temporal_residual_adjoint(Tensor grad, {_TOKENS}, SymInt size) -> Tensor",
    _adjoint,
    lambda grad, *rest: grad.new_empty(rest[-1], grad.shape[2]),
    _adjoint_backward,
    _setup,
    linear=True,
)
