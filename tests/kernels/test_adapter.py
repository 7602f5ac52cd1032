"""Heads with an adapter, a low-rank product and a scale of columns, against their definition."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dense
import ift_kernels
from allocations import Allocations
from ift_kernels import (
    ActiveSet,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_token,
    linear_topk,
)
from ift_kernels.common.sync_free import sync_free
from ift_kernels.schedule.device import H200
from ift_kernels.schedule.plan import Problem, make, use_schedule
from refusals import assert_refused
from serving import BACKENDS

N, D, V, R = 37, 24, 331, 5
NAMES = ("hidden", "weight", "bias", "u", "b", "scale")
OUTPUTS = ("logprob", "lse", "entropy", "mean_logit", "target_logit")


def problem(dtype=torch.float32, given=NAMES, trained=NAMES, n=N, v=V):
    """Tensors by name, None where not `given`, and targets of which some are ignored."""
    h = dense.head(n, D, v, dtype, bias=True)
    u, b, scale = torch.randn(n, R), torch.randn(v, R) / 2, 1 + torch.randn(v) / 4
    scale[3], scale[v - 1] = 0.0, -1e-40  # whose products have to be found again
    every = [h.hidden, h.weight, h.bias, u, b, scale]
    tensors = {
        name: t.detach().to(dtype).requires_grad_(name in trained) if name in given else None
        for name, t in zip(NAMES, every, strict=True)
    }
    return SimpleNamespace(**tensors), h.target


def arguments(t):
    low_rank = None if t.u is None else (t.u, t.b)
    return {"bias": t.bias, "low_rank": low_rank, "column_scale": t.scale}


def logits(t, logit_scale=1.0, softcap=None, temperature=1.0):
    x = t.hidden @ t.weight.T
    x = x if t.u is None else x + t.u @ t.b.T
    x = x if t.scale is None else x * t.scale
    z = logit_scale * (x if t.bias is None else x + t.bias)
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def like(t, change):
    return SimpleNamespace(**{n: None if x is None else change(x) for n, x in vars(t).items()})


def trained(t):
    return {n: x for n, x in vars(t).items() if x is not None and x.requires_grad}


def assert_gradients(t, loss, exact, dense_loss=None, tolerance=1e-5):
    """Of everything that is trained, against float64; where `dense_loss` is given, as accurate."""
    ours, other = trained(t), like(t, lambda x: x.detach().double().requires_grad_(x.requires_grad))
    expected = torch.autograd.grad(exact(other), trained(other).values())
    got = torch.autograd.grad(loss(t), ours.values())
    plain = torch.autograd.grad(dense_loss(t), ours.values()) if dense_loss else [None] * len(got)
    for name, mine, theirs, wanted in zip(ours, got, plain, expected, strict=True):
        assert mine.shape == wanted.shape and mine.dtype == ours[name].dtype
        if theirs is None:
            assert dense.distance(mine, wanted) <= tolerance, name
        else:
            dense.assert_as_accurate(mine, theirs, wanted, name)


def per_token(t, target, upstream, **options):
    stats = linear_logprobs(
        t.hidden, t.weight, target, outputs=tuple(upstream), **arguments(t), **options
    )
    return dense.send(stats, upstream)


def per_token_plain(t, target, upstream, **transform):
    return dense.send(dense.oracle.statistics(logits(t, **transform), target, -100), upstream)


FROZEN = tuple(name for name in NAMES if name not in ("weight", "bias"))
GIVEN = {
    "everything trained": (NAMES, NAMES),
    "frozen": (NAMES, FROZEN),
    "LoRA": (("hidden", "weight", "u", "b"), ("hidden", "u", "b")),
    "adapter alone": (NAMES, ("u", "b", "scale")),
    "frozen adapter": (NAMES, ("hidden",)),
    "scale": (("hidden", "weight", "scale"), ("hidden", "scale")),
}


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
@pytest.mark.parametrize("given", GIVEN)
def test_per_token(given, schedule):
    t, target = problem(given=GIVEN[given][0], trained=GIVEN[given][1])
    upstream = {name: torch.randn(N) for name in OUTPUTS}
    upstream["logprob"][5], upstream = 0.0, dict(upstream)
    with use_schedule(schedule):
        assert_gradients(
            t, lambda t: per_token(t, target, upstream),
            lambda t: per_token_plain(t, target, upstream),
        )  # fmt: skip
        stats = linear_logprobs(t.hidden, t.weight, target, outputs=ift_kernels.TokenStats._fields,
                                **arguments(t))  # fmt: skip
    exact = dense.oracle.statistics(logits(like(t, torch.Tensor.double)), target, -100)
    for name, value in stats._asdict().items():
        torch.testing.assert_close(
            value.double(), exact[name].double(), rtol=1e-5, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("schedule", [None, "recompute"])
@pytest.mark.parametrize("given", GIVEN)
def test_scalar_loss(given, schedule):
    """In forward, of blocks of rows, and formed again; the workspace has tiles of some columns."""
    t, target = problem(given=GIVEN[given][0], trained=GIVEN[given][1], n=150, v=3000)

    def loss(t):
        return 3 * linear_cross_entropy(t.hidden, t.weight, target, workspace=1 << 20,
                                        **arguments(t))  # fmt: skip

    def run():
        assert_gradients(t, loss, lambda t: 3 * F.cross_entropy(logits(t), target))

    if schedule is None:
        run()
    else:
        with use_schedule(schedule):
            run()


def test_every_part_of_the_transform():
    t, target = problem()
    transform = {"logit_scale": -0.7, "softcap": 5.0, "temperature": 1.3}
    options = {"label_smoothing": 0.2, "z_loss": 1e-2}

    def exact(t):
        return dense.oracle.cross_entropy(logits(t, **transform), target, **options)

    assert_gradients(
        t,
        lambda t: linear_cross_entropy(
            t.hidden, t.weight, target, **arguments(t), **transform, **options
        ),
        exact,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", ["everything trained", "LoRA"])
def test_as_accurate_as_torch_in_16_bits(given, dtype, backend):
    t, target = problem(dtype, GIVEN[given][0], GIVEN[given][1], n=150)
    if t.scale is not None:
        t.scale.data[[3, V - 1]] = 0.5  # float16 cannot find these products again
    upstream = {"logprob": torch.randn(150)}
    with ift_kernels.use_backend(backend):
        for schedule in ("keep", "recompute"):
            with use_schedule(schedule):
                assert_gradients(
                    t, lambda t: per_token(t, target, upstream),
                    *[lambda t: per_token_plain(t, target, upstream)] * 2,
                )  # fmt: skip


def test_scales_too_small_for_float16():
    """The product that they come from cannot be found again: NaN rather than 0."""
    t, target = problem(torch.float16, ("hidden", "weight", "scale"), ("scale",))
    t.scale = t.scale.detach().float().index_fill(0, torch.tensor([3, 4]), 1e-7).requires_grad_()
    loss = linear_cross_entropy(t.hidden, t.weight, target, **arguments(t))
    (got,) = torch.autograd.grad(loss, t.scale)
    assert torch.equal(got.isnan(), t.scale.abs() < 1e-5) and got.isnan()[4]


def test_adapters_of_another_dtype():
    """float32 beside a bfloat16 head, as PEFT has them: their gradients are float32."""
    t, target = problem(torch.bfloat16, *GIVEN["LoRA"])
    t.u, t.b = (x.detach().float().requires_grad_() for x in (t.u, t.b))
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(
            t.hidden, t.weight, target, reduction=reduction, **arguments(t)
        ).sum()
        got = torch.autograd.grad(loss, (t.u, t.b))
        other = like(t, lambda x: x.detach().double().requires_grad_())
        exact = F.cross_entropy(logits(other), target, reduction=reduction).sum()
        for mine, wanted in zip(got, torch.autograd.grad(exact, (other.u, other.b)), strict=True):
            assert mine.dtype == torch.float32
            assert dense.distance(mine, wanted) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(t.hidden.float(), t.weight, target, **arguments(t))
    torch.autograd.grad(loss, (t.u, t.b))


def test_rows_that_send_nothing():
    """Ignored rows and rows without upstream gradient may hold anything."""
    t, target = problem()
    upstream = {"logprob": torch.ones(N)}
    with torch.no_grad():
        for x in (t.hidden, t.u):
            x[target == -100] = torch.nan
            x[7] = torch.nan
    target[7], upstream["logprob"][7] = 5, 0.0
    for schedule in ("keep", "recompute"):
        with use_schedule(schedule):
            got = torch.autograd.grad(per_token(t, target, upstream), trained(t).values())
        assert all(g.isfinite().all() for g in got)
        assert not got[3][7].any() and not got[3][target == -100].any()
    with sync_free():
        got = torch.autograd.grad(per_token(t, target, upstream), trained(t).values())
    assert all(g.isfinite().all() for g in got)
    target[7] = -100
    loss = linear_cross_entropy(t.hidden, t.weight, target, **arguments(t))
    got = torch.autograd.grad(loss, trained(t).values(), torch.tensor(torch.inf))
    assert not got[0][7].any() and not got[3][7].any()
    nothing = torch.full_like(target, -100)
    got = torch.autograd.grad(per_token(t, nothing, upstream), trained(t).values())
    assert all(not g.any() for g in got)


def test_backward_twice_and_double_backward():
    t, target = problem()
    for loss in (
        linear_cross_entropy(t.hidden, t.weight, target, **arguments(t)),
        per_token(t, target, {"logprob": torch.ones(N)}),
    ):
        inputs = list(trained(t).values())
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        first = [g.clone() for g in first]
        for mine, again in zip(first, torch.autograd.grad(loss, inputs, retain_graph=True),
                               strict=True):  # fmt: skip
            torch.testing.assert_close(mine, again, rtol=1e-4, atol=1e-6)
        with pytest.raises(RuntimeError, match="second derivatives"):
            sum(g.sum() for g in torch.autograd.grad(loss, inputs, create_graph=True)).backward()


def test_compiled():
    t, target = problem()

    def loss(hidden, weight, bias, u, b, scale):
        options = {"bias": bias, "low_rank": (u, b), "column_scale": scale}
        return linear_cross_entropy(hidden, weight, target, **options)

    inputs = list(vars(t).values())
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    expected = loss(*inputs)
    torch.testing.assert_close(value, expected)
    for got, wanted in zip(
        torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_opcheck():
    t, target = problem(n=9, v=70)
    tensors = (t.hidden, t.weight, t.bias, target)
    options = (-100, 1.0, 0.0, 1.0, 1 << 20, torch.float32, False)
    adapter = (t.u, t.b, t.scale)
    args = (*tensors, *options, 0, [True] * 6, "recompute", [], *adapter)
    torch.library.opcheck(torch.ops.ift_kernels.linear_stats, args)


def test_choices():
    t, _ = problem()
    z = logits(like(t, torch.Tensor.double)).detach()
    given = arguments(like(t, torch.Tensor.detach))
    hidden, weight = t.hidden.detach(), t.weight.detach()
    assert torch.equal(linear_token(hidden, weight, **given).ids, z.argmax(-1))
    kth = linear_token(hidden, weight, rule="kth", k=3, **given).ids
    assert torch.equal(kth, z.topk(3).indices[:, -1])
    assert torch.equal(linear_topk(hidden, weight, 4, **given).ids, z.topk(4).indices)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("given", ["everything trained", "LoRA", "adapter alone"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_divergence(reduction, given, kind):
    t, _ = problem(given=GIVEN[given][0], trained=GIVEN[given][1], n=150, v=1100)
    teacher = torch.randn(150, 8), torch.randn(1100, 8)
    y = (teacher[0] @ teacher[1].T).log_softmax(-1).double()

    def exact(t):
        s = logits(t).log_softmax(-1)
        pair = (y.exp() * (y - s)) if kind == "forward" else s.exp() * (s - y)
        return pair.sum(-1).mean()

    def ours(t):
        value = linear_divergence(
            t.hidden, t.weight, *teacher, kind=kind, reduction=reduction, workspace=1 << 20,
            **arguments(t),
        )  # fmt: skip
        return value.mean()

    assert_gradients(t, ours, exact, tolerance=2e-5)


def test_checkpointing():
    """Non-reentrant, which lets a formula unpack what it saved only once."""
    t, target = problem()
    teacher = torch.randn(N, 8), torch.randn(V, 8)
    inputs = list(trained(t).values())
    for loss in (
        lambda *_: linear_divergence(t.hidden, t.weight, *teacher, **arguments(t)),
        lambda *_: linear_cross_entropy(t.hidden, t.weight, target, **arguments(t)),
        lambda *_: per_token(t, target, {"entropy": torch.ones(N)}),
    ):
        again = checkpoint(loss, *inputs, use_reentrant=False)
        for got, wanted in zip(
            torch.autograd.grad(again, inputs), torch.autograd.grad(loss(), inputs), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"low_rank": 3}, TypeError, r"expected a tuple \(u, B\)"),
        ({"low_rank[0]": torch.zeros(N, R).long()}, TypeError, "expected a floating"),
        ({"low_rank[0]": torch.zeros(N - 1, R)}, ValueError, r"expected shape \(\.\.\., r\)"),
        ({"low_rank[1]": torch.zeros(V, R + 1)}, ValueError, r"expected shape \(V, r\) = \(331, 5"),
        ({"low_rank[1]": torch.zeros(V, R).double()}, TypeError, "expected at most torch.float32"),
        ({"column_scale": torch.ones(V - 1)}, ValueError, "expected shape"),
        ({"gradient": ActiveSet()}, ValueError, "expected 'exact' with low_rank"),
        ({"deterministic": True}, ValueError, "expected False with low_rank"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refusals(changes, error, said):
    t, target = problem()
    name, value = next(iter(changes.items()))
    given = arguments(t)
    if name.startswith("low_rank["):
        pair = list(given["low_rank"])
        pair[int(name[9])] = value
        given["low_rank"] = tuple(pair)
    else:
        given[name] = value
    for call in (linear_logprobs, linear_cross_entropy):
        with pytest.raises(error, match=f"^{name.replace('[', chr(92) + '[')}: {said}"):
            call(t.hidden, t.weight, target, **given)


def test_what_is_refused_beside_class_weights():
    t, target = problem()
    given = arguments(t) | {"class_weight": torch.ones(V)}
    call = lambda **more: linear_cross_entropy(t.hidden, t.weight, target, **given | more)  # noqa: E731
    assert_refused(call, {"label_smoothing": 0.1}, ValueError, "expected 0 with class_weight")
    exact = F.cross_entropy(logits(t), target, weight=torch.ones(V))
    torch.testing.assert_close(call(), exact)
    weight = torch.randn(V, 2, D)
    assert_refused(
        lambda weight: linear_cross_entropy(t.hidden, weight, target, low_rank=(t.u, t.b)),
        {"weight": weight}, ValueError, r"expected shape \(V, D\) with low_rank",
    )  # fmt: skip


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_a_frozen_head_with_lora(dtype, scalar):
    """At most a tenth more than without; in neither case anything of the size of the weight."""
    n, d, v, r = 1024, 32, 8192, 4
    weight = torch.randn(v, d).to(dtype)
    target = torch.randint(v, (n,))
    peaks = []
    for adapted in (False, True):
        hidden = torch.randn(n, d).to(dtype).requires_grad_()
        u, b = torch.randn(n, r, requires_grad=True), torch.randn(v, r, requires_grad=True)
        given = {"low_rank": (u, b)} if adapted else {}
        with Allocations() as used:
            linear_cross_entropy(
                hidden, weight, target, reduction="mean" if scalar else "none",
                workspace=4 << 20, **given,
            ).sum().backward()  # fmt: skip
        peaks.append(used.peak)
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_plans_of_a_gpu_that_train_the_adapter_alone():
    for in_forward in (False, True):
        planned = make(
            Problem(8192, 128256, 4096, torch.bfloat16, 512 << 20, need_adapter=True,
                    grads_in_forward=in_forward, device=H200)
        )  # fmt: skip
        assert planned.peak_bytes <= 512 << 20 and planned.schedule != "statistics"
