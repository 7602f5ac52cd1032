"""Launching kernels: on the tensor's device, in the configuration that the table has for them.

The table, launch.json, is committed and written by ``python -m bench tune``; nothing is tuned on
first use. It is keyed by architecture ("sm_90", "gfx942"; "default" where that has no entry) and
for each kernel by a class of shapes.
"""

from __future__ import annotations

import functools
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ift_kernels.common.settings import Setting

TABLE = Path(__file__).with_name("launch.json")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

Config = dict[str, int]
# In place of the table, inside `use_config`.
_forced = Setting[dict[str, Config] | None]("ift_triton_config", None)
_architecture = Setting[str | None]("ift_triton_architecture", None)

# A class is the first that a size does not exceed.
CLASSES = (("narrow", 2048), ("wide", 1 << 62))


def shape_class(columns: int) -> str:
    """The class of a kernel that walks rows of so many elements."""
    return next(name for name, limit in CLASSES if columns <= limit)


@functools.cache
def table() -> dict[str, Any]:
    """The committed table."""
    loaded: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return loaded


@functools.cache
def architecture(index: int | None) -> str:
    """The table's name of a GPU, "interpreter" for None."""
    if index is None:
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(index: int | None) -> int:
    """How many programs a GPU works on at once, times a few; of the interpreter, 2."""
    if index is None:
        return 2
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def _lookup(kernel: str, kind: str, arch: str) -> Config:
    archs = table()["architectures"]
    for name in (arch, "default"):
        entry = archs.get(name, {}).get(kernel, {})
        if kind in entry:
            found: Config = entry[kind]
            return found
    raise KeyError(f"{kernel}, {kind}: not in {TABLE.name}")


def config(kernel: str, kind: str, device: torch.device) -> Config:
    """Block sizes, num_warps and num_stages of a kernel for a class of shapes on a device."""
    forced = _forced.get()
    if forced is not None and kernel in forced:
        return forced[kernel]
    index = device.index if device.type == "cuda" else None
    return _lookup(kernel, kind, _architecture.get() or architecture(index))


def use_architecture(name: str) -> AbstractContextManager[None]:
    """Take configurations of the named architecture inside the ``with`` block."""
    return _architecture.use(name)


def use_config(kernel: str, values: Config) -> AbstractContextManager[None]:
    """Launch `kernel` with `values` inside the ``with`` block; for the tuner and tests."""
    return _forced.use({**(_forced.get() or {}), kernel: values})


def launch(kernel: Any, programs: tuple[int, ...], device: Tensor, *args: Any, **kw: Any) -> None:
    """Run a kernel on the GPU where the tensor `device` lies, which need not be the current one."""
    if not all(programs):
        return
    if device.is_cuda and device.device.index != torch.cuda.current_device():
        with torch.cuda.device(device.device):
            run(kernel, programs, args, kw)
    else:
        run(kernel, programs, args, kw)


def run(kernel: Any, programs: tuple[int, ...], args: tuple[Any, ...], kw: dict[str, Any]) -> None:
    """The launch itself. Offline compilation puts a function here that captures it instead."""
    kernel[programs](*args, **kw)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return int(triton.next_power_of_2(size))
