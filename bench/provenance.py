"""Where and with what a measurement was made: enough to repeat it, nothing about whose machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = (
    "ift-kernels", "torch", "triton", "transformers", "trl", "cut-cross-entropy", "liger-kernel",
)  # fmt: skip
# What changes the speed of a run.
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "KMP_AFFINITY", "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA", "MALLOC_ARENA_MAX", "IFT_BACKEND", "IFT_CPU_ISA",
)  # fmt: skip


def provenance(device: torch.device, threads: int) -> dict[str, Any]:
    """Plain JSON values: machine, versions, revision, settings, date, and how busy it was."""
    import ift_kernels
    from ift_kernels import backends

    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "backends": {b["name"]: b.get("detail") or b["reason"] for b in backends.describe()},
        "version": ift_kernels.__version__,
        "revision": revision(),
        "versions": {"python": platform.python_version()} | versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": load(),
    }


def cores() -> int | None:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load() -> float | None:
    """Processes that wanted to run in the last minute; above `cores` a timing means little."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def device_name(device: torch.device) -> str:
    """The model of the processor or GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")


def versions() -> dict[str, str]:
    """Of the distributions that matter and are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
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
