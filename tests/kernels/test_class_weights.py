"""Class weights, statistics and output dims of linear_cross_entropy, and torch's own samples."""

import ast
import collections
import functools
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dense
from ift_kernels import linear_cross_entropy, linear_soft_cross_entropy
from ift_kernels.schedule import plan
from refusals import assert_refused

WEIGHT = torch.arange(300) % 9 / 4 + 0.25  # exact in 16 bits


def check(h, **options):
    ours = linear_cross_entropy(*h.args, **h.kwargs, **options)
    exact = h.double()
    losses = ours, dense.cross_entropy(h, **options), dense.cross_entropy(exact, **options)
    dense.assert_as_accurate(*losses, "loss")
    up = torch.as_tensor(1.0) if ours.dim() == 0 else dense.upstream(h, ("logprob",))["logprob"]
    send = [(loss * up.to(loss.dtype)).sum() for loss in losses]
    dense.assert_gradients(dense.gradients(send[0], h.inputs), h, *send[1:], exact.inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(
    "reduction", [{}, {"num_items": 70}, {"reduction": "sum"}, {"reduction": "none"}], ids=str
)
def test_values_and_gradients(dtype, reduction, smoothing):
    h = dense.head((3, 15), 12, 300, dtype, bias=True, logit_scale=0.7, temperature=1.3)
    check(h, class_weight=WEIGHT, label_smoothing=smoothing, z_loss=1e-3, **reduction)


@pytest.mark.parametrize("schedule", plan.SCHEDULES)
def test_softcap_and_schedules(schedule):
    with plan.use_schedule(schedule):
        check(dense.head(200, 8, 300, softcap=4.0), class_weight=WEIGHT)


def test_softcap_and_smoothing():
    h = dense.head((3, 15), 12, 300, bias=True, softcap=4.0, logit_scale=0.7)
    check(h, class_weight=WEIGHT, label_smoothing=0.3, reduction="none")
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="softcap: expected None in a compiled graph"):
        compiled(*h.args, softcap=4.0, class_weight=WEIGHT, label_smoothing=0.3)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.2}], ids=str)
def test_equals_torch_as_documented(options):
    h = dense.head(40, 8, 300, torch.float64, bias=True)
    wanted = F.cross_entropy(dense.logits(h), h.target, WEIGHT.double(), **options)
    ours = linear_cross_entropy(*h.args, bias=h.bias, class_weight=WEIGHT, **options)
    torch.testing.assert_close(ours, wanted)


def test_nothing_to_learn_from_and_rows_that_are_ignored():
    h = dense.head(20, 8, 300)
    options = {"class_weight": WEIGHT, "label_smoothing": 0.1}
    h = dense.fill_rows(h, h.target == -100)
    loss = linear_cross_entropy(*h.args, **options)
    assert all(g.isfinite().all() for g in dense.gradients(loss, h.inputs))
    no_weight = options | {"class_weight": torch.zeros(300)}
    for target, more in ((torch.full_like(h.target, -100), options), (h.target, no_weight)):
        loss = linear_cross_entropy(h.hidden, h.weight, target, **more)
        assert loss == 0 and all((g == 0).all() for g in dense.gradients(loss, h.inputs))


