"""`patch`: a transformers causal LM computes its training loss, SFT or IFT, without its logits.

Replaces the `forward` of one model object, its loss function and the `forward` of its output head
(under IFT that of its input embedding, too), and nothing else: `generate`, evaluation, saving and
every module inside run as before. See docs/patching.md.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType, NoneType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ift import two_pass
from ift.bound_forward import BoundForward
from ift.config import IFTConfig
from ift.head_options import HeadOptions
from ift.head_pass import (
    PATCH_ARGUMENTS,
    HeadForward,
    LossFunction,
    cast_dtype,
    casts_to_float32,
    in_head_pass,
    plain_head,
    refuse_lost_arguments,
)
from ift.heads import head_weight
from ift.input_embeddings import EmbeddingForward
from ift.measure import Measured, check_kind, measure, measuring, try_few_tokens
from ift.one_pass import loss_pass
from ift.prefix import Sharing
from ift_kernels import ActiveSet
from ift_kernels.common.transform import LogitTransform

Model = TypeVar("Model", bound=nn.Module)

_STATE = "_ift_patch"  # the attribute that makes a model a patched one
_REPLICATE = "_replicate_for_data_parallel"


def patch(
    model: Model,
    *,
    gradient: str | ActiveSet | None = None,
    logits_dtype: torch.dtype | None = None,
    deterministic: bool | None = None,
) -> Model:
    """Let a causal LM compute its training loss without logits. In place, undone by `unpatch`.

    ``model(..., labels=labels).loss`` is then that of supervised fine-tuning, as before;
    ``model(..., labels=labels, ift=config).loss`` that of Intuitive Fine-Tuning. The patched
    forward takes three arguments more:

    - ``loss``: a function of ``(logprob, mask)``, (B, T) of the shifted targets, in place of the
      SFT loss; any of `ift.losses` with its other arguments bound, ``num_items_in_batch`` included:
      given beside `loss` it is an error. A module of `ift.losses`, or a `functools.partial` of a
      function, gets the statistics that its options take (``scaling="eaft"``: the entropy).
    - ``ift``: an `ift.IFTConfig`; both passes of Intuitive Fine-Tuning inside this one forward.
    - ``skip_logits``: True or False to choose; None, the default, skips them when labels are given
      and the model is training or gradients are enabled. Else the original forward runs.

    No cache of keys and values is made unless ``use_cache=True`` asks for one; with `ift`, whose
    passes have their own, that is an error.

    Without logits the output has ``logits=None``, and `model.ift_metrics` holds three scalar
    tensors of this call: the number of targets, ``tokens``, and the sums over them of ``correct``
    (argmax equals target) and ``entropy``. With `ift` they are those of the second pass, and there
    are three more: the number of ``rows`` with targets, and the sums over them of the losses of the
    first pass, ``loss_sft`` (the mean cross-entropy of the row), and of the second, ``loss_ift``.

    Patching tries the model on four tokens, in evaluation mode and without gradient, and compares
    its loss with the one without logits; a model whose weights are not there yet (meta device,
    shards), or that needs more than token ids, is measured at its first loss instead. Patching
    again does nothing, unless something has replaced the patched forward since.

    Args:
        model: a transformers causal LM with a linear output head, or a PEFT model around one, which
            may have LoRA or DoRA on the head, too. A quantized head (bitsandbytes, torchao,
            `ift.heads.register_head`) is frozen. Patch before DDP or FSDP wraps it.
        gradient: of the head, as in `ift_kernels.linear_logprobs`: "exact", or "active" (an
            `ift_kernels.ActiveSet` for its options), which approximates. "exact" at first.
        logits_dtype: of the losses, as in `ift_kernels.linear_logprobs`: torch.float32 keeps their
            logits from being rounded to 16 bits, under autocast, too. At first that of the model;
            float32 where TRL's ``cast_lm_head_to_fp32`` has cast its head.
        deterministic: True: given its hidden state, every result of a token is the same to the bit
            in any batch, as in `ift_kernels.linear_logprobs`. False at first.

    None, the default of all three, leaves an option as it is; `unpatch` forgets them.

    Returns:
        `model` itself.

    Raises:
        ValueError: another gradient or logits_dtype than these; a logits_dtype for a model in
            float64; an approximate gradient that is to be deterministic.
        TypeError: no output head, or one that is neither linear nor LoRA or DoRA of that (another
            adapter, DoRA with dropout) or is quantized by another package; an encoder–decoder
            model; a PEFT model that has kept the unpatched forward.
        RuntimeError: code after the head that does other things than scale and softcap, or a loss
            that is not next-token cross-entropy. All of them name the model.

    >>> # model = ift.patch(AutoModelForCausalLM.from_pretrained(...))
    >>> # model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    """
    base = base_model(model)
    check_kind(base)
    _check_wrapper(model, base)
    options = head_options(base).changed(
        head_weight(plain_head(base))[0], gradient=gradient, logits_dtype=logits_dtype,
        deterministic=deterministic,
    )  # fmt: skip
    state: _State | None = base.__dict__.get(_STATE)
    if state is None or not _is_patched(base.__dict__.get("forward")):
        _install(base, state, options)
    _patch_heads(base)
    state = getattr(base, _STATE)
    state.head = options
    return model


