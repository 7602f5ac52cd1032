"""What the losses with classes or probabilities as targets share: options, weights, reductions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ift_kernels.common import checks
from ift_kernels.operators import dense_targets, head_call, weighted_products  # noqa: F401
from ift_kernels.schedule.accumulate import accum_dtype


class CrossEntropyStats(NamedTuple):
    """A loss, and statistics without gradient from the same pass; 0 at ignored positions."""

    loss: Tensor  # as without statistics
    accuracy: Tensor  # scalar: share of the targets not ignored that are predicted; 0 of none
    predicted: Tensor  # like target, int64: the id of the largest logit
    entropy: Tensor  # like target: of the distribution, in nats
    z_loss: Tensor  # like loss: its z-loss term, included in it


@dataclass(frozen=True)
class LossOptions:
    """Smoothing, z-loss and reduction of a loss, checked."""

    label_smoothing: float
    z_loss: float
    reduction: str
    num_items: float | Tensor | None

    @classmethod
    def checked(
        cls,
        label_smoothing: float,
        z_loss: float,
        reduction: str,
        num_items: float | Tensor | None,
    ) -> LossOptions:
        """The options of the public arguments, or a ValueError that names the bad one."""
        checks.one_of("reduction", reduction, ("mean", "sum", "none"))
        label_smoothing = checks.number("label_smoothing", label_smoothing)
        z_loss = checks.number("z_loss", z_loss)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected in [0, 1), got {label_smoothing}")
        if not 0.0 <= z_loss < float("inf"):
            raise ValueError(f"z_loss: expected a finite number ≥ 0, got {z_loss}")
        if num_items is not None and reduction != "mean":
            raise ValueError(
                f"num_items: only divides reduction 'mean', got reduction {reduction!r}"
            )
        return cls(label_smoothing, z_loss, reduction, num_items)

    def factor(self, counted: Tensor) -> Tensor:
        """What the sum of the losses is multiplied by, float64 scalar.

        `counted`: the valid tokens (bool), or their weights, 0 where not valid.
        """
        if self.reduction == "sum":
            return torch.ones((), dtype=torch.float64, device=counted.device)
        if self.num_items is not None:
            return checks.reciprocal("num_items", self.num_items, counted.device)
        if counted.dtype == torch.bool:
            return counted.sum().clamp(min=1).double().reciprocal()
        # Weights of both signs may sum to 0: an infinite mean, as of torch.
        return torch.where((counted == 0).all(), 0.0, counted.sum().reciprocal())

    def reduced(self, loss: Tensor, factor: Tensor) -> Tensor:
        """The losses of tokens, or their sum times `factor`."""
        return loss if self.reduction == "none" else (loss.double().sum() * factor).to(loss.dtype)


def check_class_weight(class_weight: Tensor, weight: Tensor) -> None:
    """Refuse what is no weight of each class of a head (V, D)."""
    checks.floating("class_weight", class_weight)
    if tuple(class_weight.shape) != (weight.shape[0],):
        raise ValueError(
            f"class_weight: expected shape (V,) with V={weight.shape[0]}, "
            f"got {tuple(class_weight.shape)}"
        )
    if class_weight.device != weight.device:
        raise ValueError(
            f"class_weight: expected on {weight.device} like weight, got {class_weight.device}"
        )
    if class_weight.requires_grad:
        raise ValueError("class_weight: expected a tensor without gradient, got requires_grad=True")


def check_deterministic(deterministic: bool, label_smoothing: float) -> None:
    """Refuse what `uniform_loss` does not promise."""
    if label_smoothing and deterministic:
        raise ValueError(
            "deterministic: expected False with label_smoothing and class_weight, whose sum over "
            "the vocabulary depends on the threads, got True"
        )


def weight_of_targets(class_weight: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """(N,) float64, 0 where not valid. A target outside the vocabulary has NaN as its loss."""
    at = target.clamp(0, len(class_weight) - 1)
    return class_weight.double()[at].masked_fill(~valid, 0.0)


def accuracy(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Share of the valid targets that are predicted, float32; 0 of none."""
    right = ((predicted == target) & valid).sum()
    return (right / valid.sum().clamp(min=1)).float()


