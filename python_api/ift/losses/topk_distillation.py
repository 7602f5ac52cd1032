"""Distillation from the log-probabilities of some ids of a teacher, as stored or sent by it."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ift.documents import IGNORE_INDEX
from ift.losses._module import Loss
from ift.losses._reduce import reduce_tokens
from ift.losses._tokens import Metrics, check_given, record
from ift.sharded import selected_logprobs
from ift_kernels import SelectedLogprobs
from ift_kernels.common import checks

Kind = Literal["forward", "reverse", "jsd"]
KINDS = ("forward", "reverse", "jsd")
Tail = Literal["bucket", "drop"]
TAILS = ("bucket", "drop")
Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def topk_distillation_loss(
    logprob: Tensor,  # (..., K)
    mask: Tensor,  # (..., K)
    teacher_logprob: Tensor,  # (..., K)
    *,
    kind: Kind = "forward",
    beta: float = 0.5,
    tail: Tail = "bucket",
    tail_logprob: Tensor | None = None,  # (...)
    teacher_tail_logprob: Tensor | None = None,  # (...)
    hard_weight: float = 0.0,
    label_logprob: Tensor | None = None,  # (...)
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    metrics: Metrics | None = None,
) -> Tensor:
    """Divergence from a teacher of which K log-probabilities per token are known.

    In eager torch, for a token without padding::

        bucket   s = cat([logprob, tail_logprob[..., None]], -1)            # K + 1 outcomes
                 t = cat([teacher_logprob, teacher_tail_logprob[..., None]], -1)
        drop     s, t = logprob.log_softmax(-1), teacher_logprob.log_softmax(-1)
        forward  (t.exp() * (t - s)).sum(-1)                                # KL(teacher ‖ student)
        reverse  (s.exp() * (s - t)).sum(-1)                                # KL(student ‖ teacher)
        m = logaddexp(s + log(1 - beta), t + log(beta))
        jsd      ((1 - beta) * s.exp() * (s - m) + beta * t.exp() * (t - m)).sum(-1)
        loss = (1 - hard_weight) * divergence - hard_weight * label_logprob
        mean     loss.sum() / tokens                                        # or / num_items

    ``TopKDistillationLoss.from_hidden`` computes all of the student's in one pass over the head.

    Args:
        logprob: the student's, of the teacher's ids, as `ift_kernels.linear_selected_logprobs`
            gives; with "drop" up to a constant per token. Padding is never read.
        mask: same shape; bool, or 0/1 of any dtype: ids that are no padding. A token without any
            does not count. To leave a token out, set all of its ids to 0.
        teacher_logprob: same shape, of the temperature that the student's have; constants.
        kind: "forward" (default; covers what the teacher says), "reverse", or "jsd".
        beta: of "jsd", in (0, 1): the teacher's share of the mixture.
        tail: what becomes of the other ids. "bucket": they are one more outcome, so the loss is at
            most the divergence of the whole distributions, and 0 only where the student's mass
            outside of the set is the teacher's. It is the default since "drop", where both are
            renormalised inside the set, does not see how much the student has outside. Take "drop"
            for a teacher whose log-probabilities are known inside a set only.
        tail_logprob: the student's log-probability of all other ids, for "bucket", which needs it.
            A token where it is -inf has no others: the bucket is left out.
        teacher_tail_logprob: the teacher's; default what its ids leave, log(1 - Σ exp), at least
            the rounding of its dtype.
        hard_weight: in [0, 1], share of the cross-entropy of the labels. Default 0.
        label_logprob: the student's log-probability of the label, for `hard_weight`.
        reduction: "mean" over the tokens that have ids, "sum", or "none".
        num_items: for "mean", divide by this instead: the tokens of the whole optimizer step.
        metrics: a dict that gets ``tokens`` and ``divergence``, detached; with `hard_weight` also
            ``cross_entropy``.

    Returns:
        Scalar, or (...) for "none", 0 where no id is; float64 for float64 inputs, else float32.
        Gradients for the student alone. inf for "reverse" where a probability of the teacher is 0
        and the student's is not, for "forward" the other way round; where both are 0, nothing.

    Raises:
        TypeError, ValueError: options out of range, shapes that do not match, an option without the
            tensor that it needs or a tensor without its option, probabilities of a token that sum
            to more than 1 with "bucket", the tail's included (on a GPU only with ``IFT_DEBUG=1``;
            the token's loss is NaN else).

    >>> student, teacher = (torch.randn(2, 50).log_softmax(-1) for _ in range(2))
    >>> values, ids = teacher.topk(8)
    >>> rest = student.scatter(-1, ids, -torch.inf).logsumexp(-1)
    >>> mine, mask = student.gather(-1, ids), torch.ones(2, 8)
    >>> bucket = topk_distillation_loss(mine, mask, values, tail_logprob=rest)
    >>> whole = (teacher.exp() * (teacher - student)).sum(-1).mean()
    >>> 0 < bucket < whole
    tensor(True)
    """
    checks.one_of("kind", kind, KINDS)
    checks.one_of("tail", tail, TAILS)
    checks.one_of("reduction", reduction, REDUCTIONS)
    if not 0 < checks.number("beta", beta) < 1:
        raise ValueError(f"beta: expected in (0, 1), got {beta}")
    if not 0 <= checks.number("hard_weight", hard_weight) <= 1:
        raise ValueError(f"hard_weight: expected in [0, 1], got {hard_weight}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: expected None with reduction {reduction!r}, got {num_items}")
    check_given("tail_logprob", tail_logprob, "tail 'bucket'", tail == "bucket", needed=True)
    check_given("teacher_tail_logprob", teacher_tail_logprob, "tail 'bucket'", tail == "bucket")
    check_given("label_logprob", label_logprob, "hard_weight", hard_weight > 0, needed=True)
    checks.floating("logprob", logprob)
    if logprob.dim() < 1 or not logprob.shape[-1]:
        raise ValueError(f"logprob: expected shape (..., K), got {tuple(logprob.shape)}")
    there = checks.as_bool_mask(mask, logprob, "logprob")
    valid = there.any(-1)
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    student = torch.where(there, logprob.to(dtype), 0)
    checks.floating("teacher_logprob", teacher_logprob)
    checks.same_shape("teacher_logprob", teacher_logprob, logprob, "logprob")
    teacher = torch.where(there, teacher_logprob.detach().to(dtype), 0)
    if tail_logprob is not None:
        mine = _per_token("tail_logprob", tail_logprob, logprob).to(dtype)
        left = _check_mass("logprob", student, there, logprob.dtype, mine)
        mine = torch.where(left.isnan(), torch.nan, mine)
        if teacher_tail_logprob is None:
            left = _check_mass("teacher_logprob", teacher, there, teacher_logprob.dtype)
            rest = left.clamp(min=torch.finfo(teacher_logprob.dtype).eps).log().to(dtype)
        else:
            rest = _per_token("teacher_tail_logprob", teacher_tail_logprob, logprob)
            rest = rest.detach().to(dtype)
            left = _check_mass("teacher_logprob", teacher, there, teacher_logprob.dtype, rest)
            rest = torch.where(left.isnan(), torch.nan, rest)
        # Without other ids the teacher's rest is nothing but rounding.
        others = valid & (mine != -torch.inf)
        there = torch.cat([there, others[..., None]], -1)
        student = torch.cat([student, torch.where(others, mine, 0)[..., None]], -1)
        teacher = torch.cat([teacher, torch.where(others, rest, 0)[..., None]], -1)
    else:
        student, teacher = _inside(student, there), _inside(teacher, there)
    each = torch.where(valid, _divergence(student, teacher, there, kind, beta), 0)
    tokens = valid.sum()
    count = tokens.clamp(min=1)
    record(metrics, tokens=tokens, divergence=each.sum() / count)
    if label_logprob is not None:
        label = _per_token("label_logprob", label_logprob, logprob)
        hard = torch.where(valid, -label.to(dtype), 0)
        record(metrics, cross_entropy=hard.sum() / count)
        # At 1 an infinite divergence counts for nothing.
        each = hard if hard_weight == 1 else (1 - hard_weight) * each + hard_weight * hard
    return reduce_tokens(each, reduction, tokens, num_items)


def _per_token(name: str, value: Tensor, logprob: Tensor) -> Tensor:
    checks.floating(name, value)
    checks.same_shape(name, value, logprob[..., 0], "logprob without its last dimension")
    return value


def _inside(logprob: Tensor, there: Tensor) -> Tensor:
    """``log_softmax`` over the ids that are `there`; 0 elsewhere."""
    filled = logprob.masked_fill(~there, -torch.inf)
    # A token without any would be NaN, in backward too.
    filled = filled.masked_fill(~there.any(-1, keepdim=True), 0)
    return torch.where(there, filled.log_softmax(-1), 0)


def _check_mass(
    name: str, logprob: Tensor, there: Tensor, dtype: torch.dtype, tail: Tensor | None = None
) -> Tensor:
    """What the probabilities of each token leave of 1, float64; NaN where they are more than 1.

    Args:
        dtype: that they were rounded to.
    """
    mass = torch.where(there, logprob.detach().double().exp(), 0).sum(-1)
    if tail is not None:
        mass = mass + torch.where(there.any(-1), tail.detach().double().exp(), 0)
    limit = 1 + max(0.01, 4 * torch.finfo(dtype).eps)
    if logprob.device.type == "cpu" or checks.debugging():
        most = float(mass.max()) if mass.numel() else 0.0
        if most > limit:
            raise ValueError(
                f"{name}: expected log-probabilities over the whole vocabulary with tail 'bucket', "
                f"got probabilities of a token that sum to {most:.6g}"
            )
    return torch.where(mass > limit, torch.nan, 1 - mass)


def _divergence(s: Tensor, t: Tensor, there: Tensor, kind: str, beta: float) -> Tensor:
    """Of log-probabilities (..., outcomes), over those that are `there`; 0 · log 0 is 0."""
    there = there & ~((s == -torch.inf) & (t == -torch.inf))
    s, t = torch.where(there, s, 0), torch.where(there, t, 0)
    if kind == "forward":
        each = _expected(t, t - s)
    elif kind == "reverse":
        each = _expected(s, s - t)
    else:
        m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
        each = (1 - beta) * _expected(s, s - m) + beta * _expected(t, t - m)
    return torch.where(there, each, 0).sum(-1)


def _expected(logprob: Tensor, value: Tensor) -> Tensor:
    """``logprob.exp() * value``, 0 where the probability is, whatever the value."""
    probability = logprob.exp()
    return probability * torch.where(probability == 0, 0, value)


class TopKDistillationLoss(Loss):
    """`topk_distillation_loss` with its options held by a module; call it on
    ``(logprob, mask, teacher_logprob)``.

    Args:
        kind, beta, tail, hard_weight, reduction: as in `topk_distillation_loss`.
    """

    function = staticmethod(topk_distillation_loss)

    kind: Kind = "forward"
    beta: float = 0.5
    tail: Tail = "bucket"
    hard_weight: float = 0.0
    reduction: Reduction = "mean"

    def _check_options(self) -> None:
        one = torch.zeros(1, 1, device="cpu")  # of one id that is certain
        given: dict[str, Any] = {"tail_logprob": one[0].log()} if self.tail == "bucket" else {}
        given |= {"label_logprob": one[0]} if _is_above_0(self.hard_weight) else {}
        self.function(one, torch.ones_like(one), one, **given, **self.options)

    def from_hidden(
        self,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (...)
        *args: Tensor,  # ids and teacher_logprob, (..., K)
        ignore_index: int = IGNORE_INDEX,
        teacher_tail_logprob: Tensor | None = None,
        num_items: float | Tensor | None = None,
        metrics: Metrics | None = None,
        **head: Any,
    ) -> Tensor:
        """The loss from hidden states and a head: ``(hidden, weight, target, ids,
        teacher_logprob)``. One pass over the head, for the labels too; no logits.

        Args:
            hidden, weight: of the student.
            target: (...) labels, shifted. A token where it is `ignore_index` does not count; the
                values matter with `hard_weight` only.
            ids: (..., K) of the teacher, padded with `ignore_index`; K at most 512, with
                `hard_weight` 511.
            teacher_logprob: (..., K), see `topk_distillation_loss`, as `teacher_tail_logprob`,
                `num_items` and `metrics`.
            head: bias, logit_scale, softcap, temperature, logits_dtype, deterministic, workspace of
                `ift_kernels.linear_selected_logprobs`; of a head that is sharded along its
                vocabulary, of `ift_kernels.vocab_parallel_selected_logprobs`.

        Returns:
            As `topk_distillation_loss`, (...) for "none".

        Raises:
            As `ift_kernels.linear_selected_logprobs` and `topk_distillation_loss`.

        >>> hidden, weight, target = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([4, 7, 1])
        >>> values, ids = torch.randn(3, 50).log_softmax(-1).topk(6)
        >>> loss = TopKDistillationLoss(hard_weight=0.5)
        >>> loss.from_hidden(hidden, weight, target, ids, values).shape, sorted(loss.metrics)
        (torch.Size([]), ['cross_entropy', 'divergence', 'tokens'])
        """
        if len(args) != 2:
            raise TypeError(
                "from_hidden: expected (hidden, weight, target, ids, teacher_logprob), got "
                f"{3 + len(args)} tensors"
            )
        ids, teacher_logprob = args
        if not isinstance(ids, Tensor) or ids.dim() != hidden.dim():
            came = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"ids: expected (..., K) for hidden {tuple(hidden.shape)}, got {came}")
        target = checks.token_ids("target", target, ids.shape[:-1], ids.device)
        ids = ids.masked_fill((target == ignore_index)[..., None], ignore_index)
        mask = ids != ignore_index
        given: dict[str, Any] = {}
        if self.tail == "bucket":
            given["teacher_tail_logprob"] = teacher_tail_logprob
        elif teacher_tail_logprob is not None:
            raise ValueError("teacher_tail_logprob: expected None with tail 'drop', got a tensor")
        head["ignore_index"] = ignore_index
        if self.hard_weight > 0:
            label = torch.where(mask.any(-1), target, ignore_index)
            found, given["label_logprob"] = selected_with_label(
                hidden, weight, ids, label, tail=self.tail == "bucket", **head
            )
            logprob = found.logprob
        elif self.tail == "bucket":
            outputs = ("logprob", "tail_logprob")
            found = selected_logprobs(hidden, weight, ids, outputs=outputs, **head)
            logprob = found.logprob
        else:  # forms the products of the ids alone, where that is cheaper
            found = selected_logprobs(hidden, weight, ids, outputs=("in_set_logprob",), **head)
            logprob = found.in_set_logprob
        if self.tail == "bucket":
            given["tail_logprob"] = found.tail_logprob
        self.metrics = {} if metrics is None else metrics
        return self.function(
            cast(Tensor, logprob), mask, teacher_logprob, num_items=num_items,
            metrics=self.metrics, **given, **self.options,
        )  # fmt: skip


def _is_above_0(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


def selected_with_label(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (..., K)
    label: Tensor,  # (...)
    *,
    ignore_index: int = IGNORE_INDEX,
    tail: bool = True,
    **head: Any,
) -> tuple[SelectedLogprobs, Tensor]:
    """``logprob`` of ids, ``tail_logprob`` of all others, and of the labels, in one pass.

    Args:
        label: `ignore_index` where there is none: its log-probability is 0.
        tail: whether the tail is asked for.
        head: options of `ift_kernels.linear_selected_logprobs`.
    """
    k = ids.shape[-1]
    among = ids == label[..., None]
    inside = among.any(-1)
    # One more id where the label is none of the set, which takes nothing from its tail.
    extra = torch.where(inside, ignore_index, label)[..., None]
    outputs = ("logprob", "tail_logprob") if tail else ("logprob",)
    found = selected_logprobs(
        hidden, weight, torch.cat([ids, extra], -1), outputs=outputs, ignore_index=ignore_index,
        **head,
    )  # fmt: skip
    assert found.logprob is not None
    of_label = found.logprob[..., k]
    apart = extra[..., 0] != ignore_index
    given = torch.where(among, found.logprob[..., :k], 0).sum(-1)
    rest = found.tail_logprob
    if rest is not None:
        both = torch.logaddexp(rest, torch.where(apart, of_label, -torch.inf))
        rest = torch.where(apart, both, rest)
    labels = torch.where(apart, of_label, given)
    return SelectedLogprobs(logprob=found.logprob[..., :k], tail_logprob=rest), labels