def head_options(base: nn.Module) -> HeadOptions:
    """The options of the head of a causal LM: those of its patch.

    Of one that TRL has cast to float32, whether before or after the patch, float32 logits.
    """
    state: _State | None = base.__dict__.get(_STATE)
    options = HeadOptions() if state is None else state.head
    return options.changed(logits_dtype=cast_dtype(plain_head(base)))


def _install(base: nn.Module, state: _State | None, options: HeadOptions) -> None:
    """Put the patched forward in place; with a state, once more on top of what replaced it."""
    forward = PatchedForward(base, base.__dict__.get("forward"))
    if state is not None:
        state.forward = forward
        base.forward = forward
        return
    setattr(base, _STATE, _State(forward, base.__dict__.get("_loss_function")))
    standard: Any = base.loss_function
    base._loss_function = LossFunction(base, standard)  # type: ignore[assignment]  # a plain attribute
    setattr(base, _REPLICATE, functools.partial(_refuse_replicas, type(base).__name__))
    base.forward = forward
    try:
        _patch_heads(base)
        with measuring:
            measured = try_few_tokens(base, forward.original, options)
        if measured is not None:
            _store_measured(base, measured)
    except BaseException:
        unpatch(base)
        raise


def _patch_heads(base: nn.Module) -> None:
    # PEFT's original beside its trained copies, too: adapters may be switched, or off.
    wrapper: Any = base.get_output_embeddings()  # type: ignore[operator]  # plain_head has called it
    copies = getattr(wrapper, "modules_to_save", None)
    heads = [wrapper] if copies is None else [wrapper.original_module, *copies.values()]
    for head in heads:
        previous = head.__dict__.get("forward")
        if previous is None or casts_to_float32(previous):
            head.forward = HeadForward(head, previous)


def unpatch(model: Model) -> Model:
    """Undo `patch`; nothing of it remains on the object. Does nothing to a model not patched.

    A wrapper that was put around the patched forward since (accelerate's mixed precision, for one)
    stays, and what it wraps calls the original forward from then on.
    """
    base = base_model(model)
    state: _State | None = base.__dict__.pop(_STATE, None)
    if state is None:
        return model
    forward = base.__dict__.get("forward")
    if _is_patched(forward) and not hasattr(forward, "__wrapped__"):
        del base.forward
        if state.forward.previous is not None:
            base.forward = state.forward.previous
    if isinstance(base.__dict__.get("_loss_function"), LossFunction):
        del base._loss_function
        if state.loss_function is not None:
            base._loss_function = state.loss_function  # type: ignore[assignment]  # a plain attribute
    for name in (_REPLICATE, "ift_metrics"):
        base.__dict__.pop(name, None)
    for module in base.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, HeadForward | EmbeddingForward):
            forward.remove()
    return model


def _is_patched(forward: Any) -> bool:
    """Whether it is a patched forward, or wraps one (``__wrapped__``)."""
    while forward is not None:
        if getattr(forward, "is_ift", False):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _check_wrapper(model: nn.Module, base: nn.Module) -> None:
    """Refuse modules around a model that call a forward of it which no patch can replace."""
    inside = set(base.modules())
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if module in inside or getattr(forward, "__self__", None) is not base:
            continue
        if not _is_patched(forward):
            raise TypeError(
                f"model: {type(module).__name__} has kept the forward of {type(base).__name__}; "
                f"patch the model before {type(module).__name__} is put around it"
            )


def _refuse_replicas(name: str) -> None:
    raise RuntimeError(
        f"{name}: torch.nn.DataParallel would compute with the weights of one device only in a "
        "patched model; expected one process per device (DistributedDataParallel, torchrun)"
    )


def base_model(model: nn.Module) -> nn.Module:
    """The causal LM itself: `model`, or what is inside a PEFT model."""
    find = getattr(model, "get_base_model", None)
    return find() if callable(find) else model


