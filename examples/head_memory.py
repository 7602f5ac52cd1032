"""How much memory the output head takes in one training step, measured on the step itself.

torch's profiler reports every allocation with the running total.  Hooks cut the step: the head owns
the time from the trunk's output to the gradient of it (or, in the first pass of IFT, to the next
entry of the trunk).  Its memory is the highest total in that time above the total at its start:
logits, their copies, workspaces and the gradient of the head weight; no activation of the trunk.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

ENTER, LEAVE = "head memory: enter", "head memory: leave"


def head_peak_bytes(trunk: torch.nn.Module, step: Callable[[], Tensor]) -> int:
    """Run ``step().backward()`` once and return the peak bytes of the head.

    Args:
        trunk: the module that makes the hidden states (``model.model`` of a Llama).
        step: one forward, returning the loss.  Gradients must be None before it, so that the
            gradient of the head weight counts.
    """
    watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with watch as profiler, _marked(trunk):
        step().backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return _peak(events)


def _peak(events: list[dict[str, Any]]) -> int:
    """The highest rise of the allocator's total inside the marked spans."""
    relevant = [e for e in events if e.get("name") in (ENTER, LEAVE, "[memory]")]
    total, start, peak = 0, None, 0
    spans = 0
    for event in sorted(relevant, key=lambda e: e["ts"]):
        if event["name"] == ENTER:
            start, spans = total, spans + 1
        elif event["name"] == LEAVE:
            start = None
        elif event["args"].get("Device Type", 0) == 0:
            total = event["args"]["Total Allocated"]
            peak = peak if start is None else max(peak, total - start)
    if spans == 0:
        raise RuntimeError("trunk: its forward was not called in the step; expected model.model")
    return peak


@contextmanager
def _marked(trunk: torch.nn.Module) -> Iterator[None]:
    """Put marks where the head takes over from the trunk and gives back to it."""

    def mark(name: str) -> None:
        with record_function(name):
            pass

    def entered(*_: Any) -> None:
        mark(LEAVE)

    def left(module: Any, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: mark(LEAVE))
        mark(ENTER)

    hooks = [trunk.register_forward_pre_hook(entered), trunk.register_forward_hook(left)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
