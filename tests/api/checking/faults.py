"""Faults of our own code, each planted for a while: name → what it does, and the stage to name."""

import contextlib

import pytest
import torch

import causal_lms
from ift import head_pass, one_pass, sharded, token_stats
from ift_kernels.common.transform import LogitTransform

FAULTS = {}


def fault(stage, **options):
    """Registers a function of a MonkeyPatch; `options`: of `causal_lms` and the batch."""

    def register(plant):
        FAULTS[plant.__name__] = (plant, stage, options)
        return plant

    return register


def replaced(patch, module, name, wrap):
    patch.setattr(module, name, wrap(getattr(module, name)))


def operation(patch, change):
    """`change` gets the operation's arguments and options, and returns the ones to use."""

    def wrap(original):
        def call(hidden, weight, target, **options):
            return original(*change(hidden, weight, target, options), **options)

        return call

    replaced(patch, sharded, "linear_logprobs", wrap)


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied or replaced."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def upstream(patch, change):
    def wrap(original):
        def call(*args, **options):
            stats = original(*args, **options)
            return stats._replace(logprob=Scaled.apply(stats.logprob, change))

        return call

    replaced(patch, sharded, "linear_logprobs", wrap)


@fault("upstream gradient")
def upstream_gradient_dropped(patch):
    upstream(patch, lambda grad: torch.where(grad == 0, 0.0, -1 / 21))


@fault("upstream gradient")
def upstream_gradient_is_its_mean(patch):
    upstream(patch, lambda grad: torch.where(grad == 0, grad, grad.sum() / (grad != 0).sum()))


@fault("targets")
def labels_shifted_twice(patch):
    def wrap(original):
        return lambda labels, *args, **options: original(labels, *args, **options).roll(-1, -1)

    replaced(patch, head_pass, "shifted_targets", wrap)


@fault("accumulation")
def loss_scaled_under_accumulation(patch):
    def wrap(original):
        def loss(logprob, mask, *, num_items=None, **options):
            return original(logprob, mask, **options)

        return loss

    replaced(patch, one_pass, "sft_loss", wrap)


@fault("reduction")
def mean_over_all_positions(patch):
    def wrap(original):
        def loss(logprob, mask, **options):
            return original(logprob, mask, **options) * (mask.sum() / mask.numel())

        return loss

    replaced(patch, one_pass, "sft_loss", wrap)


@fault("transform", model="gemma2")
def softcap_of_another_height(patch):
    def change(hidden, weight, target, options):
        options["softcap"] = 5.0
        return hidden, weight, target

    operation(patch, change)


@fault("transform", model="granite")
def logit_scale_left_out(patch):
    def wrap(original):
        return lambda transform: original(LogitTransform(1.0, transform.softcap))

    replaced(patch, token_stats, "transform_options", wrap)


@fault("stale weight")
def weight_copied_at_first_use(patch):
    copies = []

    def change(hidden, weight, target, options):
        copies.append(copies[0] if copies else weight.detach().clone())
        live = weight - weight.detach()  # with its gradient
        return hidden, copies[0] + live, target

    operation(patch, change)


@fault("head weight")
def half_of_the_head_is_not_there(patch):
    """As where a shard is used in place of the gathered weight."""

    def change(hidden, weight, target, options):
        rows = torch.arange(len(weight))[:, None] < len(weight) // 2
        return hidden, torch.where(rows, weight, 0), target

    operation(patch, change)


@fault("head weight", model="phi")
def bias_left_out(patch):
    def change(hidden, weight, target, options):
        options["bias"] = None
        return hidden, weight, target

    operation(patch, change)


@fault("targets")
def another_ignore_index(patch):
    first = int(causal_lms.batch()["labels"][0, 5])

    def change(hidden, weight, target, options):
        return hidden, weight, target.masked_fill(target == first, -100)

    operation(patch, change)


@fault("inputs", padding="left")
def positions_of_padding(patch):
    def wrap(original):
        def call(model, forward, kwargs, *args, **options):
            kwargs = {k: v for k, v in kwargs.items() if k != "attention_mask"}
            return original(model, forward, kwargs, *args, **options)

        return call

    replaced(patch, one_pass, "head_pass", wrap)


@fault("trunk", lora=True)
def adapter_not_applied(patch):
    def wrap(original):
        def call(model, *args, **options):
            layers = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
            for layer in layers:
                layer._disable_adapters = True
            try:
                return original(model, *args, **options)
            finally:
                for layer in layers:
                    layer._disable_adapters = False

        return call

    replaced(patch, one_pass, "head_pass", wrap)


@fault("parameter gradient", model="qwen2")
def tied_gradient_counted_twice(patch):
    def change(hidden, weight, target, options):
        return hidden, Scaled.apply(weight, lambda grad: 2 * grad), target

    operation(patch, change)


@fault("head gradient")
def head_is_frozen(patch):
    operation(patch, lambda hidden, weight, target, options: (hidden, weight.detach(), target))


@fault("auxiliary loss", model="mixtral")
def auxiliary_loss_lost(patch):
    original = head_pass.LossFunction.__call__

    def call(self, *args, **options):
        value = original(self, *args, **options)
        current = head_pass._current.get()
        if current is not None and current.model is self.model and current.loss is not None:
            self.model.router_aux_loss_coef = 0.0
        return value

    patch.setattr(head_pass.LossFunction, "__call__", call)


@fault("statistics")
def entropy_in_bits(patch):
    def wrap(original):
        def call(*args, **options):
            stats = original(*args, **options)
            return stats._replace(entropy=stats.entropy / 0.6931)

        return call

    replaced(patch, sharded, "linear_logprobs", wrap)


@fault("head gradient")
def hidden_gradient_rounded(patch):
    def change(hidden, weight, target, options):
        return Scaled.apply(hidden, lambda grad: grad.bfloat16().to(grad.dtype)), weight, target

    operation(patch, change)


@contextlib.contextmanager
def planted(name):
    """The model, the batch and the stage of a fault, which is there within it."""
    plant, stage, options = FAULTS[name]
    model = causal_lms.make(options.get("model", "llama"))
    model = causal_lms.lora(model) if options.get("lora") else model
    batch = causal_lms.batch()
    if options.get("padding") == "left":
        lengths = batch["attention_mask"].sum(1)
        rolled = [
            {k: v[i].roll(12 - int(n)) for k, v in batch.items()} for i, n in enumerate(lengths)
        ]
        batch = {k: torch.stack([row[k] for row in rolled]) for k in batch}
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        yield model, batch, stage
