"""Calls of the operations on a head beside the exact results and the bounds of the contract.

Each of `OPERATIONS` is a function of a `Call` that returns a `Check` for every value and gradient:
the exact ones are of `oracle` in fp64, how far ours may be from them is of `bounds`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

import ift_kernels
from ift.numerics import bounds, bounds_divergence, bounds_selected, cross_entropies, oracle
from ift.numerics.calls import (
    DIFFERENTIABLE,
    Call,
    Check,
    among,
    gradients,
    ids_of,
    laid_out,
    of_a_part,
    tensors,
    upstream,
)
from ift_kernels import backends
from ift_kernels.backends.reference.sampling import philox
from ift_kernels.schedule import plan


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


def _logprobs(call: Call) -> list[Check]:
    t, options = tensors(call), dict(call.options)
    ignore = options["ignore_index"]
    ours = ift_kernels.linear_logprobs(
        t.hidden, t.weight, torch.where(t.valid, t.target, ignore), bias=t.bias,
        workspace=call.workspace, **options, **call.transform, **call.numerics,
        **t.adapter.arguments,
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
            checks.append(among(name, torch.where(valid, fits, flat.cpu() == 0)))
            continue
        checks.append(Check(name, flat, exact[name].detach(), allowed[name]))
        learns = name in DIFFERENTIABLE and name not in options["detached"]
        assert value.requires_grad == (learns and t.learns)
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

    checks += of_a_part(
        call, t.hidden, part, {name: getattr(ours, name) for name in options["outputs"]}
    )
    return checks + gradients(call, t, head, sent, bounds.dlogits(head, ids, into))


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

    checks = [among("ids", fits), Check("logprob", logprob.flatten(), exact, bound)]
    return checks + of_a_part(call, t.hidden, part, {"ids": ids, "logprob": logprob})


def _topk(call: Call) -> list[Check]:
    t, options = tensors(call), call.options
    found = ift_kernels.linear_topk(
        t.hidden, t.weight, bias=t.bias, workspace=call.workspace, **options, **call.transform,
        **call.numerics,
    )  # fmt: skip
    k = options["k"]
    assert found.ids.shape == found.logprob.shape == (*call.shape, k)
    assert found.truncated.shape == call.shape and not found.logprob.requires_grad
    head, ids = t.head(call.transform), found.ids.reshape(-1, k).cpu()
    logprob, there = found.logprob.reshape(-1, k), ids != oracle.IGNORE_INDEX
    exact = oracle.selected(head.z, ids)["logprob"]
    each = [head.logprob_error(at) for at in ids.clamp(min=0).unbind(1)]
    bound = torch.stack(each, 1)
    if head.units.sum == bounds.FP64:  # lse is one number, in which a small logarithm is lost
        bound = bound + bounds.FP64 * head.z.logsumexp(-1, keepdim=True).abs()
    bound = torch.where(there, bound, 0)
    limits = options["top_p"], options["min_p"]
    within, outside = bounds_selected.nucleus(head, min(k + 1, call.vocabulary), *limits)
    truncated = found.truncated.flatten().cpu()
    more = within[:, k:].any(1), ~outside[:, k:].all(1)
    if limits == (None, None):
        more = (torch.zeros_like(truncated),) * 2
    ordered = ids.sort(1).values
    again = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)

    def part(hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
        some = ift_kernels.linear_topk(
            hidden, t.weight, bias=t.bias, workspace=call.workspace, **options, **call.transform,
            **call.numerics,
        )  # fmt: skip
        return {"last id": some.ids[:, -1], "last logprob": some.logprob[:, -1]}

    last = {"last id": found.ids[..., -1], "last logprob": found.logprob[..., -1]}
    return [
        among("ids", bounds_selected.may_be_top(head, ids) | ~there),
        among("no id twice", ~again),
        among("nucleus", (there | ~within[:, :k]) & ~(there & outside[:, :k])),
        among("truncated", (truncated | ~more[0]) & (~truncated | more[1])),
        Check("logprob", logprob, exact, bound),
        *of_a_part(call, t.hidden, part, last),
    ]


def _selected(call: Call) -> list[Check]:
    t, outputs = tensors(call), call.options["outputs"]
    z = t.logits(call.transform)
    ids = ids_of(call, z.detach(), t.valid.flatten().cpu())
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
    checks += of_a_part(call, t.hidden, part, each)
    return checks + gradients(
        call, t, head, sent, bounds_selected.selected_dlogits(head, ids, into)
    )


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
    allowed, unit = (
        bounds_divergence.divergence(head, teacher.head(others), kind, beta),
        head.units.sum,
    )
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
    return checks + gradients(call, t, head, [(ours, exact, gradient)], dz)


def _expected_embedding(call: Call) -> list[Check]:
    t = tensors(call)
    g = torch.Generator().manual_seed(call.seed + 2)
    table = torch.randn(call.vocabulary, call.width + 1, generator=g).to(t.hidden)
    embedding = laid_out(table, call.layouts[2]).requires_grad_()
    exact_table = embedding.detach().cpu().double().requires_grad_()
    ours = ift_kernels.linear_expected_embedding(
        t.hidden, t.weight, embedding, bias=t.bias, workspace=call.workspace, **call.transform,
        **call.numerics,
    )  # fmt: skip
    exact = oracle.expected_embedding(t.logits(call.transform), exact_table)
    head, given = t.head(call.transform), upstream(call, 0, exact.shape)
    gradient = torch.zeros(exact.shape) if given is None else given
    gradient = gradient.to(embedding.dtype).view(exact.shape)
    allowed = bounds_divergence.expected_embedding(head, exact_table.detach(), gradient.double())
    assert ours.dtype == embedding.dtype
    checks = [Check("value", ours.reshape(exact.shape), exact.detach(), allowed.value)]
    if given is None:
        return checks
    into = gradient.view(ours.shape).to(ours.device)
    (d_table,) = torch.autograd.grad(ours, embedding, into, retain_graph=True)
    (wanted,) = torch.autograd.grad(exact, exact_table, gradient.double(), retain_graph=True)
    checks.append(Check("d embedding", d_table, wanted, allowed.table))
    sent = [(ours, exact, gradient.view(ours.shape))]
    return checks + gradients(call, t, head, sent, (allowed.gradient, allowed.error))


OPERATIONS = {
    "linear_logprobs": _logprobs,
    "linear_cross_entropy": cross_entropies.cross_entropy,
    "linear_soft_cross_entropy": cross_entropies.soft_cross_entropy,
    "linear_token": _token,
    "linear_topk": _topk,
    "linear_selected_logprobs": _selected,
    "linear_divergence": _divergence,
    "linear_expected_embedding": _expected_embedding,
}
