"""What `operators.library` promises for every operator: no derivative is silently wrong."""

import functools
import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ift_kernels
from ift_kernels import ActiveSet, exact_influence, linear_cross_entropy, linear_token, linear_topk
from ift_kernels.schedule import plan
from operations import HEAD, IDS, OPERATIONS, TEACHER

REFUSED = "not supported, expected torch.autograd.grad or backward"
PREFIX = "ift_kernels::"


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


class Recorder(TorchDispatchMode):
    """The arguments of one call of every operator of the package."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ift_kernels":
            copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.setdefault(func._schema.name.removeprefix(PREFIX), copies)
        return func(*args, **(kwargs or {}))


@functools.cache
def calls():
    """One call of every operator that the operations make, forward and backward."""
    with Recorder() as recorder:
        for operation in OPERATIONS.values():
            for schedule in ("recompute", "keep", "forward"):
                tensors = [t.requires_grad_() for t in operation.inputs()]
                with plan.use_schedule(schedule):
                    operation.ours(*tensors).sum().backward()
        # Columns are left out, so that a set of active ones is kept.
        hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(3000, 16)
        options = ActiveSet(threshold=0.01, block=32, tail_bucket=64)
        target = torch.zeros(64, dtype=torch.int64)
        ift_kernels.linear_logprobs(
            hidden, weight, target, gradient=options
        ).logprob.sum().backward()
        linear_token(*TEACHER)
        linear_topk(*TEACHER, 3)
    return recorder.calls


LINEAR = {"discounted_cumsum", "temporal_residual", "temporal_residual_adjoint"}


@pytest.mark.parametrize("name", registered())
def test_every_operator_in_forward_mode(name):
    """Tangents of every argument: the derivative is right, or refused by the operator's name."""
    assert name in calls(), f"no operation in tests/operations.py calls {name}"
    op, args = getattr(torch.ops.ift_kernels, name), calls()[name]
    floating = [
        i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    assert floating
    for i in floating:
        tangent = torch.randn_like(args[i])

        def call(x, i=i):
            return op(*args[:i], x, *args[i + 1 :])

        def dual(call=call, i=i, tangent=tangent):
            with forward_ad.dual_level():
                out = call(forward_ad.make_dual(args[i].clone(), tangent))
                return forward_ad.unpack_dual(out).tangent

        def jvp(call=call, i=i, tangent=tangent):
            return torch.func.jvp(call, (args[i],), (tangent,))[1]

        for way in (dual, jvp):
            if name in LINEAR:
                torch.testing.assert_close(way(), call(tangent))
            else:
                with pytest.raises(RuntimeError, match=f"{PREFIX}{name}: forward-mode.*{REFUSED}"):
                    way()


def by_dual_numbers(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


def by_upstream_tangent(function, x, tangent):
    """A tangent that only the upstream gradient has."""
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(value), torch.full_like(value, 2.0))
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        return forward_ad.unpack_dual(gradient).tangent


def func_hessian(function, x, tangent):
    return torch.func.hessian(lambda a: function(a).square().sum())(x)


TRANSFORMS = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x, t: torch.func.linearize(f, x)[1](t),
    "dual numbers": by_dual_numbers,
    "dual numbers of a leaf": lambda f, x, t: by_dual_numbers(f, x.clone().requires_grad_(), t),
    "upstream tangent": by_upstream_tangent,
    "grad": lambda f, x, t: torch.func.grad(lambda a: f(a).sum())(x),
    "vjp": lambda f, x, t: (p := torch.func.vjp(f, x))[1](torch.ones_like(p[0]))[0],
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x),
    "hessian": func_hessian,
    "forward over reverse": lambda f, x, t: torch.func.jvp(
        torch.func.grad(lambda a: f(a).square().sum()), (x,), (t,)
    )[1],
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack([x, t])),
    "vmap of grad": lambda f, x, t: torch.func.vmap(torch.func.grad(lambda a: f(a).sum()))(
        torch.stack([x, t])
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls once per item
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_transforms_are_right_or_refused(operation, transform):
    x, *rest = operation.inputs()
    tangent = torch.randn_like(x)
    ours, plain = (lambda a, f=f: f(a, *rest) for f in (operation.ours, operation.plain))
    forward = list(TRANSFORMS)[:6]
    if transform == "vmap" or (operation.linear and transform in forward):
        wanted = TRANSFORMS[transform](plain, x, tangent)
        torch.testing.assert_close(
            TRANSFORMS[transform](ours, x, tangent), wanted, rtol=1e-4, atol=1e-5
        )
    else:
        with pytest.raises(RuntimeError, match=REFUSED):
            TRANSFORMS[transform](ours, x, tangent)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_detached_arguments_have_no_tangent(operation):
    x, *rest = operation.inputs()
    scale, one = torch.tensor(2.0), torch.tensor(1.0)
    value, tangent = torch.func.jvp(
        lambda s: s * operation.ours(x.detach(), *rest), (scale,), (one,)
    )
    torch.testing.assert_close(tangent, value / 2)


def test_compiled_forward_mode_is_refused_too():
    for name in ("discounted sums", "temporal residual", "cross-entropy per token"):
        torch._dynamo.reset()
        x, *rest = OPERATIONS[name].inputs()

        @torch.compile(backend="eager")
        def compiled(x, tangent, name=name, rest=rest):
            return torch.func.jvp(lambda a: OPERATIONS[name].ours(a, *rest), (x,), (tangent,))[1]

        with pytest.raises(Exception, match=re.escape("forward-mode differentiation")):
            compiled(x, torch.ones_like(x))


@pytest.mark.parametrize("watched", [1, 4, 12], ids=["one", "fewer", "more"])
@pytest.mark.parametrize("name", ["logprobs", "cross-entropy per token", "active", "divergence"])
def test_exact_influence_through_the_operators(name, watched):
    """Equal to the same functions in plain torch, whichever side has more entries."""
    hidden, weight, bias = OPERATIONS["logprobs"].inputs()
    probe_hidden = torch.randn(watched, hidden.shape[1])
    target = torch.randint(weight.shape[0], (watched,))

    def probe(p):
        return -linear_cross_entropy(probe_hidden, p["w"], target, bias=p["b"], reduction="none")

    def probe_plain(p):
        logp = (probe_hidden @ p["w"].T + p["b"]).log_softmax(-1)
        return logp.gather(-1, target[:, None])[:, 0]

    operation = OPERATIONS[name]

    def loss(function):
        return lambda p: function(hidden, p["w"], *([p["b"]] if len(operation.shapes) > 2 else []))

    at = {"w": weight, "b": bias, "unused": torch.ones(3, 2)}
    ours = exact_influence(probe, loss(operation.ours), at, lr=0.1)
    wanted = exact_influence(probe_plain, loss(operation.plain), at, lr=0.1)
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    # And both are the derivative in forward mode, of plain torch.
    (step,) = torch.func.vjp(lambda p: loss(operation.plain)(p).sum(), at)[1](torch.tensor(-0.1))
    _, change = torch.func.jvp(probe_plain, (at,), (step,))
    torch.testing.assert_close(wanted.reshape(watched, -1).sum(1), change, rtol=1e-4, atol=1e-6)


def test_exact_influence_of_constants_and_of_nothing():
    at = {"w": torch.randn(HEAD[1])}
    constant, empty = torch.ones(2), torch.ones(0)

    def some(p):
        return p["w"][0]

    assert exact_influence(lambda p: constant, some, at).equal(torch.zeros(2, 6))
    assert exact_influence(some, lambda p: constant[0], at).equal(torch.zeros(6))
    assert exact_influence(lambda p: empty, some, at).shape == (0, 6)
    assert exact_influence(some, lambda p: empty, at).shape == (6, 0)
    assert not at["w"].requires_grad and IDS.shape == (9,)
