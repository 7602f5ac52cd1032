"""Input of every loss: checked tokens, masked and in float32, and their sums per row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels.common import checks
from ift_kernels.common.packed_rows import Rows

Metrics = dict[str, Tensor]


class Tokens:
    """The log-probabilities of a batch, (B, T) or packed, 0 where the mask is.

    Args:
        logprob: (B, T), or (T,) for one row or packed documents; values off the mask are not read.
        mask: same shape, bool or 0/1: response tokens.
        cu_seqlens: (documents + 1,): the rows are packed documents.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit, malformed `cu_seqlens`.
    """

    def __init__(self, logprob: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> None:
        checks.per_token("logprob", logprob)
        self.mask = checks.as_bool_mask(mask, logprob, "logprob")
        self.rows = Rows(logprob, cu_seqlens)
        self.dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
        self.logprob = torch.where(self.mask, logprob.to(self.dtype), 0)
        self.counts = self.rows.sum(self.mask.to(self.dtype))  # tokens of each row, (rows,)

    @property
    def total(self) -> Tensor:
        """Tokens of the batch."""
        return self.mask.sum()

    def sums(self, x: Tensor) -> Tensor:
        """Sum of a per-token tensor over each row, (rows,)."""
        return self.rows.sum(torch.where(self.mask, x, 0))

    def means(self, x: Tensor) -> Tensor:
        """Mean over each row's tokens; 0 for a row without any."""
        return self.sums(x) / self.counts.clamp(min=1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over all tokens, a scalar; 0 without any."""
        return torch.where(self.mask, x, 0).sum() / self.total.clamp(min=1)

    def like(self, name: str, x: Tensor) -> Tensor:
        """A second tensor of the batch that is per token and nothing else, checked and masked."""
        checks.floating(name, x)
        checks.same_shape(name, x, self.mask, "logprob")
        return torch.where(self.mask, x.to(self.dtype), 0)

    def each(self, name: str, x: Tensor) -> Tensor:
        """A second tensor of the batch, per token, checked and masked; or (rows,), spread."""
        checks.floating(name, x)
        if x.shape == self.mask.shape:
            return torch.where(self.mask, x.to(self.dtype), 0)
        return torch.where(self.mask, self.rows.spread(self._of_rows(name, x)), 0)

    def sums_of(self, name: str, x: Tensor) -> Tensor:
        """(rows,) sums of a second tensor, which may be per token or already sums per row."""
        checks.floating(name, x)
        if x.shape == self.mask.shape:
            return self.sums(x.to(self.dtype))
        return self._of_rows(name, x)

    def _of_rows(self, name: str, x: Tensor) -> Tensor:
        if x.shape != (self.rows.count,):
            raise ValueError(
                f"{name}: expected the shape of logprob, {tuple(self.mask.shape)}, or one number "
                f"per row, ({self.rows.count},), got {tuple(x.shape)}"
            )
        if x.device != self.mask.device:
            raise ValueError(f"{name}: expected on {self.mask.device} like logprob, got {x.device}")
        return x.to(self.dtype)


class Pairs(NamedTuple):
    """A value per row of a batch whose first half is chosen and second half rejected."""

    chosen: Tensor  # (pairs,)
    rejected: Tensor  # (pairs,)

    @classmethod
    def halves(cls, values: Tensor) -> Pairs:
        """Split (2 · pairs,).

        Raises:
            ValueError: an odd number of rows.
        """
        if values.shape[0] % 2:
            raise ValueError(
                "logprob: expected the chosen rows, then as many rejected ones, "
                f"got {values.shape[0]} rows"
            )
        return cls(*values.chunk(2)) if values.shape[0] else cls(values, values)


def check_given(
    name: str, value: Tensor | None, option: str, used: bool, *, needed: bool = False
) -> None:
    """Refuse a tensor that nothing reads, and a missing one that `option` needs."""
    if value is None and used and needed:
        raise ValueError(f"{name}: expected a tensor with {option}, got None")
    if value is not None and not used:
        raise ValueError(f"{name}: expected None without {option}, got a tensor")


def record(metrics: Metrics | None, **values: Tensor) -> None:
    """Put detached scalars into `metrics`, if the caller wants any."""
    if metrics is not None:
        metrics.update({name: value.detach() for name, value in values.items()})


def record_tokens(metrics: Metrics | None, tokens: Tokens) -> None:
    """Metrics of every loss: how many tokens, and the perplexity of the targets."""
    if metrics is not None:
        perplexity = torch.exp(-tokens.mean(tokens.logprob.detach()))
        record(metrics, tokens=tokens.total, perplexity=perplexity)
