"""Calls of the cross-entropies against classes and probabilities, and of their heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ift_kernels
from ift.numerics import bounds, bounds_selected, oracle
from ift.numerics import bounds_cross_entropy as bounds_of
from ift.numerics.calls import (
    Call,
    Check,
    Tensors,
    among,
    gradients,
    gradients_within,
    ids_of,
    laid_out,
    of_a_part,
    tensors,
    upstream,
)


class Heads(NamedTuple):
    """The tensors of a call, those of each head, and the positions (N, H) of all of them."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, d1, ..., dK, D)
    bias: Tensor | None
    target: Tensor  # (..., d1, ..., dK)
    valid: Tensor
    each: list[Tensors]  # H of one hidden
    bounds: list[bounds.Head]

    def flat(self, t: Tensor) -> Tensor:
        """(N, H, ...) of a tensor (..., d1, ..., dK, ...), on the CPU."""
        start = self.target.dim()
        rows = math.prod(self.hidden.shape[:-1])
        return t.reshape(rows, len(self.each), *t.shape[start:]).cpu()

    @property
    def given(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def leaves(self) -> list[list[Tensor]]:
        """The exact tensors of each of `given`."""
        others = zip(*(t.exact[1:] for t in self.each), strict=True)
        return [[self.each[0].exact[0]], *map(list, others)]


def heads(call: Call) -> Heads:
    """Of a head with output dims, which has others for the same hidden states, or without."""
    dims = call.options["dims"]
    first = tensors(call)
    each = [first]
    for at in range(1, math.prod(dims)):
        other = tensors(replace(call, seed=call.seed + 7000 * at))
        exact = [first.exact[0], *other.exact[1:]]
        each.append(other._replace(hidden=first.hidden, exact=exact))
    weight, bias, target, valid = first.weight, first.bias, first.target, first.valid
    if dims:

        def stacked(parts: list[Tensor], at: int) -> Tensor:
            whole = torch.stack([part.detach() for part in parts], at)
            return whole.view(*whole.shape[:at], *dims, *whole.shape[at:][1:])

        weight = laid_out(stacked([t.weight for t in each], 1), call.layouts[1])
        weight.requires_grad_("weight" in call.needs)
        if bias is not None:
            bias = stacked([t.bias for t in each if t.bias is not None], 1)
            bias.requires_grad_("bias" in call.needs)
        target, valid = (
            stacked([getattr(t, name) for t in each], len(call.shape))
            for name in ("target", "valid")
        )
    of_each = [t.head(call.transform) for t in each]
    return Heads(first.hidden, weight, bias, target, valid, each, of_each)


class Learned(NamedTuple):
    """Probabilities of ids, which have gradients, also those that are 0."""

    probs: Tensor  # (..., d1, ..., dK, K)
    exact: Tensor  # (N, H, K) derivatives of the losses
    errors: Tensor  # (N, H, K)
    units: bounds.Units

    def check(self, ours: Tensor, gradient: Tensor, g: Tensor) -> Check:
        """Where `gradient` goes into our loss, and so g (N, H) into the losses."""
        (found,) = torch.autograd.grad(
            ours, self.probs, gradient.to(ours.device), retain_graph=True
        )
        wanted = g[..., None] * self.exact
        rounding = self.units.result + bounds.ARITHMETIC * self.units.sum
        bound = g.abs()[..., None] * self.errors + rounding * wanted.abs() + self.units.underflow
        bound = bound.masked_fill(wanted.abs() > self.units.largest / 2, math.inf)
        return Check("d probs", found.reshape(wanted.shape), wanted, bound)


def class_weights(call: Call) -> Tensor | None:
    """(V,) quarters, exact in 16 bits; None where the call has none."""
    kind = call.options["class_weight"]
    if kind is None:
        return None
    g = torch.Generator().manual_seed(call.seed + 11)
    found = torch.randint(9, (call.vocabulary,), generator=g) / 4
    found = found + 0.25 if kind == "positive" else found
    return found.to(call.device, torch.float64 if call.dtype == "float64" else torch.float32)


def cross_entropy(call: Call) -> list[Check]:
    """Of `linear_cross_entropy`."""
    h, options, weights = heads(call), dict(call.options), class_weights(call)
    options.pop("dims")
    options["class_weight"] = weights
    ignore, target = options["ignore_index"], h.target

    def loss(hidden: Tensor, target: Tensor) -> Any:
        return ift_kernels.linear_cross_entropy(
            hidden, h.weight, target, bias=h.bias, workspace=call.workspace, **options,
            **call.transform, **call.numerics, **h.each[0].adapter.arguments,
        )  # fmt: skip

    target = torch.where(h.valid, target, ignore)
    found = loss(h.hidden, target)
    ours = found.loss if options["return_stats"] else found
    ids, valid = h.flat(h.target), h.flat(h.valid)
    exact_weights = None if weights is None else weights.cpu().double()
    parts = {
        "label_smoothing": options["label_smoothing"],
        "z_loss": options["z_loss"],
        "class_weight": exact_weights,
    }
    counted = valid if exact_weights is None else torch.where(valid, exact_weights[ids], 0)
    each, allowed = [], []
    for at, (t, head) in enumerate(zip(h.each, h.bounds, strict=True)):
        there, of = valid[:, at], ids[:, at]
        z = t.logits(call.transform)
        each.append(
            oracle.cross_entropy(
                z, torch.where(there, of, ignore), ignore_index=ignore, reduction="none", **parts
            )
        )
        allowed.append(bounds_of.classes(head, of, there, _products(call, t), **parts))
    exact, bound = torch.stack(each, -1), torch.stack(allowed, -1)

    def dlogits(at: int, g: Tensor) -> bounds_of.Dlogits:
        return bounds_of.classes_dlogits(h.bounds[at], ids[:, at], g, **parts)

    checks = _of_stats(call, h, found, counted) if options["return_stats"] else []
    if options["reduction"] == "none" and len(h.each) == 1:

        def part(hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
            some = loss(hidden, target.reshape(-1)[rows.to(hidden.device)])
            return {"loss": some.loss if options["return_stats"] else some}

        checks += of_a_part(call, h.hidden, part, {"loss": ours})
    return checks + _of_loss(call, h, ours, exact, bound, counted, dlogits)


def _of_stats(
    call: Call, h: Heads, found: ift_kernels.CrossEntropyStats, counted: Tensor
) -> list[Check]:
    """Of everything but the loss."""
    ids, valid = h.flat(h.target), h.flat(h.valid)
    predicted, entropy = h.flat(found.predicted), h.flat(found.entropy)
    assert not any(value.requires_grad for value in found[1:])
    right = ((predicted == ids) & valid).sum() / valid.sum().clamp(min=1)
    checks = [Check("accuracy", found.accuracy, right.double(), torch.tensor(bounds.FP32))]
    lse, error = [], []
    for at, head in enumerate(h.bounds):
        there, mine = valid[:, at], predicted[:, at]
        fits = bounds.may_be_best(head, mine)
        checks.append(among("predicted", torch.where(there, fits, mine == 0)))
        exact = oracle.statistics(head.z, torch.where(there, ids[:, at], oracle.IGNORE_INDEX))
        allowed = bounds.statistics(head, ids[:, at], there)
        checks.append(Check("entropy", entropy[:, at], exact["entropy"], allowed["entropy"]))
        lse.append(exact["lse"])
        error.append(bounds_of.squared(exact["lse"], allowed["lse"], call.options["z_loss"]))
    each = call.options["z_loss"] * torch.stack(lse, -1).square()
    value, bound, _ = _reduced(call, h, each, torch.stack(error, -1), counted)
    return [*checks, Check("z_loss", found.z_loss.reshape(value.shape), value, bound)]


def soft_cross_entropy(call: Call) -> list[Check]:
    """Of `linear_soft_cross_entropy`, of probabilities that a function gives or of some ids."""
    h, options, weights = heads(call), call.options, class_weights(call)
    some = {name: options[name] for name in ("label_smoothing", "z_loss")}
    smoothing, z_loss = some["label_smoothing"], some["z_loss"]
    exact_weights = torch.ones(call.vocabulary) if weights is None else weights.cpu()
    exact_weights, valid = exact_weights.double(), h.flat(h.valid)
    g, rows = torch.Generator().manual_seed(call.seed + 13), len(valid)
    q = torch.randn(rows, len(h.each), call.vocabulary, generator=g).mul(2).softmax(-1)
    q = torch.where(torch.rand(q.shape, generator=g) < 0.2, 0, q)
    # 0 of forbidden tokens: others have an infinite loss, as in torch.
    q = torch.where(torch.stack([head.z for head in h.bounds], 1) > -torch.inf, q, 0)
    q = q.to(getattr(torch, call.dtype))
    exact = {
        "class_weight": None if weights is None else exact_weights, "reduction": "none", **some
    }  # fmt: skip
    ids = learned = None
    if options["of"] == "ids":
        every = torch.ones(rows, dtype=torch.bool)
        # Some pad; those of masked tokens do not, which the mask alone leaves out.
        given_ids = torch.stack([ids_of(call, head.z, every) for head in h.bounds], 1)
        ids = given_ids.masked_fill(~valid[..., None], oracle.IGNORE_INDEX)
        valid = (ids >= 0).any(-1)
        q = q.gather(-1, ids.clamp(min=0))
        given_ids = given_ids.view(*h.target.shape, q.shape[-1]).to(call.device)
    probs = q.to(call.device).view(*h.target.shape, q.shape[-1])
    given: dict[str, Any] = {"probs": lambda start, stop: probs[..., start:stop]}
    if ids is not None:
        given = {"probs": probs.requires_grad_(), "ids": given_ids}
    ours = ift_kernels.linear_soft_cross_entropy(
        h.hidden, h.weight, **given, mask=h.valid, bias=h.bias, class_weight=weights,
        workspace=call.workspace, reduction=options["reduction"], num_items=options["num_items"],
        **some, **call.transform, **call.numerics,
    )  # fmt: skip
    weighted, each, allowed, logprobs, logprob_errors = [], [], [], [], []
    for at, (t, head) in enumerate(zip(h.each, h.bounds, strict=True)):
        if ids is not None:
            of, there = ids[:, at], ids[:, at] >= 0
            kept = torch.where(there, q[:, at].double(), 0)
            whole = torch.zeros_like(head.z).scatter_add(-1, of.clamp(min=0), kept)
            weighted.append(kept * exact_weights[of.clamp(min=0)])
            logprobs.append(oracle.selected(head.z, of)["logprob"])
            logprob_errors.append(bounds_selected.selected(head, of)["logprob"])
            products = _products(call, t)
            bound = bounds_of.ids(head, of, weighted[at], exact_weights, products, **some)
        else:
            whole = q[:, at].double()
            uniform = smoothing / call.vocabulary
            weighted.append(((1 - smoothing) * whole + uniform) * exact_weights)
            bound = bounds_of.probabilities(head, weighted[at], z_loss)
        z = t.logits(call.transform)
        each.append(oracle.soft_cross_entropy(z, whole, valid[:, at], **exact))
        allowed.append(torch.where(valid[:, at], bound, 0))

    def dlogits(at: int, g: Tensor) -> bounds_of.Dlogits:
        if ids is None:
            return bounds_of.probabilities_dlogits(h.bounds[at], weighted[at], g, z_loss)
        of = h.bounds[at], ids[:, at], weighted[at], exact_weights
        return bounds_of.ids_dlogits(*of, g, **some)

    if ids is not None:
        factor = (1 - smoothing) * exact_weights[ids.clamp(min=0)]
        exact_slopes, errors = torch.stack(logprobs, 1), torch.stack(logprob_errors, 1)
        learned = Learned(probs, -factor * exact_slopes, factor * errors, h.bounds[0].units)
    return _of_loss(
        call, h, ours, torch.stack(each, -1), torch.stack(allowed, -1), valid, dlogits, learned
    )


def _of_loss(
    call: Call,
    h: Heads,
    ours: Tensor,
    each: Tensor,  # (N, H) exact losses
    bound: Tensor,  # (N, H)
    counted: Tensor,  # (N, H) bool or weights, of a mean
    dlogits: Callable[[int, Tensor], bounds_of.Dlogits],
    probs: Learned | None = None,
) -> list[Check]:
    """Of a loss and its gradients.

    Args:
        dlogits: of a head, for the gradients (N,) into its losses.
    """
    exact, bound, factor = _reduced(call, h, each, bound, counted)
    checks = [Check("loss", ours.reshape(exact.shape), exact.detach(), bound)]
    gradient = upstream(call, 0, ours.shape)
    if gradient is None:
        return checks
    valid = h.flat(h.valid) if counted.is_floating_point() else counted
    g = gradient.double().reshape(-1, 1 if ours.dim() == 0 else len(h.each)).expand(each.shape)
    g = torch.where(valid, g * factor, 0)
    sent = [(ours, exact, gradient)]
    if probs is not None:
        checks.append(probs.check(ours, gradient, g))
    dz = [dlogits(at, g[:, at]) for at in range(len(h.each))]
    if call.adapter:
        return checks + gradients(call, h.each[0], h.bounds[0], sent, dz[0])
    return checks + gradients_within(call, h.given, h.leaves, sent, _gradients(h, dz))


def _reduced(
    call: Call, h: Heads, each: Tensor, bound: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N, H) and their bounds under the reduction, and what it multiplies a sum by."""
    reduction = call.options["reduction"], call.options["num_items"]
    size, unit = each.detach().abs(), h.bounds[0].units.sum
    bound = bound + bounds.ARITHMETIC * unit * size
    exact = oracle.reduced(each, counted, *reduction)
    if reduction[0] == "none":
        return exact, bound, torch.ones(())
    factor = oracle.reduced(torch.ones(1).double(), counted, *reduction)
    total = (bounds.products_unit(each.numel(), unit) + bounds.ARITHMETIC * unit) * size.sum()
    return exact, factor * (bound.sum() + total), factor


def _gradients(h: Heads, dz: list[bounds_of.Dlogits]) -> bounds.Gradients:
    """Of all heads: weight (V, H, D), bias (V, H), and of hidden the sum over them."""
    each = [
        bounds.gradients(head, t.exact[0].detach(), t.exact[1].detach(), *one)
        for t, head, one in zip(h.each, h.bounds, dz, strict=True)
    ]
    if len(each) == 1:
        return each[0]
    sizes = [
        (one.size * head.slope.abs()) @ t.exact[1].detach().abs()
        for t, head, one in zip(h.each, h.bounds, dz, strict=True)
    ]
    added = (len(each) - 1) * h.bounds[0].units.result * torch.stack(sizes).sum(0)
    hidden, weight, bias = (torch.stack(parts, 1) for parts in zip(*each, strict=True))
    return bounds.Gradients(hidden.sum(1) + added, weight, bias)


def _products(call: Call, t: Tensors) -> Tensor | None:
    """(N, V) Σ |h·w|, in units of logits; None with a softcap."""
    if call.transform.get("softcap"):
        return None
    hidden, weight = (x.detach().abs() for x in t.exact[:2])
    scale = call.transform.get("logit_scale", 1.0) / call.transform.get("temperature", 1.0)
    products: Tensor = abs(scale) * (hidden @ weight.T)
    return products
