"""Where a fused pass first differs from the naive one, from inputs to gradients of parameters.

Each stage compares what was seen of both passes; nothing here is about a particular fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ift.checking.as_found import causal_lm
from ift.checking.naive import IGNORE_INDEX, next_tokens
from ift.checking.passes import Pass, fused_pass
from ift.checking.trace import first_difference, trunk_inputs

Stage = Literal[
    "refused", "exception", "inputs", "trunk", "head weight", "transform", "targets", "statistics",
    "stale weight", "full logits", "reduction", "accumulation", "auxiliary loss",
    "upstream gradient", "head gradient", "parameter gradient", "two passes", "reference",
]  # fmt: skip

LOOK_AT: dict[Stage, str] = {
    "refused": "the message names what is not supported",
    "exception": "the fused forward failed where the model's own did not",
    "inputs": "look at what stands between the batch and the model: padding side, attention mask, "
    "positions, arguments that a wrapper drops",
    "trunk": "look at adapters that are off or merged in one of the two, at dropout, at the "
    "attention implementation, at positions and masks",
    "head weight": "look at the weight and bias of the head that are used: a stale copy, a shard "
    "that was not gathered, an adapter on the head that is not applied",
    "transform": "look at the scale, softcap or temperature between the head and the loss",
    "targets": "look at the shift of the labels, at ignore_index and at labels that the model or "
    "the collator changes",
    "statistics": "hidden states, weight and targets agree, this result of the operation does not: "
    "look at the backend (`ift doctor`, IFT_BACKEND=reference)",
    "stale weight": "results are right at first and wrong after the weights have changed: look for "
    "a copy of a weight that outlives an optimizer step",
    "full logits": "the fused loss is right, the patched model without labels is not: look at what "
    "has replaced its forward or that of its head",
    "reduction": "every token is right, their mean is not: look at the divisor (mean or sum, "
    "num_items_in_batch, masked tokens)",
    "accumulation": "right in one batch, wrong in parts of it: look at num_items_in_batch and at "
    "what divides the loss once more",
    "auxiliary loss": "the log-probabilities are right, the rest of the loss is not: look at what "
    "the model adds to its cross-entropy (load balancing of experts)",
    "upstream gradient": "the loss is right, its gradient at the head is not in proportion: look "
    "for an upstream gradient that is dropped, scaled or taken from another token",
    "head gradient": "look at the backward of the head: gradients of its hidden states and weight",
    "parameter gradient": "the gradient that enters the trunk is right: look at parameters that "
    "are frozen, detached or reduced across processes, and at tied ones that count once or twice",
    "two passes": "one forward is right, the two of IFT are not: look at the prediction of the "
    "first pass, the mixing of embeddings, λ and the propagation",
    "reference": "the model's own loss or a gradient of it is not finite, or a prediction is a tie",
}


class Cause(NamedTuple):
    """What differs first."""

    stage: Stage
    what: str  # measured

    def __str__(self) -> str:
        return f"{self.stage}: {self.what}; {LOOK_AT[self.stage]}"


def valid(tensor: Tensor, mask: Tensor) -> Tensor:
    """The entries of the valid tokens."""
    return tensor[mask.to(tensor.device)]


def error_of(got: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    """The largest difference relative to the largest expected entry; NaN of a NaN."""
    if got is None or expected is None:
        return 0.0 if got is expected else math.inf
    if got.shape != expected.shape:
        return math.inf
    if not got.numel():
        return 0.0
    expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
    difference = float((got.to(expected) - expected).abs().max())
    size = max(float(expected.abs().max()), floor)
    return difference / size if difference else 0.0


def common_mask(got: Pass, expected: Pass) -> Tensor | None:
    """Tokens with a target in both passes; None where the shapes differ."""
    assert expected.mask is not None
    if got.mask is None or got.mask.shape != expected.mask.shape:
        return None
    return expected.mask & got.mask.to(expected.mask.device)


def same_mask(got: Pass, expected: Pass) -> bool:
    """Whether the same tokens have targets, in the mask of the loss as in the counts."""
    assert expected.mask is not None
    mask = common_mask(got, expected)
    count = int(expected.mask.sum())
    same = mask is not None and int(mask.sum()) == count and got.mask is not None
    return same and int(got.mask.sum()) == count and got.metrics.get("tokens", count) == count  # type: ignore[union-attr]


def hidden_error(got: Pass, expected: Pass, name: str = "hidden") -> float:
    """Of the hidden states of the valid tokens, or of their gradients."""
    ours, theirs = getattr(got, name), getattr(expected, name)
    mask = expected.mask
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return error_of(ours, theirs)
    if name == "hidden" and mask is not None and mask.shape == theirs.shape[:-1]:
        ours, theirs = valid(ours, mask), valid(theirs, mask)
    return error_of(ours, theirs)


def forward_cause(
    model: nn.Module, batch: dict[str, Any], got: Pass, expected: Pass, tolerance: float,
    products: Callable[[], Pass],
) -> Cause | None:  # fmt: skip
    """The first difference up to the log-probabilities and the other statistics.

    Args:
        model: patched, within `as_found`.
        products: a naive pass with the products of the head.
    """
    where = trunk_inputs(got.trace, expected.trace, tolerance)
    if where:
        return Cause("inputs", f"{where} is not what the forward with full logits gets")
    error = hidden_error(got, expected)
    if not error <= tolerance:
        found = first_difference(got.trace, expected.trace, tolerance)
        found = found or f"they differ by {error:.1e} though no module does"
        return Cause("trunk", f"the hidden states at the head differ: {found}")
    mask = common_mask(got, expected)
    if mask is None or got.logprob is None or expected.logprob is None:
        shapes = [None if m is None else tuple(m.shape) for m in (got.mask, expected.mask)]
        return Cause("targets", f"{shapes[0]} tokens reach the head in place of {shapes[1]}")
    scale = 1.0
    ours, theirs = got.logprob.to(mask.device), expected.logprob
    here = mask & ~((ours == 0) & (theirs.abs() > tolerance))  # without those that it ignored
    of_target = error_of(valid(got.logprob, here), valid(expected.logprob, here), scale)
    entropy = error_of(valid(got.entropy, here), valid(expected.entropy, here), scale)  # type: ignore[arg-type]
    best = error_of(valid(got.best, here), valid(expected.best, here), scale)  # type: ignore[arg-type]
    limit = tolerance * 10
    if not of_target <= tolerance and not (entropy <= limit or best <= limit):
        return _head_cause(model, batch, got, expected, here, products)
    if not of_target <= tolerance:
        return Cause("targets", _shift(got, expected, here, tolerance))
    if not same_mask(got, expected) or int(here.sum()) < int(expected.mask.sum()):  # type: ignore[union-attr]
        return Cause("targets", _counts(got, expected, here))
    for name, error in (("entropy", entropy), ("argmax", best)):
        if not error <= limit:
            return Cause("statistics", f"the {name} differs by {error:.1e} where the "
                         "log-probabilities of the targets agree")  # fmt: skip
    return None


def _counts(got: Pass, expected: Pass, here: Tensor) -> str:
    assert expected.mask is not None and expected.target is not None
    ours = 0 if got.mask is None else int(got.mask.sum())
    counted = got.metrics.get("tokens", ours)
    lost = expected.mask & ~here
    ids = sorted(set(expected.target[lost].tolist()))[:3]
    text = (
        f"{ours} tokens have a target in the loss, {counted:.0f} in the metrics and "
        f"{int(here.sum())} a log-probability, of the {int(expected.mask.sum())} of the naive loss"
    )
    return text + (f" (missing first: target ids {ids})" if ids else "")


def _shift(got: Pass, expected: Pass, here: Tensor, tolerance: float) -> str:
    """Whether the log-probabilities are those of labels of another place."""
    assert got.logprob is not None and expected.log_p is not None and expected.target is not None
    ours = got.logprob.to(expected.log_p)
    for offset in (-1, 1, -2, 2):
        target = expected.target.roll(-offset, -1)
        there = here & (target != IGNORE_INDEX)
        if offset > 0:
            there[..., -offset:] = False
        else:
            there[..., :-offset] = False
        of_shifted = expected.log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        same = (ours - of_shifted).abs() <= 10 * tolerance * of_shifted.abs().clamp(min=1)
        if int(there.sum()) > 1 and float(same[there].float().mean()) > 0.9:
            return (
                f"the log-probabilities are those of the labels {abs(offset)} "
                f"{'later' if offset > 0 else 'earlier'}"
            )
    wrong = (ours - expected.logprob).abs() > 10 * tolerance  # type: ignore[operator]
    return (
        f"the log-probabilities of {int((wrong & here).sum())} of {int(here.sum())} tokens are "
        "those of other targets (entropy and best token agree)"
    )


def _head_cause(
    model: nn.Module, batch: dict[str, Any], got: Pass, expected: Pass, here: Tensor,
    products: Callable[[], Pass],
) -> Cause:  # fmt: skip
    """Weight or transform: whether the fused logits are a rising function of the products.

    Differences of logits are those of log-probabilities, so a few fused passes with random labels
    give a few logits of every token.
    """
    assert expected.entropy is not None and got.entropy is not None
    for offset in (-1, 1):
        ours, theirs = got.entropy.to(expected.entropy).roll(offset, -1), expected.entropy
        inner = here[..., 2:-2]
        pairs = ours[..., 2:-2][inner], theirs[..., 2:-2][inner]
        if inner.sum() > 2 and error_of(*pairs, 1.0) < 1e-3:
            return Cause("targets", f"the results are those of the positions {-offset} later")
    naive = products()
    labels = batch["labels"]
    unfit = naive.product is None or labels.shape != naive.product.shape[:-1]
    if unfit or naive.log_p is None:
        return Cause("head weight", "the distributions differ, the hidden states do not")
    assert naive.product is not None
    generator = torch.Generator().manual_seed(7)
    logits, raw, plain = [], [], []
    for _ in range(12):
        drawn = torch.randint(naive.product.shape[-1], labels.shape, generator=generator)
        drawn = torch.where(labels == IGNORE_INDEX, labels, drawn.to(labels.device))
        one = fused_pass(model, {**batch, "labels": drawn}, backward=False)
        ids = next_tokens(drawn).clamp(min=0).to(naive.product.device)[..., None]
        assert one.logprob is not None
        logits.append(valid(one.logprob, here))
        raw.append(valid(naive.product.gather(-1, ids)[..., 0], here))
        plain.append(valid(naive.log_p.gather(-1, ids)[..., 0], here))
    z, r, p = (torch.stack(x, -1).double().cpu() for x in (logits, raw, plain))  # (tokens, 12)
    dz, dr, dp = (x[:, :, None] - x[:, None] for x in (z, r, p))
    clear = dr.abs() > 1e-2 * r.std()
    against = float(((dz * dr.sign() < -1e-4 * z.std()) & clear).sum() / clear.sum().clamp(min=1))
    if against > 0.002:
        text = "the logits are in another order than the products of the head's weight with the "
        return Cause("head weight", f"{text}same hidden states ({against:.1%} of pairs)")
    clear = dp.abs() > 1e-2 * p.std()
    ratios = (dz / dp)[clear]
    ratio = float(ratios.median()) if len(ratios) else math.nan
    even = bool(((ratios / ratio - 1).abs() < 1e-2).float().mean() > 0.95) if len(ratios) else False
    how = f"{ratio:.4g} times those of the model" if even else "bent otherwise than the model's"
    return Cause("transform", f"the logits are in the order of the products, and {how}")


def gradient_cause(
    model: nn.Module, got: Pass, expected: Pass, tolerance: float, worst: tuple[float, str]
) -> Cause | None:
    """The first difference of two backward passes whose log-probabilities agree.

    Args:
        worst: error and name of the worst parameter.
    """
    error = hidden_error(got, expected, "hidden_grad")
    if not error <= tolerance:
        return Cause("upstream gradient" if _in_proportion(got, expected) else "head gradient",
                     _described(got, expected, error))  # fmt: skip
    if worst[0] <= tolerance:
        return None
    head: nn.Module = causal_lm(model).get_output_embeddings()  # type: ignore[operator]  # of transformers
    inside = {id(p) for p in head.parameters()}
    parameters = dict(model.named_parameters())
    name = worst[1]
    ours, theirs = got.gradients.get(name), expected.gradients.get(name)
    if ours is None or theirs is None:
        state = "has no gradient" if ours is None else "has a gradient, which it should not,"
        own = id(parameters.get(name)) in inside
        return Cause("head gradient" if own else "parameter gradient",
                     f"{name} {state} in the fused pass")  # fmt: skip
    ratio = _ratio(ours, theirs)
    text = f"that of {name} is " + (f"{ratio:.4g} times" if ratio else "not in proportion to")
    text += " the naive one; that of the hidden states agrees"
    table: nn.Module = causal_lm(model).get_input_embeddings()  # type: ignore[operator]  # of transformers
    tied = id(parameters.get(name)) in inside and any(
        p is parameters[name] for p in table.parameters()
    )
    if tied:
        return Cause("parameter gradient", f"{text}; it is tied: embedding and head add up")
    own = id(parameters.get(name)) in inside
    return Cause("head gradient" if own else "parameter gradient", text)


def _ratio(ours: Tensor, theirs: Tensor) -> float:
    """By what one is a multiple of the other; 0 where it is not."""
    ours, theirs = ours.double().flatten().cpu(), theirs.double().flatten().cpu()
    if not theirs.any() or ours.shape != theirs.shape:
        return 0.0
    ratio = float(ours @ theirs / (theirs @ theirs))
    rest = float((ours - ratio * theirs).norm() / ours.norm().clamp(min=1e-300))
    return ratio if rest < 1e-2 else 0.0


def _in_proportion(got: Pass, expected: Pass) -> bool:
    """Whether each token's gradient has the right direction, and some another size."""
    if got.hidden_grad is None or expected.hidden_grad is None:
        return False
    ours, theirs = (
        x.double().flatten(0, -2).cpu() for x in (got.hidden_grad, expected.hidden_grad)
    )
    if ours.shape != theirs.shape:
        return False
    rows = theirs.norm(dim=-1) > 1e-6 * theirs.norm(dim=-1).max()
    ours, theirs = ours[rows], theirs[rows]
    square = theirs.square().sum(-1)
    factor = (ours * theirs).sum(-1) / square
    across = (ours - factor[:, None] * theirs).norm(dim=-1) / square.sqrt()
    along = (factor - 1).abs()
    fits = across <= (0.05 * along).clamp(min=1e-4)
    return bool(along.max() > 1e-3) and bool(fits.double().mean() > 0.95)


def _described(got: Pass, expected: Pass, error: float) -> str:
    if got.hidden_grad is None or expected.hidden_grad is None:
        return "no gradient reaches the hidden states"
    ratio = _ratio(got.hidden_grad, expected.hidden_grad)
    text = "the gradient of the hidden states at the head "
    if ratio and _in_proportion(got, expected):
        return text + f"is {ratio:.4g} times the naive one"
    if _in_proportion(got, expected):
        return text + "has the right direction for each token and another size (weighted tokens)"
    return text + f"differs by {error:.1e}"
