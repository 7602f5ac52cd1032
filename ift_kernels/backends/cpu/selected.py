"""Columns of a chunk that are apart from the rest, in C++: csrc/cpu/selected.cpp."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import Chunk, Selected
from ift_kernels.backends.cpu.extension import compiled, products_of
from ift_kernels.backends.layout_checks import address, check_selected, check_transposed


def take_selected(chunk: Chunk, selected: Selected) -> None:
    ids, values = selected
    check_selected(len(chunk.x), selected)
    compiled().take_selected(
        products_of(chunk), ids.data_ptr(), values.data_ptr(), ids.shape[1],
        chunk.transform.lowest_product,
    )  # fmt: skip


def put_selected(chunk: Chunk, selected: Selected, transposed: Tensor | None = None) -> None:
    ids, values = selected
    check_selected(len(chunk.x), selected)
    check_transposed(chunk.x, transposed)
    compiled().put_selected(
        products_of(chunk), ids.data_ptr(), values.data_ptr(), ids.shape[1],
        address(transposed), 0 if transposed is None else transposed.stride(0),
    )  # fmt: skip
