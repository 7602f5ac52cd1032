"""Multi-token prediction: the cross-entropy of several tokens ahead, of one head or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ift.documents import IGNORE_INDEX, document_starts, shifted_targets
from ift.losses._module import Loss
from ift.losses._reduce import divide
from ift.losses._tokens import Metrics, record
from ift.sharded import logprobs
from ift_kernels.common import checks
from ift_kernels.vocab_parallel import is_sharded

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def multi_token_targets(
    labels: Tensor,  # (B, T) or (T,)
    depths: int,
    *,
    position_ids: Tensor | None = None,  # of the shape of labels, or (1, T)
    cu_seqlens: Tensor | None = None,  # (documents + 1,)
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The token that each depth predicts at each position: depth 0 the next one, depth k the k-th
    after it.

    Equals, with `ignore_index` where position t + 1 + k is not in the row or document of t::

        target[k, ..., t] = labels[..., t + 1 + k]

    Args:
        labels: (B, T), or (T,) for packed documents: token ids, not shifted, `ignore_index` where
            there is no loss.
        depths: K ≥ 1, the next token included: D modules of DeepSeek-V3 are D + 1 depths.
        position_ids: a document starts where they do not continue by one, after left padding too;
            without them positions of left padding predict the first tokens of their row.
        cu_seqlens: int32 or int64, boundaries of packed documents over the flattened labels, in
            place of `position_ids`.

    Returns:
        (K, B, T) or (K, T) int64.

    Raises:
        TypeError, ValueError: labels that are not integers of these shapes, no depth, both kinds of
            boundaries or malformed ones.

    >>> multi_token_targets(torch.tensor([5, 6, 7, 8, 9]), 2, cu_seqlens=torch.tensor([0, 3, 5]))
    tensor([[   6,    7, -100,    9, -100],
            [   7, -100, -100, -100, -100]])
    """
    if checks.integer("depths", depths) < 1:
        raise ValueError(f"depths: expected at least 1, got {depths}")
    if not isinstance(labels, Tensor) or labels.dim() not in (1, 2):
        came = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected shape (B, T) or (T,), got {came}")
    labels = checks.token_ids("labels", labels, labels.shape, labels.device)
    rows = labels if labels.dim() == 2 else labels[None]
    if cu_seqlens is not None:
        if position_ids is not None:
            raise ValueError("position_ids: expected None with cu_seqlens, got both")
        cu_seqlens = checks.seqlens(cu_seqlens, labels)
    elif position_ids is not None and position_ids.dim() == 1:
        position_ids = position_ids[None]
    starts = document_starts(rows, position_ids, cu_seqlens)
    targets = []
    for _ in range(depths):  # what the depth before predicts one position later
        rows = shifted_targets(rows, starts, ignore_index)
        targets.append(rows.view(labels.shape))
    return torch.stack(targets)


