"""The linear operations by their definition, over full logits: what the tests compare with.

The formulas are those of `ift.numerics.oracle`, which shares no code with the operations. In fp64
they are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ift.numerics import oracle

FIELDS = (
    "logprob",
    "lse",
    "entropy",
    "argmax",
    "argmax_logprob",
    "second_logprob",
    "sum_sq",
    "mean_logit",
    "target_logit",
)
OUTPUTS = FIELDS
DIFFERENTIABLE = ("logprob", "lse", "entropy", "mean_logit", "target_logit")
# Every part of the transform at once, all different from 1.
TRANSFORM = {"logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3}


@dataclass(frozen=True)
class Head:
    """The tensors and options of one call."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    target: Tensor  # (...)
    bias: Tensor | None = None  # (V,)
    options: dict[str, float] = field(default_factory=dict)  # of the transform

    def map(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The same call on changed hidden, weight and bias."""
        bias = None if self.bias is None else change(self.bias)
        return replace(self, hidden=change(self.hidden), weight=change(self.weight), bias=bias)

    def double(self) -> Head:
        """The same numbers in fp64."""
        return self.map(lambda t: t.detach().double().requires_grad_())

    @property
    def inputs(self) -> list[Tensor]:
        """What may have a gradient."""
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of `linear_logprobs` and `linear_cross_entropy`."""
        return self.hidden, self.weight, self.target

    @property
    def kwargs(self) -> dict[str, object]:
        return {"bias": self.bias, **self.options}


def head(
    n: int | tuple[int, ...],
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    ignored: float = 0.15,
    seed: int = 0,
    **options: float,
) -> Head:
    """Random inputs with logits of spread 3, like those of a language model, and gradients on."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n,) if isinstance(n, int) else n

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    target = torch.randint(v, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = -100
    if target.numel():
        target.view(-1)[-1] = v - 1  # the last column of the last tile is somebody's target
    return Head(
        normal(*shape, d).to(dtype).requires_grad_(),
        (normal(v, d) * 3 / d**0.5).to(dtype).requires_grad_(),
        target,
        normal(v).to(dtype).requires_grad_() if bias else None,
        options,
    )


def logits(h: Head) -> Tensor:
    """(..., V), as `oracle.logits`."""
    return oracle.logits(h.hidden, h.weight, h.bias, **h.options)


def stats(h: Head, ignore_index: int = -100) -> dict[str, Tensor]:
    """Every field of TokenStats, 0 at ignored positions."""
    return oracle.statistics(logits(h), h.target, ignore_index)


def cross_entropy(h: Head, **options: Any) -> Tensor:
    """The loss of `linear_cross_entropy` with its options."""
    return oracle.cross_entropy(logits(h), h.target, **options)


def upstream(h: Head, names: tuple[str, ...] = DIFFERENTIABLE, seed: int = 1) -> dict[str, Tensor]:
    """Gradients to send into each output: mixed signs, three orders of magnitude, a third zeros."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name in names:
        size = (
            torch.rand(h.target.shape, generator=generator, dtype=torch.float64).mul(6).sub(4).exp()
        )
        sign = torch.randint(-1, 2, h.target.shape, generator=generator)
        out[name] = sign * size
    return out


def send(values: dict[str, Tensor] | object, grads: dict[str, Tensor]) -> Tensor:
    """The scalar whose gradients with respect to the outputs are `grads`."""
    get = values.get if isinstance(values, dict) else lambda name: getattr(values, name)
    return sum((get(name) * g.to(get(name))).sum() for name, g in grads.items())


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, allow_unused=True))


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def error(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square deviation."""
    e = (value.detach().double() - exact.detach()).abs()
    return e.max().item(), e.square().mean().sqrt().item()


def assert_as_accurate(
    ours: Tensor, dense: Tensor, exact: Tensor, what: str = "", scale: float | None = None
) -> None:
    """Our error against fp64 is at most twice that of the dense formula in the same dtype.

    The largest of a few deviations is luck: three times. Plus a little for where the rounding of
    the dense formula happens to cancel: of `scale`, by default the largest value, four units in the
    last place of the result's dtype for the largest error and one for the root mean square. fp64
    has nothing more exact to compare with: 1e-12 of `scale`.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, {tuple(exact.shape)}"
    assert ours.isfinite().all(), f"{what}: not finite"
    if not ours.numel():
        return
    scale = exact.abs().max().item() if scale is None else scale
    unit = torch.finfo(ours.dtype).eps * scale
    ulps = (1e-12 / torch.finfo(torch.float64).eps,) * 2 if ours.dtype == torch.float64 else (4, 1)
    kinds = ("largest", "rms"), error(ours, exact), error(dense, exact), ulps
    for kind, mine, theirs, allowed in zip(*kinds, strict=True):
        bound = (
            (3 if kind == "largest" else 2) * theirs + allowed * unit + torch.finfo(ours.dtype).tiny
        )  # no word on subnormals
        assert mine <= bound, (
            f"{what}: {kind} error {mine:.3g}, dense has {theirs:.3g} (bound {bound:.3g})"
        )


def assert_stats(ours: object, h: Head) -> None:
    """Every field of a TokenStats that is not None, held against the dense formula."""
    dense, exact = stats(h), stats(h.double())
    for name in FIELDS:
        value = getattr(ours, name)
        if value is None:
            continue
        assert value.shape == h.target.shape, f"{name}: shape {tuple(value.shape)}"
        if not value.numel():
            continue
        if name == "argmax":
            # Logits rounded to a half type tie; the choice must be within rounding of the best.
            z = logits(h.double())
            lost = z.amax(-1) - z.gather(-1, value[..., None])[..., 0]
            lost = torch.where(h.target == -100, 0, lost)
            rounding = torch.finfo(h.hidden.dtype).eps * z.abs().amax(-1)
            assert (lost <= rounding).all() and (value[h.target == -100] == 0).all()
        elif name == "second_logprob" and h.weight.shape[0] == 1:
            assert (value[h.target != -100] == -torch.inf).all()
        else:
            # A logarithm, or the mean of many logits, may be small beside the logits whose
            # rounding it has, which depends on how the vendor's product adds up.
            scale = None if name == "sum_sq" else max(1.0, exact["lse"].abs().max().item())
            assert_as_accurate(value, dense[name], exact[name], name, scale)


def fill_rows(
    h: Head, rows: object, value: float = torch.nan, column: int | slice = slice(None)
) -> Head:
    """The same call with `value` in these rows of hidden."""
    hidden = h.hidden.detach().clone()
    hidden[rows, column] = value
    return replace(h, hidden=hidden.requires_grad_())


def assert_only_needed(
    inputs: list[Tensor],
    needs: int,
    loss: Callable[[], Tensor],
    wanted: list[Tensor],
    **tolerance: float,
) -> None:
    """Backward of `loss()` gives `wanted` to the inputs whose bit is in `needs`, others nothing."""
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(bool(needs >> i & 1))
    loss().backward()
    for i, (tensor, grad) in enumerate(zip(inputs, wanted, strict=True)):
        if needs >> i & 1:
            torch.testing.assert_close(tensor.grad, grad, **tolerance)
        else:
            assert tensor.grad is None


def assert_stats_and_gradients(
    ours: object, h: Head, names: tuple[str, ...] = DIFFERENTIABLE
) -> None:
    """Every field of a TokenStats, and its gradients under `upstream` into `names`."""
    assert_stats(ours, h)
    up, exact = upstream(h, names), h.double()
    found = gradients(send(ours, up), h.inputs)
    assert_gradients(found, h, send(stats(h), up), send(stats(exact), up), exact.inputs)


def assert_compiles(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """One graph, with the values and the gradients of the eager function."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    values = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), inputs) for value in values))


def assert_gradients(
    ours: list[Tensor], h: Head, dense: Tensor, exact: Tensor, exact_inputs: list[Tensor]
) -> None:
    """`ours` against the gradients of two scalars: `dense` of `h`, `exact` of its fp64 copy."""
    theirs, wanted = gradients(dense, h.inputs), gradients(exact, exact_inputs)
    names = ("d_hidden", "d_weight", "d_bias")
    for name, tensor, *three in zip(names, h.inputs, ours, theirs, wanted, strict=False):
        assert three[0].dtype == tensor.dtype and three[0].shape == tensor.shape, name
        assert_as_accurate(*three, name)
