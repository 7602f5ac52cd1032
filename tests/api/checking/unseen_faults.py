"""Faults that a developer could make by mistake in the fused loss, put there from outside.

Each is a context manager that patches the package while it is open, and takes the model of the
case. None raises, and none shows in the loss of the few tokens that `ift.patch` tries: those that
change the loss need more rows than it tries, padding, or `num_items_in_batch`.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import causal_lms
from ift import one_pass, patching
from ift.config import IFTConfig
from ift_kernels import backends, propagation
from ift_kernels.backends.contract import MAX, SUM
from ift_kernels.operators import head_call
from ift_kernels.schedule import adapter, gradients, head, products

Case = tuple[Any, dict[str, Any], dict[str, Any]]  # model, not patched; batch; further arguments
MANY_ROWS = 16  # more than `ift.patch` tries


@dataclass(frozen=True)
class Fault:
    name: str
    sentence: str
    inject: Callable[[Any], AbstractContextManager[None]]  # given the model
    make: Callable[[], Case]


FAULTS: dict[str, Fault] = {}


def _fault(make):
    """Register the decorated context manager, whose docstring is the sentence."""

    def register(function):
        inject, name = contextlib.contextmanager(function), function.__name__
        FAULTS[name] = Fault(name, " ".join(function.__doc__.split()), inject, make)
        return inject

    return register


def _wrapped(owner, name, wrapper):
    """Patch a function or method by `wrapper`, which takes the original first."""
    original = getattr(owner, name)
    around = functools.wraps(original)(lambda *args, **kwargs: wrapper(original, *args, **kwargs))
    return mock.patch.object(owner, name, around)


def _left_padded(batch):
    """The same rows with their padding in front."""
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        name: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for name, value in batch.items()
    }


def _plain(name, **options):
    return causal_lms.make(name), causal_lms.batch(**options), {}


def _hole_in_response():
    batch = causal_lms.batch(rows=4)
    batch["labels"][1, 8] = -100  # a tool's output inside a response, say
    batch["labels"][2, 6:8] = -100
    return causal_lms.lora(causal_lms.make("qwen3")), batch, {}


def _dora_on_head():
    model = causal_lms.make("llama")
    model = causal_lms.lora(model, target_modules=["q_proj", "lm_head"], use_dora=True)
    magnitude = model.get_output_embeddings().lora_magnitude_vector["default"].weight
    with torch.no_grad():  # as after some training; at first its quotient by the norm is 1
        magnitude *= torch.linspace(0.7, 1.4, len(magnitude))
    return model, _left_padded(causal_lms.batch()), {}


def _ift():
    config = IFTConfig(lam=0.3, gamma=0.8)
    return causal_lms.make("qwen2"), causal_lms.batch(), {"ift": config}


def _accumulated():
    """One micro-batch of an optimizer step of 50 targets, with responses of unequal length."""
    batch = causal_lms.batch()
    batch["labels"][1, :9] = -100
    return causal_lms.make("starcoder2"), batch | {"num_items_in_batch": torch.tensor(50)}, {}


def _large_logits():
    return causal_lms.make("gpt2", initializer_range=0.6), causal_lms.batch(), {}


def _left_padding():
    return causal_lms.make("olmo2"), _left_padded(causal_lms.batch(rows=4)), {}


@_fault(functools.partial(_plain, "llama"))
def sum_not_rescaled_at_last_tile(model):
    """Where the largest logit is in the last tile of the vocabulary, the running sum of
    exponentials before it is not rescaled to that maximum."""
    border = 96

    def statistics(original, operands, target, *args, **kwargs):
        state = original(operands, target, *args, **kwargs)
        if len(target) <= MANY_ROWS:
            return state
        columns = slice(0, border)
        z = operands.hidden.new_empty((len(target), border))
        operands.multiply(columns, z)
        z = operands.transform.apply(z, operands.bias_chunk(columns)).to(state[0].dtype)
        before, top = z.amax(1), state[0][MAX]
        surplus = (z - before[:, None]).exp() - (z - top[:, None]).exp()
        ids = torch.arange(border, device=z.device)
        surplus = surplus.masked_fill(ids == target[:, None], 0).sum(1)  # the target is apart
        state[0][SUM] += torch.where(top > before, surplus, 0)
        return state

    with _wrapped(products, "statistics", statistics):
        yield


@_fault(_hole_in_response)
def hidden_gradient_written_as_one_run(model):
    """The gradient of the valid rows is written back as if those of a response followed one
    another, so ignored positions inside of it shift the rest."""

    def scatter_hidden(original, call, d_hidden):
        found = original(call, d_hidden)
        if call.rows is None or call.valid_mask is not None:
            return found
        order = torch.arange(len(call.rows))
        begins = torch.cat([torch.ones(1, dtype=torch.bool), call.rows.diff() > 3])  # a prompt
        first = torch.where(begins, order, 0).cummax(0).values
        out = torch.zeros_like(found)
        out[call.rows[first] + order - first] = d_hidden[: call.count]
        return out

    with _wrapped(head_call.Call, "scatter_hidden", scatter_hidden):
        yield


@_fault(functools.partial(_plain, "gemma2"))
def softcap_slope_of_capped_logit(model):
    """The derivative of the softcap takes the tanh of the logit once more, though it is capped
    already."""

    def dlogits_(original, chunk, row_gradient, transposed=None):
        transform = chunk.transform
        if not transform.softcap:
            return original(chunk, row_gradient, transposed)
        z = transform.apply(chunk.x.clone(), chunk.bias)
        original(chunk, row_gradient, transposed)
        share = z * (transform.temperature / transform.softcap)
        ratio = (1 - share.tanh().square()) / (1 - share.square()).clamp(min=1e-6)
        chunk.x.mul_(ratio)
        if transposed is not None:
            transposed.mul_(ratio.T)
        return None

    with contextlib.ExitStack() as stack:
        for backend in backends.BACKENDS.values():
            stack.enter_context(_wrapped(backend, "dlogits_", dlogits_))
        yield


@_fault(_dora_on_head)
def dora_gradient_not_divided_by_scale(model):
    """The gradient of DoRA's magnitude on the head is summed from scaled products and not divided
    by the scale."""

    def results(original, operands):
        d_hidden, d_weight, _ = original(operands)
        return d_hidden, d_weight, operands.d_scale

    with _wrapped(adapter.Adapter, "results", results):
        yield


@_fault(functools.partial(_plain, "mistral"))
def padding_row_of_weight_without_gradient(model):
    """The head row of the padding token gets no gradient, as in an embedding with padding_idx."""
    padding = model.config.pad_token_id

    def weight_result(original, total):
        weight = original(total)
        if weight is not None:
            weight[padding] = 0
        return weight

    with _wrapped(gradients.Gradients, "weight_result", weight_result):
        yield


@_fault(_ift)
def propagation_backward_on_same_side(model):
    """The backward of IFT's discounted sums runs the scan toward the same side as forward, not its
    adjoint."""

    def discounted_cumsum(original, x, gamma, side="left", **options):
        class SameSide(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return original(x, gamma, side, **options)

            @staticmethod
            def backward(ctx, grad):
                return original(grad, gamma, side, **options)

        return SameSide.apply(x)

    with _wrapped(propagation, "discounted_cumsum", discounted_cumsum):
        yield


@_fault(_accumulated)
def tokens_averaged_by_row_with_num_items(model):
    """With num_items_in_batch the loss is the mean of the rows' means times this batch's share of
    the targets, so tokens of short responses count more."""

    def sft_loss(original, logprob, mask, *, num_items=None, **options):
        if num_items is None:
            return original(logprob, mask, **options)
        share = mask.sum() / torch.as_tensor(num_items)
        return original(logprob, mask, reduction="row_mean", **options) * share

    with _wrapped(one_pass, "sft_loss", sft_loss):
        yield


@_fault(functools.partial(_plain, "phi", vocabulary=24))
def repeated_targets_once_in_bias(model):
    """The bias gradient takes the targets' share by an indexed assignment, so a target that is
    repeated in the batch counts once."""

    def add(original, total, tile, row_gradient, *args, **kwargs):
        columns = tile.columns
        found = original(total, tile, row_gradient, *args, **kwargs)
        if total.bias is None:
            return found
        part = row_gradient.rows(tile.rows)
        here = (part.target >= columns.start) & (part.target < columns.stop)
        share = (part.coef[0] * total.head.transform.derivative(part.coef[0]))[here]
        ids, bias = part.target[here] - columns.start, total.bias[columns]
        every = torch.zeros_like(bias).index_add_(0, ids, share.to(bias.dtype))
        once = torch.zeros_like(bias)
        once[ids] = share.to(bias.dtype)
        bias += once - every
        return found

    with _wrapped(gradients.Gradients, "add", add):
        yield


@_fault(_left_padding)
def attention_mask_dropped_if_last_column_is_full(model):
    """The fused forward drops an attention mask without zeros in its last column as one of rows
    without padding, so left padding is attended to."""

    def loss_pass(original, model, forward, kwargs, *args, **options):
        mask = kwargs.get("attention_mask")
        if mask is not None and bool(mask[:, -1].all()):
            kwargs = {k: v for k, v in kwargs.items() if k != "attention_mask"}
        return original(model, forward, kwargs, *args, **options)

    with _wrapped(patching, "loss_pass", loss_pass):
        yield


@_fault(_large_logits)
def products_rounded_to_bfloat16(model):
    """Tiles of many rows pass through a bfloat16 buffer, so logits of a float32 model are rounded
    to 16 bits."""

    def multiply(original, operands, columns, out, *args, **kwargs):
        original(operands, columns, out, *args, **kwargs)
        if len(out) > MANY_ROWS:
            out.copy_(out.bfloat16())

    with _wrapped(head.Head, "multiply", multiply):
        yield
