"""Run a causal LM's own forward with its output head computing a result in place of logits.

The result is computed inside the head module's forward, where sharding (FSDP2, ZeRO-3) has gathered
its weight and tied weights are one tensor. The model's code gets an empty placeholder for the
logits, and its call of `self.loss_function` returns the loss of the result. Every argument of that
call is used or refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ift.documents import IGNORE_INDEX, shifted_targets
from ift.head_parts import check_lora, has_hooks, head_parts
from ift.heads import base_layer, head_function, head_weight, is_lora
from ift_kernels.vocab_parallel import is_sharded


class UnsupportedModel(RuntimeError):
    """The model's own code does something that a loss without logits cannot reproduce."""


# (hidden, weight, bias, **adapter) → result; the last are `head_parts.HeadParts.adapter`.
HeadCallback = Callable[..., Any]
# Arguments of a patched forward; another function that gets one would ignore it.
PATCH_ARGUMENTS = ("ift", "skip_logits", "loss")


@dataclass(frozen=True)
class LossArguments:
    """What the model's code passed to its loss function, beside the logits."""

    labels: Tensor | None
    shift_labels: Tensor | None
    ignore_index: int
    num_items: Any  # num_items_in_batch

    @property
    def target(self) -> Tensor:
        """The token that each position predicts, as in transformers' ForCausalLMLoss."""
        if self.shift_labels is not None:
            return self.shift_labels
        assert self.labels is not None
        return shifted_targets(self.labels, ignore_index=self.ignore_index)

    def same_target(self, other: LossArguments) -> bool:
        """Whether the targets are equal; synchronises only if the model's code made new tensors."""
        if self.ignore_index != other.ignore_index:
            return False
        pairs = ((self.shift_labels, other.shift_labels), (self.labels, other.labels))
        for mine, theirs in pairs:
            if mine is not None and mine is theirs:
                return True
            if mine is not None or theirs is not None:
                break
        target, others = self.target.flatten(), other.target.flatten()
        return torch.equal(target, others.to(target.device))


LossCallback = Callable[[Any, LossArguments], Tensor]  # (result, arguments) → scalar


@dataclass
class _HeadCall:
    model: nn.Module
    head: nn.Module
    callback: HeadCallback
    loss: LossCallback | None
    placeholder: Tensor | None  # (V,): the logits of every token; None: empty, (*shape, 0)
    results: list[Any] = field(default_factory=list)
    losses: int = 0
    copies: list[tuple[Tensor, int, Tensor]] = field(default_factory=list)  # of `_copy_labels`
    shape: tuple[int, ...] = ()  # of the hidden states, without their width
    columns: int = 0  # rows of the head's weight, of all shards together


# One per thread and task; `head_pass` restores the previous value.
_current: ContextVar[_HeadCall | None] = ContextVar("ift_head_call", default=None)


def in_head_pass(model: nn.Module) -> bool:
    """Whether a `head_pass` of this model is running in this thread."""
    call = _current.get()
    return call is not None and call.model is model


class HeadForward:
    """The forward of a patched head: the original one, unless a `head_pass` uses this head.

    An object, since a bound method would unpickle as the class's own forward.
    """

    def __init__(self, head: Any, previous: Any = None) -> None:
        self.head = head
        self.previous = previous  # None, or TRL's, see `casts_to_float32`

    def remove(self) -> None:
        """Put back the forward that the head had before."""
        del self.head.forward
        if self.previous is not None:
            self.head.forward = self.previous  # of one object

    def __call__(self, input: Tensor, **kwargs: Any) -> Tensor:
        call = _current.get()
        if call is None or call.head is not self.head:
            if self.previous is None:
                logits: Tensor = type(self.head).forward(self.head, input, **kwargs)
                return logits
            # As TRL's, which in a copy of the model would compute with the original's weight.
            weight, bias = self.head.weight, self.head.bias
            shift = None if bias is None else bias.float()
            return nn.functional.linear(input.float(), weight.float(), shift)
        for name, value in kwargs.items():
            if value is not None:  # of PEFT, as adapter_names
                raise ValueError(f"{name}: expected None with LoRA on the output head, got one")
        parts = head_parts(self.head, input)
        hidden = parts.hidden
        call.results.append(call.callback(hidden, parts.weight, parts.bias, **parts.adapter))
        call.shape, call.columns = hidden.shape[:-1], parts.weight.shape[0]
        if call.placeholder is not None:
            logits = call.placeholder.to(hidden.device)
            return self._like_logits(logits.expand(*call.shape, -1).clone(), parts.weight)
        logprob: Tensor | None = getattr(call.results[-1], "logprob", None)
        if logprob is None or not logprob.requires_grad:
            return self._like_logits(hidden.new_empty((*call.shape, 0)), parts.weight)
        # Empty, but in the result's graph: sharding gathers the weight for backward when a gradient
        # reaches the head's output, so the graph from loss to result has to go through it.
        return self._like_logits(logprob[..., None][..., :0].to(hidden.dtype).clone(), parts.weight)

    def _like_logits(self, placeholder: Tensor, weight: Any) -> Tensor:
        """As a DTensor if the head's weight is one, which hooks of the head make logits of."""
        if not is_sharded(weight) or is_lora(self.head):  # hooks of its base do not run
            return placeholder
        from torch.distributed.tensor import DTensor, Replicate

        logits: Tensor = DTensor.from_local(placeholder, weight.device_mesh, [Replicate()])
        return logits


