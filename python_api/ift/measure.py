"""Measure what a causal LM's own code does to its logits and to its labels.

A forward of a few tokens whose head returns given logits shows scale and softcap. This needs no
table of architectures, and code that does something else is refused.
"""

from __future__ import annotations

import inspect
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ift.head_options import HeadOptions
from ift.head_parts import MAX_ERROR, head_logits, rows_error
from ift.head_pass import (
    LossArguments,
    LossFunction,
    UnsupportedModel,
    evaluating,
    head_pass,
    plain_head,
)
from ift.heads import base_layer, head_function, head_weight
from ift.one_pass import loss_pass
from ift_kernels.common.transform import LogitTransform
from ift_kernels.vocab_parallel import is_sharded

# A model is in evaluation mode while it is measured: one thread at a time.
measuring = threading.RLock()

# Logits that the head returns: the first two show cap and scale.
_PROBES = (1e6, 2.0**-13, 1.0, -1.0, 30.0, -75.0, 0.0, 300.0)


class Measured(NamedTuple):
    """Result of `measure`."""

    transform: LogitTransform
    # Labels are the targets of their own positions, not of the positions before.
    unshifted: bool


def measure(model: Any, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Measured:
    """Transform of the logits and rule of the labels, by one forward in evaluation mode.

    Args:
        model: patched, or about to be: its loss function is a `LossFunction`.
        forward: the unpatched forward.
        kwargs: inputs of a few tokens with labels, distinct ones.

    Raises:
        RuntimeError: the code does anything other than scale, then softcap; or computes its own
            loss.
    """
    found: list[LossArguments] = []

    def loss(_: Any, arguments: LossArguments) -> Tensor:
        found.append(arguments)
        return torch.zeros(())

    transform = measure_transform(model, forward, kwargs, loss)
    labels = kwargs["labels"].flatten()
    target = found[0].target.flatten().to(labels.device)
    return Measured(transform, torch.equal(target, labels))


def measure_transform(
    model: Any, forward: Callable[..., Any], kwargs: dict[str, Any], loss: Any = None
) -> LogitTransform:
    """Scale and softcap that the code of `model` applies to what its head returns.

    One forward in evaluation mode, whose head returns known values for a whole vocabulary.

    Raises:
        RuntimeError: the code does anything other than scale, then softcap.
    """
    width = max(head_weight(plain_head(model))[0].shape[0], len(_PROBES))
    probes = torch.tensor(_PROBES, dtype=torch.float32, device="cpu")
    values = probes.repeat(math.ceil(width / len(_PROBES)))[:width]
    with evaluating(model), torch.no_grad():
        output, shape = head_pass(
            model, forward, kwargs, lambda hidden, *_, **__: hidden.shape[:-1], loss=loss,
            placeholder=values,
        )  # fmt: skip
    logits = output.logits.detach()
    logits = (logits.full_tensor() if is_sharded(logits) else logits).cpu()
    if logits.shape == (*shape, width) and logits.dtype in (torch.float32, torch.float64):
        logits = logits.double()
        top, small = logits.flatten()[:2].tolist()
        scale = small / _PROBES[1]
        capped = not math.isclose(top, scale * _PROBES[0], rel_tol=1e-4)
        transform = LogitTransform(scale, abs(top) if capped else 0.0)
        expected = transform.apply(values.double(), None).expand_as(logits)
        if math.isfinite(top + small) and torch.allclose(logits, expected, rtol=1e-5, atol=0.0):
            return transform
    raise UnsupportedModel(
        f"{type(model).__name__}: expected its logits to be scale * (hidden @ weight.T + bias), "
        "then perhaps softcap * tanh(logits / softcap); its code does something else to them"
    )


def check_kind(model: Any) -> None:
    """Refuse a model whose loss is not what `ift.patch` replaces, without running it.

    Raises:
        TypeError: no plain linear head (`plain_head`), or an encoder–decoder model.
        RuntimeError: parameters beside the head, or a loss that does not come from transformers'
            ForCausalLMLoss.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    name = type(model).__name__
    plain_head(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"model: expected a causal LM whose labels are its input ids, {name} has an encoder "
            "and a decoder"
        )
    if any(p is not None for p in model._parameters.values()):
        raise RuntimeError(f"{name}: has parameters beside its head; this model cannot be patched")
    forwards = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    if not any("loss_function" in inspect.unwrap(f).__code__.co_names for f in forwards):
        raise RuntimeError(f"{name}: computes its own loss, so it cannot be patched")
    standard = model.loss_function
    standard = standard.standard if isinstance(standard, LossFunction) else standard
    if standard is not ForCausalLMLoss:
        raise RuntimeError(
            f"{name}: expected the loss function ForCausalLMLoss, got {standard}: "
            "ift.patch replaces next-token cross-entropy only"
        )


def try_few_tokens(model: Any, forward: Callable[..., Any], head: HeadOptions) -> Measured | None:
    """Measure a model on four tokens, and compare its loss with and without logits.

    None where it cannot run: weights on the meta device or in shards, or a model that needs more
    than token ids. It is then measured with the inputs of its first loss.

    Raises:
        RuntimeError: as `measure`, or the two losses differ.
    """
    if any(_has_no_values(p) for p in model.parameters()):
        return None
    with evaluating(model), torch.no_grad():
        try:
            plain, eps = _plain_loss(model, forward, head)
        except UnsupportedModel:
            raise
        except Exception:  # a model that needs an image, say, may raise anything
            try:  # what can already be refused in a model that needs other inputs
                measure(model, forward, _few_tokens(model))
            except UnsupportedModel:
                raise
            except Exception:  # the model's, as above
                return None
            return None
        measured = measure(model, forward, _few_tokens(model))
        output, _ = loss_pass(
            model, forward, _few_tokens(model), measured.transform, head,
            unshifted=measured.unshifted,
        )  # fmt: skip
    error = abs(float(output.loss) - float(plain))
    if not error <= 16 * eps * max(1.0, abs(float(plain))) + 1e-4:
        raise RuntimeError(
            f"{type(model).__name__}: its loss of four tokens is {float(plain):.6g}, without "
            f"logits {float(output.loss):.6g}; this model cannot be patched"
        )
    return measured


def _plain_loss(model: Any, forward: Callable[..., Any], head: HeadOptions) -> tuple[Tensor, float]:
    """The loss of four tokens from the model's logits, and the epsilon of these.

    Where the loss without logits has float32 ones, these are, too: the model's own may be rounded
    to 16 bits, by its weights or by an autocast around `forward`, as accelerate's.
    """
    linear: Any = plain_head(model)
    inputs, replaced = _few_tokens(model), vars(linear).get("forward")
    own, found = linear.forward, [torch.finfo(head_weight(linear)[0].dtype).eps]

    def logits(hidden: Tensor) -> Tensor:
        if head_function(base_layer(linear)) is not None:
            # With a gradient: without one bitsandbytes packs its weight anew on some CPUs.
            with torch.enable_grad():
                error = rows_error(linear, hidden, own(hidden.detach().requires_grad_()))
            if not error <= MAX_ERROR:
                raise UnsupportedModel(
                    f"{type(model).__name__}: the logits of its head, {type(linear).__name__}, are "
                    "not those of the rows of its weight: expected a relative difference of at "
                    f"most {MAX_ERROR}, got {error:.3g}"
                )
            made = head_logits(linear, hidden, head.logits_dtype or hidden.dtype)
        elif head.logits_dtype is None:
            made = own(hidden)
        else:
            made = head_logits(linear, hidden, torch.float32)
        found[:] = [torch.finfo(made.dtype).eps]
        return made

    linear.forward = logits  # of one object, for one call
    try:
        loss: Tensor = forward(**inputs).loss
    finally:
        if replaced is None:
            del linear.forward
        else:
            linear.forward = replaced
    return loss, found[0]


def _has_no_values(parameter: Tensor) -> bool:
    return parameter.is_meta or is_sharded(parameter) or hasattr(parameter, "ds_id")


def _few_tokens(model: Any) -> dict[str, Any]:
    """Four tokens of plain text with labels, in new tensors: a model may change them in place."""
    embedding = model.get_input_embeddings()
    tensors = itertools.chain(embedding.parameters(), embedding.buffers(), model.parameters())
    ids = torch.tensor([plain_ids(model)[:4]], device=next(tensors).device)
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False, "return_dict": True}


def plain_ids(model: Any) -> list[int]:
    """The vocabulary without the ids that the configuration names (``…_token_id``)."""
    config = model.config
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                given = value if isinstance(value, list) else [value]
                special.update(i for i in given if isinstance(i, int))
    columns = head_weight(plain_head(model))[0].shape[0]
    vocabulary = range(
        min(columns, getattr(model.get_input_embeddings(), "num_embeddings", columns))
    )
    return [i for i in vocabulary if i not in special] or list(vocabulary)
