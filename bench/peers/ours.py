"""This package as a peer: with its defaults, and with each option that has a price."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ift_kernels
from bench.peers.peer import Peer, Statistics
from ift_kernels import ActiveSet


class Ours(Peer):
    """This package, with its defaults."""

    name, title, slowness = "ours", "ift-kernels", 1.2
    options: dict[str, Any] = {}  # noqa: RUF012  other than the defaults; read only

    def loss(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ift_kernels.linear_cross_entropy(hidden, weight, target, **self.options)

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return _given(ift_kernels.linear_logprobs(hidden, weight, target, **self.options).logprob)

    def statistics(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Statistics:
        outputs = ("logprob", "entropy", "argmax")
        stats = ift_kernels.linear_logprobs(hidden, weight, target, outputs=outputs, **self.options)
        return _given(stats.logprob), _given(stats.entropy), _given(stats.argmax)

    def ids(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return ift_kernels.linear_token(hidden, weight, **self.options).ids


class Deterministic(Ours):
    """Results of a token that depend on nothing else in the call."""

    name, title = "deterministic", "ift-kernels, deterministic"
    options = {"deterministic": True}  # noqa: RUF012


class Fp32Logits(Ours):
    """Logits that are not rounded to the 16 bits of the inputs."""

    name, title, slowness = "fp32-logits", "ift-kernels, fp32 logits", 4.0
    options = {"logits_dtype": torch.float32}  # noqa: RUF012

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        return "the same as ours" if dtype == torch.float32 else ""


class Fp32Copies(Fp32Logits):
    """The same logits from float32 copies of hidden and weight, which take no time here."""

    name, title = "fp32-copies", "ift-kernels on fp32 copies"
    options = {}  # noqa: RUF012

    def leaf(self, tensor: Tensor) -> Tensor:
        return tensor.detach().float().requires_grad_(tensor.requires_grad)


class Lora(Ours):
    """LoRA of rank 16 on the head, as it begins: B is 0, so that results are those without it."""

    name, title, rank = "lora", "ift-kernels, LoRA on the head", 16
    lacks = dict.fromkeys(("statistics", "ids"), "only losses are measured")

    def loss(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        low_rank = self._low_rank(hidden, weight)
        return ift_kernels.linear_cross_entropy(hidden, weight, target, low_rank=low_rank)

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        low_rank = self._low_rank(hidden, weight)
        return _given(
            ift_kernels.linear_logprobs(hidden, weight, target, low_rank=low_rank).logprob
        )

    def _low_rank(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        vocabulary, width = weight.shape
        if not self.parameters or self.parameters[1].shape[0] != vocabulary:
            a = torch.full(
                (self.rank, width), width**-0.5, dtype=weight.dtype, device=weight.device
            )
            b = weight.new_zeros((vocabulary, self.rank))
            self.parameters = a.requires_grad_(), b.requires_grad_()
        a, b = self.parameters
        return hidden @ a.T, b


class Active(Ours):
    """dh from the active set; dW, where the head is trained, is exact."""

    name, title = "active", "ift-kernels, active dh"
    lacks = {"statistics": "no gradient", "ids": "no gradient"}  # noqa: RUF012
    gradient_limit = 0.05  # more is not an approximation but a mistake

    def __init__(self, active_set: ActiveSet | None = None) -> None:
        self.options = {"gradient": active_set or ActiveSet()}

    def details(self, call: Callable[[], Any]) -> dict[str, float]:
        with ift_kernels.record_active_sets() as report:
            call()
        # Without a gradient there is none.
        return {"share": report[0].share, "tail": report[0].tail_mean} if report else {}


class Dropped(Peer):
    """dh without the tail of each block, as CCE's filter does; dense products in float32."""

    name, title = "dropped", "tail dropped, error alone"
    lacks = dict.fromkeys(("loss", "statistics", "ids"), "log-probabilities only")
    gradient_limit = 10.0

    def __init__(self, options: ActiveSet | None = None) -> None:
        self.options = options or ActiveSet()

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        found = _DroppedFunction.apply(hidden, weight, target.clamp(min=0), self.options)
        return found.masked_fill(target == -100, 0)  # type: ignore[no-any-return]


class _DroppedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, options: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight, target)
        ctx.options = options
        logits = (hidden @ weight.T).float()
        return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, target = ctx.saved_tensors
        d_hidden, d_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for rows in range(0, hidden.shape[0], ctx.options.block):
            some = slice(rows, rows + ctx.options.block)
            p = (hidden[some] @ weight.T).float().softmax(1)
            active = (p > ctx.options.threshold).any(0)
            active[target[some]] = True
            dz = p.neg_()
            dz[torch.arange(len(dz)), target[some]] += 1
            dz *= upstream[some, None]
            d_weight += dz.T @ hidden[some].float()
            d_hidden.append(dz[:, active] @ weight[active].float())
        return torch.cat(d_hidden).to(hidden.dtype), d_weight.to(weight.dtype), None, None


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
