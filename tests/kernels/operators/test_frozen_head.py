"""Per-token results of a frozen head: what backward needs is formed in forward."""

import pytest
import torch

import ift_kernels as K
from ift_kernels.common import sync_free
from ift_kernels.operators import frozen_head
from ift_kernels.schedule import plan, products

ROWS, WIDTH, VOCABULARY = 300, 24, 3001
ROOM = {torch.float32: 2 << 20, torch.float64: 4 << 20, torch.bfloat16: 1 << 20}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3}
OPTIONS = ({}, {"softcap": 20.0, "temperature": 0.8, "logit_scale": 1.1})


def problem(dtype, ignored):
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
    return (
        hidden.to(dtype).requires_grad_(),
        weight,
        torch.randn(VOCABULARY).to(dtype),
        target,
        upstream,
    )


def dense(hidden, weight, bias, target, upstream, softcap=None, temperature=1.0, logit_scale=1.0):
    hidden = hidden.detach().double().requires_grad_()
    z = logit_scale * (hidden @ weight.double().T + bias.double())
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    counts = target != -100
    logprob = z.log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = (logprob * upstream[0])[counts].sum() + (z.logsumexp(-1) * upstream[1])[counts].sum()
    return torch.autograd.grad(loss, hidden)[0]


def distance(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", ROOM, ids=str)
def test_the_gradient_is_that_of_dense_logits(dtype, options, ignored, backend):
    hidden, weight, bias, target, upstream = problem(dtype, ignored)
    with K.use_backend(backend), plan.use_schedule("forward"):
        stats = K.linear_logprobs(
            hidden, weight, target, bias=bias, outputs=("logprob", "lse", "argmax"),
            workspace=ROOM[dtype], **options,
        )  # fmt: skip
        assert plan.ledger.reserved == (target != -100).sum() * WIDTH * dtype.itemsize
        loss = (stats.logprob * upstream[0] + stats.lse * upstream[1]).sum()
        first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
        assert plan.ledger.reserved == 0
        second = torch.autograd.grad(loss, hidden)[0]  # from products formed again
    with plan.use_schedule("recompute"):
        plain = K.linear_logprobs(
            hidden, weight, target, bias=bias, outputs=("logprob", "lse", "argmax"), **options
        )
    assert torch.equal(stats.argmax, plain.argmax)
    for name in ("logprob", "lse"):
        torch.testing.assert_close(getattr(stats, name), getattr(plain, name))
    wanted = dense(hidden, weight, bias, target, upstream, **options)
    for got in (first, second):
        assert distance(got, wanted) <= TOLERANCE[dtype]
        assert distance(got[:40], wanted[:40]) <= 2 * TOLERANCE[dtype]  # confident tokens
        assert not got[5:9].any()


@pytest.mark.parametrize("which", [0, 1], ids=["logprob", "lse"])
def test_one_upstream_alone(which):
    hidden, weight, bias, target, upstream = problem(torch.float32, False)
    upstream[1 - which] = 0
    with plan.use_schedule("forward"):
        stats = K.linear_logprobs(
            hidden, weight, target, bias=bias, outputs=("logprob", "lse"), workspace=2 << 20
        )
    (got,) = torch.autograd.grad((stats[which] * upstream[which]).sum(), hidden)
    assert distance(got, dense(hidden, weight, bias, target, upstream)) <= 1e-6


def test_products_are_formed_once(monkeypatch):
    rows = []
    original = products.tiles

    def counted(head, made, kept=None):
        assert kept.shape == (len(head.hidden), VOCABULARY)
        rows.append(len(head.hidden))
        return original(head, made, kept)

    monkeypatch.setattr(products, "tiles", counted)
    hidden, weight, _, target, _ = problem(torch.float32, False)
    made = K.explain(ROWS, VOCABULARY, WIDTH, torch.float32, need_weight=False, workspace=2 << 20)
    assert (made.schedule, made.products) == ("forward", 2.0)
    stats = K.linear_logprobs(hidden, weight, target, workspace=2 << 20)
    monkeypatch.setattr(torch.ops.ift_kernels, "linear_stats_backward", None)
    stats.logprob.sum().backward()
    assert len(rows) > 1 and sum(rows) == ROWS


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
    hidden, weight, _, target, upstream = problem(torch.float32, True)
    with plan.use_schedule("forward"):
        stats = K.linear_logprobs(
            hidden, weight, target, outputs=("logprob", name), detached=(name,), workspace=2 << 20
        )
        assert plan.ledger.reserved == (target != -100).sum() * WIDTH * 4
        assert not getattr(stats, name).requires_grad
        (got,) = torch.autograd.grad(stats.logprob, hidden, upstream[0])
        plain = K.linear_logprobs(
            hidden, weight, target, outputs=("logprob", name), workspace=2 << 20
        )
    (wanted,) = torch.autograd.grad(plain.logprob, hidden, upstream[0])
    torch.testing.assert_close(getattr(stats, name), getattr(plain, name).detach())
    assert distance(got, wanted.double()) <= 1e-6


def test_only_outputs_can_be_detached():
    hidden, weight, _, target, _ = problem(torch.float32, False)
    with pytest.raises(ValueError, match=r"detached: expected one of \['logprob'\], got 'entropy'"):
        K.linear_logprobs(hidden, weight, target, detached=("entropy",))
    with pytest.raises(TypeError, match="detached: expected a tuple of names, got 'lse'"):
        K.linear_logprobs(hidden, weight, target, detached="lse")


def test_losses_from_hidden_states_form_it_in_forward():
    import ift

    hidden, weight, _, target, _ = problem(torch.float32, True)
    metrics = {}
    with plan.use_schedule("forward"):
        loss = ift.losses.from_hidden(
            ift.losses.sft_loss, hidden[None], weight, target[None], metrics=metrics,
            workspace=2 << 20,
        )  # fmt: skip
    assert plan.ledger.reserved == (target != -100).sum() * WIDTH * 4
    assert metrics["entropy"] > 0
    (got,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    mean = torch.nn.functional.cross_entropy(exact @ weight.double().T, target)
    assert distance(got, torch.autograd.grad(mean, exact)[0]) <= 1e-6


def test_a_row_that_teaches_nothing_may_hold_nan():
    hidden, weight, _, target, upstream = problem(torch.float32, False)
    with torch.no_grad():
        hidden[6] = float("nan")  # upstream 0
        hidden[100] = float("inf")
    with plan.use_schedule("forward"):
        stats = K.linear_logprobs(hidden, weight, target, workspace=2 << 20)
    (got,) = torch.autograd.grad(stats.logprob, hidden, upstream[0])
    assert not got[6].any()
    assert got[100].isnan().all()
    others = torch.ones(ROWS, dtype=torch.bool)
    others[100] = False
    assert got[others].isfinite().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_targets_next_to_the_softcap(sign):
    # Their slope is what is left of 1 - 1.
    hidden, weight, bias, target, upstream = problem(torch.float32, False)
    with torch.no_grad():
        hidden[:] = 8 * sign * weight[target] / weight[target].norm(dim=1, keepdim=True)
    errors = []
    for schedule in ("forward", "recompute"):
        with plan.use_schedule(schedule):
            stats = K.linear_logprobs(
                hidden, weight, target, bias=bias, softcap=5.0, workspace=2 << 20
            )
        (got,) = torch.autograd.grad(stats.logprob, hidden, upstream[0])
        only = upstream * torch.tensor([[1.0], [0.0]])
        errors.append(distance(got, dense(hidden, weight, bias, target, only, softcap=5.0)))
    assert errors[0] <= max(1e-6, 1.5 * errors[1])


def test_the_result_may_be_edited_in_place():
    hidden, weight, _, target, upstream = problem(torch.float32, False)
    with plan.use_schedule("forward"):
        stats = K.linear_logprobs(hidden, weight, target, workspace=2 << 20)
        stats.logprob[::2] = 0
        (got,) = torch.autograd.grad(stats.logprob, hidden, upstream[0])
        other = K.linear_logprobs(hidden, weight, target, workspace=2 << 20).logprob
        (wanted,) = torch.autograd.grad(other[1::2], hidden, upstream[0][1::2])
    assert torch.equal(got, wanted)


def test_backward_without_waiting_for_the_device():
    hidden, weight, bias, target, upstream = problem(torch.float32, True)
    with plan.use_schedule("forward"):
        stats = K.linear_logprobs(hidden, weight, target, bias=bias, workspace=2 << 20)
    assert plan.ledger.reserved
    with sync_free.sync_free():
        (got,) = torch.autograd.grad(stats.logprob, hidden, upstream[0])
    only = upstream * torch.tensor([[1.0], [0.0]])
    assert distance(got, dense(hidden, weight, bias, target, only)) <= 1e-6


def test_a_second_call_before_the_first_backward():
    hidden, weight, bias, target, upstream = problem(torch.float32, False)
    wanted = dense(
        hidden, weight, bias, target, upstream.clone().mul_(torch.tensor([[1.0], [0.0]]))
    )
    calls = [
        K.linear_logprobs(hidden, weight, target, bias=bias, workspace=2 << 20).logprob
        for _ in range(2)
    ]
    for logprob in calls:
        (got,) = torch.autograd.grad(logprob, hidden, upstream[0])
        assert distance(got, wanted) <= 1e-6


def test_a_weight_changed_before_backward_is_an_error():
    hidden, weight, _, target, _ = problem(torch.float32, False)
    with plan.use_schedule("forward"):
        stats = K.linear_logprobs(hidden, weight, target, workspace=2 << 20)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logprob.sum().backward()


def test_no_second_derivative():
    hidden, weight, _, target, _ = problem(torch.float32, False)
    with plan.use_schedule("forward"):
        stats = K.linear_logprobs(hidden, weight, target, workspace=2 << 20)
    (got,) = torch.autograd.grad(stats.logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        got.sum().backward()


def test_opcheck():
    hidden, weight, bias, target, _ = problem(torch.float32, True)
    torch.library.opcheck(
        torch.ops.ift_kernels.linear_frozen,
        (hidden, weight, bias, target, -100, 1.0, 0.0, 1.0, 2 << 20, torch.float32, 0, []),
        test_utils=("test_schema", "test_autograd_registration"),
    )
