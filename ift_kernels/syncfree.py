"""Whether operations may ask the device a question, whose answer stalls its queue."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor

_asked: contextvars.ContextVar[bool] = contextvars.ContextVar("ift_sync_free", default=False)


@contextlib.contextmanager
def sync_free() -> Iterator[None]:
    """Never wait for the device inside the ``with`` block; so it is while a CUDA graph is captured.

    Sizes that depend on data become fixed ones. Rows that are ignored or have no upstream gradient
    are computed and masked instead of dropped. An active set gets the room that half of the
    workspace holds; where it does not fit, all gradients of the call are NaN: a larger workspace
    or threshold helps. Results are otherwise the same.
    """
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def on() -> bool:
    """Whether this call must not wait."""
    # A stream captures only once CUDA is in use; asking for the device costs far more.
    in_use = torch.cuda.is_initialized()
    return _asked.get() or (in_use and torch.cuda.is_current_stream_capturing())


@contextlib.contextmanager
def as_in_forward(mode: bool) -> Iterator[None]:
    """For a backward whose forward did not wait: on GPUs it runs in another thread."""
    token = _asked.set(_asked.get() or mode)
    try:
        yield
    finally:
        _asked.reset(token)


def masked_rows(keep: Tensor, value: Tensor) -> Tensor:
    """`value` (N, D) with zeros in rows outside `keep`, NaN or not."""
    return torch.where(
        keep[:, None], value, torch.zeros((), dtype=value.dtype, device=value.device)
    )


def poisoned(overflow: Tensor, value: Tensor | None) -> Tensor | None:
    """`value`, all NaN where the flag is set: an overflow that nobody looks at must not pass."""
    return None if value is None else value.masked_fill_(overflow, torch.nan)
