"""``logits_dtype=torch.float32``: logits of 16-bit inputs that are never rounded to 16 bits."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import dense
import ift_kernels
from allocations import MIB, Allocations, allowed, size
from dense import distance
from ift_kernels import (
    backends,
    linear_cross_entropy,
    linear_divergence,
    linear_expected_embedding,
    linear_logprobs,
    linear_token,
)
from ift_kernels.schedule import plan
from serving import needs_cpp

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP16, BF16)]
SCHEDULES = (None, "keep", "forward", "recompute")


def head(dtypes=(BF16, BF16), n=70, d=256, v=1500, **options):
    """Hidden and weight of these dtypes, the bias of the weight's; a fifth is ignored."""
    h = dense.head(n, d, v, FP32, ignored=0.2, **options)
    h = h.map(torch.Tensor.detach)
    bias = None if h.bias is None else h.bias.to(dtypes[1]).requires_grad_()
    hidden, weight = (
        t.detach().to(dtype).requires_grad_()
        for t, dtype in zip((h.hidden, h.weight), dtypes, strict=True)
    )
    return dense.Head(hidden, weight, h.target, bias, h.options)


def single(h):
    """The same numbers in float32."""
    return h.map(lambda t: t.detach().float().requires_grad_())


def scheduled(schedule):
    return nullcontext() if schedule is None else plan.use_schedule(schedule)


def float64_statistics(h):
    """From torch's product of the inputs in their dtype, everything else in float64."""
    z = (h.hidden.detach() @ h.weight.detach().T).double()
    rest = dense.Head(z, torch.eye(1), h.target, None, h.options)
    if h.bias is not None:
        z = z + h.bias.detach().double()
    z = rest.options.get("logit_scale", 1.0) * z
    if cap := rest.options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    return dense.oracle.statistics(z / rest.options.get("temperature", 1.0), h.target)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, **dense.TRANSFORM}], ids=["plain", "all"])
def test_statistics_err_as_float32_products(backend, dtypes, options):
    """At most 1.5 times as much as torch's own float32 product under a float64 softmax."""
    h = head(dtypes, d=1024, **options)
    got = linear_logprobs(*h.args, **h.kwargs, outputs=dense.OUTPUTS, logits_dtype=FP32)
    exact, theirs = (f(x) for f, x in ((dense.stats, h.double()), (float64_statistics, single(h))))
    exact = {name: value.detach() for name, value in exact.items()}
    for name in dense.OUTPUTS:
        mine = getattr(got, name)
        if name == "argmax":
            assert (mine == exact[name]).all()
            continue
        assert mine.dtype == FP32
        # Of the largest error luck has its part; other statistics have sums of float32 numbers, and
        # the mean logit is rounded relative to lse.
        unit = 0.0
        if name not in ("logprob", "lse"):
            scale = exact["lse" if name == "mean_logit" else name].abs().max()
            unit = 2 * torch.finfo(FP32).eps * float(scale)
        errors = (dense.error(x.float(), exact[name]) for x in (mine, theirs[name]))
        for factor, ours, other in zip((2, 1.5), *errors, strict=True):
            assert ours <= factor * other + unit, name


@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[2], PAIRS[4]], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
def test_gradients(backend, dtypes, schedule, trained):
    """Of every schedule, with as much work memory as it wants or as little as it can have."""
    for workspace in (None, MIB) if dtypes == PAIRS[0] else (MIB,):
        h = head(dtypes, d=64, v=900 if workspace is None else 4100, bias=True, softcap=7.0)
        if trained != "both":
            (h.weight if trained == "hidden" else h.hidden).requires_grad_(False)
            h.bias.requires_grad_(trained == "weight")
        leaves = [t for t in h.inputs if t.requires_grad]
        options = {"logits_dtype": FP32, "workspace": workspace, **h.kwargs}
        e, s = h.double(), single(h)
        for scalar in (False, True):
            with scheduled(schedule):
                if scalar:
                    value = linear_cross_entropy(*h.args, **options)
                else:
                    up = torch.linspace(0.1, 1, len(h.target))
                    value = (linear_logprobs(*h.args, **options).logprob * up).sum()
            found = dict(zip(map(id, leaves), torch.autograd.grad(value, leaves), strict=True))
            if scalar:
                both = [dense.cross_entropy(x) for x in (e, s)]
            else:
                both = [(dense.stats(x)["logprob"] * up).sum() for x in (e, s)]
            exact, theirs = (
                torch.autograd.grad(v, x.inputs) for v, x in zip(both, (e, s), strict=True)
            )
            for x, yes, other in zip(h.inputs, exact, theirs, strict=True):
                if id(x) in found:
                    mine = found[id(x)]
                    assert mine.dtype == x.dtype and mine.shape == x.shape
                    assert distance(mine, yes) <= 2 * distance(other.to(x.dtype), yes) + 1e-6


