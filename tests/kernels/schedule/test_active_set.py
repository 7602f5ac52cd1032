"""The active set: exact where everything is active, close and sum-preserving elsewhere."""

import functools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dense
import ift_kernels as K
from bench.harness import data as lmlike
from dense import distance
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.schedule import plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
OUTPUTS = ("logprob", "lse", "entropy", "mean_logit")
SMALL = {"block": 32, "tail_bucket": 64}
MIB = 1 << 20


def upstream(n, outputs, seed=3):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (len(outputs), n), generator=generator) * 2 - 1
    return (torch.rand((len(outputs), n), generator=generator) + 0.2) * signs


def weighted(stats, outputs, weights=None):
    """The sum of these outputs times `weights`, by default those of `upstream`."""
    weights = upstream(stats[outputs[0]].numel(), outputs) if weights is None else weights
    return sum((stats[name].flatten() * w).sum() for name, w in zip(outputs, weights, strict=True))


def gradients(h, gradient, outputs=("logprob",), inputs=None, weights=None, **options):
    """Of a weighted sum of outputs; the inputs in their own dtype."""
    inputs = [t for t in h.inputs if t.requires_grad] if inputs is None else inputs
    stats = K.linear_logprobs(*h.args, outputs=outputs, gradient=gradient, **h.kwargs, **options)
    return torch.autograd.grad(weighted(stats._asdict(), outputs, weights), inputs)


def exact(h, outputs=("logprob",), weights=None):
    """The same in fp64 by the definition."""
    h = h.double()
    return torch.autograd.grad(weighted(dense.stats(h), outputs, weights), h.inputs)


def frozen(h):
    """The same with a head that is not trained: dh is formed in forward."""
    return dense.replace(h, weight=h.weight.detach())


HEADS = pytest.mark.parametrize("of", [lambda h: h, frozen], ids=["trained", "frozen"])


generate = functools.lru_cache(2)(lmlike.generate)  # tests of one head follow one another


def lm(n=256, d=64, v=2400, dtype=torch.float32, seed=0, **shape):
    data = generate(n, d, v, dtype=dtype, seed=seed, shape=lmlike.Shape(**shape))
    hidden, weight, target = (t.clone() for t in (data.hidden, data.weight, data.target))
    return dense.Head(hidden.requires_grad_(), weight.requires_grad_(), target)


