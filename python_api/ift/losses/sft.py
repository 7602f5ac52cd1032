"""The loss of supervised fine-tuning on per-token log-probabilities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ift.losses._reduce import divide, mean_over_rows
from ift_kernels import checks
from ift_kernels.rows import Rows

Reduction = Literal["mean", "sum", "row_mean", "none"]
REDUCTIONS = ("mean", "sum", "row_mean", "none")


def sft_loss(
    logprob: Tensor,  # (B, T) or (T,)
    mask: Tensor,
    *,
    num_items: float | Tensor | None = None,
    reduction: Reduction = "mean",
    cu_seqlens: Tensor | None = None,
    num_rows: float | Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the response tokens.

    In eager torch, with ``loss = -logprob`` and every masked position 0::

        mean      loss.sum() / mask.sum()                      # or / num_items
        sum       loss.sum()
        row_mean  (loss.sum(-1) / mask.sum(-1)).mean()         # what IFT is without its two parts
        none      loss

    Args:
        logprob: log-probability of each target, already shifted, (B, T), or (T,) for one row or
            packed documents; fp32, bf16, fp16 or fp64. Values at masked positions are never read.
        mask: same shape; bool, or 0/1 of any dtype: which positions are response tokens.
        num_items: for "mean", divide by this instead of by the tokens here: under gradient
            accumulation, the response tokens of the whole optimizer step.
        reduction: above. "row_mean" is over the rows that have response tokens.
        cu_seqlens: (documents + 1,) int32 or int64: the rows of "row_mean" are packed documents.
        num_rows: for "row_mean", divide by this, as in `ift_loss`.

    Returns:
        Scalar, or the shape of `logprob` for "none"; fp64 for fp64 and fp32 otherwise. 0 where
        there is no response token.

    Raises:
        TypeError, ValueError: unknown reduction, shapes that do not match, malformed `cu_seqlens`,
            a divisor that is negative or that the reduction does not use.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.per_token("logprob", logprob)
    mask = checks.as_bool_mask(mask, logprob, "logprob")
    for name, value, user in (("num_items", num_items, "mean"), ("num_rows", num_rows, "row_mean")):
        if value is not None and reduction != user:
            raise ValueError(f"{name}: expected None with reduction {reduction!r}, got {value}")
    exact = logprob.to(torch.float64 if logprob.dtype == torch.float64 else torch.float32)
    loss = torch.where(mask, -exact, 0)
    ones = mask.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "row_mean":
        rows = Rows(loss, cu_seqlens)
        tokens = rows.sum(ones)
        return mean_over_rows(rows.sum(loss) / tokens.clamp(min=1), tokens, num_rows)
    if reduction == "sum":
        return loss.sum()
    return divide(loss.sum(), "num_items", ones.sum() if num_items is None else num_items)


class SFTLoss(nn.Module):
    """`sft_loss` with its reduction held by a module; call it on ``(logprob, mask)``.

    Args:
        reduction: as in `sft_loss`.
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        checks.one_of("reduction", reduction, REDUCTIONS)
        self.reduction: Reduction = reduction

    def forward(
        self,
        logprob: Tensor,
        mask: Tensor,
        *,
        num_items: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_rows: float | Tensor | None = None,
    ) -> Tensor:
        """See `sft_loss`."""
        return sft_loss(
            logprob,
            mask,
            num_items=num_items,
            reduction=self.reduction,
            cu_seqlens=cu_seqlens,
            num_rows=num_rows,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
