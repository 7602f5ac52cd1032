"""What a peer is: how an implementation of a linear head is called, and why one cannot run."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import worker

KINDS = ("loss", "logprob", "statistics", "ids")
LOGPROB_ONLY = {"statistics": "gives neither entropy nor ids", "ids": "gives no ids"}
LOSS_ONLY = LOGPROB_ONLY | {"logprob": "no gradient of its own per token"}
Statistics = tuple[Tensor, Tensor, Tensor | None]


@functools.cache
def optional(name: str) -> tuple[Any, str]:
    """A module, or why there is none; workers that start later are forked with it imported."""
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    except Exception as error:  # whatever a peer's import raises, the others still run
        return None, f"does not import: {type(error).__name__}: {str(error).splitlines()[0]}"
    worker.PRELOADED.append(name)
    return found, ""


class Peer:
    """One implementation. `name` is what options and files call it, `title` what readers see."""

    name = ""
    title = ""
    compiled = False  # its first call compiles: neither its time nor its memory is measured
    slowness = 1.3  # a guess, against bare GEMMs, until it has been measured
    lacks: dict[str, str] = {}  # noqa: RUF012  kind → why it is not offered; read only
    gradient_limit: float | None = None  # relative error that is refused; None: beyond rounding
    package = ""  # the module that it calls, imported when first needed: some take seconds
    gpu_only = False
    parameters: tuple[Tensor, ...] = ()  # of its own, which get gradients, too

    @property
    def module(self) -> Any:
        return optional(self.package)[0]

    def unsupported_reason(self, kind: str, device: torch.device, dtype: torch.dtype) -> str:
        """Empty if it can run."""
        return self.unavailable(device, dtype) or self.lacks.get(kind, "")

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        if self.gpu_only and device.type == "cpu":
            return "its kernels need a GPU"
        return optional(self.package)[1] if self.package else ""

    def loss(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -self.logprob(hidden, weight, target).sum() / (target != -100).sum()

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def function(self, kind: str) -> Callable[..., Any]:
        return getattr(self, kind)

    def leaf(self, tensor: Tensor) -> Tensor:
        """What it is given for hidden or weight; made before any call is timed."""
        return tensor

    def details(self, call: Callable[[], Any]) -> dict[str, float]:
        """What to report beside the errors of a call."""
        return {}