def multi_token_loss(
    logprob: Tensor,  # (K, B, T)
    mask: Tensor,  # (K, B, T)
    *,
    depth_weights: float | Sequence[float] = 0.3,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """Cross-entropy of the next token and of the tokens after it, weighted by depth.

    In eager torch, with ``n[k] = mask[k].sum()``, or `num_items`::

        mean     sum(w[k] * (-logprob[k][mask[k]]).sum() / n[k] for k in range(K))
        sum      sum(w[k] * (-logprob[k][mask[k]]).sum() for k in range(K))

    With a number λ as `depth_weights`, ``w[0] = 1`` and each of the D = K − 1 other depths has
    ``λ / D``: DeepSeek-V3 (arXiv 2412.19437, eq. 24 and 25), which divides the sum of every depth
    by the length of the sequence, ``num_items=mask[0].sum()`` here. All ones with "sum" is the loss
    of Gloeckle et al. (arXiv 2404.19737); ``[0.8, 0.64, ...]`` is that of Medusa's heads (arXiv
    2401.10774).

    Args:
        logprob: log-probability of the target of each depth, depth 0 the next token; any float
            dtype. Packed documents are (K, 1, T). Values off the mask are never read.
        mask: same shape; bool, or 0/1 of any dtype: where a depth has a target, as
            ``multi_token_targets(...) != -100``.
        depth_weights: a number λ ≥ 0, as above, or one number ≥ 0 for each depth. Default 0.3, as
            DeepSeek-V3 for most of its training.
        reduction: above; "none" is the weighted loss of each target, (K, B, T), 0 off the mask.
        num_items: for "mean", divide by this instead: under gradient accumulation, the targets of
            the whole optimizer step, a number for all depths or a tensor (K,) of one for each.
        metrics: a dict that gets ``tokens_0`` and ``cross_entropy_0``, detached, unweighted means,
            and the same of every other depth.

    Returns:
        Scalar, or (K, B, T) for "none"; float64 for float64 and float32 otherwise. A depth without
        any target adds 0.

    Raises:
        TypeError, ValueError: options out of range, shapes that do not match, another number of
            weights than of depths.

    >>> logprob, mask = torch.full((3, 1, 4), 0.5).log(), torch.ones(3, 1, 4)
    >>> metrics = {}
    >>> value = multi_token_loss(logprob, mask, depth_weights=0.2, metrics=metrics)
    >>> round(float(value / metrics["cross_entropy_2"]), 4)      # 1 + 0.2 / 2 + 0.2 / 2
    1.2
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.floating("logprob", logprob)
    if logprob.dim() != 3 or not len(logprob):
        raise ValueError(f"logprob: expected shape (depths, B, T), got {tuple(logprob.shape)}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: expected None with reduction {reduction!r}, got {num_items}")
    weights = _weights(depth_weights, len(logprob))
    valid = checks.as_bool_mask(mask, logprob, "logprob")
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    losses = torch.where(valid, -logprob.to(dtype), 0)
    totals, tokens = (x.flatten(1).sum(1).unbind() for x in (losses, valid))
    for depth, (total, count) in enumerate(zip(totals, tokens, strict=True)):
        mean = total / count.clamp(min=1)
        record(metrics, **{f"tokens_{depth}": count, f"cross_entropy_{depth}": mean})
    if reduction == "none":
        return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)])
    if reduction == "mean":
        divisors = _divisors(num_items, tokens)
        totals = tuple(
            divide(total, "num_items", n) for total, n in zip(totals, divisors, strict=True)
        )
    return torch.stack([w * total for w, total in zip(weights, totals, strict=True)]).sum()


def _weights(given: float | Sequence[float], depths: int) -> list[float]:
    """One weight for each depth."""
    if isinstance(given, (str, Tensor)) or not isinstance(given, Sequence):
        share = _weight(given) / max(1, depths - 1)
        return [1.0, *[share] * (depths - 1)]
    weights = [_weight(value) for value in given]
    if len(weights) != depths:
        raise ValueError(
            f"depth_weights: expected a number, or one for each of {depths} depths, "
            f"got {len(weights)}"
        )
    return weights


def _weight(value: object) -> float:
    weight = checks.number("depth_weights", value)
    if not 0 <= weight < math.inf:
        raise ValueError(f"depth_weights: expected finite numbers of at least 0, got {value}")
    return weight


def _divisors(
    num_items: float | Tensor | None, tokens: tuple[Tensor, ...]
) -> Sequence[float | Tensor]:
    """What the sum of each depth is divided by."""
    if num_items is None:
        return tokens
    if isinstance(num_items, Tensor) and num_items.dim() == 1 and len(num_items) == len(tokens):
        return num_items.unbind()
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(
            f"num_items: expected one number, or one for each of {len(tokens)} depths, got shape "
            f"{tuple(num_items.shape)}"
        )
    return [num_items] * len(tokens)


class MultiTokenLoss(Loss):
    """`multi_token_loss` with its options held by a module; call it on ``(logprob, mask)``.

    Args:
        depth_weights, reduction: as in `multi_token_loss`.
    """

    function = staticmethod(multi_token_loss)

    depth_weights: float | Sequence[float] = 0.3
    reduction: Reduction = "mean"

    def _check_options(self) -> None:
        given = self.depth_weights
        depths = len(given) if isinstance(given, (list, tuple)) else 2
        if not depths:
            raise ValueError("depth_weights: expected a weight for each depth, got none")
        one = torch.zeros(depths, 1, 1, device="cpu")
        self.function(one, torch.ones_like(one), **self.options)

    def from_hidden(
        self,
        hidden: Tensor,  # (K, ..., T, D)
        weight: Tensor | Sequence[Tensor],  # (V, D), (K, V, D) or K of (V, D)
        target: Tensor,  # (K, ..., T)
        *args: Any,
        bias: Tensor | Sequence[Tensor | None] | None = None,  # (V,), (K, V) or K of (V,)
        ignore_index: int = IGNORE_INDEX,
        num_items: float | Tensor | None = None,
        metrics: Metrics | None = None,
        **head: Any,
    ) -> Tensor:
        """The loss from the hidden states of every depth and one head, or one head for each.

        One head is one pass over the vocabulary for the tokens of all depths; several are computed
        in turn, in the same workspace. Gradients are exact for every head.

        Args:
            hidden: the states at the head, depth by depth; ``hidden.expand(K, ...)`` where all
                heads read the same.
            weight: (V, D), the head that all depths share; or one for each depth, (K, V, D) or a
                sequence of (V, D), whose V may differ. DTensors with ``Shard(0)`` are
                vocab-parallel.
            target: of `multi_token_targets`. A position where it is `ignore_index` does not count.
            bias: as `weight`; None for no bias.
            num_items, metrics: as in `multi_token_loss`. The metrics also have, of each depth,
                ``token_accuracy_0``, and of each beyond the first ``agreement_1``: the share of its
                targets of which it predicts what depth 0 does when it gets there: how often greedy
                speculative decoding accepts its draft after the true tokens.
            head: logit_scale, softcap, temperature, logits_dtype, deterministic, workspace,
                gradient of `ift_kernels.linear_logprobs`, the same for all depths.

        Returns:
            As `multi_token_loss`; the shape of `target` for "none".

        Raises:
            As `ift_kernels.linear_logprobs` and `multi_token_loss`; ValueError for another number
            of heads than of depths.

        >>> hidden, weight = torch.randn(2, 3, 6, 16), torch.randn(50, 16)
        >>> target = multi_token_targets(torch.randint(50, (3, 6)), 2)
        >>> loss = MultiTokenLoss(depth_weights=0.1)
        >>> value = loss.from_hidden(hidden, weight, target)
        >>> [int(loss.metrics[f"tokens_{depth}"]) for depth in range(2)]
        [15, 12]
        >>> several = loss.from_hidden(hidden, [weight, weight], target)
        >>> torch.allclose(value, several)
        True
        """
        if args:
            raise TypeError(
                f"from_hidden: expected (hidden, weight, target), got {3 + len(args)} tensors"
            )
        checks.floating("hidden", hidden)
        if hidden.dim() < 3 or not len(hidden):
            raise ValueError(
                f"hidden: expected shape (depths, ..., T, D), got {tuple(hidden.shape)}"
            )
        target = checks.token_ids("target", target, hidden.shape[:-1], hidden.device)
        head["ignore_index"] = ignore_index
        logprob, predicted = _passes(hidden, weight, target, bias, head)
        self.metrics = {} if metrics is None else metrics
        rows = len(target), -1, target.shape[-1]
        mask = target != ignore_index
        value = self.function(
            logprob.reshape(rows), mask.reshape(rows), num_items=num_items, metrics=self.metrics,
            **self.options,
        )  # fmt: skip
        record(self.metrics, **_predictions(predicted, target, mask))
        return value.view(target.shape) if value.dim() else value


def _passes(
    hidden: Tensor,
    weight: Tensor | Sequence[Tensor],
    target: Tensor,
    bias: Tensor | Sequence[Tensor | None] | None,
    head: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and predicted ids of every depth, shaped like `target`."""
    if isinstance(weight, Tensor) and weight.dim() == 2:
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected (V,) for one head, got {type(bias).__name__}")
        return _one_pass(hidden, weight, target, bias, head)
    heads = _of_depths("weight", weight, len(hidden))
    biases = [None] * len(heads) if bias is None else _of_depths("bias", bias, len(hidden))
    found = [
        _one_pass(h, cast(Tensor, w), t, b, head)
        for h, w, t, b in zip(hidden, heads, target, biases, strict=True)
    ]
    logprob, predicted = zip(*found, strict=True)
    return torch.stack(logprob), torch.stack(predicted)


def _one_pass(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, head: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    stats = logprobs(hidden, weight, target, bias=bias, outputs=("logprob", "argmax"), **head)
    return cast(Tensor, stats.logprob), cast(Tensor, stats.argmax)


def _of_depths(name: str, value: Any, depths: int) -> Sequence[Tensor | None]:
    """One tensor for each depth, of a stacked one or a sequence."""
    if isinstance(value, Tensor):
        if is_sharded(value):
            raise TypeError(
                f"{name}: expected a sequence of sharded tensors, got a stacked DTensor"
            )
        parts = [*value.unbind()] if value.dim() == (3 if name == "weight" else 2) else []
    else:
        parts = [*value]
    if len(parts) != depths:
        came = tuple(value.shape) if isinstance(value, Tensor) else f"{len(parts)} tensors"
        raise ValueError(f"{name}: expected one for all depths or for each of {depths}, got {came}")
    return parts


def _predictions(predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``token_accuracy`` of each depth, and ``agreement`` with depth 0 of those beyond it."""
    found = {}
    for depth in range(len(target)):
        right = (predicted[depth] == target[depth]) & mask[depth]
        found[f"token_accuracy_{depth}"] = _share(right, mask[depth])
    for depth in range(1, len(target)):
        # Depth 0 predicts the same token `depth` positions later.
        later, ahead = (0, ..., slice(depth, None)), (depth, ..., slice(None, -depth))
        same_token = mask[later] & mask[ahead] & (target[later] == target[ahead])
        agrees = same_token & (predicted[later] == predicted[ahead])
        found[f"agreement_{depth}"] = _share(agrees, same_token)
    return found


def _share(some: Tensor, of: Tensor) -> Tensor:
    return some.sum() / of.sum().clamp(min=1)
