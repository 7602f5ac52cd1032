"""Calls of the operations on a head: their random tensors, and the checks of their results.

`operations` has a function for each operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ift.numerics import adapters, bounds, inputs, oracle

DIFFERENTIABLE = ("logprob", "lse", "entropy", "mean_logit", "target_logit")
LAYOUTS = ("contiguous", "transposed", "strided", "part")
UPSTREAM = ("normal", "sparse", "small", "large", "zero", "absent")


@dataclass(frozen=True)
class Call:
    """One call with random tensors; its `repr` says all of it."""

    operation: str
    backend: str = "reference"
    schedule: str | None = None
    dtype: str = "float32"
    weight_dtype: str | None = None  # None: that of hidden
    kind: str = "ordinary"  # of the inputs
    shape: tuple[int, ...] = (5,)
    width: int = 4
    vocabulary: int = 7
    seed: int = 0
    bias: bool = False
    needs: tuple[str, ...] = ("hidden", "weight", "bias")  # what requires gradients
    layouts: tuple[str, ...] = ("contiguous",) * 3  # of hidden, weight and upstream gradients
    masked: float = 0.2  # share of tokens that are ignored or off the mask
    upstream: tuple[str, ...] = ("normal",) * len(DIFFERENTIABLE)
    transform: dict[str, Any] = field(default_factory=dict)
    numerics: dict[str, Any] = field(default_factory=dict)  # logits_dtype, deterministic
    workspace: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the operation alone
    device: str = "cpu"
    adapter: str | None = None  # "low_rank", "column_scale" or "both"


class Check(NamedTuple):
    """One result of a call beside what it has to be."""

    name: str
    ours: Tensor
    exact: Tensor
    bound: Tensor

    def share(self) -> float:
        """The largest error, in shares of its bound; infinite for NaN and for a wrong shape."""
        if self.ours.shape != self.exact.shape:
            return math.inf
        ours = self.ours.detach().cpu().double()
        error = torch.where(ours == self.exact, 0, (ours - self.exact).abs())  # infinities
        shares = torch.where(error == 0, 0, error / self.bound)
        shares = torch.where(self.bound == torch.inf, 0, shares)
        return float(shares.nan_to_num(nan=math.inf).amax()) if shares.numel() else 0.0


Sent = tuple[Tensor, Tensor, Tensor]  # a result of ours, the exact one, the gradient into them


class Tensors(NamedTuple):
    """What an operation is called with, and the same numbers flat, in fp64, on the CPU."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None
    target: Tensor  # (...) an id everywhere
    valid: Tensor  # (...) bool
    exact: list[Tensor]  # hidden, weight and perhaps bias
    units: bounds.Units
    adapter: adapters.Adapter = adapters.Adapter()

    @property
    def names(self) -> tuple[str, ...]:
        return ("hidden", "weight", "bias")[: len(self.exact)]

    @property
    def given(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def learns(self) -> bool:
        return any(t.requires_grad for t in (*self.given, *self.adapter.given.values()))

    def logits(self, transform: dict[str, Any]) -> Tensor:
        hidden, weight = self.adapter.joined(*self.exact[:2])
        return oracle.logits(hidden, weight, *self.exact[2:], **transform)

    def head(self, transform: dict[str, Any]) -> bounds.Head:
        hidden, weight, *bias = (t.detach() for t in self.exact)
        joined, scaled = (t.detach() for t in self.adapter.joined(hidden, weight))
        return bounds.head(
            joined, scaled, bias[0] if bias else None, self.units,
            rounded=self.adapter.rounded(hidden, weight, self.units), **transform,
        )  # fmt: skip


def tensors(call: Call, teacher: bool = False) -> Tensors:
    """The tensors of a call, or of its teacher."""
    rows, seed = math.prod(call.shape), call.seed + (1000 if teacher else 0)
    width = call.width + 3 * teacher
    made = inputs.make(call.kind, rows, width, call.vocabulary, bias=call.bias, seed=seed)
    if teacher and call.kind == "masked":  # both forbid the same tokens
        made = made._replace(bias=tensors(call).exact[2].detach())
    dtype = getattr(torch, call.dtype)
    weight_dtype = getattr(torch, call.weight_dtype or call.dtype)
    # Products of fp16 end at 65504.
    shrink = 0.2 if call.kind == "huge" and torch.float16 in (dtype, weight_dtype) else 1.0
    hidden = laid_out(made.hidden.to(call.device, dtype).view(*call.shape, width), call.layouts[0])
    weight = laid_out((made.weight * shrink).to(call.device, weight_dtype), call.layouts[1])
    bias = None if made.bias is None else made.bias.to(call.device, dtype)
    given = [t for t in (hidden, weight, bias) if t is not None]
    exact = [t.detach().cpu().double().reshape(-1, t.shape[-1]) for t in given[:2]]
    exact += [t.detach().cpu().double() for t in given[2:]]
    for name, *both in zip(("hidden", "weight", "bias"), given, exact, strict=False):
        for t in both:
            t.requires_grad_(name in call.needs and not teacher)
    g = torch.Generator().manual_seed(seed + 1)
    valid = torch.rand(rows, generator=g) >= call.masked
    units = bounds.units(dtype, weight_dtype, logits_dtype=call.numerics.get("logits_dtype"))
    target, valid = (x.view(call.shape).to(call.device) for x in (made.target, valid))
    adapter = adapters.Adapter()
    if call.adapter and not teacher:
        adapter = adapters.make(
            call.adapter, call.shape, call.vocabulary, dtype, call.device, bool(call.needs), seed
        )
    return Tensors(hidden, weight, bias, target, valid, exact, units, adapter)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout, with NaN in the gaps."""
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    if layout == "strided":
        larger = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan)
        return larger[..., 1::2].copy_(t)
    if layout == "part":
        larger = t.new_full([size + 3 for size in t.shape], torch.nan)
        return larger[tuple(slice(1, 1 + size) for size in t.shape)].copy_(t)
    return t


def ids_of(call: Call, z: Tensor, valid: Tensor) -> Tensor:
    """(N, K) ids of possible tokens, some of them padding; at least one token is in the tail."""
    g = torch.Generator().manual_seed(call.seed + 5)
    order = torch.rand(z.shape, generator=g).masked_fill(z == -torch.inf, -1.0)
    ids = order.topk(call.options["k"]).indices
    most = (z > -torch.inf).sum(-1, keepdim=True) - 1
    out = torch.arange(ids.shape[1]) >= torch.minimum(most, (ids[:, :1] % (ids.shape[1] + 2)) + 1)
    return ids.masked_fill(out | ~valid[:, None], oracle.IGNORE_INDEX)


def upstream(call: Call, which: int, shape: Sequence[int]) -> Tensor | None:
    """A gradient to send into an output; None where nothing is sent."""
    kind = call.upstream[which]
    if kind == "absent":
        return None
    g = torch.Generator().manual_seed(call.seed + 17 * which)
    found = torch.randn(tuple(shape), generator=g)
    if kind == "sparse":
        found = found * (torch.rand(tuple(shape), generator=g) < 0.3)
    found = found * {"small": 1e-5, "large": 300.0, "zero": 0.0}.get(kind, 1.0)
    return laid_out(found, call.layouts[2]) if found.dim() else found


def gradients(
    call: Call,
    t: Tensors,
    head: bounds.Head,
    sent: list[Sent],
    dz: Sequence[Tensor],
) -> list[Check]:
    """Of the gradients of hidden, weight, bias and an adapter.

    Args:
        dz: exact gradients of logits (N, V), their errors, and perhaps the sizes of their terms.
    """
    hidden, weight = (x.detach() for x in t.exact[:2])
    if not t.adapter.given:
        allowed: Sequence[Tensor] = bounds.gradients(head, hidden, weight, *dz)
        return gradients_within(call, t.given, [[leaf] for leaf in t.exact], sent, allowed)
    within = t.adapter.gradients(head, hidden, weight, dz)
    names = (*t.names, *t.adapter.given)
    given = (*t.given, *t.adapter.given.values())
    exact = [[leaf] for leaf in (*t.exact, *t.adapter.exact.values())]
    allowed = [within[name] for name in names]
    return gradients_within(call, given, exact, sent, allowed, names)


def gradients_within(
    call: Call,
    given: Sequence[Tensor],
    exact: Sequence[Sequence[Tensor]],
    sent: list[Sent],
    allowed: Sequence[Tensor],
    names: Sequence[str] = ("hidden", "weight", "bias"),
) -> list[Check]:
    """Of the gradients of tensors with these names, with the errors that are allowed.

    Args:
        exact: of each of `given` its exact leaves, which several heads have along dimension 1.
    """
    needed = [i for i, t in enumerate(given) if t.requires_grad]
    if not needed or not sent:
        return []
    ours, true, _ = zip(*sent, strict=True)
    found = torch.autograd.grad(
        ours, [given[i] for i in needed], [g.to(o.device) for o, _, g in sent]
    )
    exact_into = [g.double().reshape(e.shape) for _, e, g in sent]
    leaves = [leaf for i in needed for leaf in exact[i]]
    of_leaves = iter(torch.autograd.grad(true, leaves, exact_into, retain_graph=True))
    checks = []
    for i, mine in zip(needed, found, strict=True):
        assert mine.dtype == given[i].dtype and mine.shape == given[i].shape
        several = [next(of_leaves) for _ in exact[i]]
        wanted = several[0] if len(several) == 1 else torch.stack(several, 1)
        checks.append(Check(f"d {names[i]}", mine.reshape(wanted.shape), wanted, allowed[i]))
    return checks


def among(name: str, fits: Tensor) -> Check:
    """That a choice is one of those that rounding may make."""
    return Check(name, (~fits).double(), torch.zeros(fits.shape), torch.zeros(fits.shape))


def of_a_part(
    call: Call,
    hidden: Tensor,
    function: Callable[[Tensor, Tensor], dict[str, Tensor]],
    ours: dict[str, Tensor],
) -> list[Check]:
    """With `deterministic`, results of a part of the rows, which have to be the same to the bit.

    Args:
        function: results of some hidden states and their numbers.
        ours: (...) results of every row, by name.
    """
    count = math.prod(call.shape)
    if not call.numerics.get("deterministic") or not count:
        return []
    # The noise of a sample is of a row's number, so a slice; of others the order may change, too.
    rows = torch.arange(count // 3, count)
    if call.operation != "linear_token":
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(call.seed))]
    with torch.no_grad():
        part = function(hidden.reshape(count, -1)[rows.to(hidden.device)], rows)
    checks = []
    for name, value in ours.items():
        whole = value.detach().reshape(-1)[rows.to(value.device)].cpu()
        checks.append(Check(f"{name} of a part", part[name].cpu(), whole, torch.zeros(len(rows))))
    return checks
