"""Bounds of sets of ids: a set is a head of its own ids, with one more column for all others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ift.numerics import bounds, oracle
from ift.numerics.bounds import ARITHMETIC, SUMMED, Head


def _set(h: Head, ids: Tensor) -> Head:
    """The head of the ids alone, (N, K)."""
    there = ids != oracle.IGNORE_INDEX
    at = torch.where(there, ids, 0)
    z, error, slope, slope_error = (
        value.gather(-1, at) for value in (h.z, h.error, h.slope, h.slope_error)
    )
    # A row without ids is a row of zeros, of which nothing is taken.
    z = z.masked_fill(~there, -torch.inf).masked_fill(~there.any(-1, keepdim=True), 0.0)
    return Head(z, error.masked_fill(~there, 0.0), slope, slope_error, h.units)


def _outside(h: Head, ids: Tensor) -> Tensor:
    """(N, V) bool."""
    there = ids != oracle.IGNORE_INDEX
    at = torch.where(there, ids, 0)
    return torch.zeros_like(h.z).scatter_add(-1, at, there.to(h.z)) == 0


def _rest(h: Head, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) log-sum-exp of all other ids, and its error."""
    z = h.z.masked_fill(~_outside(h, ids), -torch.inf)
    rest = z.logsumexp(-1)
    moved = (z + h.error).logsumexp(-1) - rest
    # In place of the set a softcap leaves the lowest logit, which is subtracted.
    unit, count = h.units.sum, (ids != oracle.IGNORE_INDEX).sum(-1)
    share = 1 + count / (h.z.shape[1] - count).clamp(min=1)
    moved = moved + unit * share * (ARITHMETIC + min(h.z.shape[1], SUMMED))
    finite = rest.isfinite()
    return rest, torch.where(finite, moved, 0.0)


def _whole(h: Head, ids: Tensor) -> Head:
    """The set and one column for the rest, (N, K + 1)."""
    few, (rest, error) = _set(h, ids), _rest(h, ids)
    there = (ids != oracle.IGNORE_INDEX).any(-1)
    z = torch.cat([few.z, rest.where(there, 0.0)[:, None]], -1)
    error = torch.cat([few.error, error[:, None]], -1)
    return Head(z, error, torch.ones_like(z), torch.zeros_like(z), h.units)


def selected(h: Head, ids: Tensor) -> dict[str, Tensor]:
    """Of every output of `linear_selected_logprobs`."""
    there, unit = ids != oracle.IGNORE_INDEX, h.units.sum
    few, whole, count = _set(h, ids), _whole(h, ids), ids.shape[1]

    def of_columns(head: Head, columns: int) -> Tensor:
        places = torch.arange(columns)[:, None].expand(-1, len(ids))
        return torch.stack([head.logprob_error(place) for place in places], -1)

    per_column = of_columns(whole, count + 1)
    found = {"logprob": per_column[:, :-1], "in_set_logprob": of_columns(few, count)}
    found = {name: torch.where(there, value, 0) for name, value in found.items()}
    each = {"tail_logprob": per_column[:, -1]}
    for name, head in (("lse", whole), ("in_set_lse", few)):
        size = 1 + head.z.logsumexp(-1).abs()
        each[name] = head.lse_error + head.sum_error + ARITHMETIC * unit * size
    valid = there.any(-1)
    if unit == bounds.FP64:  # the exact tail is rounded as well, in two steps
        size = 1 + h.z.abs().amax(-1) + h.z.logsumexp(-1).abs()
        each["tail_logprob"] = each["tail_logprob"] + ARITHMETIC * unit * size
    return found | {name: torch.where(valid, value, 0) for name, value in each.items()}


def selected_dlogits(h: Head, ids: Tensor, upstream: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(N, V) gradients of the logits for `upstream` into the outputs, and their errors."""
    there, count = ids != oracle.IGNORE_INDEX, ids.shape[1]
    at, valid = torch.where(there, ids, 0), there.any(-1)
    few, whole = _set(h, ids), _whole(h, ids)
    zero = torch.zeros_like(h.z[:, 0])

    def given(name: str, like: Tensor) -> Tensor:
        value = upstream.get(name)
        return (
            torch.zeros_like(like)
            if value is None
            else torch.where(there if like.dim() > 1 else valid, value, 0)
        )

    def added(head: Head, per_column: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        gradient, error = bounds.dlogits(head, zero.long(), {"lse": lse})
        for column in range(per_column.shape[1]):
            place = torch.full_like(zero, column).long()
            more = bounds.dlogits(head, place, {"logprob": per_column[:, column]})
            gradient, error = gradient + more[0], error + more[1]
        return gradient, error

    like = torch.zeros_like(few.z)
    a = torch.cat([given("logprob", like), given("tail_logprob", zero)[:, None]], -1)
    gradient, error = added(whole, a, given("lse", zero))
    in_set, in_set_error = added(few, given("in_set_logprob", like), given("in_set_lse", zero))
    rest, rest_error = _rest(h, ids)
    share = torch.where(_outside(h, ids), h.z - rest.where(valid, 0.0)[:, None], -torch.inf).exp()
    relative = torch.expm1(h.error + rest_error[:, None]) + h.units.sum * (
        ARITHMETIC + share.log().abs().nan_to_num(0.0, 0.0, 0.0)
    )
    of_rest, of_rest_error = gradient[:, count:], error[:, count:]
    dz = of_rest * share
    dz_error = (
        of_rest_error * share * (1 + relative)
        + of_rest.abs() * share * relative
        + torch.where(share > 0, 2.0**-126, 0.0)
    )
    for value, total in (
        (gradient[:, :count] + in_set, dz),
        (error[:, :count] + in_set_error, dz_error),
    ):
        total.scatter_add_(-1, at, torch.where(there, value, 0))
    # What it is compared with has 1 - p of the tail by a difference, in fp64.
    sizes = sum((v.abs() if v.dim() == 1 else v.abs().sum(-1) for v in upstream.values()), zero)
    dz_error = dz_error + ARITHMETIC * bounds.FP64 * sizes[:, None]
    return torch.where(valid[:, None], dz, 0), torch.where(valid[:, None], dz_error, 0)


def may_be_top(h: Head, ids: Tensor) -> Tensor:
    """(N, K) bool: whether the logits may be rounded such that `ids` are the best, in order."""
    at, count = ids.clamp(min=0), ids.shape[1]
    own, own_error = h.z.gather(-1, at), h.error.gather(-1, at)
    least = (h.z - h.error).topk(count).values
    most = (h.z + h.error).topk(count).values
    return (own + own_error >= least) & (own - own_error <= most)


def nucleus(h: Head, count: int, top_p: float | None, min_p: float | None) -> tuple[Tensor, Tensor]:
    """(N, count) bool of places: in the nucleus however logits are rounded; in it in no case."""
    best = h.z.topk(count).values
    within, outside = best > -torch.inf, best == -torch.inf
    if top_p is not None and top_p < 1:
        p, error = (x.topk(count).values for x in (h.z.softmax(-1), h.probability_error()))
        before, error = p.cumsum(-1) - p, error.cumsum(-1) - error
        error = error + ARITHMETIC * bounds.FP64
        within &= before + error < top_p
        outside |= before - error >= top_p
    if min_p:
        least, most = ((h.z + sign * h.error).topk(count).values for sign in (-1, 1))
        gap, slack = math.log(min_p), ARITHMETIC * h.units.sum
        within &= least - most[:, :1] >= gap + slack
        outside |= most - least[:, :1] < gap - slack
    return within, outside
