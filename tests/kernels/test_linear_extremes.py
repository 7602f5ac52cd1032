"""The linear operations at the edges: infinities, NaN, huge logits, long rows, many rows."""

import pytest
import torch

import dense
from ift_kernels import linear_cross_entropy, linear_divergence, linear_logprobs
from serving import BACKENDS

SMALL = 1 << 20
NAN, INF = float("nan"), float("inf")
HALF = [torch.float32, torch.bfloat16]
# Few outputs of a plain head go another way through the C++ code than all of them.
OUTPUTS = {"every-output": dense.OUTPUTS, "few": ("logprob", "entropy", "argmax", "argmax_logprob")}


def call(h, outputs=dense.OUTPUTS, **options):
    return linear_logprobs(*h.args, outputs=outputs, **h.kwargs, **options)


def exact_logits(offset=0.0, step=0.125, n=40, v=1500):
    """A head whose logits are small multiples of `step` plus `offset`: exact in float32."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randint(-64, 65, (n, v), generator=generator) * step
    # Two columns per row of hidden and of weight keep the product exact: z = row + column.
    rows, columns = z[:, :1], z[:1].T
    hidden = torch.cat([rows, torch.ones_like(rows)], 1)
    weight = torch.cat([torch.ones_like(columns), columns + offset], 1)
    target = torch.randint(v, (n,), generator=generator)
    return dense.Head(hidden.requires_grad_(), weight.requires_grad_(), target)


# A log-sum-exp of 10⁴ is 1e-3 from its float32 neighbours; log-probabilities must not feel that.
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 2.0**16], ids=lambda x: f"offset{x:g}")
@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
def test_a_large_common_logit_costs_no_digits(backend, offset, outputs):
    h = exact_logits(offset)
    stats = call(h, outputs)
    exact = dense.stats(h.double())
    for name in ("logprob", "entropy", "argmax_logprob", "second_logprob", "sum_sq"):
        if getattr(stats, name) is not None:
            torch.testing.assert_close(
                getattr(stats, name).double(), exact[name], rtol=1e-6, atol=1e-6, msg=name
            )
    up = dense.upstream(h, ("logprob", "entropy"))
    double = h.double()
    ours = dense.gradients(dense.send(stats, up), h.inputs)[0]
    wanted = dense.gradients(dense.send(dense.stats(double), up), double.inputs)[0]
    # Column 0 multiplies a 1 of every token: the sum of dlogits, which is 0 for every row.
    torch.testing.assert_close(ours[:, 0].double(), wanted[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_large_common_logit_and_label_smoothing(backend, offset):
    h = exact_logits(offset)
    options = {"label_smoothing": 0.1, "reduction": "none"}
    ours = linear_cross_entropy(*h.args, **options)
    torch.testing.assert_close(
        ours.double(), dense.cross_entropy(h.double(), **options), rtol=1e-6, atol=2e-6
    )


def test_logits_of_ten_thousand_both_ways(backend):
    h = dense.head(60, 17, 900)
    h = h.map(lambda t: (60 * t.detach()).requires_grad_())  # logits of spread 10⁴
    stats = call(h)
    assert stats.lse.abs().max() > 1e4
    dense.assert_stats_and_gradients(stats, h)


# Where forward and backward round a logit differently, probabilities do not sum to 1 and what
# remains of 1 − p of a certain token is noise. Scales that are no power of two show it.
@pytest.mark.parametrize("scale", [1.0, 0.7, 3.3])
@pytest.mark.parametrize("softcap", [None, 200.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["logprob", "entropy"])
def test_gradients_of_certain_tokens(backend, scale, softcap, dtype, name):
    h = dense.head(200, 16, 400, dtype, logit_scale=8 * scale, softcap=softcap, ignored=0)
    h = dense.replace(h, target=dense.logits(h).argmax(-1))
    exact = h.double()
    certain = dense.logits(exact).softmax(-1).amax(-1) > 1 - 1e-5
    assert certain.sum() > 5
    ours, theirs, wanted = (
        dense.gradients(value.sum(), [x.hidden])[0][certain].double()
        for value, x in (
            (getattr(call(h, (name,)), name), h),
            (dense.stats(h)[name], h),
            (dense.stats(exact)[name], exact),
        )
    )
    # p is good to a unit in its last place, 1.2e-7, and weights are of size 3, scaled.
    atol = 4 * 1.2e-7 * 3 * 8 * scale
    assert (ours - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + atol


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("workspace", [SMALL, None], ids=["small", "default"])
def test_masked_tokens_are_as_if_they_were_not_there(backend, schedule, dtype, workspace):
    v = 3000  # masked: a whole block of 1024, the first tile, the last column, one in the middle
    h = dense.head(150, 12, v, dtype, bias=True)
    open_ = torch.ones(v, dtype=torch.bool)
    open_[:1100] = open_[1500] = open_[-1] = False
    bias = torch.where(open_, h.bias.detach(), -INF).requires_grad_()
    renumber = open_.cumsum(0) - 1
    target = torch.where(h.target < 0, h.target, open_.nonzero()[h.target % open_.sum(), 0])
    masked = dense.replace(h, bias=bias, target=target)
    left = dense.Head(
        h.hidden.detach().requires_grad_(),
        h.weight.detach()[open_].requires_grad_(),
        torch.where(target < 0, target, renumber[target]),
        bias.detach()[open_].requires_grad_(),
    )
    names = ("logprob", "lse", "entropy", "argmax", "second_logprob", "sum_sq")
    ours = call(masked, names, workspace=workspace)
    smaller = dense.stats(left)
    for name in names:
        value, wanted = getattr(ours, name), smaller[name]
        if name == "argmax":
            value = torch.where(target < 0, 0, renumber[value])
        assert value.isfinite().all(), name
        if dtype == torch.float32 or name != "argmax":  # bfloat16 logits tie
            torch.testing.assert_close(value, wanted, rtol=1e-2 if dtype in HALF[1:] else 1e-5,
                                       atol=1e-2 if dtype in HALF[1:] else 1e-5)  # fmt: skip
    up = dense.upstream(masked, ("logprob", "lse", "entropy"))
    grads = dense.gradients(dense.send(ours, up), masked.inputs)
    wanted = dense.gradients(dense.send(dense.stats(left), up), left.inputs)
    for name, mine, theirs in zip(("hidden", "weight", "bias"), grads, wanted, strict=True):
        if name != "hidden":
            assert (mine[~open_] == 0).all(), f"{name}: a masked token has a gradient"
            mine = mine[open_]
        error = (mine - theirs).norm() / theirs.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{name}: {error}"


def test_masked_target_and_everything_masked(backend):
    h = dense.head(5, 4, 20, ignored=0)
    h.target.fill_(3)
    bias = torch.zeros(20).index_fill(0, torch.tensor([3]), -INF)
    assert (call(dense.replace(h, bias=bias)).logprob == -INF).all()
    nothing = call(dense.replace(h, bias=torch.full((20,), -INF)))
    assert (nothing.lse == -INF).all()
    # As log_softmax has it; +inf would be a very good token.
    assert nothing.logprob.isnan().all() and nothing.argmax_logprob.isnan().all()


POISON = {"nan": NAN, "inf": INF, "-inf": -INF}


# Odd widths: oneDNN's 16-bit products read past an odd row into the next. 5: fewer than a vector.
@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("width", [5, 8, 33])
@pytest.mark.parametrize("dtype", [*HALF, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
def test_poisoned_hidden_stays_in_its_row(backend, value, width, dtype, outputs):
    h = dense.head(70, width, 1100, dtype, bias="sum_sq" in outputs, ignored=0)
    bad = torch.zeros(70, dtype=torch.bool)
    bad[[0, 31, 69]] = True
    poisoned = dense.fill_rows(h, bad, POISON[value], -1)
    stats, clean = call(poisoned, outputs), call(h, outputs)
    for name in dense.FIELDS:
        if getattr(stats, name) is None:
            continue
        if name == "argmax":  # any id will do, as long as it is one
            assert ((stats.argmax >= 0) & (stats.argmax < 1100)).all()
            continue
        ours, wanted = getattr(stats, name), getattr(clean, name)
        if name not in ("mean_logit", "target_logit"):  # of infinite logits: as torch has them
            assert ours[bad].isnan().all(), name
        torch.testing.assert_close(ours[~bad], wanted[~bad], msg=name)
    d_hidden, *rest = dense.gradients(stats.logprob.sum() + stats.entropy.sum(), poisoned.inputs)
    assert torch.equal(d_hidden.isnan().all(1), bad)
    assert torch.equal(d_hidden.isnan().any(1), bad)
    assert all(grad.isnan().all() for grad in rest)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_poison_reaches_the_scalar_loss_in_every_schedule(backend, schedule, dtype):
    h = dense.head(300, 9, 1100, dtype, bias=True, ignored=0.1)
    h.target[7] = 3
    poisoned = dense.fill_rows(h, 7, column=2)
    loss = linear_cross_entropy(
        poisoned.hidden, h.weight, h.target, bias=h.bias, workspace=4 * SMALL
    )
    assert loss.isnan()
    d_hidden, d_weight, d_bias = dense.gradients(loss, poisoned.inputs)
    assert d_hidden[7].isnan().all() and d_hidden.isnan().any(1).sum() == 1
    assert d_weight.isnan().all() and d_bias.isnan().all()


# In the first block of 1024, at its end, at the start of the second, at the end of a partial third.
@pytest.mark.parametrize("row", [5, 1023, 1024, 2499])
@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float16], ids=str)
def test_poisoned_head_row_poisons_every_token(backend, row, outputs, dtype):
    h = dense.head(20, 6, 2500, dtype, ignored=0)
    for value in (NAN, -NAN):
        weight = h.weight.detach().clone()
        weight[row] = value
        stats = call(dense.replace(h, weight=weight), outputs)
        assert stats.logprob.isnan().all() and stats.entropy.isnan().all()
        assert (stats.argmax == row).all()  # as torch.argmax has it


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float16], ids=str)
def test_tokens_masked_by_the_head(backend, outputs, dtype):
    """Logits of −inf without a bias: single ones, and a whole block of 1024."""
    h = dense.head(30, 6, 3500, dtype, ignored=0)
    hidden, weight = h.hidden.detach().abs(), h.weight.detach().clone()
    open_ = torch.ones(3500, dtype=torch.bool)
    open_[3] = open_[1024:2049] = open_[-1] = False
    weight[~open_] = -INF
    target = h.target.clamp(max=900) + (h.target == 3)
    ours = call(dense.Head(hidden, weight, target), outputs)
    wanted = dense.stats(dense.Head(hidden, weight[open_], target - (target > 3).long()))
    for name in ("logprob", "entropy", "argmax_logprob", "second_logprob", "sum_sq"):
        if getattr(ours, name) is not None:
            torch.testing.assert_close(
                getattr(ours, name), wanted[name], rtol=1e-2, atol=1e-2, msg=name
            )


def test_nan_upstream_reaches_the_gradients(backend, schedule):
    h = dense.head(64, 6, 1300, ignored=0)
    grads = torch.zeros(64)
    grads[5] = NAN
    d_hidden, d_weight = dense.gradients((call(h).logprob * grads).sum(), h.inputs)
    assert d_hidden[5].isnan().all() and (d_hidden[6:] == 0).all()
    assert d_weight.isnan().all()


# Rows without upstream gradient are skipped, says the documentation: so they cannot poison either,
# and not in one schedule more than in another.
def test_poisoned_row_without_upstream_gradient(backend, schedule):
    h = dense.head(64, 6, 1300, ignored=0)
    hidden = dense.fill_rows(h, 5).hidden
    keep = torch.ones(64)
    keep[5] = 0
    for outputs in (("logprob",), ("logprob", "entropy", "mean_logit")):
        stats = linear_logprobs(hidden, h.weight, h.target, outputs=outputs)
        sent = [getattr(stats, name) for name in outputs]
        for grad in torch.autograd.grad(sent, [hidden, h.weight], [keep] * len(sent)):
            assert grad.isfinite().all()


@pytest.mark.parametrize("value", [INF, NAN])
def test_an_infinite_loss_scale_reaches_no_ignored_row(backend, schedule, value):
    """As no other row that has no part in the loss: its gradient is 0, not 0 times an infinity."""
    h = dense.head(64, 6, 1300)
    valid = h.target != -100
    loss = linear_cross_entropy(*h.args)
    divergence = linear_divergence(
        h.hidden, h.weight, h.hidden.flip(0), h.weight, mask=valid, reduction="mean"
    )
    for total in (loss, divergence):
        (d_hidden,) = torch.autograd.grad(total, h.hidden, torch.tensor(value))
        assert (d_hidden[~valid] == 0).all() and not d_hidden[valid].isfinite().any()


def test_poisoned_ignored_row_is_not_read(backend, schedule):
    h = dense.head(64, 6, 1300, ignored=0)
    h.target[5] = -100
    hidden = dense.fill_rows(h, 5).hidden
    for reduction in ("none", "mean"):
        loss = linear_cross_entropy(hidden, h.weight, h.target, reduction=reduction).sum()
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [hidden, h.weight]))


# Positions of the tie: within a vector, across blocks of 1024, across tiles, first and last.
@pytest.mark.parametrize(
    "tied", [(0, 1), (3, 40), (1023, 1024), (100, 2900), (0, 2999), (7, 8, 9, 1500)], ids=str
)
@pytest.mark.parametrize("workspace", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float16], ids=str)
def test_ties_go_to_the_lowest_id(backend, tied, workspace, dtype):
    weight = torch.zeros(3000, 2)
    weight[:, 0] = torch.arange(3000) % 5 * 0.25
    weight[list(tied), 0] = 2.0
    hidden = torch.tensor([[1.0, 0.0], [2.0, 1.0], [-1.0, 3.0]]).repeat(50, 1)
    h = dense.Head(hidden.to(dtype), weight.to(dtype), torch.zeros(150, dtype=torch.long))
    stats = call(h, workspace=workspace)
    assert torch.equal(stats.argmax, dense.logits(h.double()).argmax(-1))
    assert torch.equal(stats.argmax, call(h, ("argmax",), workspace=workspace).argmax)
    assert stats.argmax[0] == tied[0]
    # The second-best of a tied pair is as good as the best.
    assert torch.equal(stats.second_logprob[0::3], stats.argmax_logprob[0::3])


def test_second_best_wherever_it_is(backend):
    """The best and the second-best token in the same vector, block or tile, in either order."""
    places = [0, 1, 15, 16, 17, 500, 512, 1023, 1024, 1300]
    pairs = [(a, b) for a in places for b in places if a != b]
    weight = torch.linspace(-1, 0, 1301)[:, None].repeat(1, len(pairs))
    for row, (best, second) in enumerate(pairs):
        weight[best, row], weight[second, row] = 3.0, 2.0
    target = torch.zeros(len(pairs), dtype=torch.long)
    h = dense.Head(torch.eye(len(pairs)), weight, target)
    stats, wanted = call(h), dense.stats(h)
    assert torch.equal(stats.argmax, wanted["argmax"])
    torch.testing.assert_close(stats.second_logprob, wanted["second_logprob"])


def test_more_products_than_an_int32_counts():
    """N·V > 2³¹. Backward is asked for rows at both ends only: the rest are skipped."""
    n, v = 16400, 131072
    hidden, weight = torch.randn(n, 2), torch.randn(v, 2)
    target = torch.randint(v, (n,))
    assert n * v > 2**31
    some = torch.cat([torch.arange(40), torch.arange(n - 40, n)])
    hidden.requires_grad_()
    logprob = linear_logprobs(hidden, weight, target).logprob
    h = dense.Head(hidden.detach()[some].requires_grad_(), weight, target[some])
    exact = h.double()
    theirs, wanted = dense.stats(h)["logprob"], dense.stats(exact)["logprob"]
    dense.assert_as_accurate(logprob[some], theirs, wanted)
    logprob[some].sum().backward()
    (dense_grad,) = dense.gradients(theirs.sum(), [h.hidden])
    (exact_grad,) = dense.gradients(wanted.sum(), [exact.hidden])
    dense.assert_as_accurate(hidden.grad[some], dense_grad, exact_grad)
    assert hidden.grad[40:-40].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_further_apart_than_an_int32_counts(dtype):
    """The C++ epilogues on a chunk whose second row starts 2³¹ elements behind the first.

    The memory between is never touched, so it is never there.
    """
    if "cpu" not in BACKENDS:
        pytest.skip("the C++ extension is not built, and the reference has no addresses")
    far, v = 2**31 + 64, 70
    storage = torch.UntypedStorage((far + v) * dtype.itemsize)
    x = torch.tensor([], dtype=dtype).set_(storage, 0, (2, v), (far, 1))
    values = torch.randn(2, v).to(dtype)
    x.copy_(values)
    from ift_kernels.backends import contract, cpu, reference

    target = torch.tensor([3, v - 1])
    states = []
    for backend, product in ((cpu, x), (reference, values.clone())):
        chunk = contract.Chunk(product)
        running = state, argmax = contract.new_state(2, torch.device("cpu"))
        backend.stats_update(chunk, target, running, contract.TRACK_ARGMAX)
        states.append(torch.cat([state[:3], argmax[None]]))
        norm = torch.stack([state[0], state[1].log()]).float()
        backend.probabilities_(chunk, norm)
        states.append(product.clone().double())
    torch.testing.assert_close(states[:2], states[2:], rtol=1e-6, atol=1e-6)
