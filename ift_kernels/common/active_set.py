"""Options and statistics of the active set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ift_kernels.common import checks
from ift_kernels.common.settings import Setting

MAX_SIZE = 1 << 20  # tokens of a block and ids of a tail bucket: kernels have buffers of their size


@dataclass(frozen=True)
class ActiveSet:
    """Options of ``gradient="active"``; pass an instance in its place.

    Args:
        threshold: a vocabulary id is active in a block of tokens if any of them gives it more than
            this probability, or has it as its target. 0: all are.
        block: tokens that share an active set, a multiple of 32.
        tail_bucket: ids whose inactive share is one sum per token, a multiple of 64.

    Raises:
        TypeError, ValueError: an option out of range.
    """

    threshold: float = 2.0**-12
    block: int = 128
    tail_bucket: int = 2048

    def __post_init__(self) -> None:
        threshold = checks.number("threshold", self.threshold)
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold: expected in [0, 1), got {threshold}")
        for name, step in (("block", 32), ("tail_bucket", 64)):
            value = checks.integer(name, getattr(self, name))
            if not step <= value <= MAX_SIZE or value % step:
                raise ValueError(
                    f"{name}: expected a positive multiple of {step} up to {MAX_SIZE}, got {value}"
                )


def options(gradient: str | ActiveSet) -> ActiveSet | None:
    """The active set that `gradient` asks for; None for "exact"."""
    if isinstance(gradient, ActiveSet):
        return gradient
    checks.one_of("gradient", gradient, ("exact", "active"))
    return ActiveSet() if gradient == "active" else None


@dataclass(frozen=True)
class ActiveSetStats:
    """How the active set of one gradient of hidden turned out.

    share: active share k of (block, id) pairs, 1 where a tile was dense.
    tail_mean, tail_max: over tokens, of the probability outside the active set; with a softcap
    weighted by its derivative, as it is in the gradient.
    tiles, dense_tiles: of products; how many of them were dense. 0 of none where all of the
    gradient was exact, since a GPU's plan takes that for faster: the share is 1 then, the tail 0.
    """

    share: float
    tail_mean: float
    tail_max: float
    tiles: int
    dense_tiles: int


_report = Setting[list[ActiveSetStats] | None]("ift_active_report", None)


@contextlib.contextmanager
def record_active_sets() -> Iterator[list[ActiveSetStats]]:
    """Collect an `ActiveSetStats` for every call with an active set inside the ``with`` block.

    The set is formed with the gradient of hidden: in forward for a scalar loss or a frozen head,
    else in backward, which adds to the list of its forward. Measuring the tail costs a float64 copy
    of each tile.

    >>> import torch, ift_kernels
    >>> hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(5000, 16)
    >>> with ift_kernels.record_active_sets() as report:
    ...     stats = ift_kernels.linear_logprobs(
    ...         hidden, weight, torch.zeros(64, dtype=torch.int64), gradient="active"
    ...     )
    ...     stats.logprob.sum().backward()
    >>> len(report), 0 < report[0].share <= 1
    (1, True)
    """
    report: list[ActiveSetStats] = []
    with _report.use(report):
        yield report


def recording() -> list[ActiveSetStats] | None:
    """The list of the innermost `record_active_sets`, or None outside of any."""
    return _report.get()
