"""Distillation of hidden states by their angle, with the labels' cross-entropy where wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ift.documents import IGNORE_INDEX
from ift.losses._module import Loss
from ift.losses._reduce import reduce_tokens
from ift.losses._tokens import Metrics, check_given, record
from ift.sharded import logprobs
from ift_kernels.common import checks

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def cosine_distillation_loss(
    hidden: Tensor,  # (..., D)
    mask: Tensor,  # (...)
    teacher_hidden: Tensor,  # (..., E)
    *,
    projection: Callable[[Tensor], Tensor] | None = None,
    hard_weight: float = 0.0,
    label_logprob: Tensor | None = None,  # (...)
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """One minus the cosine of the angle between a student's and a teacher's hidden states.

    In eager torch (DistilBERT's term, arXiv 1910.01108)::

        student = hidden if projection is None else projection(hidden)
        distance = 1 - F.cosine_similarity(student.float(), teacher_hidden.float(), dim=-1)
        loss = (1 - hard_weight) * distance - hard_weight * label_logprob
        mean     loss[mask].sum() / mask.sum()                              # or / num_items

    It sees directions alone: neither the length of a hidden state nor the heads. A token counts by
    itself, so padded and packed batches are the same. ``CosineDistillationLoss.from_hidden``
    computes `label_logprob` in one pass over the head.

    Args:
        hidden: the student's, of a layer or the last one; values off the mask are never read.
        mask: (...) bool, or 0/1 of any dtype: tokens that count.
        teacher_hidden: (..., E), constants; E is D, or the width that `projection` gives.
        projection: of the student's hidden states to the teacher's width, such as a
            ``torch.nn.Linear`` that is trained with the student. Default None: the widths are one.
        hard_weight: in [0, 1], share of the cross-entropy of the labels. Default 0.
        label_logprob: (...) the student's log-probability of the label, for `hard_weight`.
        reduction: "mean" over the tokens that count, "sum", or "none".
        num_items: for "mean", divide by this instead: the tokens of the whole optimizer step.
        metrics: a dict that gets ``tokens`` and ``distance``, detached; with `hard_weight` also
            ``cross_entropy``.

    Returns:
        Scalar, or (...) for "none", 0 off the mask; float64 for float64 inputs, else float32. The
        distance is in [0, 2], and 1 where a hidden state is 0. Gradients for the student and
        `projection`.

    Raises:
        TypeError, ValueError: options out of range, shapes that do not match, widths that differ
            without `projection`, an option without the tensor that it needs or a tensor without its
            option.

    >>> student, teacher = torch.randn(3, 8), torch.randn(3, 16)
    >>> up = torch.nn.Linear(8, 16, bias=False)
    >>> loss = cosine_distillation_loss(student, torch.tensor([1, 1, 0]), teacher, projection=up)
    >>> distance = 1 - torch.nn.functional.cosine_similarity(up(student), teacher)
    >>> torch.allclose(loss, distance[:2].mean())
    True
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    if not 0 <= checks.number("hard_weight", hard_weight) <= 1:
        raise ValueError(f"hard_weight: expected in [0, 1], got {hard_weight}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: expected None with reduction {reduction!r}, got {num_items}")
    check_given("label_logprob", label_logprob, "hard_weight", hard_weight > 0, needed=True)
    checks.floating("hidden", hidden)
    checks.floating("teacher_hidden", teacher_hidden)
    if hidden.dim() < 1:
        raise ValueError(f"hidden: expected shape (..., D), got {tuple(hidden.shape)}")
    valid = checks.as_bool_mask(mask, hidden[..., 0], "hidden without its last dimension")
    # Before the projection: what is off the mask, NaN and all, has no gradient.
    student = torch.where(valid[..., None], hidden, 0)
    student = student if projection is None else projection(student)
    if teacher_hidden.shape != student.shape:
        made = "hidden" if projection is None else "what projection gives"
        raise ValueError(
            f"teacher_hidden: expected the shape of {made}, {tuple(student.shape)}, got "
            f"{tuple(teacher_hidden.shape)}"
        )
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    teacher = torch.where(valid[..., None], teacher_hidden.detach(), 0).to(dtype)
    distance = 1 - F.cosine_similarity(student.to(dtype), teacher, dim=-1)
    each = torch.where(valid, distance, 0)
    tokens = valid.sum()
    count = tokens.clamp(min=1)
    record(metrics, tokens=tokens, distance=each.sum() / count)
    if label_logprob is not None:
        checks.floating("label_logprob", label_logprob)
        checks.same_shape("label_logprob", label_logprob, valid, "mask")
        hard = torch.where(valid, -label_logprob.to(dtype), 0)
        record(metrics, cross_entropy=hard.sum() / count)
        each = (1 - hard_weight) * each + hard_weight * hard
    return reduce_tokens(each, reduction, tokens, num_items)


class CosineDistillationLoss(Loss):
    """`cosine_distillation_loss` with its options held by a module; call it on
    ``(hidden, mask, teacher_hidden)``.

    Args:
        projection, hard_weight, reduction: as in `cosine_distillation_loss`. The parameters of a
            projection that is a module are parameters of the loss, for the optimizer to take.
    """

    function = staticmethod(cosine_distillation_loss)

    projection: Callable[[Tensor], Tensor] | None = None
    hard_weight: float = 0.0
    reduction: Reduction = "mean"

    def _check_options(self) -> None:
        one = torch.ones(1, 1, device="cpu")
        hard = isinstance(self.hard_weight, (int, float)) and self.hard_weight > 0
        given: dict[str, Any] = {"label_logprob": one[0]} if hard else {}
        if self.projection is not None and not callable(self.projection):
            raise TypeError(f"projection: expected a function or None, got {self.projection!r}")
        # A projection takes hidden states of its own width alone.
        options = {**self.options, "projection": None}
        self.function(one, one[0], one, **given, **options)

    def from_hidden(
        self,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (...)
        *args: Tensor,  # teacher_hidden, (..., E)
        ignore_index: int = IGNORE_INDEX,
        num_items: float | Tensor | None = None,
        metrics: Metrics | None = None,
        **head: Any,
    ) -> Tensor:
        """The loss from the last hidden states and a head: ``(hidden, weight, target,
        teacher_hidden)``. One pass over the head for the labels, none without `hard_weight`.

        Args:
            hidden: of the student's last layer, at its head.
            weight: of the student's head.
            target: (...) labels, shifted. A token where it is `ignore_index` does not count; the
                values matter with `hard_weight` only.
            teacher_hidden: (..., E), as `num_items` and `metrics` described at
                `cosine_distillation_loss`.
            head: with `hard_weight`, bias, logit_scale, softcap, temperature, logits_dtype,
                deterministic, workspace, gradient of `ift_kernels.linear_logprobs`; of a head that
                is sharded along its vocabulary, of `ift_kernels.vocab_parallel_logprobs`.

        Returns:
            As `cosine_distillation_loss`, (...) for "none".

        Raises:
            As `ift_kernels.linear_logprobs` and `cosine_distillation_loss`; ValueError for options
            of the head without `hard_weight`.

        >>> hidden, weight, target = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([4, 7, 1])
        >>> loss = CosineDistillationLoss(hard_weight=0.5)
        >>> loss.from_hidden(hidden, weight, target, torch.randn(3, 8)).shape, sorted(loss.metrics)
        (torch.Size([]), ['cross_entropy', 'distance', 'tokens'])
        """
        if len(args) != 1:
            raise TypeError(
                "from_hidden: expected (hidden, weight, target, teacher_hidden), got "
                f"{3 + len(args)} tensors"
            )
        (teacher_hidden,) = args
        given: dict[str, Any] = {}
        if self.hard_weight > 0:
            found = logprobs(hidden, weight, target, ignore_index=ignore_index, **head)
            given["label_logprob"] = found.logprob
        elif head:
            name = next(iter(head))
            raise ValueError(f"{name}: expected none without hard_weight, got {head[name]!r}")
        self.metrics = {} if metrics is None else metrics
        return self.function(
            hidden, target != ignore_index, teacher_hidden, num_items=num_items,
            metrics=self.metrics, **given, **self.options,
        )  # fmt: skip
