"""A head weight that is not in memory: its rows are computed when they are read.

The schedules read a weight (V, D) by chunks of rows and by ids of targets. `HeadRows` answers both
from functions, so that a quantized head is dequantized chunk by chunk inside the workspace, and
operators, autograd and schedules are those of any other head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ReadRows = Callable[[int, int], Tensor]  # (start, stop) → (stop - start, D)
ReadIds = Callable[[Tensor], Tensor]  # (n,) int64 → (n, D)

# Elements that a function computes at once: its temporaries are a few times as large.
PIECE = {"cpu": 1 << 19}
PIECE_GPU = 1 << 23

# Implementations of the operators of ``ift_kernels`` by qualified name, see `operators.library`.
OPERATORS: dict[str, Callable[..., Any]] = {}


class HeadRows(Tensor):
    """A frozen head weight (V, D) of which only rows can be had, computed when they are read.

    Every operation of `ift_kernels` takes it as `weight`, and results equal those of
    ``weight = rows(0, V).to(dtype)``, with gradients for the other tensors. Never more rows than a
    chunk of the workspace are computed at once.

    Args:
        rows: (start, stop) to rows [start, stop) of the weight, (stop - start, D), of any float
            dtype, on `device`. It has to return the same values in every call, and may be called
            from threads of backward. At most a few MiB are asked for at once.
        shape: (V, D).
        dtype: of the weight; rows of another dtype are rounded to it. ``weight.to(dtype)`` is the
            same weight in another one.
        device: of the rows.
        gather: ids (n,) int64, in any order and repeated, to those rows (n, D). Default: `rows` for
            every run of consecutive ids, which is slow on a GPU.

    No other operation on it is served; each is refused by name. It has no gradient and cannot be
    part of a compiled graph.

    Raises:
        TypeError, ValueError: arguments that do not fit; rows of another shape or device.

    >>> packed, scale = torch.randint(-127, 128, (100, 16), dtype=torch.int8), torch.rand(100, 1)
    >>> weight = HeadRows(lambda start, stop: packed[start:stop] * scale[start:stop], (100, 16))
    >>> torch.equal(weight[10:20], packed[10:20] * scale[10:20])
    True
    """

    _rows: ReadRows
    _gather: ReadIds | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's

    @staticmethod
    def __new__(
        cls: type[HeadRows],
        rows: ReadRows,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gather: ReadIds | None = None,
    ) -> HeadRows:
        for name, function in (("rows", rows), ("gather", gather)):
            if not callable(function) and not (name == "gather" and function is None):
                raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
        shape = tuple(shape)  # type: ignore[assignment]  # checked next
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape: expected (V, D), both at least 1, got {shape}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise TypeError(f"dtype: expected 16-bit floats or wider, got {dtype}")
        made: HeadRows = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device(device)
        )
        made._rows, made._gather = rows, gather
        return made

    def read(self, columns: slice, out: Tensor | None = None) -> Tensor:
        """The rows of these columns of logits, dense; in `out` if given, in its dtype."""
        start, stop, _ = columns.indices(self.shape[0])
        out = self._empty(stop - start) if out is None else out
        step = self._step()
        for first in range(start, stop, step):
            last = min(first + step, stop)
            found = self._checked("rows", self._rows, (first, last), last - first)
            out[first - start : last - start].copy_(found)
        return out

    def read_ids(self, ids: Tensor) -> Tensor:
        """The rows of `ids` (n,), dense."""
        out, step = self._empty(len(ids)), self._step()
        function = self._runs if self._gather is None else self._gather
        for first in range(0, len(ids), step):
            some = ids[first : first + step]
            found = self._checked("gather", function, (some,), len(some))
            out[first : first + step].copy_(found)
        return out

    def _runs(self, ids: Tensor) -> Tensor:
        unique, places = ids.unique(return_inverse=True)
        there = unique.tolist()
        if there and not 0 <= there[0] <= there[-1] < self.shape[0]:
            raise IndexError(
                f"ids: expected in [0, {self.shape[0]}), got {there[0]} to {there[-1]}"
            )
        found, begin = self._empty(len(there)), 0
        for at in range(1, len(there) + 1):
            if at == len(there) or there[at] != there[at - 1] + 1:
                run = there[begin], there[at - 1] + 1
                found[begin:at].copy_(self._checked("rows", self._rows, run, at - begin))
                begin = at
        return found.index_select(0, places)

    def _checked(
        self, name: str, function: Callable[..., Tensor], arguments: tuple[Any, ...], count: int
    ) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = function(*arguments)
        shape = (count, self.shape[1])
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{name}: expected rows of shape {shape}, got {came}")
        if found.device != self.device or not found.is_floating_point():
            raise ValueError(
                f"{name}: expected rows of floats on {self.device}, got {found.dtype} "
                f"on {found.device}"
            )
        return found.to(self.dtype)

    def _step(self) -> int:
        return max(PIECE.get(self.device.type, PIECE_GPU) // self.shape[1], 1)

    def _empty(self, rows: int) -> Tensor:
        return torch.empty((rows, self.shape[1]), dtype=self.dtype, device=self.device)

    def _in(self, dtype: torch.dtype) -> HeadRows:
        return HeadRows(
            self._rows,
            (self.shape[0], self.shape[1]),
            dtype=dtype,
            device=self.device,
            gather=self._gather,
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as Tensor has it
        return f"HeadRows({tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch documents it
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operator = OPERATORS.get(func._schema.name)
        if operator is not None:
            return operator(*args, **kwargs)
        served = _SERVED.get(func)
        if served is not None and args and isinstance(args[0], HeadRows):
            found = served(*args, **kwargs)
            if found is not None:
                return found
        raise NotImplementedError(
            f"{func}: is not served for HeadRows, a head weight whose rows are computed; expected "
            "an operation of ift_kernels, or rows of it, weight[start:stop]"
        )


def is_dense(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products can take rows of `weight` where they are: in memory, in this dtype."""
    return weight.dtype == dtype and not isinstance(weight, HeadRows)


def read_rows(weight: Tensor, columns: slice, out: Tensor) -> Tensor:
    """Write these rows of `weight` to `out`, in its dtype."""
    if isinstance(weight, HeadRows):
        return weight.read(columns, out)
    return out.copy_(weight[columns])


def _slice(
    self: HeadRows, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Tensor | None:
    return self.read(slice(start, stop)) if dim == 0 and step == 1 else None


def _index_select(self: HeadRows, dim: int, index: Tensor) -> Tensor | None:
    return self.read_ids(index) if dim == 0 else None


def _to_copy(self: HeadRows, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor | None:
    moved = options.pop("device", None) not in (None, self.device)
    options.pop("non_blocking", None)
    changed = moved or any(value is not None for value in options.values())
    return None if changed else self._in(dtype or self.dtype)


_SERVED: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.aten.slice.Tensor: _slice,
    torch.ops.aten.alias.default: lambda self: self.read(slice(None)),  # weight[0:V]
    torch.ops.aten.index_select.default: _index_select,
    torch.ops.aten.detach.default: lambda self: self._in(self.dtype),
    torch.ops.aten._to_copy.default: _to_copy,
}
