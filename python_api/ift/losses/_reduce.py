"""The last step of a loss: the divisor, which may belong to a larger batch than this call's."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.common import checks


def divide(total: Tensor, name: str, count: float | Tensor) -> Tensor:
    """``total / count``; 0 with a `count` of 0, as of an accumulation step without any token.

    Args:
        total: of any shape.
        name: the argument that `count` came from, for the errors.
        count: at least 0; a number, or a tensor that holds one.
    """
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {tuple(count.shape)}")
        count = count.to(total).reshape(())  # its value is not read: that would synchronise
        return total * (count != 0) / torch.where(count == 0, 1, count)
    count = checks.number_of_items(name, count)
    return total / count if count else total * 0


def mean_over_rows(
    per_row: Tensor,  # (rows,), 0 where the row has no tokens
    tokens: Tensor,  # (rows,)
    num_rows: float | Tensor | None,
) -> Tensor:
    """Mean over `num_rows` rows; by default over those of `per_row` that have tokens."""
    return divide(per_row.sum(), "num_rows", (tokens > 0).sum() if num_rows is None else num_rows)


def reduce_tokens(
    each: Tensor,  # (...), 0 where a token does not count
    reduction: str,  # "mean", "sum" or "none"
    tokens: Tensor,  # scalar, those that count
    num_items: float | Tensor | None,
) -> Tensor:
    """Losses of tokens, their sum, or their mean over `num_items`, by default over `tokens`."""
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    return divide(each.sum(), "num_items", tokens if num_items is None else num_items)