def test_weights_of_both_signs_that_sum_to_0_have_an_infinite_mean():
    weight, target = torch.eye(2), torch.tensor([0, 1])
    signed = torch.tensor([1.0, -1.0])
    for of_logits in (torch.eye(2), 2 * torch.eye(2) + torch.tensor([[0.0, 1.0], [0.0, 0.0]])):
        loss = linear_cross_entropy(of_logits, weight, target, class_weight=signed)
        wanted = F.cross_entropy(of_logits, target, signed)
        torch.testing.assert_close(loss, wanted, equal_nan=True)
        assert not loss.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("class_weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_statistics(backend, reduction, class_weight):
    h = dense.head((4, 10), 8, 300, bias=True)
    options = {"reduction": reduction, "class_weight": class_weight, "z_loss": 1e-2}
    found = linear_cross_entropy(*h.args, bias=h.bias, return_stats=True, **options)
    stats, valid = dense.stats(h), h.target != -100
    loss = dense.cross_entropy(h, **options)
    torch.testing.assert_close(found.loss, loss)
    pairs = (dense.gradients(value.sum(), h.inputs) for value in (found.loss, loss))
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-6)
    without = dense.cross_entropy(h, **options | {"z_loss": 0.0})
    torch.testing.assert_close(found.z_loss, (loss - without).detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.entropy, stats["entropy"].detach())
    assert torch.equal(found.predicted, stats["argmax"])
    right = (stats["argmax"] == h.target)[valid].float().mean()
    torch.testing.assert_close(found.accuracy, right)
    assert not any(value.requires_grad for value in found[1:])


def test_statistics_of_no_target():
    h = dense.head(5, 8, 30, ignored=2.0)
    h.target.fill_(-100)
    found = linear_cross_entropy(*h.args, return_stats=True)
    assert all((value == 0).all() for value in found)


def test_output_dims():
    """Every option of a head with output dims is that of its heads."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 8, generator=g, requires_grad=True)
    weight = torch.randn(30, 3, 2, 8, generator=g, requires_grad=True)
    bias = torch.randn(30, 3, 2, generator=g, requires_grad=True)
    target = torch.randint(30, (2, 6, 3, 2), generator=g)
    target[0, :2] = target[1, 3, 1] = -100
    z = torch.einsum("btd,vijd->btijv", hidden, weight) + bias.movedim(0, -1)
    options = {"class_weight": WEIGHT[:30], "label_smoothing": 0.1}
    for reduction in ("mean", "sum", "none"):
        found = linear_cross_entropy(
            hidden, weight, target, bias=bias, reduction=reduction, return_stats=True, **options
        )
        wanted = F.cross_entropy(
            z.flatten(0, 3), target.flatten(), WEIGHT[:30], label_smoothing=0.1, reduction=reduction
        )
        torch.testing.assert_close(found.loss.flatten(), wanted.view(-1))
        of_both = (
            torch.autograd.grad(loss.sum(), (hidden, weight, bias), retain_graph=True)
            for loss in (found.loss, wanted)
        )
        torch.testing.assert_close(*of_both)
        assert found.predicted.shape == found.entropy.shape == target.shape
        valid = target != -100
        right = (z.argmax(-1) == target)[valid].float().mean()
        torch.testing.assert_close(found.accuracy, right)


def test_output_dims_of_no_tokens():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(30, 3, 8)
    for reduction, shape in (("mean", ()), ("none", (0, 3))):
        loss = linear_cross_entropy(
            hidden, weight, torch.zeros(0, 3).long(), reduction=reduction, return_stats=True
        ).loss
        assert loss.shape == shape and loss.sum() == 0
        loss.sum().backward()


class Sample:
    """A placeholder for torch's SampleInput."""

    def __init__(self, tensor, *args, **kwargs):
        self.input, self.args, self.kwargs = tensor, args, kwargs


def samples_of_torch():
    """Torch's functions that make samples, from its source: to import it takes many seconds, a
    package that is not installed with torch, and sets flags of the process."""
    folder = Path(torch.__file__).parent / "testing" / "_internal"
    source = (folder / "common_methods_invocations.py").read_text(encoding="utf-8")
    names = {
        "itertools": itertools, "partial": functools.partial, "random": random, "Any": Any,
        "torch": torch, "make_tensor": torch.testing.make_tensor, "SampleInput": Sample,
    }  # fmt: skip
    wanted = ("linear", "linear_cross_entropy")
    found = [
        ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and node.name in [f"sample_inputs_{name}" for name in wanted]
    ]
    assert len(found) == 2
    exec("\n\n".join(found), names)
    for chunked, chunked_none in ((False, False), (True, False), (True, True)):
        yield from names["sample_inputs_linear_cross_entropy"](
            None, "cpu", torch.float64, True, chunked=chunked, chunked_none=chunked_none
        )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13")
