"""What a backend implements, and what the running statistics of a row are.

A backend is a module or package with the functions of `Backend`; `reference` is their executable
specification. Epilogues work on a `Chunk` of raw products ``x = h @ W[columns].T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ift_kernels.common.transform import LogitTransform

# Of all that is here, with csrc/contract.h: raised by a change that compiled code has to follow.
VERSION = 4

# Rows of the running state. With m the running maximum of the logits z and e = exp(z − m):
# m, Σe, z[target], Σe·(z−m), Σe², Σz, second maximum. The sums over e leave out the target's own
# column, whose 1 would cost them their digits where it is nearly certain: see `row_values`.
MAX, SUM, TARGET, E_Z, E_SQ, Z_SUM, SECOND = range(7)
STATE_ROWS = 7

# What to track beyond m, Σe and z[target].
TRACK_ARGMAX, TRACK_ENTROPY, TRACK_SQ, TRACK_MEAN, TRACK_SECOND = 1, 2, 4, 8, 16
# What to return of that: no epilogue sees this bit.
RETURN_TARGET = 32


class Statistic(NamedTuple):
    """One statistic of a token: what it is called, and what it takes."""

    name: str  # of the output
    track: int  # the bit that asks for it
    state: tuple[int, ...]  # rows of the running state that it is made of
    differentiable: bool
    formula: str  # of the final state, its sums over all columns


STATISTICS = (
    Statistic("logprob", 0, (MAX, SUM, TARGET), True, "z[target] − m − log Σe"),
    Statistic("lse", 0, (MAX, SUM), True, "m + log Σe"),
    Statistic("entropy", TRACK_ENTROPY, (SUM, E_Z), True, "log Σe − Σe·(z−m) / Σe"),
    Statistic("argmax", TRACK_ARGMAX, (), False, "the lowest id with z = m"),
    Statistic("argmax_logprob", TRACK_ARGMAX, (SUM,), False, "−log Σe"),
    Statistic("second_logprob", TRACK_SECOND, (MAX, SUM, SECOND), False, "second max − m − log Σe"),
    Statistic("sum_sq", TRACK_SQ, (SUM, E_SQ), False, "Σe² / (Σe)²"),
    Statistic("mean_logit", TRACK_MEAN, (MAX, SUM, Z_SUM), True, "Σz / V − m − log Σe, then + lse"),
    Statistic("target_logit", RETURN_TARGET, (TARGET,), True, "z[target]"),
)
TRACK_ALL = sum({s.track for s in STATISTICS} - {RETURN_TARGET})  # of epilogues

# Of the divergence of two heads.
KINDS = ("forward", "reverse", "jsd")


class Chunk(NamedTuple):
    """Raw products of consecutive columns, and what makes them logits: ``transform(x + bias)``."""

    x: Tensor  # (N, C)
    bias: Tensor | None = None  # (C,)
    transform: LogitTransform = LogitTransform()
    offset: int = 0  # vocabulary id of the first column


class RowState(NamedTuple):
    """The running statistics of rows."""

    values: Tensor  # (STATE_ROWS, N) float64
    argmax: Tensor  # (N,) int64

    def rows(self, rows: slice) -> RowState:
        return RowState(*(value[..., rows] for value in self))


class RowGradient(NamedTuple):
    """What turns a product into its gradient, per row: see `dlogits_`."""

    target: Tensor  # (N,)
    norm: Tensor  # (2, N)
    coef: Tensor  # (4, N)

    def rows(self, rows: slice) -> RowGradient:
        return RowGradient(*(value[..., rows] for value in self))


class Selected(NamedTuple):
    """Ids of the vocabulary that are apart from the rest, per row, and a number for each."""

    ids: Tensor  # (N, K) int64, ascending, without repetition; negative: none
    values: Tensor  # (N, K) float32 (float64 when computing in float64)

    def rows(self, rows: slice) -> Selected:
        return Selected(*(value[rows] for value in self))


class ActiveColumns(NamedTuple):
    """Which columns of a tile are active in which block of rows, and the tail that is left."""

    mask: Tensor  # uint8 (blocks, C)
    counts: Tensor  # int32 (blocks, buckets): active columns of each bucket
    # float32 (buckets, N): the sum of each row over the tail, over that of its tail weights; None
    # where `take_active` has to form it.
    tail_gradient: Tensor | None


class TakenColumns(NamedTuple):
    """What `take_active` returns beside the active columns themselves."""

    ids: Tensor  # int64: the active columns of every block, one block after another
    counts: Tensor  # int32 (blocks,): how many
    tail_gradient: Tensor  # (buckets, N)


def new_state(rows: int, device: torch.device, *parts: int) -> RowState:
    """Empty running statistics; `parts`: leading dimension, one state per part of a row.

    The logit of a target is NaN until its column comes: so is what is made of an id outside the
    vocabulary, where no check has refused it.
    """
    shape = (*parts, STATE_ROWS, rows)
    values = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
    values[..., SUM:SECOND, :].zero_()
    values[..., TARGET, :].fill_(torch.nan)
    return RowState(values, torch.zeros((*parts, rows), dtype=torch.int64, device=device))


class Backend(Protocol):
    """The functions of a backend; `reference` says what each computes."""

    __name__: str

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot serve; "" if it can."""

    def describe(self) -> dict[str, Any]:
        """Available, reason, detail: for errors and ``ift doctor``."""

    def wants_transpose(self, dtype: torch.dtype) -> bool:
        """Should `dlogits_` also write the gradient transposed, for a faster product of dW?"""

    def scratch(self, like: Tensor, elements: int) -> Tensor:
        """Uninitialised work memory, which a later call may get again."""

    def stats_update(self, chunk: Chunk, target: Tensor, state: RowState, track: int) -> None:
        """Update the running statistics with a chunk; -1 for no target."""

    def dlogits_(
        self, chunk: Chunk, row_gradient: RowGradient, transposed: Tensor | None = None
    ) -> None:
        """Overwrite a chunk by its gradient."""

    def take_selected(self, chunk: Chunk, selected: Selected) -> None:
        """Move the products of the selected columns to `selected.values`; the lowest stay."""

    def put_selected(
        self, chunk: Chunk, selected: Selected, transposed: Tensor | None = None
    ) -> None:
        """Overwrite the selected columns of a chunk by `selected.values`."""

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """Times a factor, in place."""

    def probabilities_(self, chunk: Chunk, norm: Tensor) -> None:
        """Overwrite a chunk by probabilities."""

    def softmax_gradient_(
        self, chunk: Chunk, d_prob: Tensor, norm: Tensor, centre: Tensor, prob: Tensor | None = None
    ) -> None:
        """Overwrite a chunk by its gradient, given that of its probabilities."""

    def top_k_update(self, chunk: Chunk, values: Tensor, ids: Tensor) -> None:
        """Update the k best logits with a chunk."""

    def gumbel_update(
        self, chunk: Chunk, seed: int, rows: Tensor, best: Tensor, logit: Tensor, ids: Tensor
    ) -> None:
        """Update a Gumbel-max draw with a chunk."""

    def mark_active(
        self, chunk: Chunk, row_gradient: RowGradient, log_threshold: float, block: int,
        bucket: int, tail_weights: Tensor | None,
    ) -> ActiveColumns:  # fmt: skip
        """Which columns of products matter to which block of rows, and the sums of the others."""

    def take_active(
        self, chunk: Chunk, columns: ActiveColumns, block: int, bucket: int, tail_weights: Tensor,
        active: Tensor, counts: Sequence[int], row_gradient: RowGradient | None = None,
    ) -> TakenColumns:  # fmt: skip
        """Copy the active columns of gradients, or of what `dlogits_` would make of products."""

    def bucket_sums(self, matrix: Tensor, bucket: int, tail_weights: Tensor) -> Tensor:
        """Weighted sums of head rows over buckets."""

    def divergence_terms(
        self, student: Chunk, teacher: Chunk, kind: str, beta: float, norm: Tensor, value: Tensor,
        centre: Tensor,
    ) -> None:  # fmt: skip
        """Add a tile's terms to the divergence of every row."""

    def divergence_gradient_(
        self, student: Chunk, teacher: Chunk, kind: str, beta: float, norm: Tensor, centre: Tensor,
        upstream: Tensor, value: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Overwrite the student's tile by its gradient."""

    def transpose(self, x: Tensor, out: Tensor) -> None:
        """Copy a tile transposed, where `wants_transpose`."""

    def scan(
        self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float, left: bool
    ) -> Tensor:
        """Discounted sums along rows or documents."""

    def residual(
        self, embedding: Tensor, ids: Tensor, predicted: Tensor, labels: Tensor,
        cu_seqlens: Tensor | None, lam: float, ignore_index: int,
    ) -> Tensor:  # fmt: skip
        """Embeddings mixed with those of predicted tokens."""

    def residual_grad(
        self, grad: Tensor, ids: Tensor, predicted: Tensor, labels: Tensor,
        cu_seqlens: Tensor | None, lam: float, ignore_index: int, vocabulary: int,
    ) -> Tensor:  # fmt: skip
        """The gradient of the table."""


# Functions that launch nothing on a device, and the others.
ON_HOST = ("unsupported_reason", "describe", "wants_transpose", "scratch")
EPILOGUES = tuple(n for n in vars(Backend) if not n.startswith("_") and n not in ON_HOST)