def uniform_loss(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    class_weight: Tensor | None,  # (V,); None: 1
    valid: Tensor,  # (...) tokens whose loss is taken
    lse: Tensor,  # (...)
    options: head_call.Options,
) -> Tensor:
    """``-(class_weight * log_softmax(z)).sum(-1) / V``, the loss against uniform targets.

    Without softcap the sum of logits is h·(Wᵀw): a matrix-vector product of the head. With one it
    is a cross-entropy against dense targets.
    """
    if class_weight is None:
        class_weight = torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
    rows, w = hidden.reshape(-1, hidden.shape[-1]), class_weight.to(torch.float64)
    if options.softcap:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "softcap: expected None in a compiled graph with label_smoothing and class_weight "
                f"or ids, got {options.softcap}"
            )
        share = (w / len(weight)).to(accum_dtype(options.dtype))
        cross, _ = dense_targets.cross_entropy(
            rows, weight, bias, valid.reshape(-1),
            lambda columns: share[columns].expand(len(rows), -1), options,
        )  # fmt: skip
        return cross.view(lse.shape)
    logits = torch.ops.ift_kernels.weighted_products(rows, weight, w)[0].view(lse.shape)
    if bias is not None:
        logits = logits + w @ bias.double()
    logits = logits * (options.scale / options.temperature)
    loss: Tensor = (w.sum() * lse.double() - logits) / len(weight)
    return torch.where(valid, loss, 0.0).to(lse.dtype)


def heads_of(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, d1, ..., dK, D)
    bias: Tensor | None,  # (V, d1, ..., dK)
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The head (V, D) and bias (V,) at every output position: one of each where K is 0."""
    heads: tuple[Tensor, ...] = (weight,)
    biases: tuple[Tensor | None, ...] = (bias,)
    if isinstance(weight, Tensor) and weight.dim() > 2:
        checks.plain_floating("hidden", hidden)
        if not weight.numel():
            raise ValueError(f"weight: expected no dimension of size 0, got {tuple(weight.shape)}")
        heads = weight.flatten(1, -2).unbind(1)
        biases = (None,) * len(heads)
        if bias is not None:
            checks.floating("bias", bias)
            if bias.shape != weight.shape[:-1]:
                raise ValueError(
                    f"bias: expected shape {tuple(weight.shape[:-1])} like weight without D, "
                    f"got {tuple(bias.shape)}"
                )
            biases = bias.flatten(1).unbind(1)
    checks.head_arguments(hidden, heads[0], biases[0])
    return heads, biases


def of_output_dims(
    cross_entropy: Callable[..., Any],
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, d1, ..., dK, D)
    target: Tensor,  # (..., d1, ..., dK)
    bias: Tensor | None,  # (V, d1, ..., dK)
    class_weight: Tensor | None,  # (V,)
    options: LossOptions,
    return_stats: bool,
    ignore_index: int,
    **others: Any,
) -> Tensor | CrossEntropyStats:
    """`cross_entropy` of the head at every output position, and their common reduction."""
    heads, biases = heads_of(hidden, weight, bias)
    tokens, dims = hidden.shape[:-1], weight.shape[1:-1]
    target = checks.token_ids("target", target, torch.Size((*tokens, *dims)), hidden.device)
    targets = target.reshape(*tokens, len(heads)).unbind(-1)
    found = [
        cross_entropy(
            hidden, head, of_head, bias=b, class_weight=class_weight, ignore_index=ignore_index,
            label_smoothing=options.label_smoothing, z_loss=options.z_loss, reduction="none",
            return_stats=return_stats, **others,
        )
        for head, b, of_head in zip(heads, biases, targets, strict=True)
    ]  # fmt: skip
    valid = target != ignore_index
    counted = valid if class_weight is None else weight_of_targets(class_weight, target, valid)
    factor = options.factor(counted)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts, -1).view(target.shape)

    if not return_stats:
        return options.reduced(joined(found), factor)
    loss, predicted, entropy, z_loss = (
        joined([getattr(stats, name) for stats in found])
        for name in ("loss", "predicted", "entropy", "z_loss")
    )
    return CrossEntropyStats(
        options.reduced(loss, factor), accuracy(predicted, target, valid), predicted, entropy,
        options.reduced(z_loss, factor),
    )  # fmt: skip
