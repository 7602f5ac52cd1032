"""One forward and backward of a weighted sum of log-probabilities, fused or from full logits, with
all that can be seen of it: what `ift.check` compares part by part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ift.checking.as_found import Gradients, causal_lm, for_capture, take_gradients, whole
from ift.checking.naive import IGNORE_INDEX, auxiliary, next_tokens, of_logits
from ift.checking.trace import Trace, traced


@dataclass
class Pass:
    """What was seen. Token tensors are (B, T) of the positions that reach the head."""

    loss: float = 0.0
    gradients: Gradients = field(default_factory=dict)
    hidden: Tensor | None = None  # (B, T, D) at the head's entry
    hidden_grad: Tensor | None = None
    target: Tensor | None = None  # naive only
    mask: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    best: Tensor | None = None  # the log-probability of `argmax`
    log_p: Tensor | None = None  # (B, T, V), naive only
    product: Tensor | None = None  # the same of what the head module returns, naive only
    metrics: dict[str, float] = field(default_factory=dict)  # of the patch, fused only
    trace: Trace = field(default_factory=Trace)


def coefficients(like: Tensor) -> Tensor:
    """The weights of the log-probabilities: of either sign, other ones for each token."""
    generator = torch.Generator().manual_seed(25)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    weights: Tensor = drawn / max(1, like.shape[-1]) ** 0.5
    return weights.to(like)


class Recorder:
    """A loss that stores the statistics it gets and weights the log-probabilities."""

    takes_stats = True  # `ift.patch` then passes them, instead of the log-probability alone

    def __init__(self, found: Pass) -> None:
        self.found = found

    def __call__(self, stats: Any, mask: Tensor) -> Tensor:
        found = self.found
        found.mask = mask
        found.logprob, found.entropy = stats.logprob.detach(), stats.entropy.detach()
        found.argmax, found.best = stats.argmax, stats.argmax_logprob
        total: Tensor = (coefficients(stats.logprob) * stats.logprob).sum()
        return total


def fused_pass(model: Any, batch: dict[str, Any], *, backward: bool = True) -> Pass:
    """Of a patched model, within `as_found`."""
    base, found = causal_lm(model), Pass()
    torch.manual_seed(0)
    with torch.set_grad_enabled(backward), _seen(base, found):
        loss: Tensor = model(**for_capture(batch), loss=Recorder(found)).loss
        found.loss = loss.item()
        if backward:
            found.gradients = take_gradients(model, loss)
    metrics: Any = base.ift_metrics
    found.metrics = {name: float(metrics[name]) for name in ("tokens", "correct")}
    return found


def naive_pass(
    model: Any, batch: dict[str, Any], *, backward: bool = True, keep_product: bool = False
) -> Pass:
    """Of an unpatched model, within `as_found`."""
    base, found = causal_lm(model), Pass()
    calls: list[tuple[Tensor, Tensor | None]] = []
    torch.manual_seed(0)
    head: nn.Module = base.get_output_embeddings()  # type: ignore[operator]  # of transformers

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        found.product = whole(output.detach())

    if keep_product:
        head.register_forward_hook(keep)
    with torch.set_grad_enabled(backward), _seen(base, found), _loss_calls(base, calls):
        output = model(**for_capture(batch))
        logits, target = calls[-1] if calls else (output.logits, None)
        if target is None:
            target = next_tokens(batch["labels"])
        logprob, found.mask, log_p = of_logits(whole(logits), target.reshape(logits.shape[:-1]))
        found.target = target.reshape(logprob.shape).to(logprob.device)
        loss = (coefficients(logprob) * logprob).sum()
        loss = loss + auxiliary(output, logprob, found.mask)
        found.loss = loss.item()
        if backward:
            found.gradients = take_gradients(model, loss)
    found.log_p, found.logprob = log_p.detach(), logprob.detach()
    found.entropy = -(found.log_p.exp() * found.log_p.clamp(min=-1e30)).sum(-1)
    found.best, found.argmax = found.log_p.max(-1)
    return found


@contextlib.contextmanager
def _seen(base: nn.Module, found: Pass) -> Iterator[None]:
    """Records hidden states at the head with their gradient, and a trace of all else."""
    head: nn.Module = base.get_output_embeddings()  # type: ignore[operator]  # of transformers

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
        hidden = args[0]
        found.hidden = whole(hidden.detach()).clone()
        if hidden.requires_grad:
            hidden.register_hook(leave)

    def leave(grad: Tensor) -> None:
        found.hidden_grad = whole(grad.detach()).clone()

    handle = head.register_forward_pre_hook(enter)
    try:
        with traced(base, head) as found.trace:
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _loss_calls(base: Any, calls: list[tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Records the logits and targets that the model's code gives to its loss function."""
    standard = getattr(base, "loss_function", None)
    if standard is None or not isinstance(getattr(type(base), "loss_function", None), property):
        yield
        return
    before = base.__dict__.get("_loss_function")

    def record(logits: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        target = kwargs.get("shift_labels")
        if target is None and labels is not None:
            ignore_index = kwargs.get("ignore_index", IGNORE_INDEX)
            target = next_tokens(labels, ignore_index)
            target = target.masked_fill(target == ignore_index, IGNORE_INDEX)
        calls.append((logits, target))
        return standard(logits, labels, *args, **kwargs)

    base._loss_function = record
    try:
        yield
    finally:
        if before is None:
            del base._loss_function
        else:
            base._loss_function = before
