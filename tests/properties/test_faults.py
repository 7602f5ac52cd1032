"""A mistake in any feature of the cross-entropies and of the best ids is found by the first few
hundred calls that are drawn."""

import math
import sys

import pytest
import torch

import ift_kernels
from ift_kernels import class_targets
from ift_kernels.schedule import dense_targets
from tests.properties import harness
from tests.properties.cases import sample

CALLS = 300
CLASSES, SOFT, TOPK = "linear_cross_entropy", "linear_soft_cross_entropy", "linear_topk"
topk_module = sys.modules["ift_kernels.linear_topk"]


def wrapped(owner, name, change):
    """Where to put `change(real, *args, **kwargs)`."""
    real = getattr(owner, name)
    return owner, name, lambda *args, **kwargs: change(real, *args, **kwargs)


def with_stats(change):
    """Another result with `return_stats`."""

    def call(real, *args, **kwargs):
        found = real(*args, **kwargs)
        return found._replace(**change(found)) if kwargs["return_stats"] else found

    return lambda: wrapped(ift_kernels, CLASSES, call)


def soft(change):
    """Other arguments."""

    def call(real, hidden, weight, *, probs, ids=None, **kwargs):
        given = {"probs": probs, "ids": ids, **kwargs}
        return real(hidden, weight, **given | change(given))

    return lambda: wrapped(ift_kernels, SOFT, call)


def first_chunk(given):
    """Probabilities of the first columns for every chunk."""
    return {"probs": lambda start, stop: given["probs"](0, stop - start)}


def reversed_biases(real, hidden, weight, bias):
    heads, biases = real(hidden, weight, bias)
    return heads, biases[::-1]


def shorter(real, logit, ids, lse, k, top_p, *rest):
    return real(logit, ids, lse, k, 0.9 * top_p, *rest)


def weighted(o):
    return o["class_weight"] is not None


def smoothed(o):
    return weighted(o) and o["label_smoothing"] > 0


def mean(o):
    return weighted(o) and o["reduction"] == "mean" and o["num_items"] is None


def stats(o):
    return o["return_stats"]


def of_ids(o):
    return o["of"] == "ids"


def of_function(o):
    return o["of"] == "function"


# What each concerns: options of a call, and where the mistake is.
FAULTS = {
    "class weight of another id": (
        CLASSES, weighted,
        lambda: wrapped(
            class_targets, "weight_of_targets", lambda f, w, *rest: f(w.roll(1), *rest)
        ),
    ),
    "smoothing without class weights": (
        CLASSES, smoothed,
        lambda: wrapped(
            class_targets, "uniform_loss",
            lambda f, h, w, b, class_weight, *rest: f(h, w, b, None, *rest),
        ),
    ),
    "smoothing without softcap": (
        CLASSES, smoothed,
        lambda: wrapped(
            class_targets, "uniform_loss",
            lambda f, *rest: f(*rest[:-1], rest[-1]._replace(softcap=0.0)),
        ),
    ),
    "mean over tokens, not weights": (
        CLASSES, mean,
        lambda: wrapped(
            class_targets.LossOptions, "factor", lambda f, self, counted: f(self, counted > 0)
        ),
    ),
    "bias of another output": (
        CLASSES, lambda o: len(o["dims"]) > 0,
        lambda: wrapped(class_targets, "heads_of", reversed_biases),
    ),
    "ignored targets are accurate": (
        CLASSES, stats,
        lambda: wrapped(class_targets, "accuracy", lambda f, p, t, valid: f(p, t, valid | True)),
    ),
    "entropy": (
        CLASSES, stats, with_stats(lambda found: {"entropy": found.entropy * 1.0001})
    ),
    "predicted": (
        CLASSES, stats, with_stats(lambda found: {"predicted": found.predicted.clamp(max=9)})
    ),
    "z-loss of the statistics": (
        CLASSES, stats, with_stats(lambda found: {"z_loss": found.z_loss * 1.001})
    ),
    "another chunk": (SOFT, of_function, soft(first_chunk)),
    "no z-loss, function": (SOFT, of_function, soft(lambda _: {"z_loss": 0.0})),
    "no smoothing, function": (SOFT, of_function, soft(lambda _: {"label_smoothing": 0.0})),
    "upstream gradient of a function": (
        SOFT, of_function,
        lambda: wrapped(
            dense_targets.DenseTargets, "gradients",
            lambda f, self, norm, d_cross, *rest: f(self, norm, d_cross * 1.001, *rest),
        ),
    ),
    "sum of the probabilities": (
        SOFT, of_function,
        lambda: wrapped(
            dense_targets.DenseTargets, "values",
            lambda f, self: f(self)._replace(total=torch.ones_like(f(self).total)),
        ),
    ),
    "no class weights, ids": (SOFT, of_ids, soft(lambda _: {"class_weight": None})),
    "no mask, ids": (SOFT, of_ids, soft(lambda _: {"mask": None})),
    "probabilities of ids": (SOFT, of_ids, soft(lambda given: {"probs": 1.01 * given["probs"]})),
    "nucleus": (
        TOPK, lambda o: o["top_p"] is not None, lambda: wrapped(topk_module, "nucleus", shorter)
    ),
    "truncated": (
        TOPK, lambda o: o["top_p"] is not None,
        lambda: wrapped(
            ift_kernels, TOPK,
            lambda f, *args, **kw: (found := f(*args, **kw))._replace(
                truncated=found.ids[..., -1] >= 0
            ),
        ),
    ),
    "logprob of the next id": (
        TOPK, lambda o: o["k"] > 1,
        lambda: wrapped(
            ift_kernels, TOPK,
            lambda f, *args, **kw: (found := f(*args, **kw))._replace(
                logprob=found.logprob.roll(1, -1)
            ),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, monkeypatch):
    operation, concerns, fault = FAULTS[name]
    monkeypatch.setattr(*fault())
    for call in sample(operation, CALLS):
        small = math.prod(call.shape) * call.vocabulary < 5_000
        if not concerns(call.options) or small == (name == "another chunk"):
            continue
        try:
            harness.check(call)
        except AssertionError:
            return
    pytest.fail(f"not found in {CALLS} calls")
