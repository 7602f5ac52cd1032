"""The machine that measures: its clock, its memory, and a description of it for the report.

Memory is what a call takes on top of what is there before it. CPU: the high-water mark of the
process's resident memory, which the kernel keeps (`VmHWM`) and resets on request, minus what was
resident before the call and minus the tensors that the call returns. It includes what libraries
allocate behind torch's back and every peak, however short; but it counts pages, so each reading
wants a fresh process in which nothing large was freed before. CUDA: the same, with torch's
allocator in place of the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ift_kernels
from ift.cli.doctor import cpu_info, cpu_name, usable_cpus, version_of
from ift_kernels import backends
from ift_kernels.backends.cpu import memory

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
DISTRIBUTIONS = (
    "ift-kernels", "torch", "triton", "transformers", "trl", "cut-cross-entropy", "liger-kernel",
    "quack-kernels", "verl", "flash-attn",
)  # fmt: skip
# Environment variables that change the speed of a run.
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "KMP_AFFINITY", "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA", "MALLOC_ARENA_MAX", "IFT_BACKEND", "IFT_CPU_ISA",
)  # fmt: skip

# The only clock of the benchmarks, called as `machine.now()`: a test replaces it with a counter.
now = time.perf_counter

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt


class Budget:
    """Seconds to spend, counted from its creation.

    Args:
        minutes: how much.
    """

    def __init__(self, minutes: float) -> None:
        self._end = now() + 60 * minutes

    def left(self) -> float:
        """Seconds that are left; below 0 once they are spent."""
        return self._end - now()


# --- memory ---------------------------------------------------------------------------------------


class Observed(NamedTuple):
    """What one call did."""

    result: Any
    seconds: float
    extra_bytes: int | None  # None: this machine does not report it


def observe(call: Callable[[], Any], device: torch.device) -> Observed:
    """Run `call` once; its peak is over what is resident now and without what it returns."""
    gc.collect()
    give_back()
    before = _reset(device)
    start = now()
    result = call()
    synchronize(device)
    seconds = now() - start
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

    glibc otherwise keeps up to 64 MiB of them, and a later call that takes them again would seem
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
    """Give free memory back to the system, where the C library can: kept work memory, too."""
    memory.clear()
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


# --- description ----------------------------------------------------------------------------------


def provenance(device: torch.device, threads: int) -> dict[str, Any]:
    """Plain JSON values: machine, versions, revision, settings, date, and how busy it was."""
    cpu = cpu_name()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpu": cpu,
        "cores": usable_cpus(),
        "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "backends": {b["name"]: b.get("detail") or b["reason"] for b in backends.describe()},
        "version": ift_kernels.__version__,
        "revision": revision(),
        "versions": {"python": platform.python_version()}
        | {name: found for name in DISTRIBUTIONS if (found := version_of(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "clocks": clocks(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": load(),
    }


def load() -> float | None:
    """Processes that wanted to run in the last minute; above `cores` a timing means little."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def clocks(device: torch.device) -> dict[str, str]:
    """Of the processor or GPU, as far as the system reports them: now, and at most."""
    if device.type != "cuda":
        return _cpu_clocks()
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:  # of a GPU that does not answer
        return {}
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    at = device.index or 0
    values = lines[at].split(", ") if at < len(lines) else []
    return dict(zip(fields, values, strict=False))


def _cpu_clocks() -> dict[str, str]:
    found = {}
    if rates := [float(value) for value in cpu_info("cpu MHz")]:
        found["now"] = f"{min(rates):.0f} to {max(rates):.0f} MHz"
    with contextlib.suppress(OSError):  # virtual machines have none
        limit = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
        found["max"] = f"{int(limit.read_text()) // 1000} MHz"
    return found


def revision() -> str:
    """The commit of the checkout, with "+" if files differ from it; "unknown" outside one.

    Results do not count: a series of measurements would change its own revision.
    """
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
