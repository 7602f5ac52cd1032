"""Which backend serves which tensor.

A backend is a package with the same small set of epilogues and scans (`contract.Backend`); the
schedules that drive them are the same for all. The choice is by device first, then by what is
available, then, operation by operation, by what was measured to be faster (`selection`). The
environment variable ``IFT_BACKEND`` or the context manager `use_backend` overrides it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from ift_kernels.backends import cpu, cuda, reference, selection, triton
from ift_kernels.backends.contract import EPILOGUES, Backend
from ift_kernels.common.settings import Setting

# In order of preference; `reference` serves whatever nothing else does.
BACKENDS: dict[str, Backend] = {
    "cpu": cpu, "triton": cast(Backend, triton), "cuda": cuda, "reference": reference
}  # fmt: skip


class _Forced(Setting[str | None]):
    """The backend of `use_backend`. None: the environment decides; "": no backend is forced."""

    def in_forward(self) -> str | None:
        return requested() or ""  # the environment may be another one in backward


_forced = _Forced("ift_backend", None)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {sorted(BACKENDS)}, got {name!r}")
    return name


def requested() -> str | None:
    """The backend asked for by `use_backend` or ``IFT_BACKEND``, or None."""
    name = _forced.get()
    if name is not None:
        return name or None
    env = os.environ.get("IFT_BACKEND", "")
    return _check_name(env, "IFT_BACKEND") if env else None


def use_backend(name: str) -> AbstractContextManager[None]:
    """Use the named backend inside the ``with`` block, and in the backward of calls made there.

    Raises:
        ValueError: `name` is not a backend.
    """
    return _forced.use(_check_name(name, "name"))


def get(tensor: Tensor, dtype: torch.dtype | None = None) -> Backend:
    """The backend for this tensor's device and `dtype` (default: the tensor's own).

    Raises:
        RuntimeError: a backend was asked for by name and cannot serve the tensor.
    """
    dtype = tensor.dtype if dtype is None else dtype
    name = requested()
    if name is not None:
        reason = BACKENDS[name].unsupported_reason(tensor.device, dtype)
        if reason and dtype != torch.float64:  # fp64 always goes through the reference
            raise RuntimeError(f"backend {name!r} was asked for but cannot serve: {reason}")
        return reference if reason else BACKENDS[name]
    serving = (
        (n, b) for n, b in BACKENDS.items() if not b.unsupported_reason(tensor.device, dtype)
    )
    if not selection.FASTER:
        return next(serving, ("", reference))[1]  # without asking the others
    found = dict(serving)
    return selection.faster(found, tensor.device) if found else reference


def plain_torch(backend: Backend) -> list[str]:
    """The epilogues of a backend that plain torch serves, some of them only in part."""
    found = [
        name
        for name in EPILOGUES
        if getattr(backend, name) is getattr(reference, name)
        and (name != "transpose" or backend.wants_transpose(torch.bfloat16))  # else never called
    ]
    partly: Callable[[], list[str]] = getattr(backend, "partly_plain_torch", list)
    return found + partly()


def describe() -> list[dict[str, Any]]:
    """One row per backend: name, available, reason (why not), detail, `plain_torch` (if available).

    For ``ift doctor``.
    """
    rows = [{"name": name, **backend.describe()} for name, backend in BACKENDS.items()]
    for row in rows:
        serves = row["available"] and row["name"] != "reference"
        row["plain_torch"] = plain_torch(BACKENDS[row["name"]]) if serves else []
    return rows
