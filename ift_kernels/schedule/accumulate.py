"""Sums of products over tiles, in float32 whatever the dtype of the products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ift_kernels.schedule import device
from ift_kernels.schedule.head import slices


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results, of sums over chunks and of a bias, for products in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


FIRST_ROWS = 16  # that are cast through a copy


class Sum:
    """``total[rows] += a @ b`` over tiles, in float32 whatever the dtype of the products.

    On CUDA, from torch 2.8 on, products of 16-bit matrices are added to it unrounded. Elsewhere
    every partial product is rounded once to 16 bits; their sum is not. A product of all rows and
    the whole inner size is the sum, in its own dtype; without unrounded products a first one of all
    rows is the sum so far: often there is no other.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        like: Tensor,
        inner: int,
        into: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """`inner`: the inner size of all products together; `into`: where the sum is best formed,
        of this shape; `result` says whether it was; `factor`: of the whole sum, before it is
        rounded, where products are not.
        """
        self._width, self._like, self._inner = shape[1], like, inner
        self._fp32_products, self._factor = adds_fp32_products(like), factor
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
        begins = self._first is None and self._total is None and len(a) == self._shape[0]
        whole = begins and a.shape[1] == self._inner and self._factor is None
        if self._fp32_products and not whole:
            add_fp32_product(self.total[rows], a, b)
        elif begins:
            with sums_in_fp32(a):
                self._first = torch.mm(a, b, out=self._buffer(a.dtype))
        elif self.total.dtype == a.dtype:
            self.total[rows].addmm_(a, b)
        else:
            if self._part is None:
                self._part = self._first
            self._part = _add_rounded(self.total[rows], a, b, self._part)

    @property
    def _value(self) -> Tensor:
        """The whole sum but for its factor: float32, or a product that was all of it."""
        only = self._first if self._total is None else None
        return self.total if only is None else only

    def write(self, out: Tensor, add: bool = False) -> Tensor:
        """The whole sum in the dtype of `out`, rounded once, or once more where it is added."""
        if add:
            value = self._value if self._factor is None else self._value * self._factor
            return out.add_(value)
        if self._factor is None:
            return out.copy_(self._value)
        return torch.mul(self._value, self._factor, out=out)

    def result(self, dtype: torch.dtype) -> Tensor:
        """The whole sum in `dtype`, in the place where it was to be formed if that has it."""
        out = self._into
        if out is None or out.dtype != dtype:
            if self._factor is None:
                return self._value.to(dtype)
            out = self._like.new_empty(self._shape, dtype=dtype)
        return out if self._factor is None and out is self._value else self.write(out)


