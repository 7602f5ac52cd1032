"""One forward of a causal LM with its loss computed in the head: SFT, or the caller's loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ift.anchored import AnchoredLoss
from ift.documents import IGNORE_INDEX
from ift.head_options import HeadOptions
from ift.head_pass import LossArguments, head_pass
from ift.losses import sft_loss
from ift.losses._module import taken_statistics
from ift.token_stats import token_metrics, token_stats
from ift_kernels import TokenStats
from ift_kernels.common.transform import LogitTransform

logger = logging.getLogger(__name__)


def loss_pass(
    model: Any,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    transform: LogitTransform,
    head: HeadOptions,
    *,
    unshifted: bool = False,
    loss: Callable[..., Tensor] | None = None,
    warned: set[str] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Output and token metrics of one forward, whose loss is `loss` or that of transformers.

    transformers' is the mean over targets, or their sum over ``num_items_in_batch``. The head
    computes the log-probabilities of the targets that `kwargs` imply. If the model's code then
    gives other targets to its loss function, the forward runs again with those.

    Args:
        unshifted: the model takes labels as targets of their own positions (`measure.measure`).
        loss: a function of (logprob, mask), or of (stats, mask) with an attribute `takes_stats`,
            which may have the one that it wraps as `loss`; or an `AnchoredLoss`. Statistics for
            options come by name.
        warned: warnings already logged; None: log none.

    Raises:
        ValueError: `kwargs` without the targets of the positions that they keep.
        RuntimeError: the model's code gives other targets each time.
    """
    expected = _expected(model, kwargs, unshifted)
    takes_stats = getattr(loss, "takes_stats", False)  # a loss of this package, as ValleyGuard
    anchored = loss if isinstance(loss, AnchoredLoss) else None
    inner = getattr(loss, "loss", None) if takes_stats or anchored else loss
    statistics, outputs, detached = taken_statistics(inner or sft_loss, {})
    if takes_stats:
        outputs += ("argmax_logprob",)
    for _ in range(2):
        found: list[LossArguments] = []
        target, ignore_index = expected.target, expected.ignore_index

        def compute(
            stats: TokenStats,
            given: LossArguments,
            expected: LossArguments = expected,
            found: list[LossArguments] = found,
        ) -> Tensor:
            assert stats.logprob is not None
            found.append(given)
            if not expected.same_target(given):
                return stats.logprob.new_zeros(())
            mask = (expected.target != expected.ignore_index).reshape(stats.logprob.shape)
            mask = mask.to(stats.logprob.device)
            if loss is not None:
                more = {name: getattr(stats, name) for name in statistics}
                return loss(stats if takes_stats else stats.logprob, mask, **more)
            return sft_loss(stats.logprob, mask, num_items=given.num_items)

        callback = token_stats(target, transform, head, ignore_index=ignore_index,
                               outputs=outputs, detached=detached)  # fmt: skip
        if anchored is not None:
            callback = anchored.in_head(callback, target, transform, head, ignore_index)
        # As transformers' Trainer does: a cache costs memory and hides packed rows from the mask.
        output, stats = head_pass(
            model, forward, {"use_cache": False, **kwargs}, callback, loss=compute
        )
        if expected.same_target(found[0]):
            return output, token_metrics(stats, target, ignore_index)
        expected = found[0]
        if warned is not None and "labels" not in warned:
            warned.add("labels")
            logger.warning(
                "%s changes its labels before its loss: each forward runs twice, the second time "
                "with the changed ones",
                type(model).__name__,
            )
    raise RuntimeError(
        f"{type(model).__name__}: gives other targets to its loss function in every forward of "
        "the same inputs; this model cannot be patched"
    )


def target_logprobs(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the mask, (B, T), of one forward of a patched model."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(logprob: Tensor, mask: Tensor) -> Tensor:
        found.append((logprob, mask))
        return logprob.new_zeros(())

    model(**inputs, loss=keep)
    return found[0]


def _expected(model: Any, kwargs: dict[str, Any], unshifted: bool) -> LossArguments:
    """The arguments that the model's code gives to its loss function if it changes none."""
    labels, shift_labels = kwargs["labels"], kwargs.get("shift_labels")
    if shift_labels is None and isinstance(kwargs.get("logits_to_keep"), Tensor):
        # It may keep as many positions as there are labels, but other ones.
        raise ValueError(
            f"shift_labels: expected the targets of the positions that {type(model).__name__} "
            "keeps with logits_to_keep, got None"
        )
    if shift_labels is None and unshifted:
        shift_labels = labels
    ignore_index = kwargs.get("ignore_index", IGNORE_INDEX)
    return LossArguments(labels, shift_labels, ignore_index, kwargs.get("num_items_in_batch"))
