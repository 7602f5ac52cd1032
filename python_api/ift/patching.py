"""`patch`: a transformers causal LM computes its training loss, SFT or IFT, without its logits.

Wraps the `forward` of one model object and of its output head, and nothing else: `generate`,
evaluation, saving and every module inside run as before. See docs/patching.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType, NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ift import two_pass
from ift.config import IFTConfig
from ift.documents import IGNORE_INDEX, shifted_targets
from ift.head_pass import (
    HeadForward,
    head_pass,
    measure_transform,
    plain_head,
    token_metrics,
    token_stats,
)
from ift.losses import sft_loss
from ift_kernels import ActiveSet, TokenStats, checks
from ift_kernels.transform import LogitTransform

Model = TypeVar("Model", bound=nn.Module)

_STATE = "_ift_patch"  # the attribute that makes a model a patched one


def patch(model: Model, *, gradient: str | ActiveSet | None = None) -> Model:
    """Let a causal LM compute its training loss without logits. In place, undone by `unpatch`.

    ``model(..., labels=labels).loss`` is then that of supervised fine-tuning, as before;
    ``model(..., labels=labels, ift=config).loss`` that of Intuitive Fine-Tuning. The patched
    forward takes three arguments more:

    - ``loss``: a function of ``(logprob, mask)``, (B, T) of the shifted targets, in place of the
      SFT loss; any of `ift.losses` with its other arguments bound.
    - ``ift``: an `ift.IFTConfig`; both passes of Intuitive Fine-Tuning inside this one forward.
    - ``skip_logits``: True or False to choose; None, the default, skips them when labels are given
      and the model is training or gradients are enabled. Else the original forward runs untouched.

    Without logits the output has ``logits=None``, and `model.ift_metrics` holds three scalar
    tensors of this call: the number of targets, ``tokens``, and the sums over them of ``correct``
    (argmax equals target) and ``entropy``.

    Args:
        model: a transformers causal LM with a plain linear output head, or a PEFT model around one.
            Patch before DDP or FSDP wraps it.
        gradient: of the head, as in `ift_kernels.linear_logprobs`: "exact", or "active" (an
            `ift_kernels.ActiveSet` for its options) for the active-set backward; "auto" is "active"
            while the head is frozen and "exact" while it is trained. None, the default, leaves it
            as it is, "auto" at first.

    Returns:
        `model` itself.

    Raises:
        ValueError: another gradient than these.
        TypeError: no output head, or one that is not plainly linear (LoRA on the head, quantized).
        On the first loss, RuntimeError naming the model: code after the head that does other things
        than scale and softcap, or a loss that is not next-token cross-entropy.

    >>> # model = ift.patch(AutoModelForCausalLM.from_pretrained(...))
    >>> # model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    """
    base = base_model(model)
    head = plain_head(base)
    if isinstance(gradient, str):
        checks.one_of("gradient", gradient, ("auto", "exact", "active"))
    if _STATE not in base.__dict__:
        setattr(base, _STATE, _State(base.__dict__.get("forward")))
        base.forward = _Forward(base)
    if gradient is not None:
        getattr(base, _STATE).gradient = gradient
    # PEFT's original beside its trained copy, too: adapters may be switched off.
    wrapper: Any = base.get_output_embeddings()  # type: ignore[operator]  # plain_head has called it
    other = getattr(wrapper, "original_module", head)
    heads: tuple[Any, ...] = (head, other)
    for each in heads:
        if "forward" not in each.__dict__:
            each.forward = HeadForward(each)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`; nothing of it remains on the object. Does nothing to a model not patched.

    Raises:
        RuntimeError: something (accelerate's mixed precision, for one) wrapped the patched forward
            since; undo that first, as ``accelerator.unwrap_model(model, keep_fp32_wrapper=False)``
            does.
    """
    base = base_model(model)
    state = base.__dict__.get(_STATE)
    if state is None:
        return model
    if not getattr(base.__dict__.get("forward"), "is_ift", False):
        raise RuntimeError(
            f"{type(base).__name__}: its forward was wrapped after ift.patch, by "
            f"{base.forward!r}; undo that first"
        )
    del base.forward
    if state.previous is not None:
        base.forward = state.previous
    for name in (_STATE, "ift_metrics"):
        base.__dict__.pop(name, None)
    for module in base.modules():
        if isinstance(module.__dict__.get("forward"), HeadForward):
            del module.forward
    return model


def base_model(model: nn.Module) -> nn.Module:
    """The causal LM itself: `model`, or what is inside a PEFT model."""
    find = getattr(model, "get_base_model", None)
    return find() if callable(find) else model


@dataclass
class _State:
    """What a patched model remembers. Plain data, so that copies and pickles of it work."""

    previous: Callable[..., Any] | None  # a forward that sat on the object before
    transform: LogitTransform | None = None  # measured at the first loss
    gradient: str | ActiveSet = "auto"  # of the head
    embeds_checked: bool = False
    share: bool | None = None
    told: set[str] = field(default_factory=set)
    draws: two_pass.Draws = field(default_factory=two_pass.Draws)


class _Forward:
    """The forward of a patched model.

    Looks like a bound method (`__self__`, `__func__`, a signature): accelerate takes it apart and
    Trainer inspects it. Is an object: a bound method would unpickle as the class's forward.
    """

    is_ift = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _forward(self.model, *args, **kwargs)

    @property
    def __self__(self) -> nn.Module:
        return self.model

    @property
    def __func__(self) -> Callable[..., Any]:
        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _forward(model, *args, **kwargs)

        own = self.__signature__
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # type: ignore[attr-defined]  # read by inspect
        forward.is_ift = True  # type: ignore[attr-defined]  # a method made from it is still ours
        return forward

    @property
    def __signature__(self) -> inspect.Signature:
        original = inspect.signature(original_forward(self.model))
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("ift", "skip_logits", "loss")
        ]
        parameters = list(original.parameters.values())
        at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return original.replace(parameters=[*parameters[:at], *extra, *parameters[at:]])


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that a patched model had before."""
    previous: Callable[..., Any] | None = getattr(model, _STATE).previous
    return MethodType(type(model).forward, model) if previous is None else previous


def logit_transform(model: nn.Module, kwargs: dict[str, Any]) -> LogitTransform:
    """What a patched model does to its logits, measured with the inputs in `kwargs` the first time.

    Raises:
        RuntimeError: it does something that `ift.patch` does not know.
    """
    state: _State = getattr(model, _STATE)
    if state.transform is None:
        state.transform = measure_transform(model, original_forward(model), _two_tokens(kwargs))
    return state.transform


def _forward(
    model: nn.Module,
    *args: Any,
    ift: IFTConfig | None = None,
    skip_logits: bool | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    if loss is not None and (ift is not None or skip_logits is False or not callable(loss)):
        raise ValueError("loss: expected a function, without ift and without skip_logits=False")
    if not isinstance(ift, (IFTConfig, NoneType)):
        raise TypeError(f"ift: expected an ift.IFTConfig or None, got {type(ift).__name__}")
    original = original_forward(model)
    names = inspect.signature(original).parameters
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if kwargs.get("labels") is None and skip_logits and kwargs.get("shift_labels") is not None:
        kwargs["labels"] = kwargs["shift_labels"]  # the original asks for a loss only with labels
    has_labels = kwargs.get("labels") is not None
    if skip_logits is None:
        skip_logits = (
            loss is not None
            or ift is not None
            or (has_labels and (model.training or torch.is_grad_enabled()))
        )
    if not skip_logits:
        if ift is not None:
            raise ValueError("skip_logits: expected True or None with ift, got False")
        return original(**kwargs)
    if not has_labels:
        asked = "loss" if loss is not None else "skip_logits=True" if ift is None else "ift"
        raise ValueError(f"labels: expected (B, T) token ids with {asked}, got None")

    state = getattr(model, _STATE)
    logit_transform(model, kwargs)
    if ift is None:
        output, metrics = _one_pass(model, original, kwargs, state, loss)
    else:
        output, metrics = two_pass.ift_forward(model, original, kwargs, ift, state)
    model.ift_metrics = metrics  # type: ignore[assignment]  # a plain attribute
    return _without_logits(output, model, kwargs)


def _one_pass(
    model: nn.Module,
    original: Callable[..., Any],
    kwargs: dict[str, Any],
    state: _State,
    own: Callable[..., Tensor] | None,
) -> tuple[Any, dict[str, Tensor]]:
    """The loss `own`; or as transformers' ForCausalLMLoss: mean over targets, or their sum over
    num_items_in_batch."""
    target = kwargs.get("shift_labels")
    if target is None:
        # Of as many positions as there are labels, perhaps, but of others.
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise ValueError(
                f"shift_labels: expected the targets of the positions that {type(model).__name__} "
                "keeps with logits_to_keep, got None"
            )
        target = shifted_targets(kwargs["labels"])
    num_items = kwargs.get("num_items_in_batch")

    def loss(stats: TokenStats) -> Tensor:
        assert stats.logprob is not None
        mask = (target != IGNORE_INDEX).reshape(stats.logprob.shape).to(stats.logprob.device)
        if own is not None:  # one of this package's own may want to know how peaked p is
            return own(stats if getattr(own, "takes_stats", False) else stats.logprob, mask)
        return sft_loss(stats.logprob, mask, num_items=num_items)

    # As transformers' Trainer does: a cache costs memory and hides packed rows from the mask.
    kwargs = {"use_cache": False, **kwargs}
    assert state.transform is not None
    ask = token_stats(target, state.transform, state.gradient)
    output, stats = head_pass(model, original, kwargs, ask, loss=loss)
    return output, token_metrics(stats, target)


def _two_tokens(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the smallest forward: two tokens of the first row."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return {name: kwargs[name][:1, :2].detach(), "use_cache": False}
    raise ValueError("input_ids: expected token ids (B, T), or inputs_embeds, got neither")


def _without_logits(output: Any, model: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The same output without the stand-in, as a tuple where one was asked for."""
    output = type(output)(**{key: value for key, value in output.items() if key != "logits"})
    wanted = kwargs.get("return_dict")
    if wanted is None:
        wanted = getattr(getattr(model, "config", None), "return_dict", True)
    return output if wanted else output.to_tuple()
