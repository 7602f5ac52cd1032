"""A loss of a patched model, with the negative gradients in the valley counted or masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ift.dynamics.monitor import PEAK, VALLEY, in_valley
from ift_kernels import TokenStats
from ift_kernels.common import checks


class ValleyGuard:
    """Wraps a loss for ``model(..., loss=guard)`` of a patched model.

    A negative gradient lowers a token's log-probability: ∂loss/∂logprob > 0. The guard reads the
    gradients, so it works with any loss. Each backward adds its batch to `negative_tokens` and
    `valley_tokens`.

    With ``mask=True`` negative gradients in the valley are set to 0: a token of almost no
    probability is not pushed further down, and its mass does not go to the argmax. This mitigation
    is this package's own, from no publication. It changes the objective: off by default.

    Args:
        loss: a function of (logprob, mask), as ``model(..., loss=)`` takes it.
        mask: whether to mask, default False.
        valley, peak: as in `SqueezeMonitor`.

    Raises:
        TypeError: `loss` cannot be called.
        ValueError: a valley or peak outside [0, 1].

    >>> # guard = ValleyGuard(functools.partial(dpo_loss, reference=reference), mask=True)
    >>> # model(input_ids=ids, labels=labels, loss=guard).loss.backward()
    """

    takes_stats = True  # `ift.patch` passes the statistics instead of the log-probability

    def __init__(
        self,
        loss: Callable[..., Tensor],
        *,
        mask: bool = False,
        valley: float = VALLEY,
        peak: float = PEAK,
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss: expected a function, got {type(loss).__name__}")
        self.loss, self.mask = loss, mask
        self.valley = checks.unit_interval("valley", valley)
        self.peak = checks.unit_interval("peak", peak)
        self._counts: Tensor | None = None

    def __call__(self, stats: TokenStats, mask: Tensor, **statistics: Tensor) -> Tensor:
        """The loss of the batch; `statistics` for its options, such as an entropy."""
        assert stats.logprob is not None and stats.argmax_logprob is not None
        with torch.no_grad():
            valley = in_valley(stats.logprob, stats.argmax_logprob, self.valley, self.peak) & mask
        logprob: Tensor = _Guarded.apply(stats.logprob, valley, self)  # type: ignore[no-untyped-call]  # torch has none
        return self.loss(logprob, mask, **statistics)

    @property
    def negative_tokens(self) -> int:
        """Tokens with a negative gradient so far."""
        return 0 if self._counts is None else int(self._counts[0])

    @property
    def valley_tokens(self) -> int:
        """Those of them in the valley."""
        return 0 if self._counts is None else int(self._counts[1])

    def add(self, negative: Tensor, valley: Tensor) -> None:
        """Add to the counts, on the device: no synchronisation."""
        found = torch.stack([negative.sum(), valley.sum()])
        self._counts = found if self._counts is None else self._counts.to(found.device) + found


class _Guarded(torch.autograd.Function):
    """The identity; backward counts, and masks with ``guard.mask``."""

    @staticmethod
    def forward(ctx: Any, logprob: Tensor, valley: Tensor, guard: ValleyGuard) -> Tensor:
        ctx.save_for_backward(valley)
        ctx.guard = guard
        return logprob.view_as(logprob)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (valley,) = ctx.saved_tensors
        negative = grad > 0
        in_the_valley = negative & valley
        ctx.guard.add(negative, in_the_valley)
        return torch.where(in_the_valley, 0, grad) if ctx.guard.mask else grad, None, None