@needs_cpp
@pytest.mark.parametrize("threshold", [0.0, 2.0**-9])
def test_active_columns(threshold):
    """Chosen from float32 logits; of all columns the gradient is exact."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(6000, 64, generator=generator) / 8).bfloat16()
    target = torch.randint(6000, (200,), generator=generator)
    hidden = (torch.randn(200, 64, generator=generator) + 8 * weight[target].float()).bfloat16()
    hidden.requires_grad_()
    chosen = ift_kernels.ActiveSet(threshold, 32, 512)
    found = []
    for h, w in ((hidden, weight), (hidden.detach().float().requires_grad_(), weight.float())):
        with ift_kernels.record_active_sets() as report:
            out = linear_logprobs(h, w, target, gradient=chosen, logits_dtype=FP32)
            found += torch.autograd.grad(out.logprob.sum(), h)
    got, of_float32 = found
    e = hidden.detach().double().requires_grad_()
    logprob = -F.cross_entropy(e @ weight.double().T, target, reduction="none")
    (wanted,) = torch.autograd.grad(logprob.sum(), e)
    assert (out.logprob - logprob).abs().max() < 1e-5
    assert distance(got, wanted if threshold == 0 else of_float32) < 3e-3
    assert report[0].share == 1 if threshold == 0 else report[0].share < 0.8


def test_divergence(backend):
    h, t = head(bias=True), head((FP16, BF16), d=40, seed=1)  # the teacher's dtypes are mixed
    teacher = t.hidden.detach(), t.weight.detach()
    for kind, reduction, workspace in (
        ("forward", "mean", None), ("reverse", "none", MIB), ("jsd", "mean", MIB)
    ):  # fmt: skip
        found = []
        for form, dtype in ((lambda x: x, FP32), (single, None), (dense.Head.double, None)):
            x = form(h)
            other = (y.to(FP32 if dtype is None else y.dtype) for y in teacher)
            if x.hidden.dtype == torch.float64:
                other = (y.double() for y in teacher)
            value = linear_divergence(
                x.hidden, x.weight, *other, bias=x.bias, kind=kind, reduction=reduction,
                logits_dtype=dtype, workspace=workspace,
            ).sum()  # fmt: skip
            found.append((value, torch.autograd.grad(value, x.inputs)))
        (value, mine), (_, theirs), (exact, wanted) = found
        assert abs(value - exact) <= 2e-6 * abs(exact)
        for a, b, c in zip(mine, theirs, wanted, strict=True):
            assert distance(a, c) <= 2 * distance(b.to(a.dtype), c)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_expected_embedding(backend, dtypes):
    h = head(dtypes, bias=True)
    table = torch.randn(1500, 24).bfloat16().requires_grad_()

    def run(h, table, dtype=None):
        out = linear_expected_embedding(
            h.hidden, h.weight, table, bias=h.bias, logits_dtype=dtype, workspace=MIB
        )
        up = (torch.arange(out.numel()) % 7 - 3).view_as(out)  # as it is in 16 bits
        return out, *torch.autograd.grad((out * up).sum(), [*h.inputs, table])

    mine = run(h, table, FP32)
    theirs = run(single(h), table.detach().float().requires_grad_())
    exact = run(h.double(), table.detach().double().requires_grad_())
    for a, b, c in zip(mine, theirs, exact, strict=True):
        assert distance(a, c) <= 2 * distance(b.to(a.dtype), c) + 1e-6


@pytest.mark.parametrize("rule", ["greedy", "kth", "sample"])
def test_token_choice(backend, rule):
    """The tokens of the same numbers in float32."""
    for dtypes in PAIRS[:4]:
        h = head(dtypes, bias=True)
        mine = linear_token(
            h.hidden, h.weight, bias=h.bias, rule=rule, seed=3, logits_dtype=FP32, workspace=MIB
        )
        s = single(h)
        theirs = linear_token(s.hidden, s.weight, bias=s.bias, rule=rule, seed=3)
        assert torch.equal(mine.ids, theirs.ids)
        torch.testing.assert_close(mine.logprob, theirs.logprob, rtol=0, atol=2e-6)


def test_deterministic(backend):
    """A token alone has what it has among others."""
    h = head(n=5, v=5000, bias=True)
    options = {"bias": h.bias, "logits_dtype": FP32, "deterministic": True, "ignore_index": -1}
    target = h.target.clamp(min=0)
    whole = linear_logprobs(h.hidden, h.weight, target, **options).logprob
    (d_weight,) = torch.autograd.grad(whole.sum(), h.weight)
    e = h.double()
    loss = F.cross_entropy(e.hidden @ e.weight.T + e.bias, target, reduction="sum")
    assert distance(d_weight, -torch.autograd.grad(loss, e.weight)[0]) < 3e-3
    with torch.no_grad():
        alone = linear_logprobs(h.hidden[3:4], h.weight, target[3:4], **options).logprob
    assert torch.equal(alone, whole[3:4].detach())


@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.0, 1.5])
def test_criterion_of_verl(backend, temperature):
    """|error| <= 1e-3 + 2e-4 |x|, of logprob and entropy; 16-bit logits do not meet it."""
    h = head(n=128, d=512, v=4000)
    exact = dense.stats(dense.Head(*h.double().args, None, {"temperature": temperature}))
    met = []
    for dtype in (FP32, None):
        got = linear_logprobs(
            *h.args, temperature=temperature, outputs=("logprob", "entropy"), logits_dtype=dtype
        )
        pairs = [(getattr(got, name), exact[name]) for name in ("logprob", "entropy")]
        met.append(all(((a - b).abs() <= 1e-3 + 2e-4 * b.abs()).all() for a, b in pairs))
    assert met == [True, False]


def test_criterion_of_cut_cross_entropy(backend):
    """Every row's log-sum-exp within 1e-5 of the best result of these inputs."""
    for dtypes in ((BF16, BF16), (FP16, FP16)):
        h = head(dtypes, n=128, d=512, v=4000)
        got = linear_logprobs(*h.args, outputs=("lse",), logits_dtype=FP32).lse
        assert (got - dense.stats(h.double())["lse"]).abs().max() < 1e-5


