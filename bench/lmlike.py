"""Hidden states, head weight and targets whose probabilities look like those of a language model.

Random logits are not LM-like: every token gets about the same share, so schedules that depend on
where the probability mass lies look wonderful or useless for no reason. Here the logit of
vocabulary id v at position n is, before targets are drawn,

    z[n, v] = −slope · log rank[v] + σ · Gaussian[n, v]

a Zipf law of frequencies, the same at every position, plus a part that tells positions apart, of
which positions of one document share a portion. Ids are almost in order of frequency, as in a
byte-pair vocabulary, with some disorder. Targets are drawn from softmax(z), and then every hidden
state is moved towards its target, as training would have done. All of it is linear: z is exactly
``hidden @ weight.T``, with hidden states of one length, as after a final RMS norm. All head rows
share one more direction, as those of trained models do: it moves every logit of a position alike,
so no probability depends on it, but a gradient does whose rows have lost their sum.

Calibrated on three figures published for Qwen2.5-0.5B (V = 151936): 0.125 % of probabilities exceed
2⁻¹²; of 128 × 128 tiles of tokens and ids 61 % hold one that does, and 99 % when the vocabulary is
permuted. `survival` measures them; ``python -m bench.lmlike`` prints them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PUBLISHED = {"above": 0.00125, "natural": 0.61, "permuted": 0.99}
THRESHOLD = 2.0**-12
TILE = 128  # tokens, and ids


@dataclass(frozen=True)
class Shape:
    """How the distribution looks; the defaults are the calibrated ones."""

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
    rows: int,
    width: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    shape: Shape | None = None,
    seed: int = 0,
) -> Data:
    """LM-like data of N = `rows`, D = `width`, V = `vocabulary`, the same for the same seed.

    Raises:
        ValueError: a width below 8, which cannot hold the directions it takes.
    """
    if width < 8:
        raise ValueError(f"width: expected at least 8, got {width}")
    shape = shape or Shape()
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    # One direction is frequency, the same at every position; all else is orthogonal to it.
    common = _unit(normal(width))

    def directions(x: Tensor) -> Tensor:
        return _unit(x - (x @ common)[:, None] * common)

    order = torch.arange(1, vocabulary + 1).log() + shape.disorder * normal(vocabulary)
    log_rank = torch.empty(vocabulary)
    log_rank[order.argsort()] = torch.arange(1, vocabulary + 1).log()
    frequency = -shape.slope * (log_rank - log_rank.mean())
    scale = math.sqrt(width)
    own = directions(normal(vocabulary, width))
    # What moves a position to its target also moves other ids a little: spread boost / scale.
    spread = math.sqrt(max(shape.sigma**2 - (shape.boost / scale) ** 2, 0))
    documents = normal(-(-rows // shape.document), width).repeat_interleave(shape.document, 0)
    mixed = math.sqrt(shape.shared) * documents[:rows]
    mixed += math.sqrt(1 - shape.shared) * normal(rows, width)
    position = spread * scale * directions(mixed)
    target = torch.empty(rows, dtype=torch.int64)
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
    """The three published figures on `data`, and two more that tell what kind of data it is.

    Returns:
        ``above``: share of probabilities above the threshold; ``natural`` and ``permuted``: share
        of tiles that hold one, with ids as they are and permuted; ``k``: active share, of (block of
        128 tokens, id) pairs with one; ``loss``: mean −log p of the targets. Tokens and ids beyond
        the last whole tile are left out, as long as there is one.
    """
    vocabulary = data.weight.shape[0]
    permutation = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
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


def main() -> None:
    """Print the figures of the calibrated shape beside the published ones."""
    parser = argparse.ArgumentParser(prog="python -m bench.lmlike", description=main.__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--seed", type=int, default=0)
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = vars(parser.parse_args())
    sizes = [options.pop(name) for name in ("rows", "width", "vocabulary")]
    seed = options.pop("seed")
    measured = survival(generate(*sizes, shape=Shape(**options), seed=seed))
    for name, value in measured.items():
        known = f"   published {PUBLISHED[name]:.3%}" if name in PUBLISHED else ""
        print(f"{name:<9}" + (f"{value:8.2f}" if name == "loss" else f"{value:8.3%}") + known)


if __name__ == "__main__":
    main()
