"""Columns of a chunk that are apart from the rest, in CUDA C++: csrc/cuda/selected.cu."""

from __future__ import annotations

from torch import Tensor

from ift_kernels.backends.contract import Chunk, Selected
from ift_kernels.backends.cuda.extension import compiled, products_of
from ift_kernels.backends.layout_checks import check_selected


def take_selected(chunk: Chunk, selected: Selected) -> None:
    ids, values = selected
    check_selected(len(chunk.x), selected)
    queue, products = products_of(chunk)
    compiled().take_selected(
        queue, products, ids.data_ptr(), values.data_ptr(), ids.shape[1],
        chunk.transform.lowest_product,
    )  # fmt: skip


def put_selected(chunk: Chunk, selected: Selected, transposed: Tensor | None = None) -> None:
    ids, values = selected
    check_selected(len(chunk.x), selected)
    queue, products = products_of(chunk)
    compiled().put_selected(queue, products, ids.data_ptr(), values.data_ptr(), ids.shape[1])
    if transposed is not None:
        transposed.copy_(chunk.x.T)
