"""The head callback of losses: statistics of each target in place of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ift import sharded
from ift.documents import IGNORE_INDEX
from ift.head_options import HeadOptions
from ift.head_parts import refuse_adapter
from ift.support import Support, check_support, support_ids, support_stats
from ift_kernels import TokenStats
from ift_kernels.common.transform import LogitTransform


def transform_options(transform: LogitTransform) -> dict[str, Any]:
    """The transform as arguments of the operations of `ift_kernels`."""
    return {"logit_scale": transform.scale, "softcap": transform.softcap or None}


def token_stats(
    target: Tensor,
    transform: LogitTransform,
    head: HeadOptions,
    *,
    ignore_index: int = IGNORE_INDEX,
    outputs: tuple[str, ...] = ("logprob", "entropy", "argmax"),
    detached: tuple[str, ...] = ("entropy",),
    temperature: float = 1.0,
    support: Tensor | Support | None = None,
) -> Callable[..., TokenStats]:
    """A head callback: each target's log-probability, and two statistics for the logs.

    `target` has one entry per row of the hidden states that reach the head, in any shape. With
    `support`, ids (*target.shape, K) or one that no token has more ids than, they are those within.
    """
    if support is not None:
        check_support(support, target, outputs)

    def callback(hidden: Tensor, weight: Tensor, bias: Tensor | None, **adapter: Any) -> TokenStats:
        if target.numel() != hidden.shape[:-1].numel():
            raise ValueError(
                f"labels: expected one per hidden state that reaches the head, "
                f"{tuple(hidden.shape[:-1])}, got {tuple(target.shape)}: with logits_to_keep, pass "
                "shift_labels of the positions kept"
            )
        operation: Callable[..., TokenStats] = sharded.logprobs
        targets = target.reshape(hidden.shape[:-1]).to(hidden.device)
        options = head._asdict() | transform_options(transform)
        options |= {"bias": bias, "ignore_index": ignore_index, "temperature": temperature}
        options |= adapter
        if support is not None:
            refuse_adapter("support", adapter)
            found = support
            if isinstance(found, Tensor):
                found = found.reshape(*targets.shape, found.shape[-1]).to(hidden.device)
            rest = {name: value for name, value in options.items() if name != "gradient"}
            ids = support_ids(found, hidden, weight, targets, **rest).ids
            operation = functools.partial(support_stats, ids=ids)
        return operation(hidden, weight, targets, outputs=outputs, detached=detached, **options)

    return callback


def token_metrics(
    stats: TokenStats, target: Tensor, ignore_index: int = IGNORE_INDEX
) -> dict[str, Tensor]:
    """Sums over the targets, as scalar tensors; it does not synchronise."""
    assert stats.argmax is not None and stats.entropy is not None
    target = target.reshape(stats.argmax.shape).to(stats.argmax.device)
    valid = target != ignore_index
    return {
        "tokens": valid.sum(),
        "correct": ((stats.argmax == target) & valid).sum(),
        "entropy": stats.entropy.detach().sum(),  # 0 where there is no target
    }
