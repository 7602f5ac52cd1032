"""Work memory of finished calls, kept for later ones.

The C library gives large blocks back to the system when they are freed, and the next call then pays
for every page again: a fault, and zeros that are never read. For the workspace of a head that is a
tenth of the time of its products, several times more where a virtual machine returns free memory to
its host. torch caches memory on other devices, not here. What is kept stays within `LIMIT`, the
largest workspace that a call has by default.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

LIMIT = 384 << 20  # bytes that may be kept
SMALL = 1 << 20  # bytes: less than this the C library keeps by itself
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_blocks: list[torch.UntypedStorage] = []
_lock = threading.Lock()


def empty(like: Tensor, elements: int) -> tuple[Tensor, bool]:
    """``like.new_empty(elements)`` of memory that no other tensor uses.

    And whether it was never touched and will be kept, so that its pages are worth a thought.
    """
    nbytes = elements * like.element_size()
    # A storage that does not report how many tensors share it must not be handed out twice.
    if nbytes < SMALL or nbytes > LIMIT or _use_count is None:
        return like.new_empty(elements), False
    with _lock:
        free = [block for block in _blocks if _use_count(block._cdata) == 1]
        fitting = [block for block in free if nbytes <= block.nbytes() <= 2 * nbytes]
        new = False
        if fitting:
            block = min(fitting, key=torch.UntypedStorage.nbytes)
        else:
            # A little more, for a next batch that is a little longer; unused pages cost nothing.
            step = 1 << max(nbytes.bit_length() - 5, 0)
            block = torch.UntypedStorage(-(-nbytes // step) * step, device="cpu")
            new = _make_space(block.nbytes(), free)
            if new:
                _blocks.append(block)
        tensor = torch.empty(0, dtype=like.dtype, device="cpu").set_(block, 0, (elements,), (1,))
        return tensor, new


def clear() -> None:
    """Let go of what no tensor uses."""
    with _lock:
        _blocks[:] = [block for block in _blocks if _use_count and _use_count(block._cdata) > 1]


def _make_space(nbytes: int, free: list[torch.UntypedStorage]) -> bool:
    """Let go of free blocks, oldest first, until `nbytes` more fit; False if there is not.

    Blocks in use stay until they are free: what they hold counts.
    """
    reserved = sum(block.nbytes() for block in _blocks)
    for block in free:
        if reserved + nbytes <= LIMIT:
            break
        _blocks[:] = [kept for kept in _blocks if kept is not block]
        reserved -= block.nbytes()
    return reserved + nbytes <= LIMIT
