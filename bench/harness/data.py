"""Inputs of a head, and what is exact on them.

Hidden states, head weight and targets whose probabilities are like those of a language model.

Random logits are not LM-like: every token gets about the same share, so schedules that depend on
where the probability mass lies would measure far too well or too badly. Here the logit of
vocabulary id v at position n is, before targets are drawn,

    z[n, v] = −slope · log rank[v] + σ · Gaussian[n, v]

a Zipf law of frequencies, the same at every position, plus a part that distinguishes positions, of
which positions of one document share a portion. Ids are almost in order of frequency, as in a
byte-pair vocabulary, with some disorder. Targets are drawn from softmax(z), and then every hidden
state is moved towards its target, as training would have done. All of it is linear: z is exactly
``hidden @ weight.T``, with hidden states of one length, as after a final RMS norm. All head rows
share one more direction, as those of trained models do: it moves every logit of a position alike,
so no probability depends on it, but a gradient does whose rows have lost their sum.

Calibrated on three figures published for Qwen2.5-0.5B (V = 151936): 0.125 % of probabilities exceed
2⁻¹²; of 128 × 128 tiles of tokens and ids 61 % hold one that does, and 99 % when the vocabulary is
permuted. `survival` measures them, and every report has those of its own data.

`exact` is the reference in fp64, on a sample small enough to keep, and `Errors` compares results
with it. The log-sum-exp of every row is exact. Gradients are compared on some rows (of hidden) and
some columns (of weight): any upstream gradient then needs no further pass over the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PUBLISHED = {"above": 0.00125, "natural": 0.61, "permuted": 0.99}
THRESHOLD = 2.0**-12
TILE = 128  # tokens, and ids
ROWS, COLUMNS = 64, 512  # compared; half of the columns are targets
CHUNK = 4096  # columns of fp64 logits at a time
# Multiply-adds above which the log-sum-exp comes from fp32 products: minutes otherwise.
FP64_WORK = 1e12
# Relative errors above which a result is wrong, not just inexact. Mistakes are of the order of 1.
WRONG = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}


@dataclass(frozen=True)
class Shape:
    """Parameters of the distribution; the defaults are the calibrated ones."""

    slope: float = 1.12  # of log-probability against log rank
    sigma: float = 2.1  # standard deviation of the Gaussian part of a logit
    shared: float = 0.2  # of its variance, the portion that a document's positions share
    document: int = 128  # positions
    disorder: float = 0.7  # standard deviation of the log rank of an id around its log position
    boost: float = 4.5  # added to the target's logit
    offset: float = 0.5  # length of what all head rows share; their own part has length 1


@dataclass(frozen=True)
class Data:
    """Head inputs; `logits` would be ``hidden @ weight.T``."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,) int64