class SumInResult:
    """A float32 sum over tiles, as `Sum`, of the first rows of a 16-bit `result` (R, width).

    Its first half is in the memory of `result`, which is not written before the sum is whole.
    """

    def __init__(self, result: Tensor, rows: int, factor: Tensor | None = None) -> None:
        """`factor`: as of `Sum`."""
        self._result, self._rows, self._factor = result, rows, factor
        width = result.shape[1]
        inside = min(rows, len(result) // 2)
        memory = result.view(-1)[: 2 * inside * width].view(torch.float32).view(inside, width)
        outside = result.new_empty((rows - inside, width), dtype=torch.float32)
        self._totals = ((0, memory.zero_()), (inside, outside.zero_()))
        self._fp32_products = adds_fp32_products(result)
        self._part: Tensor | None = None

    def add(self, rows: slice, a: Tensor, b: Tensor) -> None:
        """``sum[rows] += a @ b``, as far as these are among its rows."""
        for begin, total in self._totals:
            start, stop = max(rows.start, begin), min(rows.stop, begin + len(total))
            if start >= stop:
                continue
            some, of_a = total[start - begin : stop - begin], a[start - rows.start :]
            if self._fp32_products and b.dtype != some.dtype:
                add_fp32_product(some, of_a[: stop - start], b)
            elif b.dtype == some.dtype:
                some.addmm_(of_a[: stop - start], b)
            else:
                self._part = _add_rounded(some, of_a[: stop - start], b, self._part)

    def result(self) -> Tensor:
        """`result`, with the sum in its first rows."""
        (_, inside), (_, outside) = self._totals
        if self._factor is not None:
            inside, outside = inside.mul_(self._factor), outside.mul_(self._factor)
        done = min(FIRST_ROWS, len(inside))
        self._result[:done] = inside[:done].clone()
        while done < len(inside):  # a row is written where one of half its number was
            rows = slice(done, min(2 * done, len(inside)))
            self._result[rows] = inside[rows]
            done = rows.stop
        self._result[done : self._rows] = outside
        return self._result


def _add_rounded(total: Tensor, a: Tensor, b: Tensor, scratch: Tensor | None) -> Tensor:
    """``total += a @ b``, rounded to 16 bits in `scratch`; returns that, or a larger one."""
    if scratch is None or len(scratch) < len(a):
        scratch = a.new_empty(total.shape)
    accumulate_fp32(total, torch.mm(a, b, out=scratch[: len(a)]))
    return scratch


def adds_fp32_products(like: Tensor) -> bool:
    """Whether products of 16-bit matrices can be added to a float32 sum unrounded."""
    sixteen_bit = like.dtype.itemsize == 2 and like.device.type != "cpu"
    return sixteen_bit and device.of(like.device).fp32_out


def operand_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of hidden and weight in products of `dtype`: 16 bits where those are not rounded.

    They are cast to that of the products elsewhere: on a CPU, and where they differ.
    """
    kept = dtype == torch.float32 and hidden.dtype == weight.dtype and adds_fp32_products(hidden)
    return hidden.dtype if kept else dtype


@contextlib.contextmanager
def sums_in_fp32(like: Tensor) -> Iterator[None]:
    """On CUDA: a vendor that divides a long inner size does not add up parts of 16 bits.

    torch lets it, by default; the setting is the process's, so products that other threads begin
    meanwhile are as precise.
    """
    settings: Any = torch.backends.cuda.matmul
    name = f"allow_{'bf16' if like.dtype == torch.bfloat16 else 'fp16'}_reduced_precision_reduction"
    if not like.is_cuda or like.dtype.itemsize != 2 or not getattr(settings, name):
        yield
        return
    before = getattr(settings, name)
    setattr(settings, name, False)
    try:
        yield
    finally:
        setattr(settings, name, before)


def add_fp32_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, rounded to float32 alone."""
    torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def accumulate_fp32(total: Tensor, part: Tensor) -> None:
    """``total += part``, a 16-bit `part` piece by piece: torch casts all that it adds at once."""
    for rows in pieces(part):
        total[rows].add_(part[rows])  # += would also assign


def add_column_sums(total: Tensor, part: Tensor) -> None:
    """``total += part.sum(0)``, a 16-bit `part` piece by piece as well."""
    for rows in pieces(part):
        total.add_(part[rows].sum(0, dtype=total.dtype))


def common_factor(*coefficients: Tensor) -> Tensor:
    """What coefficients are divided by where the gradients of tiles are rounded, of float32.

    The largest of them, less powers of two above 1: so one that all rows share, as 1 / N of a mean,
    becomes a power of two. Rounded in every element alike, it would be a bias of all sums; and
    float16 would underflow.
    """
    tiny = torch.finfo(coefficients[0].dtype).tiny
    found = [each.abs().nan_to_num(0, 0, 0).amax() for each in coefficients]
    most = torch.stack(found).amax().clamp(min=tiny)
    mantissa, exponent = most.frexp()
    return torch.ldexp(2 * mantissa, (exponent - 1).clamp(max=0))


def pieces(part: Tensor) -> Iterator[slice]:
    """Rows of a matrix: all, but few on a CPU, which casts 16 bits in memory."""
    step = len(part)
    if part.device.type == "cpu" and part.dtype.itemsize == 2:
        step = min(step, max((1 << 16) // part.shape[1], 1))
    return slices(0, len(part), max(step, 1))