@dataclass
class _State:
    """State of a patched model. Plain data, so that it can be copied and pickled."""

    forward: PatchedForward  # the one in place
    loss_function: Callable[..., Any] | None  # one that was set on the object before
    measured: Measured | None = None
    hooks: tuple[int, ...] = ()  # of the head, when it was measured
    head: HeadOptions = field(default_factory=HeadOptions)
    sharing: Sharing | None = None  # how its prompts can be shared; None: not measured yet
    warned: set[str] = field(default_factory=set)  # warnings already logged
    sampled_rows: two_pass.SampledRows = field(default_factory=two_pass.SampledRows)
    last_backward: tuple[int, int, Tensor, Tensor] | None = (
        None  # see two_pass.warn_of_accumulation
    )

    @property
    def transform(self) -> LogitTransform | None:
        return None if self.measured is None else self.measured.transform


class PatchedForward(BoundForward):
    """The forward of a patched model."""

    keywords: ClassVar[dict[str, Any]] = dict.fromkeys(PATCH_ARGUMENTS)

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With the arguments of `patch`."""
        original = PatchedForward(model, self.previous).original
        if _STATE not in model.__dict__:  # unpatched, but still inside of a wrapper
            refuse_lost_arguments(type(model).__name__, kwargs)
        elif not in_head_pass(model):  # else one patched forward is inside of another
            return _forward(model, original, *args, **kwargs)
        return original(*args, **{k: v for k, v in kwargs.items() if k not in PATCH_ARGUMENTS})


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that a patched model had before."""
    state: _State = getattr(model, _STATE)
    return state.forward.original


def measured_model(model: nn.Module, kwargs: dict[str, Any]) -> Measured:
    """What the code of a patched model does to its logits and labels.

    Measured with the inputs in `kwargs` where it is not yet, or where the forward hooks of its head
    have changed since.

    Raises:
        RuntimeError: it does something else than scale and softcap.
    """
    state: _State = getattr(model, _STATE)
    if state.measured is None or state.hooks != tuple(plain_head(model)._forward_hooks):
        with measuring:
            if state.measured is None or state.hooks != tuple(plain_head(model)._forward_hooks):
                _store_measured(model, measure(model, state.forward.original, _two_tokens(kwargs)))
    assert state.measured is not None
    return state.measured


def _store_measured(model: nn.Module, measured: Measured) -> None:
    state: _State = getattr(model, _STATE)
    state.measured, state.hooks = measured, tuple(plain_head(model)._forward_hooks)


def _forward(
    model: nn.Module,
    original: Callable[..., Any],
    *args: Any,
    ift: IFTConfig | None = None,
    skip_logits: bool | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    if loss is not None and (ift is not None or skip_logits is False or not callable(loss)):
        raise ValueError("loss: expected a function, without ift and without skip_logits=False")
    if loss is not None and kwargs.get("num_items_in_batch") is not None:
        raise ValueError(
            "num_items_in_batch: expected None with loss, a function of (logprob, mask) that "
            "divides as it likes; bind the number of items to it"
        )
    if not isinstance(ift, (IFTConfig, NoneType)):
        raise TypeError(f"ift: expected an ift.IFTConfig or None, got {type(ift).__name__}")
    if args:
        kwargs = _by_name(model, original, args, kwargs)
    if kwargs.get("labels") is None and skip_logits and kwargs.get("shift_labels") is not None:
        kwargs["labels"] = kwargs["shift_labels"]  # the original computes a loss with labels only
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
        argument = "loss" if loss is not None else "skip_logits=True" if ift is None else "ift"
        raise ValueError(f"labels: expected (B, T) token ids with {argument}, got None")

    state: _State = getattr(model, _STATE)
    measured = measured_model(model, kwargs)
    if ift is None:
        output, metrics = loss_pass(
            model, original, kwargs, measured.transform, state.head,
            unshifted=measured.unshifted, loss=loss, warned=state.warned,
        )  # fmt: skip
    else:
        output, metrics = two_pass.ift_forward(model, original, kwargs, ift, state)
    model.ift_metrics = metrics  # type: ignore[assignment]  # a plain attribute
    return _without_logits(output, model, kwargs)


def _by_name(
    model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by their names; a TypeError where Python would raise one."""
    signature = inspect.signature(original)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        # A wrapper with *args passes them on to the forward of the class.
        signature = inspect.signature(MethodType(type(model).forward, model))
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _two_tokens(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the smallest forward: two tokens of the first row, and labels that differ."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            few = kwargs[name][:1, :2].detach()
            labels = torch.arange(few.shape[1], device=few.device)[None]
            return {name: few, "labels": labels, "use_cache": False}
    raise ValueError("input_ids: expected token ids (B, T), or inputs_embeds, got neither")


def _without_logits(output: Any, model: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The same output without the placeholder, as a tuple where one was asked for."""
    output = type(output)(**{key: value for key, value in output.items() if key != "logits"})
    return_dict = kwargs.get("return_dict")
    if return_dict is None:
        return_dict = getattr(getattr(model, "config", None), "return_dict", True)
    return output if return_dict else output.to_tuple()
