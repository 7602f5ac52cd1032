"""The KL from a frozen model in the loss of one that trains, without the logits of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ift.documents import IGNORE_INDEX
from ift.head_options import HeadOptions
from ift.head_pass import HeadCallback
from ift.losses import Head
from ift.token_stats import transform_options
from ift_kernels import TokenStats, linear_divergence
from ift_kernels.common.transform import LogitTransform
from ift_kernels.vocab_parallel import is_sharded


class AnchoredLoss:
    """A loss of (logprob, mask) that takes ``reference_kl``, and the head that it is from.

    `ift.one_pass.loss_pass` computes the KL inside the head of the model that trains.

    Args:
        loss: `ift.losses.sft_loss` with `kl_coef`, as a module or a `functools.partial`.
        reference: of the frozen model, for the tokens of one forward.
    """

    def __init__(self, loss: Callable[..., Tensor], reference: Head) -> None:
        self.loss, self.reference = loss, reference
        self.kl: Tensor | None = None

    def in_head(
        self,
        callback: HeadCallback,
        target: Tensor,
        transform: LogitTransform,
        head: HeadOptions,
        ignore_index: int = IGNORE_INDEX,
    ) -> HeadCallback:
        """`callback`, which also computes the KL of each target for the next call."""

        def both(hidden: Tensor, weight: Tensor, bias: Tensor | None, **adapter: Any) -> TokenStats:
            if is_sharded(weight):
                raise TypeError("loss: expected kl_coef 0 with a sharded head, got a DTensor")
            stats: TokenStats = callback(hidden, weight, bias, **adapter)
            frozen = self.reference
            mask = (target != ignore_index).reshape(hidden.shape[:-1]).to(hidden.device)
            self.kl = linear_divergence(
                hidden, weight, frozen.hidden, frozen.weight, mask=mask, reduction="none",
                bias=bias, teacher_bias=frozen.bias, teacher_logit_scale=frozen.logit_scale,
                teacher_softcap=frozen.softcap, logits_dtype=head.logits_dtype,
                **transform_options(transform), **adapter,
            )  # fmt: skip
            return stats

        return both

    def __call__(self, logprob: Tensor, mask: Tensor, **statistics: Any) -> Tensor:
        kl, self.kl = self.kl, None
        assert kl is not None
        return self.loss(logprob, mask, reference_kl=kl.view_as(logprob), **statistics)
