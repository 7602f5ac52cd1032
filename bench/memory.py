"""How much memory a call takes on top of what is there before it.

CPU: the high-water mark of the process's resident memory, which the kernel keeps (`VmHWM`) and
resets on request, minus what was resident before the call and minus the tensors that the call
returns. It counts what libraries take behind torch's back and misses nothing between two looks, as
a sampler would; but it counts pages, so each reading wants a fresh process in which nothing large
was freed before. CUDA: the same, with torch's allocator in place of the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import clock

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt


class Observed(NamedTuple):
    """What one call did."""

    result: Any
    seconds: float
    extra_bytes: int | None  # None: this machine does not tell


def observe(call: Callable[[], Any], device: torch.device) -> Observed:
    """Run `call` once; its peak is over what is resident now and without what it returns."""
    gc.collect()
    give_back()
    before = _reset(device)
    start = clock.now()
    result = call()
    synchronize(device)
    seconds = clock.now() - start
    peak = _peak(device)
    extra = None if before is None or peak is None else peak - before - _bytes(result)
    return Observed(result, seconds, extra)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read now is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Make free() give blocks of 64 KiB and more back to the system, where the C library can.

    glibc otherwise keeps up to 64 MiB of them, and a later call that takes them again would look
    smaller than it is. Afterwards it does what it had come to do by itself in a process that frees
    large blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 64 << 10)
    mallopt(_M_TRIM_THRESHOLD, 64 << 10)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def keep_freed() -> None:
    """Make this process keep what it frees, as allocators for servers do, where the C library can.

    Timings then are those of a process that has run for a while: a call does not pay for pages
    that another call has just given back, which costs a tenth of the time of large products, and
    half of it where a virtual machine returns free memory to its host.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Give free memory back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset(device: torch.device) -> int | None:
    """Start a new high-water mark; the bytes in use now, None if there is no way to know."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        _RESET.write_text("5")
        return _status("VmRSS")
    except OSError:  # not Linux, or a /proc that may not be written
        return None


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        return None


def _status(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _bytes(result: Any) -> int:
    """Bytes of the tensors in nested tuples, lists and dicts; a shared storage counts once."""
    storages: dict[int, int] = {}
    waiting = [result]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
    return sum(storages.values())