def generate(
    rows: int, width: int, vocabulary: int, *, dtype: torch.dtype = torch.float32,
    shape: Shape | None = None, seed: int = 0, device: str = "cpu",
) -> Data:  # fmt: skip
    """LM-like data of N = `rows`, D = `width`, V = `vocabulary`, the same for the same seed.

    A device has random numbers of its own: the data are as LM-like there, but not the same.

    Raises:
        ValueError: a width below 8, which cannot hold the directions it takes.
    """
    if width < 8:
        raise ValueError(f"width: expected at least 8, got {width}")
    shape = shape or Shape()
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    # One direction is frequency, the same at every position; all else is orthogonal to it.
    common = _unit(normal(width))

    def directions(x: Tensor) -> Tensor:
        return _unit(x - (x @ common)[:, None] * common)

    log_place = torch.arange(1, vocabulary + 1, device=device).log()
    log_rank = torch.empty_like(log_place)
    log_rank[(log_place + shape.disorder * normal(vocabulary)).argsort()] = log_place
    frequency = -shape.slope * (log_rank - log_rank.mean())
    scale = math.sqrt(width)
    own = directions(normal(vocabulary, width))
    # What moves a position to its target also moves other ids a little: spread boost / scale.
    spread = math.sqrt(max(shape.sigma**2 - (shape.boost / scale) ** 2, 0))
    documents = normal(-(-rows // shape.document), width).repeat_interleave(shape.document, 0)
    mixed = math.sqrt(shape.shared) * documents[:rows]
    mixed += math.sqrt(1 - shape.shared) * normal(rows, width)
    position = spread * scale * directions(mixed)
    target = torch.empty(rows, dtype=torch.int64, device=device)
    for part in _blocks(rows):
        p = (position[part] @ own.T + frequency).softmax(-1)
        target[part] = torch.multinomial(p, 1, generator=generator)[:, 0]
    hidden = position + shape.boost * own[target] + scale * common
    # One length for all, as after a norm; the lengths differ by a few percent without it.
    hidden *= hidden.norm(dim=1).mean() / hidden.norm(dim=1, keepdim=True)
    weight = own + (frequency / scale)[:, None] * common
    shared = directions(normal(1, width))  # drawn last: all else stays as it is without it
    weight += shape.offset * shared
    return Data(hidden.to(dtype), weight.to(dtype), target)


def survival(data: Data, *, threshold: float = THRESHOLD, seed: int = 1) -> dict[str, float]:
    """The three published figures on `data`, and two more that show what kind of data it is.

    Returns:
        ``above``: share of probabilities above the threshold; ``natural`` and ``permuted``: share
        of tiles that hold one, with ids as they are and permuted; ``k``: active share, of (block of
        128 tokens, id) pairs with one; ``loss``: mean −log p of the targets. Tokens and ids beyond
        the last whole tile are left out, as long as there is one.
    """
    vocabulary = data.weight.shape[0]
    permutation = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    permutation = permutation.to(data.weight.device)
    weight = data.weight.float()
    sums = dict.fromkeys(("above", "natural", "permuted", "k", "loss"), 0.0)
    blocks = 0
    for part in _blocks(data.hidden.shape[0]):
        p = (data.hidden[part].float() @ weight.T).softmax(-1)
        active = p > threshold
        some = active.any(0)
        sums["above"] += active.float().mean().item()
        sums["k"] += some.float().mean().item()
        sums["natural"] += _tiles(some)
        sums["permuted"] += _tiles(some[permutation])
        sums["loss"] -= p.gather(1, data.target[part, None]).log().mean().item()
        blocks += 1
    return {name: value / blocks for name, value in sums.items()}


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _blocks(rows: int) -> Iterator[slice]:
    """Blocks of TILE rows; a last one that is not whole only where it is the first."""
    return (slice(at, min(at + TILE, rows)) for at in range(0, rows, TILE))


def _tiles(some: Tensor) -> float:
    """Share of tiles of ids with any of them active."""
    whole = max(some.shape[0] // TILE, 1)
    return some[: whole * TILE].view(whole, -1).any(1).float().mean().item()


# --- the exact result -----------------------------------------------------------------------------


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
    gradients = f"of hidden on {len(rows)} rows, of weight on {len(columns)} columns"
    return Exact(
        lse, top[:, 0], top[:, 1], (hidden.double() * weight[target].double()).sum(-1) - lse, rows,
        -(logp.exp() * logp).sum(-1), logp.exp() @ weight.double(), columns,
        (hidden.double() @ weight[columns].double().T - lse[:, None]).exp(),
        f"log-sum-exp of all rows in {str(work).removeprefix('torch.')}; gradients {gradients}, in "
        "float64",
    )  # fmt: skip


class Errors:
    """Compares results with the reference; what has been measured so far is in `found`."""

    def __init__(
        self, reference: Exact, hidden: Tensor, weight: Tensor, target: Tensor, valid_mask: Tensor
    ) -> None:
        self.reference, self.hidden, self.weight = reference, hidden, weight
        self.target, self.valid_mask = target, valid_mask  # (N,) bool: not ignored
        self.limit = WRONG[hidden.dtype]
        self.found: dict[str, float] = {}

    def logprob(self, value: Tensor) -> None:
        """(N,); root mean square of the deviation, and zeros where targets are ignored."""
        self._shape("logprob", value, self.target.shape)
        if bool((value[~self.valid_mask] != 0).any()):
            raise Wrong("logprob: not 0 at ignored positions")
        off = value.double() - self.reference.logprob
        self._note("logprob", off[self.valid_mask].square().mean().sqrt())

    def loss(self, value: Tensor) -> None:
        """Mean over the valid targets."""
        self._shape("loss", value, torch.Size())
        mean = -self.reference.logprob[self.valid_mask].mean()
        self._note("loss", (value.double() - mean).abs() / mean.abs())

    def entropy(self, value: Tensor) -> None:
        self._shape("entropy", value, self.target.shape)
        rows = self.reference.rows
        off = (value[rows].double() - self.reference.entropy)[self.valid_mask[rows]]
        self._note("entropy", off.square().mean().sqrt())

    def ids(self, value: Tensor, best: Tensor) -> None:
        """(N,): how far the logit of the chosen id is from `best`, at most."""
        self._shape("ids", value, self.target.shape)
        if bool((value < 0).any() | (value >= self.weight.shape[0]).any()):
            raise Wrong("ids: outside the vocabulary")
        off = ((self.logits(value) - best).abs() * self.valid_mask).max()
        # Rounded logits tie: what counts is a unit in the last place of the largest.
        unit = torch.finfo(self.hidden.dtype).eps * self.reference.best.abs().max()
        self._note("ids", off, limit=max(self.limit, 2 * unit.item()))

    def logits(self, ids: Tensor) -> Tensor:
        """(N,) exact logits of one id per row."""
        return (self.hidden.double() * self.weight[ids].double()).sum(-1)

    def d_hidden(self, value: Tensor, upstream: Tensor) -> None:
        """Relative error on the sampled rows, for `upstream` (N,) = ∂/∂logprob, 0 where ignored."""
        self._shape("d hidden", value, self.hidden.shape)
        if bool((value[~self.valid_mask] != 0).any()):
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
