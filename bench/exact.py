"""What a linear head should give, in fp64, on a sample small enough to keep; and how far off it is.

The log-sum-exp of every row is exact. Gradients are compared on some rows (of hidden) and some
columns (of weight): any upstream gradient then needs no further pass over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, COLUMNS = 64, 512  # compared; half of the columns are somebody's target
CHUNK = 4096  # columns of fp64 logits at a time
# Multiply-adds above which the log-sum-exp comes from fp32 products: minutes otherwise.
FP64_WORK = 1e12
# Relative errors above which a result is wrong, not just inexact. Mistakes are of the order of 1.
WRONG = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}


class Wrong(RuntimeError):
    """A result that is not what it should be; the message says which and by how much."""


@dataclass
class Exact:
    """The reference of one set of inputs; all float64 but the indices."""

    lse: Tensor  # (N,)
    best: Tensor  # (N,) largest logit
    second: Tensor  # (N,) second largest
    logprob: Tensor  # (N,) of the target
    rows: Tensor  # (R,) compared
    entropy: Tensor  # (R,)
    mean: Tensor  # (R, D), Σ_v p_v W_v
    columns: Tensor  # (C,) compared
    p: Tensor  # (N, C)
    words: str  # how it was computed, for the report


def exact(hidden: Tensor, weight: Tensor, target: Tensor, seed: int = 0) -> Exact:
    """The reference for these inputs (N, D), (V, D), (N,), as they are after rounding."""
    n, v = hidden.shape[0], weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=generator)[:ROWS].sort().values.to(hidden.device)
    some = torch.randperm(v, generator=generator)[: COLUMNS // 2].to(hidden.device)
    columns = torch.cat([target.unique()[: COLUMNS // 2], some]).unique()
    work = torch.float64 if n * v * hidden.shape[1] <= FP64_WORK else torch.float32
    h = hidden.to(work)
    lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=hidden.device)
    top = torch.full((n, 2), -torch.inf, dtype=torch.float64, device=hidden.device)
    for at in range(0, v, CHUNK):
        z = (h @ weight[at : at + CHUNK].to(work).T).double()
        lse = torch.logaddexp(lse, z.logsumexp(1))
        top = torch.cat([top, z.topk(min(2, z.shape[1])).values], 1).topk(2).values
    z = hidden[rows].double() @ weight.double().T
    logp = z.log_softmax(-1)
    return Exact(
        lse=lse,
        best=top[:, 0],
        second=top[:, 1],
        logprob=(hidden.double() * weight[target].double()).sum(-1) - lse,
        rows=rows,
        entropy=-(logp.exp() * logp).sum(-1),
        mean=logp.exp() @ weight.double(),
        columns=columns,
        p=(hidden.double() @ weight[columns].double().T - lse[:, None]).exp(),
        words=f"log-sum-exp of all rows in {str(work).removeprefix('torch.')}; gradients of hidden "
        f"on {len(rows)} rows, of weight on {len(columns)} columns, in float64",
    )


class Errors:
    """Compares results with the reference; what has been measured so far is in `found`."""

    def __init__(
        self, reference: Exact, hidden: Tensor, weight: Tensor, target: Tensor, counts: Tensor
    ) -> None:
        self.reference, self.hidden, self.weight = reference, hidden, weight
        self.target, self.counts = target, counts  # counts: (N,) bool, not ignored
        self.limit = WRONG[hidden.dtype]
        self.found: dict[str, float] = {}

    def logprob(self, value: Tensor) -> None:
        """(N,); root mean square of the deviation, and zeros where targets are ignored."""
        self._shape("logprob", value, self.target.shape)
        if bool((value[~self.counts] != 0).any()):
            raise Wrong("logprob: not 0 at ignored positions")
        off = value.double() - self.reference.logprob
        self._note("logprob", off[self.counts].square().mean().sqrt())

    def loss(self, value: Tensor) -> None:
        """Mean over the targets that count."""
        self._shape("loss", value, torch.Size())
        mean = -self.reference.logprob[self.counts].mean()
        self._note("loss", (value.double() - mean).abs() / mean.abs())

    def entropy(self, value: Tensor) -> None:
        self._shape("entropy", value, self.target.shape)
        rows = self.reference.rows
        off = (value[rows].double() - self.reference.entropy)[self.counts[rows]]
        self._note("entropy", off.square().mean().sqrt())

    def ids(self, value: Tensor, best: Tensor) -> None:
        """(N,): how far the logit of the chosen id is from `best`, at most."""
        self._shape("ids", value, self.target.shape)
        if bool((value < 0).any() | (value >= self.weight.shape[0]).any()):
            raise Wrong("ids: outside the vocabulary")
        off = ((self.logits(value) - best).abs() * self.counts).max()
        # Rounded logits tie: what counts is a unit in the last place of the largest.
        unit = torch.finfo(self.hidden.dtype).eps * self.reference.best.abs().max()
        self._note("ids", off, limit=max(self.limit, 2 * unit.item()))

    def logits(self, ids: Tensor) -> Tensor:
        """(N,) exact logits of one id per row."""
        return (self.hidden.double() * self.weight[ids].double()).sum(-1)

    def d_hidden(self, value: Tensor, upstream: Tensor) -> None:
        """Relative error on the sampled rows, for `upstream` (N,) = ∂/∂logprob, 0 where ignored."""
        self._shape("d hidden", value, self.hidden.shape)
        if bool((value[~self.counts] != 0).any()):
            raise Wrong("d hidden: not 0 at ignored positions")
        rows = self.reference.rows
        pull = self.weight[self.target[rows]].double() - self.reference.mean
        self.relative("d hidden", value[rows], upstream[rows, None].double() * pull)

    def d_weight(self, value: Tensor, upstream: Tensor) -> None:
        """Relative error on the sampled columns."""
        self._shape("d weight", value, self.weight.shape)
        hit = self.target[:, None] == self.reference.columns
        dz = upstream[:, None].double() * (hit.double() - self.reference.p)
        self.relative("d weight", value[self.reference.columns], dz.T @ self.hidden.double())

    def relative(self, name: str, value: Tensor, true: Tensor) -> None:
        """Frobenius norm of the deviation over that of the truth."""
        self._note(name, (value.double() - true).norm() / true.norm().clamp(min=1e-30))

    def _shape(self, name: str, value: Tensor, shape: torch.Size) -> None:
        if value.shape != shape:
            raise Wrong(f"{name}: shape {tuple(value.shape)}, expected {tuple(shape)}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Wrong(f"{name}: not finite")

    def _note(self, name: str, error: Tensor, limit: float | None = None) -> None:
        """Keep an error, or refuse it."""
        limit = self.limit if limit is None else limit
        self.found[name] = float(error.detach())
        if not self.found[name] <= limit:
            raise Wrong(f"{name}: error {self.found[name]:.2g}, more than {limit:.2g} is wrong")
