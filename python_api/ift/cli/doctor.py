"""``ift doctor``: what is installed, on what machine, and which backend serves what and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

DISTRIBUTIONS = (
    "ift-kernels", "torch", "triton", "numpy", "transformers", "accelerate", "tokenizers",
    "peft", "bitsandbytes",
)  # fmt: skip
VARIABLES = ("IFT_BACKEND", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit code 0, or 1 when torch or our package cannot be imported."""
    report = examine()
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 1 if report["problem"] else 0


def examine() -> dict[str, Any]:
    """Everything the report says, as plain JSON values."""
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version()}
        | {n: version_of(n) for n in DISTRIBUTIONS},
        "platform": f"{platform.system()} {platform.machine()}, {cpu_name()}",
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "devices": [],
        "threads": {"cpu_count": os.cpu_count(), "usable": usable_cpus()},
        "backends": [],
        "serves": {},
        "promises": {},
        "problem": None,
    }
    try:
        import torch

        report["threads"]["torch"] = torch.get_num_threads()
        report["devices"] = _devices(torch)
        from ift_kernels import backends

        report["backends"] = backends.describe()
        report["serves"] = _serves(torch, backends)
        report["promises"] = _promises(torch)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        # A shared library is missing, or IFT_BACKEND names a backend that is not built.
        report["problem"] = f"{type(error).__name__}: {error}"
    return report


def as_text(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = ["versions"]
    lines += [f"  {name:<14}{version or 'not installed'}" for name, version in
              report["versions"].items()]  # fmt: skip
    lines += ["machine", f"  {report['platform']}"]
    lines += [f"  {name}={value}" for name, value in report["environment"].items()]
    threads = report["threads"]
    lines.append(f"  threads: torch uses {threads.get('torch', '?')}, {threads['usable']} usable")
    lines.append("devices")
    lines += [f"  {device['name']:<14}{device['detail']}" for device in report["devices"]]
    lines.append("backends, in order of preference")
    for backend in report["backends"]:
        state = "available" if backend["available"] else f"unavailable: {backend['reason']}"
        lines.append(f"  {backend['name']:<14}{state}")
        if backend.get("detail"):
            lines.append(f"  {'':<14}{backend['detail']}")
        if backend.get("plain_torch"):
            lines.append(f"  {'':<14}in plain torch: {', '.join(backend['plain_torch'])}")
    lines.append("what serves what")
    lines += [f"  {what:<14}{backend}" for what, backend in report["serves"].items()]
    lines.append("promises: docs/numerics.md; deterministic was checked on this machine")
    lines += [f"  {what:<14}{promise}" for what, promise in report["promises"].items()]
    if report["problem"]:
        lines.append(f"problem\n  {report['problem']}")
    return "\n".join(lines)


def _serves(torch: Any, backends: Any) -> dict[str, str]:
    """The backend that the operations choose, by device and dtype, under IFT_BACKEND if set."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = {}
    for device in kinds:
        for name in ("float32", "bfloat16", "float16", "float64"):
            backend = backends.get(torch.empty(0, dtype=getattr(torch, name), device=device))
            chosen[f"{device} {name}"] = backend.__name__.rpartition(".")[2]
    return chosen


def _promises(torch: Any) -> dict[str, str]:
    """What the numerics contract says of each dtype, and whether results here are invariant."""
    from ift.numerics import bounds, invariance

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        str(dtype).removeprefix("torch."): bounds.promise(dtype)
        for dtype, logits_dtype in bounds.UNITS
        if logits_dtype is None
    }
    results = invariance.check(device, quick=True)
    broken = [dtype for dtype in invariance.DTYPES if not invariance.holds(results, dtype)]
    held = "holds" if not broken else f"does not hold: {', '.join(broken)}: see ift numerics"
    return {**found, "deterministic": held}


def version_of(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(torch: Any) -> list[dict[str, str]]:
    devices = [{"name": "cpu", "detail": torch.backends.cpu.get_cpu_capability()}]
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"built for {built}, but no usable GPU" if built else "this torch is built without it"
        return [*devices, {"name": "cuda", "detail": f"unavailable: {why}"}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        detail = f"{properties.name}, {capability}, {memory}"
        devices.append({"name": f"cuda:{index}", "detail": detail})
    return devices


def usable_cpus() -> int | None:
    """CPUs this process may run on (containers and taskset give fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_info(field: str) -> list[str]:
    """The values of one field of /proc/cpuinfo, of every core; none outside Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(field)]


def cpu_name() -> str:
    """The model of the processor."""
    return next(iter(cpu_info("model name")), platform.processor() or "unknown processor")