OPERATIONS = {
    "logprobs": lambda h, w: linear_logprobs(
        *h.args, outputs=dense.OUTPUTS, logits_dtype=FP32, workspace=w
    ).logprob,
    "cross-entropy": lambda h, w: linear_cross_entropy(*h.args, logits_dtype=FP32, workspace=w),
    "expected-embedding": lambda h, w: linear_expected_embedding(
        h.hidden, h.weight, h.weight.detach()[:, :8], logits_dtype=FP32, workspace=w
    ),
    "divergence": lambda h, w: linear_divergence(
        h.hidden, h.weight, h.hidden.detach(), h.weight.detach(), logits_dtype=FP32, workspace=w,
        num_items=7,
    ),
}  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("rows", [3, 264])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32)], ids=str)
def test_peak_of_work_memory(operation, rows, dtypes):
    """Inside the workspace, and never a copy of the head: in float32 that is 7 MB."""
    h = head(dtypes, rows, 200, 9000)
    workspace, start = 2 * MIB, plan.ledger.reserved
    with ift_kernels.use_backend("cpu"):
        with Allocations() as forward:
            out = operation(h, workspace)
        kept = plan.ledger.reserved - start
        with Allocations() as backward:
            out.sum().backward()
        limit = allowed(h, workspace)
    gradients = size(h.hidden.grad, h.weight.grad)
    formed = gradients if forward.alive >= gradients else 0  # in forward
    assert forward.peak - formed - size(out) <= limit, forward.peak / MIB
    assert backward.peak + kept * (not formed) - gradients * (not formed) <= limit
    largest = max(seen.largest for seen in (forward, backward))
    assert largest <= max(size(h.weight), workspace)


