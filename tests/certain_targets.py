"""The gradient of the target's logit, from p = 1e-30 to 1 − 1e-12.

The head is the identity, so hidden states are the products, exact in every dtype, and the gradient
of hidden is theirs. The oracle adds the bias to these products in float32, as every epilogue does;
all else it does in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import ift_kernels as K
from ift_kernels.schedule import plan

ONE_LESS_P = (1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 1 - 1e-3)
P = (1e-12, 1e-30)


class Transform(NamedTuple):
    """Of logits. `rounding`: how far an epilogue's logit may be off, in units of 2⁻²⁴ of it.

    None where products are scaled by powers of two; one product with a rounded factor; under a
    softcap a product, tanh to two units in the last place, and another product.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    has_bias: bool = False
    rounding: float = 0.0

    def options(self) -> dict[str, float | None]:
        return {"logit_scale": self.scale, "softcap": self.softcap, "temperature": self.temperature}

    def logits(self, x: Tensor, bias: Tensor | None) -> Tensor:
        z = x.float() if bias is None else x.float() + bias.float()
        z = z.double() * self.scale
        return (z if self.softcap is None else self.capped(z)) / self.temperature

    def capped(self, z: Tensor) -> Tensor:
        return self.softcap * torch.tanh(z / self.softcap)

    def products(self, z: Tensor) -> Tensor:
        """Those that have these logits, without a bias."""
        z = z * self.temperature
        z = z if self.softcap is None else self.softcap * torch.atanh(z / self.softcap)
        return z / self.scale

    def steepness(self, z: Tensor) -> Tensor:
        """1 − tanh²."""
        cap = torch.inf if self.softcap is None else self.softcap
        return 1.0 - (z * self.temperature / cap).square()


TRANSFORMS = {
    "plain": Transform(),
    "bias": Transform(has_bias=True),
    "powers of two": Transform(scale=0.5, temperature=0.25, has_bias=True),
    "scale": Transform(scale=0.7, temperature=1.3, rounding=2.0),
    "softcap": Transform(scale=1.1, softcap=80.0, temperature=0.8, has_bias=True, rounding=5.0),
}
SCHEDULES = ("recompute", "keep", "forward", "frozen", "active", "frozen, active")


class Tokens(NamedTuple):
    x: Tensor  # (N, V) products
    bias: Tensor | None
    target: Tensor
    one_less_p: Tensor  # (N,) float64, as all that follow
    logprob: Tensor
    gradient: Tensor  # of logprob by the target's product
    allowed: Tensor  # relative error of the gradient, and of logprob


def tokens(columns: int, dtype: torch.dtype, transform: Transform, copies: int = 6) -> Tokens:
    """Of each p, `copies`. Targets at both ends of a row and in between; every second against one
    other column that is likely, the rest against many.
    """
    generator = torch.Generator().manual_seed(columns)
    odds = [torch.tensor(q).double().logit() for q in ONE_LESS_P]
    odds += [-torch.tensor(p).double().logit() for p in P]
    log_odds = torch.stack(odds).repeat_interleave(copies)  # of 1 − p
    places = torch.tensor([0, columns // 2, columns - 1])
    target = places[torch.arange(len(log_odds)) % 3]
    x = torch.randn(len(target), columns, generator=generator)
    x[::2, columns // 3] += 8.0
    x = x.to(dtype)
    bias = torch.randn(columns, generator=generator).to(dtype) if transform.has_bias else None
    at = target[:, None]
    others = transform.logits(x, bias).scatter(1, at, -torch.inf).logsumexp(1)
    own = transform.products(others - log_odds)
    own = own if bias is None else own - bias[target].double()
    x.scatter_(1, at, own.to(dtype)[:, None])

    z = transform.logits(x, bias)
    own = z.gather(1, at)[:, 0]
    log_odds = z.scatter(1, at, -torch.inf).logsumexp(1) - own
    one_less_p, steep = log_odds.sigmoid(), transform.steepness(own)
    # A logit's rounding moves log(1 − p) by p of it, and 1 − tanh² by 2·tanh² of it.
    off = transform.rounding * 2.0**-24
    of_logits = off * (own.abs() + z.abs().amax(1)) * (1 - one_less_p)
    allowed = 4 * torch.finfo(dtype).eps + of_logits + 2 * off * (1 - steep) / steep
    logprob = -torch.logaddexp(log_odds, torch.zeros_like(log_odds))
    gradient = one_less_p * steep * transform.scale / transform.temperature
    return Tokens(x, bias, target, one_less_p, logprob, gradient, allowed)


def assert_gradient(given: Tokens, transform: Transform, schedule: str) -> None:
    """Of every token, by the schedule of this name, in the backend that is chosen."""
    x, bias, target, *_ = given
    options = {"bias": bias, **transform.options(), "workspace": 1 << 20}
    if "active" in schedule:
        options["gradient"] = K.ActiveSet(block=32, tail_bucket=64)
    hidden = x.clone().requires_grad_()
    weight = torch.eye(x.shape[1], dtype=x.dtype).requires_grad_("frozen" not in schedule)
    other = "forward" if "frozen" in schedule else "keep"
    with plan.use_schedule(schedule if schedule in plan.SCHEDULES else other):
        if schedule == "forward":
            value = -K.linear_cross_entropy(hidden, weight, target, reduction="sum", **options)
        else:
            logprob = K.linear_logprobs(hidden, weight, target, **options).logprob
            value = logprob.sum()
    (d_hidden,) = torch.autograd.grad(value, hidden)
    found = d_hidden.gather(1, target[:, None])[:, 0]
    assert_close(found, given.gradient, given.allowed, "gradient")
    if schedule != "forward":
        assert_close(logprob, given.logprob, given.allowed, "logprob")


def assert_logprob(given: Tokens, transform: Transform) -> None:
    """Of a call without gradients."""
    weight = torch.eye(given.x.shape[1], dtype=given.x.dtype)
    options = {"bias": given.bias, **transform.options()}
    stats = K.linear_logprobs(given.x, weight, given.target, **options)
    assert_close(stats.logprob, given.logprob, given.allowed, "logprob")


def assert_close(found: Tensor, exact: Tensor, allowed: Tensor, what: str) -> None:
    error = (found.detach().double() - exact).abs() / exact.abs()
    worst = int((error / allowed).argmax())
    assert (error <= allowed).all(), (
        f"{what} {exact[worst]:.3g}: relative error {error[worst]:.3g}, of {allowed[worst]:.3g}"
    )
