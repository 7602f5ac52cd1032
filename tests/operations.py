"""Every differentiable operation of the package beside its definition in plain torch.

Each is a function of floating point tensors, so that tests can ask torch for any of its
derivatives, by any transform, in any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ift_kernels import (
    ActiveSet,
    discounted_cumsum,
    linear_cross_entropy,
    linear_divergence,
    linear_expected_embedding,
    linear_logprobs,
    linear_selected_logprobs,
    propagation_weights,
    temporal_residual,
)

N, D, V = 9, 6, 70


@dataclass(frozen=True)
class Operation:
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    linear: bool = False  # forward-mode differentiation is the operation itself

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=g) for shape in self.shapes)


IDS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
HEAD = ((N, D), (V, D), (V,))
WEIGHTS = torch.linspace(-1, 2, N)


def _dense(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return h @ w.T if b is None else h @ w.T + b


def _all_outputs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    s = linear_logprobs(h, w, IDS, bias=b, outputs=("logprob", "lse", "entropy", "mean_logit"))
    return WEIGHTS * (s.logprob + 0.5 * s.entropy - 0.1 * s.lse + s.mean_logit)


def _all_outputs_plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = _dense(h, w, b)
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    logprob = logp.gather(-1, IDS[:, None])[:, 0]
    return WEIGHTS * (logprob + 0.5 * entropy - 0.1 * z.logsumexp(-1) + z.mean(-1))


def _nll(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.cross_entropy(_dense(h, w, b), IDS)


# Every column is active, so the gradient is exact.
ACTIVE = ActiveSet(threshold=0.0, block=32, tail_bucket=64)


TEACHER = tuple(torch.randn(s, generator=torch.Generator().manual_seed(8)) for s in HEAD[:2])


def _divergence(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    s, t = _dense(h, w, b).log_softmax(-1), _dense(*TEACHER).log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1)


SET = torch.tensor([[7, 50]]).expand(N, 2)


def _selected(h: Tensor, w: Tensor, b: Tensor, outputs: tuple[str, ...]) -> Tensor:
    s = linear_selected_logprobs(h, w, SET, bias=b, outputs=outputs)
    first = s.in_set_logprob if s.logprob is None else s.logprob
    tail = 0.0 if s.tail_logprob is None else s.tail_logprob
    return WEIGHTS * (first[:, 0] + tail)


def _selected_plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    logp = _dense(h, w, b).log_softmax(-1)
    return WEIGHTS * (logp[:, SET[0, 0]] + logp.scatter(1, SET, -torch.inf).logsumexp(1))


PREDICTED, LABELS = IDS.flip(0), torch.where(torch.arange(N) < 3, -100, IDS)


def _residual_plain(table: Tensor) -> Tensor:
    mixed_in = torch.where(LABELS != -100, PREDICTED.roll(1, -1), IDS)
    return 0.8 * table[IDS] + 0.2 * table[mixed_in]


def _cumsum_plain(x: Tensor) -> Tensor:
    t = torch.arange(N)
    distance = t[None] - t[:, None]
    return torch.where(distance >= 0, 0.9 ** distance.clamp(min=0), 0.0) @ x


MASK = torch.arange(N) > 1


def _propagation_plain(logprob: Tensor) -> Tensor:
    c = torch.where(MASK, _cumsum_plain(torch.where(MASK, -logprob, 0)), 0)
    return MASK.sum() * c / c.sum()


OPERATIONS: dict[str, Operation] = {
    "logprobs": Operation(_all_outputs, _all_outputs_plain, HEAD),
    "logprobs of a frozen head": Operation(
        lambda h: linear_logprobs(h, TEACHER[1], IDS).logprob,
        lambda h: _dense(h, TEACHER[1]).log_softmax(-1).gather(-1, IDS[:, None])[:, 0],
        HEAD[:1],
    ),
    "cross-entropy": Operation(lambda h, w, b: linear_cross_entropy(h, w, IDS, bias=b), _nll, HEAD),
    "cross-entropy per token": Operation(
        lambda h, w: linear_cross_entropy(h, w, IDS, reduction="none"),
        lambda h, w: F.cross_entropy(_dense(h, w), IDS, reduction="none"),
        HEAD[:2],
    ),
    "active": Operation(
        lambda h, w, b: linear_cross_entropy(h, w, IDS, bias=b, gradient=ACTIVE), _nll, HEAD
    ),
    "active, frozen head": Operation(
        lambda h: linear_logprobs(h, TEACHER[1], IDS, gradient=ACTIVE).logprob,
        lambda h: _dense(h, TEACHER[1]).log_softmax(-1).gather(-1, IDS[:, None])[:, 0],
        HEAD[:1],
    ),
    "divergence": Operation(
        lambda h, w, b: linear_divergence(h, w, *TEACHER, bias=b),
        lambda *tensors: _divergence(*tensors).mean(),
        HEAD,
    ),
    "divergence per token": Operation(
        lambda h, w, b: linear_divergence(h, w, *TEACHER, bias=b, reduction="none"),
        _divergence,
        HEAD,
    ),
    "expected embedding": Operation(
        lambda h, w, e: linear_expected_embedding(h, w, e),
        lambda h, w, e: _dense(h, w).softmax(-1) @ e,
        (*HEAD[:2], (V, 4)),
    ),
    "selected log-probabilities": Operation(
        lambda h, w, b: _selected(h, w, b, outputs=("logprob", "tail_logprob")),
        lambda h, w, b: _selected_plain(h, w, b),
        HEAD,
    ),
    "log-probabilities in a set": Operation(
        lambda h, w, b: _selected(h, w, b, outputs=("in_set_logprob",)),
        lambda h, w, b: WEIGHTS * _dense(h, w, b)[:, SET[0]].log_softmax(-1)[:, 0],
        HEAD,
    ),
    "temporal residual": Operation(
        lambda table: temporal_residual(table, IDS, PREDICTED, LABELS, lam=0.2),
        _residual_plain,
        ((V, 4),),
        linear=True,
    ),
    "discounted sums": Operation(
        lambda x: discounted_cumsum(x, 0.9), _cumsum_plain, ((N,),), linear=True
    ),
    "propagation weights": Operation(
        lambda x: propagation_weights(-x.abs(), MASK, gamma=0.9),
        lambda x: _propagation_plain(-x.abs()),
        ((N,),),
        linear=True,
    ),
}