def test_samples_of_torch():
    """Values and gradients of hidden, weight and bias of every sample that F.linear_cross_entropy
    has, in any combination of its options.

    Not in scope: `options`, which say how torch splits its own work; the gradient of dense
    probabilities, which a function gives as constants; samples that torch expects errors of, whose
    texts are its own.
    """
    kinds, seen = collections.Counter(), set()
    for sample in samples_of_torch():
        (weight, target), options = sample.args, dict(sample.kwargs)
        # A chunked sample says the same of its result, but not of probabilities: it warns.
        chunked = options.pop("options", None) is not None
        kind = ("soft" if target.is_floating_point() else "ids", weight.dim() > 2)
        if chunked and kind != ("ids", False):
            continue
        of_options = (*sorted(options), options.get("reduction"), sample.input.dim())
        if (kind, of_options) in seen and weight.dim() == 2:  # another size
            continue
        seen.add((kind, of_options))
        kinds[kind] += 1
        wanted = F.linear_cross_entropy(sample.input, weight, target, **options)
        bias, class_weight = options.pop("linear_bias", None), options.pop("weight", None)
        given = {"bias": bias, "class_weight": class_weight, **options}
        if kind == ("ids", weight.dim() > 2):
            ours = linear_cross_entropy(sample.input, weight, target, **given)
        else:
            q = target.detach()
            q = q.movedim(1, -1) if weight.dim() > 2 else q  # torch's classes are dimension 1
            given["probs"] = lambda start, stop, q=q: q[..., start:stop]
            ours = linear_soft_cross_entropy(sample.input, weight, **given)
        torch.testing.assert_close(ours, wanted)
        inputs = [t for t in (sample.input, weight, bias) if t is not None]
        of_both = (torch.autograd.grad(loss.sum(), inputs) for loss in (ours, wanted))
        torch.testing.assert_close(*of_both)
    assert len(kinds) == 4 and min(kinds.values()) > 5, kinds


def test_compiles():
    h = dense.head(9, 8, 300, bias=True)

    def loss(hidden, weight):
        return linear_cross_entropy(
            hidden, weight, h.target, class_weight=WEIGHT, label_smoothing=0.1, reduction="none"
        )

    dense.assert_compiles(loss, h.hidden, h.weight)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"class_weight": torch.ones(29)}, ValueError, r"expected shape \(V,\) with V=30"),
        ({"class_weight": torch.ones(30).long()}, TypeError, "expected a floating point tensor"),
        ({"class_weight": [1.0] * 30}, TypeError, "expected a floating point tensor, got list"),
        ({"class_weight": torch.ones(30).requires_grad_()}, ValueError, "expected .* without grad"),
        (
            {"deterministic": True, "class_weight": torch.ones(30), "label_smoothing": 0.1},
            ValueError, "expected False with label_smoothing",
        ),
        ({"return_stats": 1}, TypeError, "expected True or False"),
        ({"bias": torch.ones(30), "weight": torch.ones(30, 2, 8)}, ValueError, "expected shape"),
        ({"target": torch.ones(5).long(), "weight": torch.ones(30, 2, 8)}, ValueError, "expected"),
        ({"weight": torch.ones(30, 0, 8)}, ValueError, "expected no dimension of size 0"),
    ],
)  # fmt: skip
def test_refusals(options, error, said):
    of_head = {"hidden": torch.randn(5, 8), "weight": torch.randn(30, 8)}
    target = torch.zeros(options.get("weight", of_head["weight"]).shape[1:-1].numel() * 5).long()
    if options.get("weight") is not None and options["weight"].dim() == 3:
        target = target.view(5, -1)
    assert_refused(linear_cross_entropy, options, error, said, **of_head | {"target": target})
