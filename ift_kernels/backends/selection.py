"""Where several backends serve a device, which of them is faster, operation by operation."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch

from ift_kernels.backends.contract import Backend

# By architecture ("sm_90") and function of a backend, the backend that measured faster on it; what
# is not here goes to the first available one. Not measured: no entries.
FASTER: dict[str, dict[str, str]] = {}


class Mixed:
    """A backend whose functions come from several."""

    def __init__(self, first: Backend, faster: dict[str, Any]) -> None:
        self.__name__ = first.__name__
        self._first = first
        self.__dict__.update(faster)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)


def faster(serving: dict[str, Backend], device: torch.device) -> Backend:
    """The first of `serving`, but for the functions of which another is known to be faster."""
    first = next(iter(serving.values()))
    if device.type != "cuda" or not FASTER:
        return first
    table = FASTER.get(_architecture(device.index or 0), {})
    chosen = tuple((op, cast(Any, serving[name])) for op, name in table.items() if name in serving)
    return _mixed(cast(Any, first), chosen) if chosen else first


@functools.cache
def _mixed(first: Backend, chosen: tuple[tuple[str, Any], ...]) -> Mixed:
    """One object for all calls: operations on two heads compare their backends."""
    return Mixed(first, {op: getattr(backend, op) for op, backend in chosen})


@functools.cache
def _architecture(index: int) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))
