"""The schedules of the head are different ways to the same numbers, inside the same budget."""

import gc
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ift_kernels as K
from dense import distance
from ift_kernels.common import sync_free
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.schedule import plan

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def head(n, width, vocabulary, dtype, frozen=False, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(n, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).requires_grad_(not frozen)
    bias = torch.randn(vocabulary).to(dtype).requires_grad_(not frozen)
    target = torch.randint(vocabulary, (n,))
    target[::7] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("workspace", [2 << 20, None], ids=["2MiB", "default"])
def test_schedules_agree(dtype, frozen, workspace):
    # 300 × 3001: several tiles, an odd last one, and with 2 MiB products that fit only in part.
    hidden, weight, bias, target = head(300, 24, 3001, dtype, frozen)
    inputs = [hidden] if frozen else [hidden, weight, bias]
    results = {}
    for schedule in plan.SCHEDULES:
        with plan.use_schedule(schedule):
            loss = K.linear_cross_entropy(
                hidden, weight, target, bias=bias, label_smoothing=0.1, z_loss=0.01, softcap=20.0,
                workspace=workspace,
            )  # fmt: skip
            first = torch.autograd.grad(1.7 * loss, inputs, retain_graph=True)
            first = [g.clone() for g in first]
            second = torch.autograd.grad(1.7 * loss, inputs)  # after what was kept is consumed
        results[schedule] = (loss, first)
        for a, b in zip(first, second, strict=True):
            assert distance(a, b) <= TOLERANCE[dtype]
    loss, gradients = results["recompute"]
    for other_loss, others in results.values():
        assert abs(other_loss - loss) <= 1e-5 * abs(loss)
        for a, b in zip(others, gradients, strict=True):
            assert distance(a, b) <= TOLERANCE[dtype]


def test_forward_gradients_are_not_recomputed(monkeypatch):
    hidden, weight, bias, target = head(200, 16, 2000, torch.float32)
    from ift_kernels.schedule import gradients

    calls = []
    original = gradients.recomputed_tiles
    monkeypatch.setattr(gradients, "recomputed_tiles", lambda *a: calls.append(a) or original(*a))
    with plan.use_schedule("forward"):
        loss = K.linear_cross_entropy(hidden, weight, target, bias=bias, workspace=3 << 19)
        calls.clear()
        loss.backward()
    assert not calls


def test_two_blocks_of_tokens_round_bfloat16_once_more_and_no_more():
    hidden, weight, bias, target = head(512, 64, 8192, torch.bfloat16)
    shape, formed = (439, 8192, 64), {"grads_in_forward": True, "transpose": True}
    for workspace, blocks in ((64 << 20, 1), (8 << 20, 2)):
        problem = plan.Problem(*shape, torch.bfloat16, workspace, True, True, True, **formed)
        made = plan.make(problem, schedule="forward")
        assert (made.schedule, -(-439 // made.tile_rows)) == ("forward", blocks)
    # Seven blocks would round seven times: recomputed instead.
    tight = plan.make(replace(problem, workspace=3 << 20), schedule="forward")
    assert tight.schedule != "forward"

    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    dense = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T + exact[2], target)
    wanted = torch.autograd.grad(dense, exact[:2])
    errors = []
    for workspace in (64 << 20, 8 << 20):
        with plan.use_schedule("forward"):
            loss = K.linear_cross_entropy(hidden, weight, target, bias=bias, workspace=workspace)
        got = torch.autograd.grad(loss, [hidden, weight])
        errors.append([distance(a, b) for a, b in zip(got, wanted, strict=True)])
    assert errors[1][0] <= 1.1 * errors[0][0]
    assert errors[1][1] <= 1.5**0.5 * errors[0][1]


def test_gradients_accumulate_over_calls():
    # A gradient formed in forward becomes .grad itself; the next backward adds to it in place.
    hidden, weight, bias, target = head(200, 16, 2000, torch.float32)
    for schedule in plan.SCHEDULES:
        hidden.grad = weight.grad = bias.grad = None
        with plan.use_schedule(schedule):
            one = K.linear_cross_entropy(hidden, weight, target, bias=bias, workspace=1 << 20)
            one.backward()
            once = [g.clone() for g in (hidden.grad, weight.grad, bias.grad)]
            two = K.linear_cross_entropy(hidden, weight, target, bias=bias, workspace=1 << 20)
            (2 * two).backward()
        for got, want in zip((hidden.grad, weight.grad, bias.grad), once, strict=True):
            assert distance(got, 3 * want) < 1e-6


def test_two_graphs_at_once_share_the_budget():
    hidden, weight, bias, target = head(256, 16, 4096, torch.float32)
    budget = 4 << 20
    assert plan.ledger.reserved == 0
    stats = [
        K.linear_logprobs(hidden, weight, target, bias=bias, workspace=budget) for _ in range(3)
    ]
    assert 0 < plan.ledger.reserved <= budget
    separate = [torch.autograd.grad(s.logprob.sum(), weight)[0] for s in stats]
    assert distance(separate[1], separate[0]) < 1e-6
    assert distance(separate[2], separate[0]) < 1e-6
    assert plan.ledger.reserved == 0


def test_kept_products_are_released_with_their_graph():
    hidden, weight, _, target = head(256, 16, 4096, torch.float32)
    stats = K.linear_logprobs(hidden, weight, target)
    assert plan.ledger.reserved > 0
    del stats
    gc.collect()
    assert plan.ledger.reserved == 0


@pytest.mark.parametrize("rows", [130, 9000], ids=["few", "more than a tile of the backward plan"])
def test_kept_16_bit_products_are_transposed_whole(rows):
    # 9000 × 8192: backward once planned narrower tiles than the products that forward had kept.
    hidden, weight, _, target = head(rows, 8, 8192, torch.bfloat16)
    upstream = torch.randn(rows)
    gradients = []
    for schedule in ("recompute", "keep"):
        with plan.use_schedule(schedule):
            stats = K.linear_logprobs(hidden, weight, target, workspace=128 << 20)
            loss = (stats.logprob * upstream).sum()
            gradients.append(torch.autograd.grad(loss, [hidden, weight]))
    for a, b in zip(*gradients, strict=True):
        assert distance(a, b) < 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("loss", ["scalar", "per token"])
def test_activation_checkpointing(reentrant, loss):
    hidden, weight, _, target = head(512, 16, 4096, torch.float32)

    def run(h, w):
        if loss == "scalar":
            return K.linear_cross_entropy(h, w, target, workspace=6 << 20)
        return K.linear_logprobs(h, w, target, workspace=6 << 20).logprob.sum()

    plain = torch.autograd.grad(run(hidden, weight), [hidden, weight])
    hidden.grad = weight.grad = None
    checkpoint(run, hidden, weight, use_reentrant=reentrant).backward()
    assert plan.ledger.reserved == 0  # nothing stays that the checkpoint should have dropped
    assert distance(hidden.grad, plain[0]) < 1e-6
    assert distance(weight.grad, plain[1]) < 1e-6


def test_fp16_keeps_small_gradients_under_a_loss_scale():
    hidden, weight, _, target = head(4096, 8, 2048, torch.float16, frozen=True)
    dense = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().T, target, ignore_index=-100
    )
    (want,) = torch.autograd.grad(dense * 65536, hidden)
    loss = K.linear_cross_entropy(hidden, weight, target, workspace=2 << 20)
    (got,) = torch.autograd.grad(loss * 65536, hidden)
    assert distance(got, want) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [33, 62, 64])  # odd, even, a multiple of 64 bytes
