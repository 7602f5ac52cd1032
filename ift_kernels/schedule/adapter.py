"""What an adapter adds to a head: a low-rank product, and a scale of each column.

Raw products become ``x = column_scale * (hidden @ weight.T + u @ B.T)``: LoRA, and with the scale
DoRA. Neither an adapted weight nor ``u @ B.T`` is formed as a whole: each tile of products gets its
share. The gradients of u, B and the scale are float32 sums over tiles, as small as the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ift_kernels.schedule.accumulate import (
    accum_dtype,
    accumulate_fp32,
    add_column_sums,
    add_fp32_product,
    adds_fp32_products,
    pieces,
)
from ift_kernels.schedule.head import pad_row_stride

# Smaller scales are taken for this one: far below what any logit is rounded to, yet the product
# that a scaled one came from, which the gradient of the scale needs, can be divided out.
MIN_SCALE = 2.0**-100
# Float16 has no such number, and rounds products of scales below this one to hardly any digits.
MIN_SCALE_FLOAT16 = 1e-5


@dataclass(frozen=True)
class Adapter:
    """The operands of a call's rows, and the sums of their gradients that are wanted."""

    hidden: Tensor | None  # u (N, r), in the dtype of products
    weight: Tensor | None  # B (V, r), any float dtype, cast chunk by chunk
    scale: Tensor | None  # (V,), in the dtype of sums
    d_hidden: Tensor | None = None  # sums, in theirs
    d_weight: Tensor | None = None
    d_scale: Tensor | None = None  # of dz * (scaled product), to be divided by the scale
    float16: bool = False  # whether products are

    @classmethod
    def of(
        cls, hidden: Tensor | None, weight: Tensor | None, scale: Tensor | None, dtype: torch.dtype
    ) -> Adapter:
        """For products in `dtype`."""
        if hidden is not None:
            hidden = pad_row_stride(hidden.to(dtype))
        if scale is not None:
            scale = scale.to(accum_dtype(dtype)).contiguous()
            if dtype != torch.float16:
                tiny = torch.copysign(scale.new_full((), MIN_SCALE), scale)
                scale = torch.where(scale.abs() < MIN_SCALE, tiny, scale)
        return cls(hidden, weight, scale, float16=dtype == torch.float16)

    def rows(self, rows: slice) -> Adapter:
        """The same of some rows; sums over rows are shared."""
        hidden, d_hidden = (x if x is None else x[rows] for x in (self.hidden, self.d_hidden))
        return replace(self, hidden=hidden, d_hidden=d_hidden)

    def with_sums(self, needs: tuple[bool, bool, bool]) -> Adapter:
        """With sums of 0 for the gradients of u, B and the scale that are wanted."""
        tensors, like = (self.hidden, self.weight, self.scale), self.hidden
        like = self.scale if like is None else like
        assert like is not None
        sums = [
            like.new_zeros(x.shape, dtype=accum_dtype(like.dtype))
            if need and x is not None
            else None
            for x, need in zip(tensors, needs, strict=True)
        ]
        return replace(self, d_hidden=sums[0], d_weight=sums[1], d_scale=sums[2])

    @property
    def has_sums(self) -> bool:
        return any(x is not None for x in (self.d_hidden, self.d_weight, self.d_scale))

    def without_sums(self) -> Adapter:
        """For tiles that are formed again, whose share is added already."""
        return replace(self, d_hidden=None, d_weight=None, d_scale=None)

    def weight_chunk(self, columns: slice, dtype: torch.dtype) -> Tensor:
        """B of these columns."""
        assert self.weight is not None
        return self.weight[columns].to(dtype)

    def apply(self, columns: slice, product: Tensor, rows: slice) -> None:
        """Turn ``hidden @ weight.T`` into the adapted product, in place."""
        if self.hidden is not None:
            product.addmm_(self.hidden[rows], self.weight_chunk(columns, product.dtype).T)
        self._scale(columns, product)

    def _scale(self, columns: slice, product: Tensor) -> None:
        if self.scale is not None:
            for some in pieces(product):
                product[some].mul_(self.scale[columns])

    def copy(self, product: Tensor) -> Tensor | None:
        """The scaled product, where its gradient, which takes its place, is multiplied with it."""
        return None if self.d_scale is None else product.clone()

    def add(
        self, rows: slice, columns: slice, gradient: Tensor, transposed: Tensor | None,
        copy: Tensor | None,
    ) -> None:  # fmt: skip
        """Add a tile's share of the sums.

        `gradient`, of the scaled products, becomes that of those before the scale, in place; so
        does `transposed`, the same in memory of its own.
        """
        if self.d_scale is not None and copy is not None:
            copy.mul_(gradient).masked_fill_(gradient == 0, 0)  # 0 times a NaN is 0
            add_column_sums(self.d_scale[columns], copy)
        self._scale(columns, gradient)
        if self.scale is not None and transposed is not None:
            for some in pieces(transposed):
                transposed[some].mul_(self.scale[columns][some, None])
        if self.d_hidden is not None:
            chunk = self.weight_chunk(columns, gradient.dtype)
            add_product(self.d_hidden[rows], gradient, chunk)
        if self.d_weight is not None:
            assert self.hidden is not None
            add_transposed_product(self.d_weight[columns], gradient, self.hidden[rows])

    def multiply_sums(self, factor: Tensor | None) -> None:
        """Times the factor that the gradients of all tiles lack, see `accumulate.common_factor`."""
        for total in (self.d_hidden, self.d_weight, self.d_scale):
            if total is not None and factor is not None:
                total.mul_(factor)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of u, B and the scale, once all tiles are added."""
        d_scale = self.d_scale
        if d_scale is not None and self.scale is not None:
            d_scale = d_scale / self.scale
            if self.float16:
                d_scale.masked_fill_(self.scale.abs() < MIN_SCALE_FLOAT16, torch.nan)
        return self.d_hidden, self.d_weight, d_scale


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` of few columns, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif adds_fp32_products(a):
        add_fp32_product(total, a, b)
    else:
        accumulate_fp32(total, torch.mm(a, b))


def add_transposed_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a.T @ b`` of few columns, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a.T, b)
    elif adds_fp32_products(a):
        add_fp32_product(total, a.T, b)
    else:  # the large operand as it lies: a CPU would copy its transpose
        total.add_(torch.mm(pad_row_stride(b.T.contiguous()), a).T)
