"""Every tensor argument of every operation in every layout: the same numbers on every backend."""

import pytest
import torch

from ift_kernels import (
    ActiveSet,
    discounted_cumsum,
    influence,
    linear_cross_entropy,
    linear_divergence,
    linear_expected_embedding,
    linear_logprobs,
    linear_token,
    propagation_weights,
    temporal_residual,
    use_backend,
)
from serving import BACKENDS

N, D, V = 40, 16, 192


def transposed(t):
    """Columns of consecutive elements; of a vector, every second element."""
    return t.T.contiguous().T if t.dim() == 2 else strided(t)


def strided(t):
    """Every second element of the last dimension of a larger tensor, whose others are NaN."""
    filler = float("nan") if t.is_floating_point() else 0
    larger = torch.full((*t.shape[:-1], 2 * t.shape[-1]), filler, dtype=t.dtype)
    larger[..., ::2] = t
    return larger[..., ::2]


def part(t):
    """The middle of a larger tensor: rows that do not follow one another; a vector, strided."""
    if t.dim() == 1:
        return strided(t.flip(0))
    filler = float("nan") if t.is_floating_point() else 0
    larger = torch.full([size + 6 for size in t.shape], filler, dtype=t.dtype)
    inside = larger[tuple(slice(3, -3) for _ in t.shape)]
    return inside.copy_(t)


def expanded(t):
    """One row in the place of all, of stride 0."""
    return t[:1].expand(t.shape)


LAYOUTS = transposed, strided, part, expanded
SET = ActiveSet(threshold=2.0**-10, block=32, tail_bucket=64)
ALL = ("logprob", "lse", "entropy", "argmax", "second_logprob", "sum_sq", "mean_logit")


def stats(hidden, weight, target, bias, **options):
    s = linear_logprobs(hidden, weight, target, bias=bias, **options)
    return tuple(value for value in s if value is not None)


OPERATIONS = {
    "logprobs": lambda h, w, y, b: stats(h, w, y, b, outputs=ALL),
    "recomputed": lambda h, w, y, b: stats(h, w, y, b, workspace=1 << 20),
    "active": lambda h, w, y, b: stats(h, w, y, b, gradient=SET),
    "active, frozen": lambda h, w, y, b: stats(h, w.detach(), y, b.detach(), gradient=SET),
    "frozen": lambda h, w, y, b: stats(h, w.detach(), y, b.detach()),
    "loss": lambda h, w, y, b: (linear_cross_entropy(h, w, y, bias=b, label_smoothing=0.1),),
    "embedding": lambda h, w, e: (linear_expected_embedding(h, w, e),),
    "divergence": lambda h, w, b, th, tw, tb, m: (
        linear_divergence(h, w, th, tw, bias=b, teacher_bias=tb, mask=m, reduction="none"),
    ),
    "greedy": lambda h, w, b: tuple(linear_token(h, w, bias=b)),
    "kth": lambda h, w, b: tuple(linear_token(h, w, bias=b, rule="kth", k=3)),
    "sample": lambda h, w, b: tuple(linear_token(h, w, bias=b, rule="sample", seed=3)),
    "influence": lambda h, y, th, ty, w, b: (influence(h, y, th, ty, w, bias=b),),
    "residual": lambda e, y, ty, labels: (temporal_residual(e, y % V, ty % V, labels, 0.3),),
    "cumsum": lambda x, xm: (discounted_cumsum(x, 0.9, mask=xm),),
    "propagation": lambda x, xm: (propagation_weights(-x.abs(), xm),),
}
SHAPES = {
    "h": (N, D), "w": (V, D), "b": (V,), "e": (V, D), "th": (N, D), "tw": (V, D), "tb": (V,),
    "y": (N,), "ty": (N,), "labels": (N,), "m": (N,), "x": (8, 12), "xm": (8, 12),
}  # fmt: skip


def tensor(name, dtype):
    g = torch.Generator().manual_seed(sorted(SHAPES).index(name))
    if name in ("y", "ty", "labels"):
        ids = torch.randint(V, SHAPES[name], generator=g)
        # All rows of "y" count: a choice of rows would be a copy.
        return ids if name == "y" else torch.where(torch.arange(N) % 5 == 4, -100, ids)
    if name in ("m", "xm"):
        return torch.randint(2, SHAPES[name], generator=g).bool()
    return torch.randn(SHAPES[name], generator=g).to(dtype)


def arguments_of(operation):
    code = OPERATIONS[operation].__code__
    return code.co_varnames[: code.co_argcount]


def run(operation, tensors):
    """Values, and the gradients of whatever can have one."""
    tensors = [t.detach() for t in tensors]
    for t in tensors:
        if t.is_floating_point():
            t.requires_grad_()
    values = OPERATIONS[operation](*tensors)
    sent = [v for v in values if v.requires_grad]
    inputs = [t for t in tensors if t.requires_grad]
    # Upstream gradients of stride 0, and others.
    loss = sum((v * torch.linspace(-1, 1, v.shape[-1] if v.dim() else 1)).sum() for v in sent)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True) if sent else ()
    return [*values, *(g for g in grads if g is not None)]


CASES = [(operation, name) for operation in OPERATIONS for name in arguments_of(operation)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "name"), CASES)
def test_every_layout_of_every_argument(operation, name, backend):
    check(operation, name, backend, torch.float32, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["h", "w"])
@pytest.mark.parametrize("operation", ["logprobs", "active", "embedding"])
def test_layouts_in_16_bits(operation, name, backend):
    check(operation, name, backend, torch.bfloat16, rtol=0.1, atol=0.1)


def check(operation, name, backend, dtype, **tolerance):
    names = arguments_of(operation)
    tensors = [tensor(n, dtype) for n in names]
    which = names.index(name)
    before, after = tensors[:which], tensors[which + 1 :]
    layouts = [f for f in LAYOUTS if f is not transposed or tensors[which].dim() == 2]
    with use_backend(backend):
        for layout in layouts:
            changed = layout(tensors[which])
            assert not changed.is_contiguous()
            copy = changed.clone()
            ours = run(operation, [*before, changed, *after])
            wanted = run(operation, [*before, changed.contiguous(), *after])
            for a, b in zip(ours, wanted, strict=True):
                if a.dtype == torch.int64:
                    assert (a == b).double().mean() >= (1 if dtype == torch.float32 else 0.9)
                else:
                    torch.testing.assert_close(a, b, **tolerance)
            assert torch.equal(changed, copy)