@pytest.mark.parametrize("vocabulary", [1001, 1024])
def test_nan_stays_in_its_row(dtype, width, vocabulary):
    # oneDNN reads 16-bit rows past their end; a NaN there must meet padding, not the next row.
    hidden, weight, _, target = head(70, width, vocabulary, dtype)
    with torch.no_grad():
        hidden[10] = float("nan")
    for schedule in plan.SCHEDULES:
        with plan.use_schedule(schedule):
            logprob = K.linear_logprobs(hidden, weight, target, workspace=1 << 20).logprob
            (of_logprob,) = torch.autograd.grad(logprob.sum(), hidden)
            loss = K.linear_cross_entropy(hidden, weight, target, workspace=1 << 20)
            (of_loss,) = torch.autograd.grad(loss, hidden)
        soft = K.linear_expected_embedding(hidden, weight, weight)
        (of_soft,) = torch.autograd.grad(soft.sum(), hidden)
        for rows in (logprob[:, None], of_logprob, of_loss, soft, of_soft):
            assert rows.isnan().any(1).nonzero().flatten().tolist() == [10]


@pytest.mark.parametrize("need_weight", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "per token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 1024, 16384, 100_000])
@pytest.mark.parametrize("vocabulary", [1000, 151936, 256000])
def test_plans_fit_the_workspace(rows, vocabulary, dtype, scalar, need_weight):
    made = K.explain(rows, vocabulary, 2304, dtype, scalar=scalar, need_weight=need_weight)
    assert made.peak_bytes <= plan.checks.workspace_bytes(None, torch.device("cpu"), dtype)
    assert 2.0 <= made.products <= 5.0


@pytest.mark.parametrize("gradient", ["exact", "active", K.ActiveSet(tail_bucket=64)], ids=str)
@pytest.mark.parametrize(
    ("workspace", "scalar", "need_hidden", "need_weight", "schedule", "of_active"),
    [
        (1 << 20, False, True, True, "recompute", "recompute"),
        (4 << 20, False, True, False, "forward", "keep"),
        (4 << 20, True, True, True, "forward", "keep"),
        (8 << 20, False, True, True, "keep", "keep"),
        (8 << 20, True, False, True, "forward", "forward"),
    ],
)
def test_explained_plans_are_followed(
    gradient, workspace, scalar, need_hidden, need_weight, schedule, of_active, monkeypatch
):
    rows, vocabulary, width = 256, 6000, 32
    hidden = torch.randn(rows, width, requires_grad=need_hidden)
    weight = torch.randn(vocabulary, width, requires_grad=need_weight)
    target = torch.arange(rows)
    needs = {"need_hidden": need_hidden, "need_weight": need_weight}
    given = {"gradient": gradient, "workspace": workspace}
    explained = K.explain(rows, vocabulary, width, torch.float32, scalar=scalar, **needs, **given)
    made, original = [], plan.make
    monkeypatch.setattr(plan, "make", lambda *a: made.append(original(*a)) or made[-1])
    function = K.linear_cross_entropy if scalar else K.linear_logprobs
    function(hidden, weight, target, **given)
    assert explained == made[-1]
    assert explained.schedule == (schedule if gradient == "exact" else of_active)


def test_explained_gradients_are_exact_or_active():
    for gradient in ("auto", None, True):
        with pytest.raises(ValueError, match=r"gradient: expected one of \['active', 'exact'\]"):
            K.explain(8, 100, 8, gradient=gradient)
    exact, active = (K.explain(256, 6000, 32, gradient=name) for name in ("exact", "active"))
    assert exact != active
    with sync_free.sync_free():  # sizes may not depend on data: as "exact"
        assert K.explain(256, 6000, 32, gradient="active") == exact
    without = (K.explain(256, 6000, 32, need_hidden=False, gradient=n) for n in ("exact", "active"))
    assert len(set(without)) == 1


def test_forced_schedule_must_exist():
    with pytest.raises(ValueError, match=r"name: expected one of .* got 'fast'"):
        plan.use_schedule("fast").__enter__()


@pytest.mark.parametrize("kind", ["loss", "logprob"])
def test_float16_gradients_wait_for_the_loss_scale(kind):
    # The products are bfloat16, but hidden's gradient is float16: formed in forward it would be
    # rounded to nothing before the scale arrives.
    torch.manual_seed(0)
    hidden = torch.randn(256, 32).half().requires_grad_()
    weight = (torch.randn(2000, 32) / 6).bfloat16()
    target = torch.randint(2000, (256,))
    scale, items = 2.0**16, 2.0**20
    with torch.autocast("cpu", torch.bfloat16), plan.use_schedule("forward"):
        if kind == "loss":
            loss = K.linear_cross_entropy(hidden, weight, target, num_items=int(items))
        else:
            loss = -K.linear_logprobs(hidden, weight, target).logprob.sum() / items
    (got,) = torch.autograd.grad(loss * scale, hidden)
    exact = hidden.detach().double().requires_grad_()
    dense = torch.nn.functional.cross_entropy(exact @ weight.double().T, target, reduction="sum")
    (wanted,) = torch.autograd.grad(dense * (scale / items), exact)
    assert distance(got, wanted) < 5e-3


@pytest.mark.parametrize("where", ["forward", "backward", "another thread"])
@pytest.mark.parametrize("gradient", ["exact", "active"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("scalar", [False, True], ids=["per-token", "scalar"])
def test_a_mode_that_changes_before_backward(scalar, frozen, gradient, where):
    """What forward kept has the rows of its mode; autograd's threads for GPUs know of none."""
    hidden, weight, _, target = head(100, 33, 3000, torch.float32, frozen)
    inputs = [hidden] if frozen else [hidden, weight]

    def value():
        if scalar:
            return K.linear_cross_entropy(hidden, weight, target, gradient=gradient)
        return K.linear_logprobs(hidden, weight, target, gradient=gradient).logprob.sum()

    def backward():
        with sync_free.sync_free() if where == "backward" else nullcontext():
            found.extend(torch.autograd.grad(out, inputs))

    found = []
    exact = [g.clone() for g in torch.autograd.grad(value(), inputs)]
    with sync_free.sync_free() if where != "backward" else nullcontext():
        out = value()
        if where == "another thread":
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
    if where != "another thread":
        backward()
    assert len(found) == len(exact)
    for mine, true in zip(found, exact, strict=True):
        assert distance(mine, true) <= (1e-5 if gradient == "exact" else 0.015)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "dtype", "mib"),
    [
        (1, 30000, 64, torch.bfloat16, 1),
        (2048, 32000, 1024, torch.bfloat16, 256),
        (16384, 32000, 1024, torch.bfloat16, 8),
        (65536, 500, 64, torch.bfloat16, 1),
        (131072, 32000, 1024, torch.bfloat16, 64),
        (300000, 500, 1024, torch.float32, 8),
        (524288, 128256, 4096, torch.bfloat16, 256),
    ],
)
def test_the_active_set_has_the_schedule_of_exact(
    rows, vocabulary, width, dtype, mib, block, trained
):
    """Its copies count for a tile, not for all rows: no dearer schedule, no sliver of a tile."""
    problem = plan.Problem(
        rows, vocabulary, width, dtype, mib << 20, True, trained,
        grads_in_forward=not trained, transpose=dtype == torch.bfloat16,
    )  # fmt: skip
    exact = plan.make(problem)
    sparse = plan.make(replace(problem, active=ActiveSet(block=block, tail_bucket=64)))
    assert sparse.schedule == exact.schedule and sparse.products <= exact.products * 1.05
    assert sparse.peak_bytes <= mib << 20
    area = sparse.tile_rows * sparse.tile_columns
    assert area >= exact.tile_rows * exact.tile_columns / 4 or rows == 1, (sparse, exact)


@pytest.mark.parametrize("backend", ["reference", None], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "z_loss": 0.01}], ids=len)
@pytest.mark.parametrize("gradient", ["exact", ActiveSet(0.0, 32, 512)], ids=["exact", "active"])
def test_many_blocks_sum_dw_in_float32(backend, options, gradient):
    """More than two blocks would round a bfloat16 dW once for each of them."""
    hidden, weight, bias, target = head(3000, 64, 1000, torch.bfloat16)
    workspace = 11 << 18
    with K.use_backend(backend) if backend else nullcontext():
        problem = plan.explain(2571, 1000, 64, scalar=True, gradient=gradient, workspace=workspace)
        assert problem.sum_columns == 1000 and len(problem.blocks(2571)) > 3
        loss = K.linear_cross_entropy(
            hidden, weight, target, bias=bias, workspace=workspace, gradient=gradient, **options
        )
        got = torch.autograd.grad(1.7 * loss, [hidden, weight, bias])
    h, w, b = (t.detach().double().requires_grad_() for t in (hidden, weight, bias))
    logits = h @ w.T + b
    if options:
        logits = 20.0 * torch.tanh(logits / 20.0)
    wanted = torch.nn.functional.cross_entropy(logits, target)
    if options:
        wanted = wanted + 0.01 * logits.logsumexp(1)[target >= 0].square().mean()
    for a, e in zip(got, torch.autograd.grad(1.7 * wanted, [h, w, b]), strict=True):
        assert a.dtype == torch.bfloat16
        assert distance(a, e) < 6e-3
