"""Per-token results of a frozen head: what backward needs is formed in forward."""

import pytest
import torch

import dense
import ift_kernels as K
from ift_kernels.common import sync_free
from ift_kernels.operators import frozen_head
from ift_kernels.schedule import plan
from ift_kernels.schedule.head import Head

ROWS, WIDTH, VOCABULARY = 300, 24, 3001
WORKSPACE = {torch.float32: 2 << 20, torch.float64: 4 << 20, torch.bfloat16: 1 << 20}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3}
OPTIONS = ({}, {"softcap": 20.0, "temperature": 0.8, "logit_scale": 1.1})


def problem(dtype=torch.float32, ignored=False, bias=True):
    """A call with a frozen head, and upstream gradients of logprob and lse."""
    torch.manual_seed(0)
    weight = (torch.randn(VOCABULARY, WIDTH) / 2).to(dtype)
    target = torch.randint(VOCABULARY, (ROWS,))
    hidden = torch.randn(ROWS, WIDTH)
    hidden[:40] = 6 * weight[target[:40]].float()  # 1 - p of these is next to nothing
    if ignored:
        target[::3] = -100
    upstream = torch.randn(2, ROWS, dtype=torch.float32)
    upstream[:, 5:9] = 0
    upstream[0, 50:60] = 0
    upstream[1, 60:70] = 0
    bias = torch.randn(VOCABULARY).to(dtype) if bias else None
    return dense.Head(hidden.to(dtype).requires_grad_(), weight, target, bias), upstream


def call(h, outputs=("logprob",), schedule="forward", workspace=2 << 20, **options):
    options |= {"outputs": outputs, "workspace": workspace, **h.kwargs}
    with plan.use_schedule(schedule):
        return K.linear_logprobs(*h.args, **options)


def reserved(h):
    """Bytes of the gradient that forward has formed."""
    return (h.target != -100).sum() * WIDTH * h.hidden.dtype.itemsize


def exact_gradient(h, upstream):
    exact = h.double()
    stats = dense.stats(exact)
    loss = (stats["logprob"] * upstream[0] + stats["lse"] * upstream[1]).sum()
    return torch.autograd.grad(loss, exact.hidden)[0]


def distance(a, b):
    return float((a.double() - b).norm() / b.norm())


ONLY_LOGPROB = torch.tensor([[1.0], [0.0]])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", WORKSPACE, ids=str)
def test_the_gradient_is_that_of_dense_logits(dtype, options, ignored, backend):
    h, upstream = problem(dtype, ignored)
    h, outputs = dense.replace(h, options=options), ("logprob", "lse", "argmax")
    with K.use_backend(backend), plan.use_schedule("forward"):
        stats = call(h, outputs, workspace=WORKSPACE[dtype])
        assert plan.ledger.reserved == reserved(h)
        loss = (stats.logprob * upstream[0] + stats.lse * upstream[1]).sum()
        first = torch.autograd.grad(loss, h.hidden, retain_graph=True)[0].clone()
        assert plan.ledger.reserved == 0
        second = torch.autograd.grad(loss, h.hidden)[0]  # from products formed again
    plain = call(h, outputs, "recompute", None)
    assert torch.equal(stats.argmax, plain.argmax)
    for name in ("logprob", "lse"):
        torch.testing.assert_close(getattr(stats, name), getattr(plain, name))
    wanted = exact_gradient(h, upstream)
    for got in (first, second):
        assert distance(got, wanted) <= TOLERANCE[dtype]
        assert distance(got[:40], wanted[:40]) <= 2 * TOLERANCE[dtype]  # confident tokens
        assert not got[5:9].any()


@pytest.mark.parametrize("which", [0, 1], ids=["logprob", "lse"])
def test_one_upstream_alone(which):
    h, upstream = problem()
    upstream[1 - which] = 0
    stats = call(h, ("logprob", "lse"))
    (got,) = torch.autograd.grad((stats[which] * upstream[which]).sum(), h.hidden)
    assert distance(got, exact_gradient(h, upstream)) <= 1e-6


@pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
def test_the_logit_of_the_target(ignored):
    h, upstream = problem(ignored=ignored)
    outputs = ("target_logit", "logprob")
    stats, exact = call(h, outputs), h.double()
    assert plan.ledger.reserved == reserved(h)
    wanted = dense.stats(exact)
    torch.testing.assert_close(stats.target_logit, wanted["target_logit"].float())
    names = dict(zip(outputs, upstream, strict=True))
    (got,) = torch.autograd.grad(dense.send(stats, names), h.hidden)
    (exact_gradient,) = torch.autograd.grad(dense.send(wanted, names), exact.hidden)
    assert distance(got, exact_gradient) <= 1e-6


def test_products_are_formed_once(monkeypatch):
    sizes = []
    original = Head.multiply

    def counted(head, columns, out, rows=slice(None)):
        sizes.append(out.numel())
        original(head, columns, out, rows)

    monkeypatch.setattr(Head, "multiply", counted)
    h, _ = problem(bias=False)
    made = K.explain(ROWS, VOCABULARY, WIDTH, torch.float32, need_weight=False, workspace=2 << 20)
    assert (made.schedule, made.products) == ("forward", 2.0)
    stats = K.linear_logprobs(*h.args, workspace=2 << 20)
    monkeypatch.setattr(torch.ops.ift_kernels, "linear_stats_backward", None)
    stats.logprob.sum().backward()
    assert len(sizes) > 1 and sum(sizes) == ROWS * VOCABULARY


