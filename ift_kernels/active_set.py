"""What a user says about the active set, and what a call reports of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ift_kernels import checks
from ift_kernels.settings import Setting

MOST = 1 << 20  # tokens of a block and ids of a tail tile: kernels have buffers of their size


@dataclass(frozen=True)
class ActiveSet:
    """Options of ``gradient="active"``; pass an instance in its place.

    Args:
        threshold: a vocabulary id is active in a block of tokens if any of them gives it more than
            this probability, or has it as its target. 0: all are.
        block: tokens that share an active set, a multiple of 32.
        tail_tile: ids whose inactive share is known as one sum per token, a multiple of 64.
        dW: of a head that is trained, "dense" (the default) for its exact gradient, "active" for
            the cheaper one, close in norm but not row by row: not for Adam, see docs/active_set.md.

    Raises:
        TypeError, ValueError: an option out of range.
    """

    threshold: float = 2.0**-12
    block: int = 128
    tail_tile: int = 2048
    dW: str = "dense"

    def __post_init__(self) -> None:
        threshold = checks.number("threshold", self.threshold)
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold: expected in [0, 1), got {threshold}")
        for name, step in (("block", 32), ("tail_tile", 64)):
            value = checks.integer(name, getattr(self, name))
            if not step <= value <= MOST or value % step:
                raise ValueError(
                    f"{name}: expected a positive multiple of {step} up to {MOST}, got {value}"
                )
        checks.one_of("dW", self.dW, ("dense", "active"))


def options(gradient: str | ActiveSet) -> ActiveSet | None:
    """The active set that `gradient` asks for; None for "exact"."""
    if isinstance(gradient, ActiveSet):
        return gradient
    checks.one_of("gradient", gradient, ("exact", "active"))
    return ActiveSet() if gradient == "active" else None


@dataclass(frozen=True)
class ActiveSetStats:
    """How the active set of one call turned out.

    share: active share k of (block, id) pairs, 1 where a tile was left dense; NaN where nothing was
    kept in forward, because the set is then formed in backward.
    tail_mean, tail_max: over tokens, of the probability outside the active set; with a softcap
    weighted by its derivative, as it is in the gradient.
    kept_bytes: products kept from forward to backward.
    tiles, dense_tiles, recomputed_tiles: of products; how many were dense, how many not kept.
    """

    share: float
    tail_mean: float
    tail_max: float
    kept_bytes: int
    tiles: int
    dense_tiles: int
    recomputed_tiles: int


class _Report(Setting[list[ActiveSetStats] | None]):
    """Of calls in the ``with`` block: what backward runs again is none of them."""

    def in_backward(self, forward: list[ActiveSetStats] | None) -> list[ActiveSetStats] | None:
        return self.get()


_report = _Report("ift_active_report", None)


@contextlib.contextmanager
def record_active_sets() -> Iterator[list[ActiveSetStats]]:
    """Collect an `ActiveSetStats` for every call with an active set inside the ``with`` block.

    >>> import torch, ift_kernels
    >>> hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(5000, 16)
    >>> with ift_kernels.record_active_sets() as report:
    ...     stats = ift_kernels.linear_logprobs(
    ...         hidden, weight, torch.zeros(64, dtype=torch.int64), gradient="active"
    ...     )
    >>> len(report), 0 < report[0].share <= 1
    (1, True)
    """
    report: list[ActiveSetStats] = []
    with _report.use(report):
        yield report


def recording() -> list[ActiveSetStats] | None:
    """The list of the innermost `record_active_sets`, or None: nobody asked."""
    return _report.get()
