"""Heads whose logits are ordinary, peaked, flat, huge or partly −inf."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = {
    "ordinary": "logits of spread 3",
    "peaked": "the target of most tokens has p = 1 − 1e-6",
    "flat": "every token nearly as likely as any other",
    "huge": "logits of some thousands",
    "masked": "a third of the vocabulary at −inf, by the bias",
}


class Inputs(NamedTuple):
    """Of a head, in fp64."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,) int64


def make(
    kind: str, rows: int, width: int, vocabulary: int, *, bias: bool = False, seed: int = 0
) -> Inputs:
    """Random inputs of a kind, one of `KINDS`.

    "masked" has a bias in any case; its targets are not masked.

    >>> head = make("peaked", 4, 8, 100)
    >>> p = (head.hidden @ head.weight.T).softmax(-1).gather(1, head.target[:, None])
    >>> bool(((1 - p).log10().round() == -6).any())
    True
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    hidden, weight = normal(rows, width), normal(vocabulary, width) * (3 / math.sqrt(width))
    target = torch.randint(vocabulary, (rows,), generator=g)
    if rows:
        target[-1] = vocabulary - 1  # the last column of the last tile
    offsets = normal(vocabulary) if bias or kind == "masked" else None
    if kind == "flat":
        weight = weight * 1e-3
        offsets = None if offsets is None else offsets * 1e-3
    elif kind == "huge":
        weight = weight * 1e3
    elif kind == "peaked":
        # One feature is 1 in every token and drives one column.
        top = int(torch.randint(vocabulary, (), generator=g))
        hidden[:, 0] = 1
        weight = weight * 0.03
        weight[:, 0] = 0
        weight[top, 0] = math.log(1e6 * vocabulary)
        offsets = None if offsets is None else offsets * 0.1
        target = torch.where(torch.rand(rows, generator=g) < 0.8, top, target)
    elif kind == "masked" and offsets is not None:
        closed = torch.rand(vocabulary, generator=g) < 1 / 3
        closed[target] = False
        closed[0] = closed[0] and not bool(closed.all())
        offsets = offsets.masked_fill(closed, -math.inf)
    elif kind != "ordinary":
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return Inputs(hidden, weight, offsets, target)