@needs_cpp
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "mib", "summed"),
    [(600, 256, 2000, 8, 0), (3000, 64, 4000, 12, 4000)],
)
def test_gradients_are_formed_in_forward(monkeypatch, rows, width, vocabulary, mib, summed):
    """Of a scalar loss: dW is rounded once, where blocks of rows are several as a float32 sum."""
    monkeypatch.setattr(plan, "MIN_SUMMED_ROWS", 128)
    h = head(n=rows, d=width, v=vocabulary)
    options = {"logits_dtype": FP32, "workspace": mib * MIB}
    plan._by_rules.cache_clear()
    with ift_kernels.use_backend("cpu"), plan.use_schedule("forward"):
        made = ift_kernels.explain(rows, vocabulary, width, BF16, scalar=True, **options)
        with Allocations() as seen:
            loss = linear_cross_entropy(*h.args, **options)
        found = torch.autograd.grad(loss, h.inputs)
    plan._by_rules.cache_clear()
    assert (made.schedule, made.products, made.sum_columns) == ("forward", 3, summed)
    assert (len(made.blocks(rows)) > 1) == (summed > 0)
    assert seen.peak - size(*found) <= mib * MIB + 64 * 8 * rows + MIB // 4
    e, s = h.double(), single(h)
    exact = torch.autograd.grad(dense.cross_entropy(e), e.inputs)
    theirs = torch.autograd.grad(dense.cross_entropy(s), s.inputs)
    for mine, yes, other in zip(found, exact, theirs, strict=True):
        assert distance(mine, yes) <= 1.1 * distance(other.bfloat16(), yes)


def test_plans():
    """A chunk of the head in float32, and the sum of its dW, stay in cache as a tile does."""
    for n in (8, 128, 512, 2048):
        for need_weight in (True, False):
            made = ift_kernels.explain(
                n, 32000, 1024, BF16, need_weight=need_weight, logits_dtype=FP32
            )
            same = ift_kernels.explain(n, 32000, 1024, FP32, need_weight=need_weight)
            assert made.products == same.products
            assert made.tile_columns * 4096 * (1 + need_weight) <= 8 * MIB
    assert ift_kernels.explain(8, 100, 16, FP32, logits_dtype=FP32) == ift_kernels.explain(
        8, 100, 16, FP32
    )


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, BF16)], ids=str)
def test_compiled(dtypes):
    h = head(dtypes, n=9, d=16, v=300, bias=True)

    def function(hidden, weight, bias):
        options = {"bias": bias, "logits_dtype": FP32}
        stats = linear_logprobs(hidden, weight, h.target, outputs=("logprob", "lse"), **options)
        soft = linear_expected_embedding(hidden, weight, weight, **options)
        ids = linear_token(hidden, weight, **options).ids
        loss = linear_cross_entropy(hidden, weight, h.target, **options)
        of_both = linear_divergence(
            hidden, weight, hidden, weight, kind="jsd", logits_dtype=FP32, reduction="none"
        )
        return (stats.logprob + stats.lse + of_both).sum() + soft.float().sum() + loss + 0 * ids[0]

    dense.assert_compiles(function, *h.inputs)


def test_autocast_is_not_heeded(backend):
    h = head()
    plain = linear_logprobs(*h.args, logits_dtype=FP32).logprob
    with torch.autocast("cpu", BF16):
        assert torch.equal(linear_logprobs(*h.args, logits_dtype=FP32).logprob, plain)


def test_float32_inputs_are_as_without_it(backend):
    h = head((FP32, FP32), bias=True)
    results = []
    for dtype in (None, FP32):
        loss = linear_cross_entropy(*h.args, **h.kwargs, logits_dtype=dtype)
        results.append([loss, *torch.autograd.grad(loss, h.inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


CALLS = {
    "linear_logprobs": lambda h, **o: linear_logprobs(*h.args, **o),
    "linear_cross_entropy": lambda h, **o: linear_cross_entropy(*h.args, **o),
    "linear_token": lambda h, **o: linear_token(h.hidden, h.weight, **o),
    "linear_divergence": lambda h, **o: linear_divergence(
        h.hidden, h.weight, h.hidden, h.weight, **o
    ),
    "linear_expected_embedding": lambda h, **o: linear_expected_embedding(
        h.hidden, h.weight, h.weight, **o
    ),
    "explain": lambda h, **o: ift_kernels.explain(5, 50, 8, h.hidden.dtype, **o),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_refusals(call):
    h = dense.head(5, 8, 50, BF16)
    for dtype in (BF16, FP16, torch.float64, "float32"):
        with pytest.raises(ValueError, match=rf"logits_dtype: expected .* got {dtype!r}"):
            call(h, logits_dtype=dtype)
    with pytest.raises(ValueError, match=r"logits_dtype: expected None for float64 inputs"):
        call(h.double(), logits_dtype=FP32)


def test_mixed_dtypes_want_it():
    h = head((BF16, FP32))
    with pytest.raises(TypeError, match=r"weight: expected .* pass logits_dtype=torch.float32"):
        linear_logprobs(*h.args)
    assert backends.get(h.hidden, FP32) is backends.get(single(h).hidden)
