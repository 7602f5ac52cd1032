"""Whether operations may ask the device a question, whose answer stalls its queue."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ift_kernels.common.settings import Setting


class _Asked(Setting[bool]):
    """Whether `sync_free` is on. Backward may be asked not to wait although forward did."""

    def in_forward(self) -> bool:
        return on()  # while a graph is captured too

    def in_backward(self, forward: bool) -> bool:
        return forward or self.get()


_asked = _Asked("ift_sync_free", False)


def sync_free() -> AbstractContextManager[None]:
    """Never wait for the device inside the ``with`` block; so it is while a CUDA graph is captured.

    Sizes that depend on data become fixed ones. Rows that are ignored or have no upstream gradient
    are computed and masked instead of dropped. How many columns an active set has depends on data:
    ``gradient="active"`` gives exact gradients here. Results are otherwise the same.
    """
    return _asked.use(True)


def on() -> bool:
    """Whether this call must not wait."""
    # A stream captures only once CUDA is in use; asking for the device costs far more.
    in_use = torch.cuda.is_initialized()
    return _asked.get() or (in_use and torch.cuda.is_current_stream_capturing())


def masked_rows(keep: Tensor, value: Tensor) -> Tensor:
    """`value` (N, D) with zeros in rows outside `keep`, NaN or not."""
    return torch.where(
        keep[:, None], value, torch.zeros((), dtype=value.dtype, device=value.device)
    )
