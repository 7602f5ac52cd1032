"""Run a causal LM's own forward with its output head answering a question instead of making logits.

The question is asked inside the head module's forward, from its weight as that forward finds it:
that is where sharding (FSDP2, ZeRO-3) has gathered it and where tied weights are one. The model's
code gets an empty stand-in for the logits. What it would do to logits (scale, softcap) is measured
once, on known values: no table of architectures is needed, and an unknown transform cannot pass.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ift.documents import IGNORE_INDEX
from ift_kernels import ActiveSet, TokenStats, linear_logprobs, vocab_parallel_logprobs
from ift_kernels.transform import LogitTransform
from ift_kernels.vocab_parallel import is_sharded, whole

Answer = Callable[[Tensor, Tensor, "Tensor | None"], Any]  # (hidden, weight, bias) → anything


@dataclass
class _Question:
    head: nn.Module
    answer: Answer
    stand_in: Tensor | None  # None: an empty one, (*hidden.shape[:-1], 0)
    answers: list[Any] = field(default_factory=list)


# One per thread and task, so that an exception or a nested call cannot leave a question behind.
_asked: ContextVar[_Question | None] = ContextVar("ift_head_question", default=None)


class HeadForward:
    """The forward of a patched head: the original one, unless a question is asked of this head.

    An object and not a bound method, which would unpickle as the class's own forward.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def __call__(self, input: Tensor) -> Tensor:
        question = _asked.get()
        if question is None or question.head is not self.head:
            return nn.Linear.forward(self.head, input)
        weight, bias = self.head.weight, self.head.bias
        shape = getattr(weight, "ds_shape", None)
        if shape is not None and weight.shape != shape:
            raise RuntimeError(
                f"{type(self.head).__name__}: its weight is partitioned by DeepSpeed "
                f"ZeRO-3; expected its ds_shape {tuple(shape)} here, got {tuple(weight.shape)}"
            )
        hidden = whole(input, weight)
        question.answers.append(question.answer(hidden, weight, bias))
        if question.stand_in is not None:
            return _like_logits(question.stand_in.to(hidden.device), weight)
        logprob: Tensor | None = getattr(question.answers[-1], "logprob", None)
        if logprob is None or not logprob.requires_grad:
            return _like_logits(hidden.new_empty((*hidden.shape[:-1], 0)), weight)
        # Empty, but of the answer's graph: sharding gathers the weight for backward when a gradient
        # reaches the head's output, which therefore has to lie between the loss and the answer.
        return _like_logits(logprob[..., None][..., :0].to(hidden.dtype), weight)


def _like_logits(stand_in: Tensor, weight: Tensor) -> Tensor:
    """As the head returns it: a DTensor if its weight is one."""
    if not is_sharded(weight):
        return stand_in
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = weight
    made: Tensor = DTensor.from_local(stand_in, sharded.device_mesh, [Replicate()])
    return made


def plain_head(model: nn.Module) -> nn.Linear:
    """The output head of `model`: a module that computes ``hidden @ weight.T + bias`` and no more.

    Raises:
        TypeError: there is none, or it is another kind of module (LoRA on the head, quantized).
    """
    name = type(model).__name__
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    chosen = getattr(head, "modules_to_save", None)  # PEFT: a trained copy beside the original
    if chosen is not None:
        off = getattr(head, "disable_adapters", False)
        head = head.original_module if off else chosen[next(iter(head.active_adapters))]
    if head is None:
        raise TypeError(f"model: expected a causal LM with an output head, {name} has none")
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"model: expected a plain linear output head, {name} has "
            f"{type(head).__module__}.{type(head).__name__}, whose logits are not hidden @ weight.T"
        )
    if not isinstance(head.__dict__.get("forward"), (HeadForward, type(None))):
        raise TypeError(f"model: the forward of the output head of {name} is already replaced")
    return head