class LossFunction:
    """The loss function of a patched model: the standard one outside a `head_pass` with a loss.

    Args:
        standard: transformers' ForCausalLMLoss, which the model had before.
    """

    def __init__(self, model: nn.Module, standard: Callable[..., Tensor]) -> None:
        self.model = model
        self.standard = standard

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        call = _current.get()
        if call is None or call.model is not self.model or call.loss is None:
            refuse_lost_arguments(type(self.model).__name__, kwargs)
            return self.standard(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        name = type(self.model).__name__
        for extra in _loss_options(self.standard):
            if kwargs.get(extra) is not None:
                raise ValueError(
                    f"{extra}: {name} passes it to its loss function; expected None, "
                    "the loss without logits has no such option"
                )
        if vocab_size != call.columns:
            raise ValueError(
                f"vocab_size: expected {call.columns}, the rows of the head of {name}, "
                f"got {vocab_size}"
            )
        if labels is None and shift_labels is None:
            raise ValueError(
                f"labels: {name} gives its loss function neither these nor shift_labels"
            )
        if logits.shape[:-1] != call.shape:
            raise UnsupportedModel(
                f"{name}: gives logits of shape {tuple(logits.shape[:-1])} to its loss function, "
                f"not those of the {tuple(call.shape)} hidden states at its head; "
                "this model cannot be patched"
            )
        call.losses += 1
        labels, shift_labels = (_unless_changed(call, y) for y in (labels, shift_labels))
        arguments = LossArguments(labels, shift_labels, ignore_index, num_items_in_batch)
        loss = call.loss(call.results[-1], arguments)
        if call.placeholder is not None:
            return loss
        empty: Any = logits.sum()  # see HeadForward
        nothing: Tensor = empty.full_tensor() if is_sharded(empty) else empty
        return loss + nothing


def _copy_labels(call: _HeadCall, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Pass copies of the labels to the model's code, which may change them in place."""
    for name in ("labels", "shift_labels"):
        given = kwargs.get(name)
        if isinstance(given, Tensor):
            with torch.inference_mode(False):  # an inference tensor has no version
                copy = given.clone()
            call.copies.append((copy, copy._version, given))
            kwargs = {**kwargs, name: copy}
    return kwargs


def _unless_changed(call: _HeadCall, labels: Tensor | None) -> Tensor | None:
    """The caller's tensor in place of its copy, unless the model's code has changed the copy."""
    for copy, version, given in call.copies:
        if labels is copy and copy._version == version:
            return given
    return labels


def refuse_lost_arguments(name: str, kwargs: dict[str, Any]) -> None:
    """Raise if `kwargs` holds arguments of a patched forward, which this function ignores."""
    for argument in PATCH_ARGUMENTS:
        if kwargs.get(argument) is not None:
            raise RuntimeError(
                f"{argument}: the forward of {name} that takes it did not run, since something "
                "replaced it after ift.patch or ift.unpatch took it off; patch the model again"
            )


@cache
def _loss_options(standard: Callable[..., Tensor]) -> tuple[str, ...]:
    """Options of this transformers' standard loss that `LossFunction` does not have."""
    from transformers.loss.loss_utils import fixed_cross_entropy

    named = {*inspect.signature(standard).parameters}
    named |= {*inspect.signature(fixed_cross_entropy).parameters} - {"source", "target"}
    honoured = {*inspect.signature(LossFunction.__call__).parameters}
    return tuple(sorted(named - honoured))


def casts_to_float32(forward: Any) -> bool:
    """Whether it is the forward that TRL's ``cast_lm_head_to_fp32`` gives to a head.

    It computes the head's product in float32, from a weight that is cast to it, too.
    """
    module, name = (getattr(forward, key, None) or "" for key in ("__module__", "__name__"))
    return module.split(".")[0] == "trl" and name == "cast_forward_to_fp32"


def cast_dtype(head: nn.Module) -> torch.dtype | None:
    """float32 of a head with such a forward, or one in its place; None of another."""
    forward = head.__dict__.get("forward")
    forward = forward.previous if isinstance(forward, HeadForward) else forward
    return torch.float32 if casts_to_float32(forward) else None


def plain_head(model: nn.Module) -> Any:
    """The output head of `model`: a module that computes ``hidden @ weight.T + bias`` alone.

    Or PEFT's LoRA or DoRA around one, see `ift.head_parts`. Its weight and bias are those of
    `heads.head_weight`: it may be of a registered kind.

    Raises:
        TypeError: there is none, or it is another kind of module (another adapter, quantized in a
            way that is not known).
    """
    name = type(model).__name__
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if callable(find) else None
    replaced = False
    saved = getattr(head, "modules_to_save", None)  # PEFT: trained copies beside the original
    if saved is not None:
        adapters = head.active_adapters
        off = head.disable_adapters or not adapters or any(a not in saved for a in adapters)
        replaced = "forward" in vars(head)  # by one that calls none of them
        head = head.original_module if off else saved[adapters[0]]
    if head is None:
        raise TypeError(f"model: expected a causal LM with an output head, {name} has none")
    base = base_layer(head)
    if base is not head:
        check_lora(head, name)
        # Its forward is not called: whatever shards or moves its weight there would not run.
        replaced = replaced or casts_to_float32(vars(head).get("forward"))
        replaced = replaced or has_hooks(base)
    registered = head_function(base) is not None
    linear = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    if not (linear or registered):
        raise TypeError(
            f"model: expected a plain linear output head, {name} has "
            f"{type(base).__module__}.{type(base).__name__}, whose logits are not hidden @ weight.T"
        )
    forwards = (vars(head).get("forward"), vars(base).get("forward"))
    known = (f is None or isinstance(f, HeadForward) or casts_to_float32(f) for f in forwards)
    if replaced or not all(known):
        raise TypeError(f"model: the forward of the output head of {name} is already replaced")
    weight, _ = head_weight(base)
    if not registered and not (weight.is_floating_point() and _is_plain(weight)):
        raise TypeError(
            f"model: expected an output head with a floating-point weight, {name} has one of "
            f"{type(weight).__module__}.{type(weight).__name__} in {weight.dtype} "
            "(quantized? see ift.heads.register_head)"
        )
    for hook in head._backward_pre_hooks.values():
        if getattr(hook, "__module__", "").split(".")[0] not in ("torch", "deepspeed"):
            raise TypeError(
                f"model: the output head of {name} has a full_backward_pre_hook, {hook}, "
                "which would see no gradient of logits; remove it"
            )
    return head


def _is_plain(weight: Tensor) -> bool:
    """Whether the elements are the values; torchao, for one, quantizes in subclasses."""
    package = type(weight).__module__.split(".")[0]
    return package in ("torch", "deepspeed") and not type(weight).__module__.startswith("torch.ao")


def head_pass(
    model: Any,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    callback: HeadCallback,
    *,
    loss: LossCallback | None = None,
    placeholder: Tensor | None = None,
) -> tuple[Any, Any]:
    """``forward(**kwargs)``, with `callback` computed in the head in place of the logits.

    Args:
        forward: the unpatched forward of `model`.
        callback: called with (hidden, weight, bias) inside the head's forward, and by name with
            `low_rank` and `column_scale` where LoRA or DoRA is on the head.
        loss: with labels in `kwargs`: a function of that result and of the arguments of the call
            of `self.loss_function`, whose return value it replaces; the model's code then adds its
            auxiliary losses. The model's `loss_function` has to be a `LossFunction`.
        placeholder: (V,), the logits that the head returns for every token; by default empty ones.

    Returns:
        The model's output, a ModelOutput, and the result.

    Raises:
        RuntimeError: the model calls its head never or twice, does not take its loss from
            ``self.loss_function``, or reshapes its logits.
    """
    name = type(model).__name__
    head = plain_head(model)
    if not isinstance(head.__dict__.get("forward"), HeadForward):
        raise RuntimeError(f"{name}: the output head was replaced after ift.patch; patch again")
    if loss is not None and not isinstance(model.loss_function, LossFunction):
        raise RuntimeError(
            f"{name}: expected the loss function ForCausalLMLoss, got {model.loss_function}: "
            "ift.patch replaces next-token cross-entropy only"
        )
    config = getattr(model, "config", None)
    if not kwargs.get("return_dict", getattr(config, "return_dict", True)):
        kwargs = {**kwargs, "return_dict": True}
    call = _HeadCall(model, head, callback, loss, placeholder)
    if loss is not None:
        kwargs = _copy_labels(call, kwargs)
    token = _current.set(call)
    try:
        output = forward(**kwargs)
    finally:
        _current.reset(token)

    if len(call.results) != 1:
        raise UnsupportedModel(
            f"{name}: expected one call of its output head per forward, got "
            f"{len(call.results)}; this model cannot be patched"
        )
    if loss is not None and call.losses != 1:
        raise UnsupportedModel(
            f"{name}: expected its loss to come from one call of self.loss_function, got "
            f"{call.losses}; this model cannot be patched"
        )
    if placeholder is None and output.logits.shape[-1] != 0:
        raise UnsupportedModel(f"{name}: reshapes its logits; this model cannot be patched")
    return output, call.results[0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: no dropout, no noise. The random state is restored at the end, since some
    models draw random numbers in evaluation, too."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for module in training:
        module.training = False
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            yield
    finally:
        for module in training:
            module.training = True
