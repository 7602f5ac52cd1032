"""Sums of products over tiles, in float32 whatever the dtype of the products."""

from __future__ import annotations

import torch
from torch import Tensor


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results, of sums over chunks and of a bias, for products in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sum:
    """``total[rows] += a @ b`` over tiles, in float32 whatever the dtype of the products.

    torch's CPU product of two bfloat16 matrices is rounded to bfloat16, so every partial product is
    rounded once; their sum is not. A first product of all rows is the sum so far, as it is: often
    there is no other.
    """

    def __init__(self, shape: tuple[int, int], like: Tensor, into: Tensor | None = None) -> None:
        """`into`: where the sum is best formed, of this shape; `result` says whether it was."""
        self._width, self._like = shape[1], like
        self.restart(shape[0], into)

    def restart(self, rows: int, into: Tensor | None = None) -> None:
        """The sum of other rows."""
        self._shape, self._into = (rows, self._width), into
        self._first: Tensor | None = None
        self._total: Tensor | None = None
        self._part: Tensor | None = None

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        if self._into is not None and self._into.dtype == dtype:
            return self._into
        return self._like.new_empty(self._shape, dtype=dtype)

    @property
    def total(self) -> Tensor:
        """The sum so far, to be added to in place."""
        if self._total is None:
            dtype = accum_dtype(self._like.dtype)
            if self._first is None:
                self._total = self._buffer(dtype).zero_()
            else:
                self._total = self._first.to(dtype)
        return self._total

    def add(self, rows: slice, a: Tensor, b: Tensor) -> None:
        if self._first is None and self._total is None and len(a) == self._shape[0]:
            self._first = torch.mm(a, b, out=self._buffer(a.dtype))
        elif self.total.dtype == a.dtype:
            self.total[rows].addmm_(a, b)
        else:
            if self._part is None:
                self._part = a.new_empty(self._shape) if self._first is None else self._first
            accumulate_fp32(self.total[rows], torch.mm(a, b, out=self._part[rows]))

    def result(self, dtype: torch.dtype) -> Tensor:
        """The whole sum in `dtype`."""
        only = self._first if self._total is None else None
        return (self.total if only is None else only).to(dtype)


def accumulate_fp32(total: Tensor, part: Tensor) -> None:
    """``total += part``, a 16-bit `part` piece by piece: torch casts all that it adds at once."""
    step = len(part)
    if part.device.type == "cpu":
        step = min(step, max((1 << 16) // part.shape[1], 1))
    for start in range(0, len(part), max(step, 1)):
        total[start : start + step].add_(part[start : start + step])  # += would also assign