# Rows and columns that fill neither their last block nor their last tile.
@pytest.mark.parametrize("transform", [{}, dense.TRANSFORM], ids=["plain", "transformed"])
@pytest.mark.parametrize(
    ("n", "v", "bias", "workspace"),
    [
        (75, 333, False, None),
        (75, 333, True, None),
        (301, 1333, True, None),
        (301, 1333, True, MIB),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_zero_is_exact(dtype, n, v, bias, workspace, transform, backend, sparse):
    h = dense.head(n, 24, v, dtype, bias=bias, **transform)
    options = ActiveSet(threshold=0.0, **SMALL)
    found = gradients(h, options, OUTPUTS, workspace=workspace)
    wanted = gradients(h, "exact", OUTPUTS, workspace=workspace)
    for mine, true, dtype_of in zip(found, exact(h, OUTPUTS), h.inputs, strict=True):
        assert mine.dtype == dtype_of.dtype
        assert distance(mine, true) <= ROUNDING[dtype] * 2
    for mine, other in zip(found, wanted, strict=True):
        assert distance(mine, other) <= ROUNDING[dtype] * 2


@HEADS
@pytest.mark.parametrize("workspace", [None, 4 << 20], ids=["default", "4MiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_at_the_default_threshold(dtype, workspace, of, schedule, sparse):
    h = of(lm(dtype=dtype, d=64))
    with K.record_active_sets() as report:
        found = gradients(h, ActiveSet(tail_bucket=512), workspace=workspace)
    assert len(report) == 1
    d_hidden, d_weight = exact(h)
    assert 1e-4 < distance(found[0], d_hidden) <= 0.015
    for mine in found[1:]:
        assert distance(mine, d_weight) <= ROUNDING[dtype] * 2


@HEADS
@pytest.mark.parametrize("gamma", [0.6, 1.0, 2.0])
def test_error_on_other_data(gamma, of):
    # Not the generator that thresholds and tiles were tuned on: clusters of ids and of tokens.
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(20, 48, generator=generator)
    ids = centres[torch.randint(20, (6000,), generator=generator)]
    weight = ids + 0.7 * torch.randn(6000, 48, generator=generator)
    tokens = centres[torch.randint(20, (256,), generator=generator)]
    hidden = gamma * 0.5 * (tokens + 0.5 * torch.randn(256, 48, generator=generator))
    target = (hidden @ weight.T).softmax(-1).multinomial(1, generator=generator)[:, 0]
    h = of(dense.Head(hidden.requires_grad_(), weight.requires_grad_(), target))
    assert distance(gradients(h, "active")[0], exact(h)[0]) <= 0.015


def with_a_constant_column(h):
    """What that column of the head receives is the sum of a row's gradient."""
    weight = torch.cat([h.weight.detach(), torch.ones(len(h.weight), 1)], 1).requires_grad_()
    hidden = torch.cat([h.hidden.detach(), torch.zeros(len(h.hidden), 1)], 1).requires_grad_()
    return dense.Head(hidden, weight, h.target)


@HEADS
@pytest.mark.parametrize("outputs", [OUTPUTS, ("logprob",), ("logprob", "lse")], ids=str)
def test_rows_keep_their_sum(outputs, of, sparse):
    h = of(with_a_constant_column(lm()))
    found = gradients(h, ActiveSet(threshold=2.0**-6), outputs)[0]
    true = exact(h, outputs)[0]
    scale = upstream(256, outputs).abs().sum(0)
    assert ((found[:, -1].double() - true[:, -1]).abs() / scale).max() <= 2e-5


@pytest.mark.parametrize("trained", [True, False])
def test_error_bound_of_a_row(trained, sparse):
    # ‖Σ_v (dz − dz')‖₁ ≤ 2·|a|·tail mass: seen through a head whose rows are unit vectors.
    torch.manual_seed(0)
    v = 512
    logits = 3 * torch.randn(64, v)
    target = logits.softmax(-1).multinomial(1)[:, 0]
    hidden, weight = logits.clone().requires_grad_(), torch.eye(v, requires_grad=trained)
    chosen = ActiveSet(threshold=2.0**-7, block=32, tail_bucket=128)
    stats = K.linear_logprobs(hidden, weight, target, gradient=chosen)
    a = upstream(64, ("logprob",))[0]
    (found,) = torch.autograd.grad(stats.logprob, hidden, a)
    p = logits.double().softmax(-1)
    onehot = torch.nn.functional.one_hot(target, v)
    true = a[:, None].double() * (onehot - p)
    marked = ((p > chosen.threshold) | onehot.bool()).view(2, 32, v).any(1).repeat_interleave(32, 0)
    tail = torch.where(marked, 0.0, p).sum(1)
    error = (found - true).abs().sum(1)
    assert (error <= 2 * a.abs() * tail + 1e-5).all()
    assert error.max() > 1e-3  # the threshold is high enough for the bound to say something
    assert (found - true)[marked].abs().max() <= 1e-5  # active columns are exact


def test_flat_logits_fall_back_to_dense():
    torch.manual_seed(0)
    hidden = torch.randn(128, 32, requires_grad=True)
    weight = (torch.randn(2000, 32) / 32**0.5).requires_grad_()
    h = dense.Head(hidden, weight, torch.randint(2000, (128,)))
    for of in (lambda h: h, frozen):
        with K.record_active_sets() as report:
            found = gradients(of(h), "active")
        assert report[0].dense_tiles == report[0].tiles > 0 and report[0].share == 1.0
        assert report[0].tail_max == 0
        for mine, other in zip(found, gradients(of(h), "exact"), strict=True):
            assert distance(mine, other) <= 1e-6


@pytest.mark.parametrize("softcap", [None, 8.0])
@HEADS
def test_report(of, schedule, softcap, sparse):
    h = of(dense.replace(lm(), options={"softcap": softcap} if softcap else {}))
    with K.record_active_sets() as report:
        gradients(h, "active", workspace=8 << 20)
        gradients(h, "exact")
    gradients(h, "active")
    assert len(report) == 1
    z = (h.hidden @ h.weight.T).detach().double()
    slope = torch.ones_like(z)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap).square()
    p = z.softmax(-1)
    active_ids = p > 2.0**-12
    active_ids[torch.arange(256), h.target] = True
    blocks = active_ids.view(2, 128, -1).any(1)
    tail = torch.where(blocks.repeat_interleave(128, 0), 0.0, p * slope).sum(1)
    assert report[0].share == pytest.approx(float(blocks.double().mean()), rel=0.01)
    assert report[0].tail_mean == pytest.approx(float(tail.mean()), rel=0.01)
    assert report[0].tail_max == pytest.approx(float(tail.max()), rel=0.01)
    assert report[0].tiles > 0 == report[0].dense_tiles


def test_a_report_is_of_the_forward_that_was_recorded():
    h = lm()
    with K.record_active_sets() as report:
        stats = K.linear_logprobs(*h.args, gradient="active")
    assert not report
    with K.record_active_sets() as other:
        stats.logprob.sum().backward()
    assert len(report) == 1 and not other


def test_a_call_without_a_row_is_reported_once():
    h = frozen(lm())
    with plan.use_schedule("forward"), K.record_active_sets() as report:
        gradients(dense.replace(h, target=torch.full_like(h.target, -100)), "active")
    assert len(report) == 1


def test_a_tiny_workspace_is_right():
    h = lm(v=4000)
    for of in (lambda h: h, frozen):
        options = ActiveSet(block=4096, tail_bucket=8192)
        found = gradients(of(h), options, workspace=1 << 20)
        assert distance(found[0], exact(h)[0]) <= 0.015


@HEADS
def test_second_backward_and_accumulation(of):
    h = of(lm())
    inputs = [t for t in h.inputs if t.requires_grad]
    stats = K.linear_logprobs(*h.args, gradient="active")
    first = torch.autograd.grad(stats.logprob.sum(), inputs, retain_graph=True)
    first = [g.clone() for g in first]
    second = torch.autograd.grad(stats.logprob.sum(), inputs)
    for one, two in zip(first, second, strict=True):
        assert distance(two, one) <= 0.01
    stats = K.linear_logprobs(*h.args, gradient="active")
    (g,) = torch.autograd.grad(stats.logprob.sum(), h.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        g.sum().backward()


@HEADS
def test_ignored_rows_and_rows_without_upstream_gradient(of, sparse):
    h = of(lm())
    h.target[::3] = -100
    given = upstream(256, ("logprob",))
    given[:, 1::3] = 0
    found = gradients(h, ActiveSet(threshold=0.0), weights=given)
    for mine, true in zip(found, exact(h, weights=given), strict=False):
        assert distance(mine, true) <= 5e-6
    assert (found[0][::3] == 0).all() and (found[0][1::3] == 0).all()


@HEADS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_reach_the_gradients(value, of):
    h = lm()
    with torch.no_grad():
        h.weight[2300] = value
        h.weight[2300, 1:] = 0
        h.hidden[5, 0] = 1.0
        h.hidden[6:, 0] = 0.0 if math.isnan(value) else -1.0
        h.hidden[:5, 0] = 0.0 if math.isnan(value) else -1.0
    d_hidden, *d_weight = gradients(of(h), "active")
    assert d_hidden[5].isnan().any() and all(g.isnan().any() for g in d_weight)
    given = torch.ones(1, 256)
    given[0, 9] = value
    d_hidden, *d_weight = gradients(of(lm()), "active", weights=given)
    assert not d_hidden[9].isfinite().all() and not any(g.isfinite().all() for g in d_weight)
    assert d_hidden[200].isfinite().all()


def test_a_nan_in_a_row_without_upstream_gradient_stays_there():
    h = lm()
    with torch.no_grad():
        h.hidden[5] = math.nan
    given = torch.ones(1, 256)
    given[0, 5] = 0
    for each in (h, frozen(h)):
        found = gradients(each, "active", weights=given)
        assert all(g.isfinite().all() for g in found)


def test_frozen_parts_and_loss():
    h = lm()
    for trained in h.inputs:
        hidden, weight = (t if t is trained else t.detach() for t in h.inputs)
        loss = K.linear_cross_entropy(hidden, weight, h.target, gradient="active")
        wanted = K.linear_cross_entropy(hidden, weight, h.target)
        torch.testing.assert_close(loss, wanted)
        (mine,), (true,) = (torch.autograd.grad(value, trained) for value in (loss, wanted))
        assert distance(mine, true) <= 0.015


def test_checkpointing_autocast_and_compile():
    h = lm()
    true = gradients(h, "exact")

    def call(hidden, weight):
        return K.linear_logprobs(hidden, weight, h.target, gradient="active").logprob

    weights = upstream(256, ("logprob",))[0]
    for reentrant in (False, True):
        total = (checkpoint(call, *h.inputs, use_reentrant=reentrant) * weights).sum()
        if reentrant:  # not with autograd.grad
            total.backward()
        found = [t.grad for t in h.inputs] if reentrant else torch.autograd.grad(total, h.inputs)
        assert distance(found[0], true[0]) <= 0.015 and distance(found[1], true[1]) <= 1e-5
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad((compiled(*h.inputs) * weights).sum(), h.inputs)
    assert distance(found[0], true[0]) <= 0.015 and distance(found[1], true[1]) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        value = call(*h.inputs)
    found = torch.autograd.grad((value * weights).sum(), h.inputs)
    assert found[0].dtype == torch.float32
    assert distance(found[0], true[0]) <= 0.03 and distance(found[1], true[1]) <= 0.02


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threshold": 1.0}, "threshold: expected in"),
        ({"threshold": -1.0}, "threshold: expected in"),
        ({"block": 100}, "block: expected a positive multiple of 32"),
        ({"tail_bucket": 0}, "tail_bucket: expected a positive multiple of 64"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        ActiveSet(**options)


def test_gradient_names_are_checked():
    with pytest.raises(ValueError, match="gradient"):
        K.linear_logprobs(torch.ones(1, 8), torch.ones(9, 8), torch.zeros(1).long(), gradient="a")


@pytest.mark.parametrize(("first", "then"), [("cpu", "reference"), ("reference", "cpu")])
@HEADS
def test_backward_under_another_backend(first, then, of):
    # bfloat16, where the backends differ in what they would plan.
    h = of(lm(n=513, d=32, v=9000, dtype=torch.bfloat16))
    options = ActiveSet(tail_bucket=512)
    with K.use_backend(first):
        stats = K.linear_logprobs(*h.args, gradient=options, workspace=24117248)
    a = upstream(513, ("logprob",))[0]
    with K.use_backend(then):
        found = torch.autograd.grad(stats.logprob, [t for t in h.inputs if t.requires_grad], a)
    for mine, true in zip(found, exact(h, weights=a[None]), strict=False):
        assert distance(mine, true) <= 0.02


@HEADS
def test_masked_out_ids_have_no_part_in_the_tail(of, backend, sparse):
    torch.manual_seed(0)
    head = (torch.randn(2000, 32) / 3).requires_grad_()
    bias = torch.zeros(2000)
    bias[1900:] = -torch.inf
    with torch.no_grad():
        head[1900:] = 1e4  # padding rows, never trained
    hidden = torch.randn(32, 32, requires_grad=True)
    h = dense.Head(hidden, head, torch.randint(1900, (32,)), bias.requires_grad_())
    found = gradients(of(h), ActiveSet(threshold=2.0**-7))
    assert distance(found[0], exact(h)[0]) <= 0.5  # a high threshold, but nothing of the padding
    for mine in found[1:]:
        assert mine[1900:].abs().max() <= 1e-6
