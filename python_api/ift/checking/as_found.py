"""What a check may not leave behind, and what it gathers: states of a model, warnings, costs."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ift.heads import base_layer, head_function
from ift.patching import base_model

# The gradient of each loss: a backward that drops it is wrong by 2. It has no rounding of its own.
UPSTREAM = 0.5
Gradients = dict[str, Tensor]


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, inside DDP."""
    return base_model(model.module if isinstance(model, DistributedDataParallel) else model)


def take_gradients(model: nn.Module, *losses: Tensor) -> Gradients:
    """`UPSTREAM` times the gradients of the losses by name, for parameters that they reach.

    Of sharded parameters the whole gradients. Clears those of `model`.
    """
    for loss in losses:
        backward(loss)
    gradients = {
        name.removeprefix("module."): whole(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return gradients


def backward(loss: Tensor) -> None:
    """From `UPSTREAM`, where anything is trained."""
    if loss.requires_grad:
        loss.backward(torch.full_like(loss, UPSTREAM))


def whole(tensor: Tensor) -> Tensor:
    """All shards of a DTensor; another tensor itself."""
    gather: Any = getattr(tensor, "full_tensor", None)
    full: Tensor = tensor if gather is None else gather()
    return full


@contextlib.contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Within it: evaluation mode, gradients enabled, no gradient yet. After it: all as before.

    Restores every attribute of every module, which covers what a forward leaves there (position
    offsets of multimodal models), buffers, gradients and the random state.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    # Hooks above all: transformers adds some in a first forward, and an attribute that says so.
    tables = [(d, d.copy()) for saved in attributes for d in saved.values() if isinstance(d, dict)]
    buffers = [{n: (b, b.clone()) for n, b in m._buffers.items() if b is not None} for m in modules]
    gradients = [(p, p.grad) for p in model.parameters()]
    # `torch.manual_seed` reaches every GPU, so the random state of each is restored.
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    try:
        for module in modules:
            module.training = False
        model.zero_grad(set_to_none=True)
        with torch.enable_grad(), torch.random.fork_rng(list(gpus)):
            yield
    finally:
        reshard(model)  # else its parameters would be restored under whole ones
        for module, saved in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(saved)
        for table, saved in tables:
            table.clear()
            table.update(saved)
        for module, held in zip(modules, buffers, strict=True):
            for name, (buffer, value) in held.items():
                with torch.no_grad():
                    buffer.copy_(value)
                module._buffers[name] = buffer
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextlib.contextmanager
def changed_weights(model: nn.Module) -> Iterator[None]:
    """Within it the head and every second trained parameter have another sign; exact, in place.

    As an optimizer step does it to a model: a copy of a weight made before is then wrong.
    """
    head: nn.Module = causal_lm(model).get_output_embeddings()  # type: ignore[operator]  # of transformers
    reshard(model)
    # Another sign of both factors of an adapter would change nothing.
    own = {p: None for name, p in head.named_parameters() if "lora_B" not in name}
    if head_function(base := base_layer(head)) is not None:  # quantized: no sign to change
        own = {p: None for p in own if all(p is not fixed for fixed in base.parameters())}
    inside = set(head.parameters())
    trained = [p for p in model.parameters() if p.requires_grad and p not in inside]
    changed = [p for p in (*own, *trained[::2]) if p.is_floating_point() and p.dtype.itemsize > 1]
    try:
        with torch.no_grad():
            for parameter in changed:
                parameter.neg_()
        yield
    finally:
        reshard(model)
        with torch.no_grad():
            for parameter in changed:
                parameter.neg_()


def reshard(model: nn.Module) -> None:
    """Let every FSDP2 module hold its shard alone, as between two steps."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]  # of torch's FSDPModule


@contextlib.contextmanager
def logged_warnings() -> Iterator[list[logging.LogRecord]]:
    """The warnings that the package logs within it."""
    handler, logger = BufferingHandler(sys.maxsize), logging.getLogger("ift")
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        logger.removeHandler(handler)


class Cost(NamedTuple):
    """Of one forward and backward, the first one."""

    seconds: float
    peak_bytes: int | None  # beyond what was there before; None where nothing says it


@contextlib.contextmanager
def metered(costs: list[Cost]) -> Iterator[None]:
    """Appends the cost of what runs within it.

    The peak is that of torch's allocator on a GPU; on a CPU that of the process, sampled.
    """
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: int | None = torch.cuda.memory_allocated()
    else:
        before = _resident_bytes()
    peaks, done = [before or 0], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            peaks.append(max(peaks.pop(), _resident_bytes() or 0))

    sampler = threading.Thread(target=sample, daemon=True)
    if not on_gpu and before is not None:
        sampler.start()
    start = time.perf_counter()
    try:
        yield
        if on_gpu:
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated())
    finally:
        seconds = time.perf_counter() - start
        done.set()
        if sampler.is_alive():
            sampler.join()
        costs.append(Cost(seconds, None if before is None else max(0, peaks[-1] - before)))


def _resident_bytes() -> int | None:
    """Memory of this process; None outside Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * 4096


def for_capture(batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` for a forward with a loss of the check's own, which nothing divides."""
    return {name: value for name, value in batch.items() if name != "num_items_in_batch"}