def head_pass(
    model: Any,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    answer: Answer,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    stand_in: Tensor | None = None,
) -> tuple[Any, Any]:
    """``forward(**kwargs)``, with `answer` computed in the head in place of the logits.

    Args:
        forward: the unpatched forward of `model`.
        answer: called with (hidden, weight, bias) inside the head's forward.
        loss: with labels in `kwargs`: the loss of that answer, returned to the model's own code
            where it asks for its loss, so that it adds what it adds (auxiliary losses).
        stand_in: what the head returns; by default empty logits.

    Returns:
        The model's output, a ModelOutput, and the answer.

    Raises:
        RuntimeError: the model does not work this way: head called never or twice, loss not taken
            from ``self.loss_function``, logits reshaped.
    """
    name = type(model).__name__
    head = plain_head(model)
    if "forward" not in head.__dict__:
        raise RuntimeError(f"{name}: the output head was replaced after ift.patch; patch again")
    question = _Question(head, answer, stand_in)
    losses = 0

    def ask_loss(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal losses
        losses += 1
        assert loss is not None
        empty: Any = logits.sum()  # see HeadForward
        nothing: Tensor = empty.full_tensor() if is_sharded(empty) else empty
        return loss(question.answers[-1]) + nothing

    config = getattr(model, "config", None)
    if not kwargs.get("return_dict", getattr(config, "return_dict", True)):
        kwargs = {**kwargs, "return_dict": True}
    token = _asked.set(question)
    try:
        with _replaced_loss(model, ask_loss) if loss is not None else contextlib.nullcontext():
            output = forward(**kwargs)
    finally:
        _asked.reset(token)

    if len(question.answers) != 1:
        raise RuntimeError(
            f"{name}: expected one call of its output head per forward, got "
            f"{len(question.answers)}; this model cannot be patched"
        )
    if loss is not None and losses != 1:
        raise RuntimeError(
            f"{name}: expected its loss to come from one call of self.loss_function, got {losses}; "
            "this model cannot be patched"
        )
    if stand_in is None and output.logits.shape[-1] != 0:
        raise RuntimeError(f"{name}: reshapes its logits; this model cannot be patched")
    return output, question.answers[0]


@contextlib.contextmanager
def _replaced_loss(model: Any, loss: Callable[..., Tensor]) -> Iterator[None]:
    standard = model.loss_function
    if getattr(standard, "__name__", "") != "ForCausalLMLoss":
        raise RuntimeError(
            f"{type(model).__name__}: expected the loss function ForCausalLMLoss, got {standard}: "
            "ift.patch replaces next-token cross-entropy only"
        )
    had = "_loss_function" in model.__dict__
    model.loss_function = loss
    try:
        yield
    finally:
        if had:
            model.loss_function = standard
        else:
            del model._loss_function


def transform_options(transform: LogitTransform) -> dict[str, Any]:
    """The transform as arguments of the operations of `ift_kernels`."""
    return {"logit_scale": transform.scale, "softcap": transform.softcap or None}


def token_stats(
    target: Tensor,
    transform: LogitTransform,
    gradient: str | ActiveSet = "auto",
    workspace: int | None = None,
    *,
    outputs: tuple[str, ...] = ("logprob", "entropy", "argmax"),
    detached: tuple[str, ...] = ("entropy",),
    temperature: float = 1.0,
) -> Callable[[Tensor, Tensor, Tensor | None], TokenStats]:
    """The answer that losses are made of: each target's cost, and two statistics for the logs.

    `target` has one entry per row of the hidden states that reach the head, in any shape.
    """

    def answer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStats:
        if target.numel() != hidden.shape[:-1].numel():
            raise ValueError(
                f"labels: expected one per hidden state that reaches the head, "
                f"{tuple(hidden.shape[:-1])}, got {tuple(target.shape)}: with logits_to_keep, pass "
                "shift_labels of the positions kept"
            )
        frozen = not any(p is not None and p.requires_grad for p in (weight, bias))
        own = "active" if frozen else "exact"
        operation = vocab_parallel_logprobs if is_sharded(weight) else linear_logprobs
        return operation(
            hidden,
            weight,
            target.reshape(hidden.shape[:-1]).to(hidden.device),
            bias=bias,
            ignore_index=IGNORE_INDEX,
            temperature=temperature,
            outputs=outputs,
            detached=detached,
            gradient=own if gradient == "auto" else gradient,
            workspace=workspace,
            **transform_options(transform),
        )

    return answer


def token_metrics(stats: TokenStats, target: Tensor) -> dict[str, Tensor]:
    """Sums over the targets, as scalar tensors: nothing here waits for the device."""
    assert stats.argmax is not None and stats.entropy is not None
    target = target.reshape(stats.argmax.shape).to(stats.argmax.device)
    valid = target != IGNORE_INDEX
    return {
        "tokens": valid.sum(),
        "correct": ((stats.argmax == target) & valid).sum(),
        "entropy": stats.entropy.detach().sum(),  # 0 where there is no target
    }


# Values given to the model's code in place of logits: the first two fix cap and scale.
_PROBES = (1e6, 2.0**-13, 1.0, -1.0, 30.0, -75.0, 0.0, 300.0)


def measure_transform(
    model: Any, forward: Callable[..., Any], kwargs: dict[str, Any]
) -> LogitTransform:
    """Scale and softcap that the code of `model` applies to what its head returns.

    One forward of at most two tokens in evaluation mode, whose head returns known values for a
    whole vocabulary. Done once per patch: a later change of the model's logit scale is not seen.

    Raises:
        RuntimeError: the code does anything other than scale, then softcap; or computes its own
            loss.
    """
    name = type(model).__name__
    if any(p is not None for p in model._parameters.values()):
        raise RuntimeError(f"{name}: has parameters beside its head; this model cannot be patched")
    width = max(plain_head(model).out_features, len(_PROBES))
    probes = torch.tensor(_PROBES, dtype=torch.float32)
    values = probes.repeat(math.ceil(width / len(_PROBES)))[:width]
    named = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    if not any("loss_function" in inspect.unwrap(f).__code__.co_names for f in named):
        raise RuntimeError(f"{name}: computes its own loss, so it cannot be patched")
    with evaluating(model), torch.no_grad():
        output, _ = head_pass(
            model, forward, kwargs, lambda *_: None, stand_in=values.view(1, 1, width)
        )
    made = output.logits.detach()
    made = (made.full_tensor() if is_sharded(made) else made).cpu()
    if made.shape == (1, 1, width) and made.dtype in (torch.float32, torch.float64):
        made = made.flatten().double()
        top, small = made[:2].tolist()
        scale = small / _PROBES[1]
        capped = not math.isclose(top, scale * _PROBES[0], rel_tol=1e-4)
        transform = LogitTransform(scale, abs(top) if capped else 0.0)
        if math.isfinite(top + small) and torch.allclose(
            made, transform.apply(values.double(), None), rtol=1e-5, atol=0.0
        ):
            return transform
    raise RuntimeError(
        f"{name}: expected its logits to be scale * (hidden @ weight.T + bias), then perhaps "
        "softcap * tanh(logits / softcap); its code does something else to them"
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without side effects: no dropout, no noise, no use of the random state."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
