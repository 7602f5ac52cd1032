"""Log-probabilities within the support of a sampler: what top-k, top-p and min-p leave.

A sampler that truncates renormalises what is left, and reports log-probabilities of that. A trainer
has to normalise over the same ids, or its ratios are wrong by the mass that was cut.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ift import sharded
from ift_kernels import ActiveSet, TokenStats
from ift_kernels.common import checks, sync_free
from ift_kernels.common.active_set import options as active_options
from ift_kernels.linear_selected import MAX_IDS
from ift_kernels.linear_topk import PADDING
from ift_kernels.operators.head_call import check_targets
from ift_kernels.vocab_parallel import whole

MAX_SUPPORT = MAX_IDS - 1  # one more id may be the target
SAMPLERS = ("vllm", "transformers")
STATISTICS = ("logprob", "entropy", "argmax")  # those that are defined within a support


class SupportIds(NamedTuple):
    """The support of every token."""

    ids: Tensor  # (..., K) int64, the target among them, padded with -100
    outside: Tensor  # (...) bool: the target was not among them and is added
    cut: Tensor  # (...) bool: there are more ids than `max_ids`

    def metrics(self, valid: Tensor) -> dict[str, Tensor]:
        """Mean number of ids, and shares of targets outside and cut, of those that are `valid`."""
        kept = valid & ~self.cut
        sizes = (self.ids != PADDING).sum(-1).masked_fill(~kept, 0)
        tokens = valid.sum().clamp(min=1)
        return {
            "support_size": sizes.sum() / kept.sum().clamp(min=1),
            "support_outside": (self.outside & kept).sum() / tokens,
            "support_cut": (self.cut & valid).sum() / tokens,
        }


@dataclass(frozen=True)
class Support:
    """The support of a sampler, rebuilt from the hidden states of its model.

    Of the logits of `ift_kernels.linear_logprobs`, temperature included, each step keeps some ids
    and the next one sees probabilities that are renormalised over those::

        top_k   the k largest, and what ties with the last of them
        top_p   the fewest of the largest whose mass reaches top_p
        min_p   those whose probability is at least min_p times the largest

    in the order of the sampler, which matters where two of them are given: min_p, top_k, top_p in
    vLLM; top_k, top_p, min_p in transformers. Other samplers have other rules: give their ids.

    With `top_k` there are 511 ids at most, ties among them; with ``deterministic`` and in sync-free
    mode a quarter and 8 more than `top_k`.

    A target outside of the support (rounding moved a borderline id, or the model has changed since)
    is added to it. Its log-probability is then finite and has a gradient, and a ratio to it is
    small, as it is to the whole vocabulary.

    Args:
        top_k: 1 to 511; None: no limit.
        top_p: in (0, 1]; None or 1: no limit.
        min_p: in [0, 1]; None or 0: no limit.
        sampler: "vllm" or "transformers".
        max_ids: 1 to 511, the default: the most ids of a sampler without top_k. The mass of a
            larger support is not known, so its token is left out of the loss. Better give the
            sampler itself a `top_k` of up to 511, which rarely binds: then no token is left out.

    Raises:
        TypeError, ValueError: an option out of range; none that limits; `max_ids` beside `top_k`.

    >>> hidden, weight, target = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([4, 7, -100])
    >>> ids, outside, cut = Support(top_k=5, top_p=0.9).ids(hidden, weight, target)
    >>> (ids == target[:, None]).any(-1).tolist(), cut.any().item()
    ([True, True, True], False)
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    sampler: Literal["vllm", "transformers"] = "vllm"
    max_ids: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("top_k", self.top_k), ("max_ids", self.max_ids)):
            if count is not None and not 1 <= checks.integer(name, count) <= MAX_SUPPORT:
                raise ValueError(f"{name}: expected None or 1 to {MAX_SUPPORT}, got {count}")
        if self.top_p is not None and not 0.0 < checks.number("top_p", self.top_p) <= 1.0:
            raise ValueError(f"top_p: expected None or a number in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0.0 <= checks.number("min_p", self.min_p) <= 1.0:
            raise ValueError(f"min_p: expected None or a number in [0, 1], got {self.min_p}")
        checks.one_of("sampler", self.sampler, SAMPLERS)
        if self.top_k is None and self._top_p is None and self._min_p is None:
            raise ValueError(
                "top_k, top_p, min_p: expected one that limits the support, got none; over the "
                "whole vocabulary no support is needed"
            )
        if self.top_k is not None and self.max_ids is not None:
            raise ValueError(f"max_ids: expected None with top_k, got {self.max_ids}")

    @property
    def _top_p(self) -> float | None:
        return None if self.top_p == 1.0 else self.top_p

    @property
    def _min_p(self) -> float | None:
        return self.min_p or None

    def may_cut(self, vocabulary: int) -> bool:
        """Whether a token may have more ids than are taken."""
        return self.top_k is None and (self.max_ids or MAX_SUPPORT) < vocabulary

    @torch.no_grad()
    def ids(
        self,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (...)
        *,
        ignore_index: int = -100,
        **head: Any,
    ) -> SupportIds:
        """The ids of every target's support. No gradient.

        From the hidden states that sampled, they are the support for every step of the update.

        Args:
            hidden, weight: as of `ift_kernels.linear_topk`; a DTensor `weight` may be sharded along
                its vocabulary.
            target: (...) the sampled ids.
            ignore_index: a target with this value has no support.
            head: bias, logit_scale, softcap, temperature, logits_dtype, deterministic, workspace of
                `ift_kernels.linear_topk`.

        Returns:
            SupportIds. Of a token that is `cut` they are too few: leave its target out.
        """
        states = whole(hidden, weight)
        target = checks.token_ids("target", target, states.shape[:-1], states.device)
        flat, wanted = states.reshape(-1, states.shape[-1]), target.flatten()
        valid = wanted != ignore_index
        check_targets(wanted, valid, weight.shape[0])
        may_sync = not sync_free.on()
        if may_sync:  # only the rows that have a target
            rows = valid.nonzero()[:, 0]
            flat, wanted = flat[rows], wanted[rows]
        best, cut = self._best(flat, weight, head)
        if may_sync and not head.get("deterministic"):  # the width would depend on the other tokens
            width = int((best != PADDING).sum(-1).max()) if len(best) else 0
            best = best[:, :width]
        outside = ~(best == wanted[:, None]).any(-1)
        extra = torch.where(outside, wanted, PADDING)
        ids = torch.cat([best, extra[:, None]], -1)
        if not may_sync:
            ids = ids.masked_fill(~valid[:, None], PADDING)
            outside, cut = outside & valid, cut & valid
        else:
            ids = _scattered(ids, rows, len(valid), PADDING)
            outside, cut = (_scattered(x, rows, len(valid), False) for x in (outside, cut))
        shape = target.shape
        return SupportIds(ids.view(*shape, -1), outside.view(shape), cut.view(shape))

    def _best(self, hidden: Tensor, weight: Tensor, head: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Ids (N, K) in descending order, padded, and whether they are cut (N,)."""
        most = min(self.max_ids or MAX_SUPPORT, weight.shape[0])
        some_for_ties = None if self.top_k is None else self.top_k + self.top_k // 4 + 8
        k = min(some_for_ties or most, most)
        ids, cut, tied = self._of_best(hidden, weight, k, head)
        if k == most or sync_free.on() or head.get("deterministic"):
            return ids, cut
        rows = tied.nonzero()[:, 0]
        if len(rows):  # more may tie than were taken
            again, *_ = self._of_best(hidden[rows], weight, most, head)
            ids = torch.nn.functional.pad(ids, (0, most - k), value=PADDING)
            ids[rows] = again
        return ids, cut

    def _of_best(
        self, hidden: Tensor, weight: Tensor, k: int, head: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same among the k best, and whether the last of these ties with the top_k-th."""
        top_k, top_p, min_p = self.top_k, self._top_p, self._min_p
        vllm = self.sampler == "vllm"
        # `linear_topk` has the mass of the whole vocabulary, so it serves what comes first.
        apart = top_k is not None or (vllm and min_p is not None)
        found = sharded.topk(
            hidden, weight, k, top_p=None if apart else top_p,
            min_p=min_p if vllm or not apart else None, **head,
        )  # fmt: skip
        there = found.ids != PADDING
        logprob = found.logprob.double().masked_fill(~there, -torch.inf)
        cut, tied = found.truncated, torch.zeros_like(found.truncated)
        if top_k is not None:
            last = min(top_k, weight.shape[0]) - 1
            there &= logprob >= logprob[:, last : last + 1]
            cut, tied = tied, there[:, -1].clone()
        if apart and top_p is not None:
            p = logprob.masked_fill(~there, -torch.inf).softmax(-1)
            there &= p.cumsum(-1) - p < top_p
        if apart and not vllm and min_p is not None:
            there &= (logprob - logprob[:, :1]).exp() >= min_p
        return found.ids.masked_fill(~there, PADDING), cut, tied


def _scattered(x: Tensor, rows: Tensor, count: int, value: float) -> Tensor:
    """`x` at `rows` of `count`, `value` at the others."""
    return x.new_full((count, *x.shape[1:]), value).index_copy(0, rows, x)


def check_support(support: object, target: Tensor, outputs: Collection[str]) -> None:
    """Refuse what is no support of these targets, and statistics that none has.

    Raises:
        TypeError, ValueError: by name.
    """
    if not isinstance(support, (Tensor, Support)):
        raise TypeError(
            f"support: expected ids (..., K) or an ift.Support, got {type(support).__name__}"
        )
    if isinstance(support, Tensor):
        if support.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"support: expected int64 or int32 ids, got {support.dtype}")
        if support.dim() != target.dim() + 1 or support.shape[:-1] != target.shape:
            raise ValueError(
                f"support: expected (..., K) for targets {tuple(target.shape)}, got "
                f"{tuple(support.shape)}"
            )
        if support.device != target.device:
            raise ValueError(
                f"support: expected on {target.device} like target, got {support.device}"
            )
    for name in outputs:
        if name not in STATISTICS:
            raise ValueError(
                f"support: expected None with {name!r}, which is a statistic of the whole "
                "vocabulary, got one"
            )


def check_gradient(gradient: str | ActiveSet) -> None:
    """Refuse an approximate one: of few columns the exact one costs little.

    Raises:
        TypeError, ValueError: by name.
    """
    if active_options(gradient) is not None:
        raise ValueError(f"gradient: expected 'exact' with support, got {gradient!r}")


def support_ids(
    support: Tensor | Support,
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    ignore_index: int,
    **head: Any,
) -> SupportIds:
    """The ids of a sampler as they are, or rebuilt, for the targets that are not `ignore_index`."""
    if isinstance(support, Support):
        return support.ids(hidden, weight, target, ignore_index=ignore_index, **head)
    none = torch.zeros_like(target, dtype=torch.bool)
    ids = support.long().masked_fill((target == ignore_index)[..., None], PADDING)
    return SupportIds(ids, none, none)


def support_stats(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    ids: Tensor,  # (..., K)
    ignore_index: int = -100,
    outputs: Collection[str] = ("logprob",),
    detached: Collection[str] = (),
    gradient: str | ActiveSet = "exact",
    **head: Any,
) -> TokenStats:
    """`STATISTICS` of ``z.masked_fill(~in_ids, -inf).log_softmax(-1)``, as `linear_logprobs`.

    Args:
        ids: the support of every target, padded with -100.
        outputs: of "logprob", "entropy" and "argmax".
        detached: "entropy", or nothing.
        The rest: as `ift_kernels.linear_logprobs`.

    Raises:
        ValueError: an active `gradient`; a support that does not hold its target, or holds an id
            twice (such a token is NaN on a GPU, where a check of values would stall the queue,
            without ``IFT_DEBUG=1``).
    """
    check_gradient(gradient)
    valid = target != ignore_index
    ids = ids.masked_fill(~valid[..., None], PADDING)
    among = (ids == target[..., None]) & valid[..., None]
    missing = valid & ~among.any(-1)
    may_look = missing.device.type == "cpu" or (checks.debugging() and not sync_free.on())
    if may_look and bool(missing.any()):
        at = tuple(missing.nonzero()[0].tolist())
        raise ValueError(
            f"support: expected ids that hold the target, {int(target[at])} at {at}, got "
            f"{ids[at].tolist()[:8]}"
        )
    try:
        found = sharded.selected_logprobs(
            hidden, weight, ids, outputs=("in_set_logprob",), ignore_index=PADDING, **head
        ).in_set_logprob
    except ValueError as error:
        raise ValueError(str(error).replace("ids: ", "support: ", 1)) from None
    assert found is not None
    stats = {"logprob": torch.where(among, found, 0).sum(-1).masked_fill(missing, torch.nan)}
    there = ids != PADDING
    if "entropy" in outputs:
        with torch.set_grad_enabled(torch.is_grad_enabled() and "entropy" not in detached):
            impossible = found == -torch.inf  # 0 · log 0 is 0, and so is its gradient
            finite = found.masked_fill(impossible, 0)
            stats["entropy"] = -torch.where(there & ~impossible, finite.exp() * finite, 0).sum(-1)
    if "argmax" in outputs:  # of equal ones the lowest id
        inside = found.detach().masked_fill(~there, -torch.inf)
        best = there & (inside == inside.amax(-1, keepdim=True))
        last = torch.iinfo(ids.dtype).max
        stats["argmax"] = torch.where(valid, ids.masked_fill(~best, last).amin(-1), 0)
    return TokenStats(**stats)
