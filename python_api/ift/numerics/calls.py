"""Calls of the operations on a head beside the exact results and the bounds of the contract.

Each of `OPERATIONS` is a function of a `Call` that returns a `Check` for every value and gradient:
the exact ones are of `oracle` in fp64, how far ours may be from them is of `bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ift_kernels
from ift.numerics import bounds, bounds_selected, inputs, oracle
from ift_kernels import backends
from ift_kernels.backends.reference.sampling import philox
from ift_kernels.schedule import plan

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


def available(device: torch.device) -> tuple[str, ...]:
    """The backends that serve fp32 tensors of a device."""
    return tuple(
        name
        for name, backend in backends.BACKENDS.items()
        if not backend.unsupported_reason(device, torch.float32)
    )


def run(call: Call) -> list[Check]:
    """Every result of a call."""
    forced = plan.use_schedule(call.schedule) if call.schedule else nullcontext()
    with ift_kernels.use_backend(call.backend), forced:
        return OPERATIONS[call.operation](call)


class Tensors(NamedTuple):
    """What an operation is called with, and the same numbers flat, in fp64, on the CPU."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None
    target: Tensor  # (...) an id everywhere
    valid: Tensor  # (...) bool
    exact: list[Tensor]  # hidden, weight and perhaps bias
    units: bounds.Units

    @property
    def names(self) -> tuple[str, ...]:
        return ("hidden", "weight", "bias")[: len(self.exact)]

    @property
    def given(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def logits(self, transform: dict[str, Any]) -> Tensor:
        return oracle.logits(*self.exact, **transform)

    def head(self, transform: dict[str, Any]) -> bounds.Head:
        hidden, weight, *bias = (t.detach() for t in self.exact)
        return bounds.head(hidden, weight, bias[0] if bias else None, self.units, **transform)


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
    hidden = _laid_out(made.hidden.to(call.device, dtype).view(*call.shape, width), call.layouts[0])
    weight = _laid_out((made.weight * shrink).to(call.device, weight_dtype), call.layouts[1])
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
    return Tensors(hidden, weight, bias, target, valid, exact, units)


def _laid_out(t: Tensor, layout: str) -> Tensor:
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
    return _laid_out(found, call.layouts[2]) if found.dim() else found


def _gradients(
    call: Call,
    t: Tensors,
    head: bounds.Head,
    sent: list[tuple[Tensor, Tensor, Tensor]],
    dz: tuple[Tensor, Tensor],
) -> list[Check]:
    """Of the gradients of hidden, weight and bias.

    Args:
        sent: (ours, exact, gradient into them).
        dz: exact gradients of logits (N, V), and their errors.
    """
    needed = [i for i, name in enumerate(t.names) if name in call.needs]
    if not needed or not sent:
        return []
    ours, exact, into = zip(*sent, strict=True)
    exact_into = [g.double().reshape(e.shape) for e, g in zip(exact, into, strict=True)]
    ours_into = [g.to(o.device) for o, g in zip(ours, into, strict=True)]
    found = torch.autograd.grad(ours, [t.given[i] for i in needed], ours_into)
    wanted = torch.autograd.grad(exact, [t.exact[i] for i in needed], exact_into, retain_graph=True)
    allowed = bounds.gradients(head, t.exact[0].detach(), t.exact[1].detach(), *dz)
    checks = []
    for i, mine, true in zip(needed, found, wanted, strict=True):
        assert mine.dtype == t.given[i].dtype and mine.shape == t.given[i].shape
        checks.append(Check(f"d {t.names[i]}", mine.reshape(true.shape), true, allowed[i]))
    return checks


def _among(name: str, fits: Tensor) -> Check:
    """That a choice is one of those that rounding may make."""
    return Check(name, (~fits).double(), torch.zeros(fits.shape), torch.zeros(fits.shape))


def _again(
    call: Call,
    t: Tensors,
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
        part = function(t.hidden.reshape(count, -1)[rows.to(t.hidden.device)], rows)
    checks = []
    for name, value in ours.items():
        whole = value.detach().reshape(-1)[rows.to(value.device)].cpu()
        checks.append(Check(f"{name} of a part", part[name].cpu(), whole, torch.zeros(len(rows))))
    return checks


def _logprobs(call: Call) -> list[Check]:
    t, options = tensors(call), dict(call.options)
    ignore = options["ignore_index"]
    ours = ift_kernels.linear_logprobs(
        t.hidden, t.weight, torch.where(t.valid, t.target, ignore), bias=t.bias,
        workspace=call.workspace, **options, **call.transform, **call.numerics,
    )  # fmt: skip
    ids, valid = t.target.flatten().cpu(), t.valid.flatten().cpu()
    exact = oracle.statistics(t.logits(call.transform), torch.where(valid, ids, ignore), ignore)
    head = t.head(call.transform)
    allowed = bounds.statistics(head, ids, valid)
    checks, sent, into = [], [], {}
    for name in options["outputs"]:
        value = getattr(ours, name)
        assert value.shape == call.shape
        flat = value.reshape(-1)
        if name == "argmax":
            fits = bounds.may_be_best(head, flat.cpu())
            checks.append(_among(name, torch.where(valid, fits, flat.cpu() == 0)))
            continue
        checks.append(Check(name, flat, exact[name].detach(), allowed[name]))
        learns = name in DIFFERENTIABLE and name not in options["detached"]
        assert value.requires_grad == (learns and bool({*call.needs} & {*t.names}))
        gradient = upstream(call, DIFFERENTIABLE.index(name), call.shape) if learns else None
        if gradient is not None:
            into[name] = torch.where(valid, gradient.reshape(-1).double(), 0)
            sent.append((value, exact[name], gradient))

    def part(hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
        target = torch.where(t.valid, t.target, ignore).reshape(-1)[rows.to(hidden.device)]
        return ift_kernels.linear_logprobs(
            hidden, t.weight, target, bias=t.bias, workspace=call.workspace, **options,
            **call.transform, **call.numerics,
        )._asdict()  # fmt: skip

    checks += _again(call, t, part, {name: getattr(ours, name) for name in options["outputs"]})
    return checks + _gradients(call, t, head, sent, bounds.dlogits(head, ids, into))


def _cross_entropy(call: Call) -> list[Check]:
    t, options = tensors(call), dict(call.options)
    ignore, of_mean = options["ignore_index"], {k: options[k] for k in ("reduction", "num_items")}
    ours = ift_kernels.linear_cross_entropy(
        t.hidden, t.weight, torch.where(t.valid, t.target, ignore), bias=t.bias,
        workspace=call.workspace, **options, **call.transform, **call.numerics,
    )  # fmt: skip
    ids, valid = t.target.flatten().cpu(), t.valid.flatten().cpu()
    smoothing, z_loss = options["label_smoothing"], options["z_loss"]
    options.pop("weight_grad_sum")
    target = torch.where(valid, ids, ignore)
    exact = oracle.cross_entropy(t.logits(call.transform), target, **options)
    each = oracle.cross_entropy(
        t.logits(call.transform).detach(), target, **options | {"reduction": "none"}
    )
    head = t.head(call.transform)
    allowed, unit = bounds.statistics(head, ids, valid), head.units.sum
    lse = torch.where(valid, head.z.logsumexp(-1), 0)
    bound = (1 - smoothing) * allowed["logprob"]
    bound = bound + smoothing * (allowed["mean_logit"] + allowed["lse"]) if smoothing else bound
    bound = bound + z_loss * (2 * lse.abs() + allowed["lse"]) * allowed["lse"]
    bound = bound + bounds.ARITHMETIC * unit * each.abs()
    factor = torch.ones(())
    if of_mean["reduction"] != "none":
        factor = oracle.reduced(torch.ones(1), valid, **of_mean)
        total = bounds.products_unit(len(ids), unit) * each.abs().sum()
        bound = factor * (bound.sum() + total + bounds.ARITHMETIC * unit * each.sum().abs())
    checks = [Check("loss", ours.reshape(exact.shape), exact.detach(), bound)]

    def part(hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
        some = target[rows].to(hidden.device)
        loss = ift_kernels.linear_cross_entropy(
            hidden, t.weight, some, bias=t.bias, workspace=call.workspace, **call.options,
            **call.transform, **call.numerics,
        )  # fmt: skip
        return {"loss": loss}

    if of_mean["reduction"] == "none":
        checks += _again(call, t, part, {"loss": ours})
    gradient = upstream(call, 0, ours.shape)
    if gradient is None:
        return checks
    g = torch.where(valid, gradient.double().reshape(-1).expand(len(ids)) * factor, 0)
    into = {"logprob": -(1 - smoothing) * g, "lse": (smoothing + 2 * z_loss * lse) * g}
    into |= {"mean_logit": -smoothing * g} if smoothing else {}
    dz = bounds.dlogits(head, ids, into, 2 * z_loss * g.abs() * allowed["lse"])
    return checks + _gradients(call, t, head, [(ours, exact, gradient)], dz)


def _token(call: Call) -> list[Check]:
    t, options = tensors(call), call.options
    ids, logprob = ift_kernels.linear_token(
        t.hidden, t.weight, bias=t.bias, workspace=call.workspace, **options, **call.transform,
        **call.numerics,
    )  # fmt: skip
    assert ids.shape == logprob.shape == call.shape and not logprob.requires_grad
    head, ids = t.head(call.transform), ids.flatten().cpu()
    rank = {"greedy": 1, "kth": options["k"], "sample": 1}[options["rule"]]
    noise = None
    if options["rule"] == "sample":
        seed = options["seed"] - (1 << 64 if options["seed"] >= 1 << 63 else 0)
        rows = options["row_offset"] + torch.arange(len(ids))
        u = (philox(seed, rows[:, None], torch.arange(call.vocabulary)).double() + 0.5) / 2**32
        noise = -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    exact = head.z.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    fits = bounds.may_be_best(head, ids, noise, rank)
    bound = head.logprob_error(ids)

    def part(hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
        first = {"row_offset": options["row_offset"] + int(rows[0])}
        found = ift_kernels.linear_token(
            hidden, t.weight, bias=t.bias, workspace=call.workspace, **options | first,
            **call.transform, **call.numerics,
        )  # fmt: skip
        return dict(zip(("ids", "logprob"), found, strict=True))

    checks = [_among("ids", fits), Check("logprob", logprob.flatten(), exact, bound)]
    return checks + _again(call, t, part, {"ids": ids, "logprob": logprob})


def _selected(call: Call) -> list[Check]:
    t, outputs = tensors(call), call.options["outputs"]
    z = t.logits(call.transform)
    ids = _ids(call, z.detach(), t.valid.flatten().cpu())
    ours = ift_kernels.linear_selected_logprobs(
        t.hidden, t.weight, ids.view(*call.shape, ids.shape[1]).to(t.hidden.device),
        bias=t.bias, outputs=outputs, workspace=call.workspace, **call.transform, **call.numerics,
    )  # fmt: skip
    exact, head = oracle.selected(z, ids), t.head(call.transform)
    allowed = bounds_selected.selected(head, ids)
    checks, sent, into = [], [], {}
    for which, name in enumerate(sorted(oracle.SELECTED)):
        if name not in outputs:
            continue
        value, wanted = getattr(ours, name), exact[name]
        checks.append(Check(name, value.reshape(wanted.shape), wanted.detach(), allowed[name]))
        gradient = upstream(call, which, value.shape)
        if gradient is not None:
            into[name] = gradient.double().reshape(wanted.shape)
            sent.append((value, wanted, gradient))

    def part(hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
        found = ift_kernels.linear_selected_logprobs(
            hidden, t.weight, ids[rows].to(hidden.device), bias=t.bias, outputs=outputs,
            workspace=call.workspace, **call.transform, **call.numerics,
        )  # fmt: skip
        return {name: value for name, value in found._asdict().items() if value is not None}

    each = {name: getattr(ours, name) for name in outputs if name not in oracle.PER_ID}
    checks += _again(call, t, part, each)
    return checks + _gradients(
        call, t, head, sent, bounds_selected.selected_dlogits(head, ids, into)
    )


def _ids(call: Call, z: Tensor, valid: Tensor) -> Tensor:
    """(N, K) ids of possible tokens, some of them padding; at least one token is in the tail."""
    g = torch.Generator().manual_seed(call.seed + 5)
    order = torch.rand(z.shape, generator=g).masked_fill(z == -torch.inf, -1.0)
    ids = order.topk(call.options["k"]).indices
    most = (z > -torch.inf).sum(-1, keepdim=True) - 1
    out = torch.arange(ids.shape[1]) >= torch.minimum(most, (ids[:, :1] % (ids.shape[1] + 2)) + 1)
    return ids.masked_fill(out | ~valid[:, None], oracle.IGNORE_INDEX)


def _divergence(call: Call) -> list[Check]:
    t, options = tensors(call), dict(call.options)
    teacher = tensors(call, teacher=True)
    others = {name: options.pop(f"teacher_{name}") for name in ("logit_scale", "softcap")}
    others["temperature"] = call.transform.get("temperature", 1.0)
    ours = ift_kernels.linear_divergence(
        t.hidden, t.weight, teacher.hidden, teacher.weight, mask=t.valid, bias=t.bias,
        teacher_bias=teacher.bias, workspace=call.workspace, **options, **call.transform,
        **call.numerics, teacher_logit_scale=others["logit_scale"],
        teacher_softcap=others["softcap"],
    )  # fmt: skip
    kind, beta, valid = options.pop("kind"), options.pop("beta"), t.valid.flatten().cpu()
    each = oracle.divergence(t.logits(call.transform), teacher.logits(others), kind, beta)
    each = torch.where(valid, each, 0)
    exact = oracle.reduced(each, valid, **options)
    head = t.head(call.transform)
    allowed, unit = bounds.divergence(head, teacher.head(others), kind, beta), head.units.sum
    bound, factor = torch.where(valid, allowed.value, 0), torch.ones(())
    if options["reduction"] != "none":
        factor = oracle.reduced(torch.ones(1), valid, **options)
        total = bounds.products_unit(len(valid), unit) * each.detach().abs().sum()
        bound = factor * (bound.sum() + total)
    checks = [Check("divergence", ours.reshape(exact.shape), exact.detach(), bound)]
    gradient = upstream(call, 0, ours.shape)
    if gradient is None:
        return checks
    g = torch.where(valid, gradient.double().reshape(-1).expand(len(valid)) * factor, 0)[:, None]
    dz = g * allowed.gradient, g.abs() * (allowed.error + 4 * unit * allowed.gradient.abs())
    return checks + _gradients(call, t, head, [(ours, exact, gradient)], dz)


def _expected_embedding(call: Call) -> list[Check]:
    t = tensors(call)
    g = torch.Generator().manual_seed(call.seed + 2)
    table = torch.randn(call.vocabulary, call.width + 1, generator=g).to(t.hidden)
    embedding = _laid_out(table, call.layouts[2]).requires_grad_()
    exact_table = embedding.detach().cpu().double().requires_grad_()
    ours = ift_kernels.linear_expected_embedding(
        t.hidden, t.weight, embedding, bias=t.bias, workspace=call.workspace, **call.transform,
        **call.numerics,
    )  # fmt: skip
    exact = oracle.expected_embedding(t.logits(call.transform), exact_table)
    head, given = t.head(call.transform), upstream(call, 0, exact.shape)
    gradient = torch.zeros(exact.shape) if given is None else given
    gradient = gradient.to(embedding.dtype).view(exact.shape)
    allowed = bounds.expected_embedding(head, exact_table.detach(), gradient.double())
    assert ours.dtype == embedding.dtype
    checks = [Check("value", ours.reshape(exact.shape), exact.detach(), allowed.value)]
    if given is None:
        return checks
    into = gradient.view(ours.shape).to(ours.device)
    (d_table,) = torch.autograd.grad(ours, embedding, into, retain_graph=True)
    (wanted,) = torch.autograd.grad(exact, exact_table, gradient.double(), retain_graph=True)
    checks.append(Check("d embedding", d_table, wanted, allowed.table))
    sent = [(ours, exact, gradient.view(ours.shape))]
    return checks + _gradients(call, t, head, sent, (allowed.gradient, allowed.error))


OPERATIONS = {
    "linear_logprobs": _logprobs,
    "linear_cross_entropy": _cross_entropy,
    "linear_token": _token,
    "linear_selected_logprobs": _selected,
    "linear_divergence": _divergence,
    "linear_expected_embedding": _expected_embedding,
}