def test_who_is_served():
    mean, entropy = K.linear.OUTPUTS["mean_logit"], K.linear.OUTPUTS["entropy"]
    assert frozen_head.serves([True, False, False], K.linear.OUTPUTS["argmax"])
    assert not frozen_head.serves([True, False, False], mean)
    assert not frozen_head.serves([True, False, False], entropy)
    assert not frozen_head.serves([True, True, False], 0)
    assert not frozen_head.serves([True, False, True], 0)
    assert not frozen_head.serves([False, False, False], 0)


@pytest.mark.parametrize("name", ["entropy", "mean_logit"])
def test_what_is_only_logged_comes_detached(name):
    h, upstream = problem(ignored=True, bias=False)
    stats = call(h, ("logprob", name), detached=(name,))
    assert plan.ledger.reserved == reserved(h)
    assert not getattr(stats, name).requires_grad
    (got,) = torch.autograd.grad(stats.logprob, h.hidden, upstream[0])
    plain = call(h, ("logprob", name))
    (wanted,) = torch.autograd.grad(plain.logprob, h.hidden, upstream[0])
    torch.testing.assert_close(getattr(stats, name), getattr(plain, name).detach())
    assert distance(got, wanted.double()) <= 1e-6


def test_only_outputs_can_be_detached():
    h, _ = problem(bias=False)
    with pytest.raises(ValueError, match=r"detached: expected one of \['logprob'\], got 'entropy'"):
        call(h, detached=("entropy",))
    with pytest.raises(TypeError, match="detached: expected a tuple of names, got 'lse'"):
        call(h, detached="lse")


def test_losses_from_hidden_states_form_it_in_forward():
    import ift

    h, _ = problem(ignored=True, bias=False)
    metrics = {}
    with plan.use_schedule("forward"):
        loss = ift.losses.from_hidden(
            ift.losses.sft_loss, h.hidden[None], h.weight, h.target[None], metrics=metrics,
            workspace=2 << 20,
        )  # fmt: skip
    assert plan.ledger.reserved == reserved(h)
    assert metrics["entropy"] > 0
    (got,) = torch.autograd.grad(loss, h.hidden)
    exact = h.double()
    mean = dense.cross_entropy(exact)
    assert distance(got, torch.autograd.grad(mean, exact.hidden)[0]) <= 1e-6


def test_a_row_that_teaches_nothing_may_hold_nan():
    h, upstream = problem(bias=False)
    with torch.no_grad():
        h.hidden[6] = float("nan")  # upstream 0
        h.hidden[100] = float("inf")
    (got,) = torch.autograd.grad(call(h).logprob, h.hidden, upstream[0])
    assert not got[6].any()
    assert got[100].isnan().all()
    others = torch.ones(ROWS, dtype=torch.bool)
    others[100] = False
    assert got[others].isfinite().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_targets_next_to_the_softcap(sign):
    # Their slope is what is left of 1 - 1.
    h, upstream = problem()
    h = dense.replace(h, options={"softcap": 5.0})
    with torch.no_grad():
        of_target = h.weight[h.target]
        h.hidden[:] = 8 * sign * of_target / of_target.norm(dim=1, keepdim=True)
    errors = []
    for schedule in ("forward", "recompute"):
        stats = call(h, schedule=schedule)
        (got,) = torch.autograd.grad(stats.logprob, h.hidden, upstream[0])
        errors.append(distance(got, exact_gradient(h, upstream * ONLY_LOGPROB)))
    assert errors[0] <= max(1e-6, 1.5 * errors[1])


def test_the_result_may_be_edited_in_place():
    h, upstream = problem(bias=False)
    with plan.use_schedule("forward"):
        stats = call(h)
        stats.logprob[::2] = 0
        (got,) = torch.autograd.grad(stats.logprob, h.hidden, upstream[0])
        (wanted,) = torch.autograd.grad(call(h).logprob[1::2], h.hidden, upstream[0][1::2])
    assert torch.equal(got, wanted)


def test_backward_without_waiting_for_the_device():
    h, upstream = problem(ignored=True)
    stats = call(h)
    assert plan.ledger.reserved
    with sync_free.sync_free():
        (got,) = torch.autograd.grad(stats.logprob, h.hidden, upstream[0])
    assert distance(got, exact_gradient(h, upstream * ONLY_LOGPROB)) <= 1e-6


def test_a_second_call_before_the_first_backward():
    h, upstream = problem()
    wanted = exact_gradient(h, upstream * ONLY_LOGPROB)
    calls = [K.linear_logprobs(*h.args, bias=h.bias, workspace=2 << 20).logprob for _ in range(2)]
    for logprob in calls:
        (got,) = torch.autograd.grad(logprob, h.hidden, upstream[0])
        assert distance(got, wanted) <= 1e-6


def test_a_weight_changed_before_backward_is_an_error():
    h, _ = problem(bias=False)
    stats = call(h)
    h.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logprob.sum().backward()


def test_no_second_derivative():
    h, _ = problem(bias=False)
    (got,) = torch.autograd.grad(call(h).logprob.sum(), h.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        got.sum().backward()


def test_opcheck():
    h, _ = problem(ignored=True)
    torch.library.opcheck(
        torch.ops.ift_kernels.linear_frozen,
        (
            h.hidden,
            h.weight,
            h.bias,
            h.target,
            -100,
            1.0,
            0.0,
            1.0,
            2 << 20,
            torch.float32,
            False,
            0,
            [],
        ),
        test_utils=("test_schema", "test_autograd_registration"),
    )
