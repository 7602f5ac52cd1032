"""Log-probabilities of sets of ids: values and gradients of every output, against full logits."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dense
import ift_kernels
from allocations import Allocations
from ift.numerics import oracle
from ift_kernels import SelectedLogprobs, linear_logprobs, linear_selected_logprobs
from ift_kernels.common.sync_free import sync_free
from ift_kernels.schedule import plan

NAMES = SelectedLogprobs._fields
IN_SET = ("in_set_logprob", "in_set_lse")
SMALL = 1 << 20


def problem(n, d, v, k, dtype=torch.float32, seed=0, **options):
    h = dense.head(n, d, v, dtype, seed=seed, **options)
    g = torch.Generator().manual_seed(seed + 1)
    ids = torch.rand(*h.target.shape, v, generator=g).topk(k).indices
    ids[torch.rand(ids.shape, generator=g) < 0.15] = -100
    ids[h.target == -100] = -100
    ids[-1, ..., 0] = v - 1 if not (ids[-1] == v - 1).any() else ids[-1, ..., 0]
    return h, ids


def sent(values, names, seed=3):
    """The scalar that sends a gradient into these outputs, none into a third of the tokens."""
    total, g = 0.0, torch.Generator().manual_seed(seed)
    keep = torch.rand(values["lse" if "lse" in names else "in_set_lse"].shape, generator=g) > 0.3
    for name in names:
        value = values[name]
        up = torch.randn(value.shape, generator=g, dtype=torch.float64)
        up = up * (keep if value.dim() == keep.dim() else keep[..., None])
        finite = torch.where(value.isfinite(), value, 0)
        total = total + (finite * up.to(value.dtype)).sum()
    return total


def check(h, ids, names=NAMES, **options):
    found = linear_selected_logprobs(h.hidden, h.weight, ids, outputs=names, **h.kwargs, **options)
    exact = h.double()
    plain, wanted = (oracle.selected(dense.logits(x), ids) for x in (h, exact))
    scale = max(1.0, wanted["lse"].abs().max().item())
    for name in NAMES:
        value = getattr(found, name)
        if name not in names:
            assert value is None
            continue
        finite = wanted[name].isfinite()
        assert torch.equal(value.isfinite(), finite) and value.shape == finite.shape, name
        parts = (x[name].masked_fill(~finite, 0) for x in (found._asdict(), plain, wanted))
        dense.assert_as_accurate(*parts, name, scale)
    ours = dense.gradients(sent(found._asdict(), names), h.inputs)
    dense.assert_gradients(ours, h, sent(plain, names), sent(wanted, names), exact.inputs)


@pytest.mark.parametrize("names", [("logprob", "tail_logprob"), IN_SET], ids=str)
def test_checkpointing(names):
    """Which lets backward read what is saved only once."""
    h, ids = problem(20, 8, 300, 6)

    def run(*inputs):
        found = linear_selected_logprobs(*inputs, ids, outputs=names)
        return getattr(found, names[0]).sum() + getattr(found, names[1]).sum()

    inputs = (h.hidden, h.weight)
    loss = checkpoint(run, *inputs, use_reentrant=False)
    pair = (torch.autograd.grad(value, inputs) for value in (loss, run(*inputs)))
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("transform", [{}, dense.TRANSFORM], ids=["plain", "capped"])
def test_values_and_gradients(dtype, transform):
    check(*problem((3, 11), 12, 300, 17, dtype, bias=bool(transform), **transform))


@pytest.mark.parametrize("schedule", plan.SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedules_with_many_tiles(schedule, dtype):
    with plan.use_schedule(schedule):
        check(*problem(200, 8, 1503, 64, dtype), workspace=SMALL)


@pytest.mark.parametrize(
    "options",
    [{"deterministic": True, "workspace": 16 << 20}, {"logit_scale": -1.7}, {"logit_scale": 0.0},
     {"softcap": 0.5}, {"ignored": 1.0}, {"temperature": 0.3}],
    ids=str,
)  # fmt: skip
def test_options(options):
    call = {k: options[k] for k in options if k in ("deterministic", "workspace")}
    given = {k: v for k, v in options.items() if k not in call}
    check(*problem(40, 8, 90, 9, bias=True, **given), **call)


def test_float32_logits():
    h, ids = problem(30, 16, 200, 9, torch.bfloat16)
    options = {"outputs": NAMES, "logits_dtype": torch.float32}
    found = linear_selected_logprobs(h.hidden, h.weight, ids, **options)
    wanted = oracle.selected(dense.logits(h.double()), ids)
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), wanted[name].float().detach())


@pytest.mark.parametrize("transform", [{}, {"softcap": 3.0}], ids=["plain", "capped"])
def test_the_whole_vocabulary_and_all_but_one(transform):
    """A tail of nothing is -inf without a gradient; one of a single id is that id's."""
    for left in (0, 1):
        h, _ = problem(12, 8, 9, 9, ignored=0.0, **transform)
        ids = torch.stack([torch.randperm(9)[: 9 - left] for _ in range(12)])
        check(h, ids)


@pytest.mark.parametrize("transform", [{"softcap": 0.5}, {"logit_scale": 0.0}], ids=str)
def test_a_rest_that_is_few_of_a_bounded_transform(transform):
    """What is left in place of 500 ids would outweigh three others."""
    h, _ = problem(30, 8, 503, 1, ignored=0.0, bias=True, **transform)
    ids = torch.stack([torch.randperm(503)[:500] for _ in range(30)])
    ids[0, 100:], ids[1] = -100, -100
    check(h, ids, ("lse", "tail_logprob"))


@pytest.mark.parametrize("workspace", [None, SMALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_in_the_set_alone(dtype, workspace, monkeypatch):
    """From gathered head rows; no product with the whole head."""
    h, ids = problem(60, 24, 4000, 5, dtype, bias=True, softcap=9.0)
    calls = []
    real = torch.ops.ift_kernels.linear_in_set

    def counted(*arguments):
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(torch.ops.ift_kernels, "linear_in_set", counted)
    check(h, ids, IN_SET, workspace=workspace)
    assert calls
    check(*problem(60, 24, 40, 30, dtype, bias=True), IN_SET)  # a large share: the dense way
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_id_is_linear_logprobs_to_the_bit(dtype):
    h, _ = problem(30, 16, 300, 1, dtype, bias=True, softcap=4.0)
    stats = linear_logprobs(*h.args, outputs=("logprob", "lse"), **h.kwargs)
    ids = h.target[:, None]
    found = linear_selected_logprobs(h.hidden, h.weight, ids, outputs=NAMES[:4], **h.kwargs)
    assert torch.equal(found.logprob[:, 0], stats.logprob) and torch.equal(found.lse, stats.lse)
    assert (found.in_set_logprob == 0).all()
    up = torch.randn(30)
    pairs = ((x.squeeze(-1) * up + y).sum() for x, y in ((found.logprob, found.lse), stats[:2]))
    for a, b in zip(*(dense.gradients(loss, h.inputs) for loss in pairs), strict=True):
        assert torch.equal(a, b)


def test_a_nearly_certain_id_keeps_what_it_leaves():
    """The tail and 1 - p of 1e-30, which 1 minus a sum of probabilities would have lost."""
    weight = torch.eye(6, 4)
    hidden = torch.tensor([[70.0, 1.0, 2.0, 3.0]], requires_grad=True)
    ids = torch.tensor([[1, 0]])
    found = linear_selected_logprobs(hidden, weight, ids, outputs=("logprob", "tail_logprob"))
    exact = hidden.detach().double().requires_grad_()
    gaps = torch.cat([exact[0, 1:], torch.zeros(2)]) - exact[0, 0]
    logprob, tail = -gaps.exp().sum(), gaps[1:].logsumexp(0)
    torch.testing.assert_close(found.logprob[0, 1].double(), logprob, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.tail_logprob[0].double(), tail, rtol=1e-6, atol=0)
    (ours,), (wanted,) = (
        torch.autograd.grad(value, x)
        for value, x in ((found.logprob[0, 1], hidden), (logprob, exact))
    )
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=0)


def test_rows_that_send_nothing_may_hold_anything():
    h, ids = problem(20, 8, 300, 6, ignored=0.0)
    ids[3] = -100
    for schedule in (None, "recompute"):
        bad = dense.fill_rows(h, [3, 5])
        with plan.use_schedule(schedule) if schedule else sync_free():
            found = linear_selected_logprobs(
                bad.hidden, bad.weight, ids, outputs=NAMES, workspace=SMALL
            )
        assert all((value[3] == 0).all() for value in found)
        assert found.logprob[5][ids[5] != -100].isnan().all()
        loss = found.logprob[[0, 1]].sum() + found.tail_logprob[2]
        d_hidden, d_weight = torch.autograd.grad(loss, (bad.hidden, bad.weight))
        assert d_weight.isfinite().all() and (d_hidden[3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forbidden_tokens_of_a_capped_head_with_a_negative_scale(dtype):
    """Which are the best there, in the set and outside it."""
    h, ids = problem(20, 8, 300, 6, dtype, bias=True, logit_scale=-0.7, softcap=3.0)
    with torch.no_grad():
        h.bias[::7] = -torch.inf
    ids[0] = torch.arange(0, 42, 7)
    ids[1, :3] = torch.tensor([1, 7, 14])
    check(h, ids)


def test_forbidden_tokens():
    h, ids = problem(20, 8, 300, 6, bias=True, ignored=0.0)
    with torch.no_grad():
        h.bias[:290] = -torch.inf
    ids[0] = torch.arange(6)
    ids[1] = torch.arange(294, 300)
    found = linear_selected_logprobs(h.hidden, h.weight, ids, bias=h.bias, outputs=NAMES[:2])
    wanted = oracle.selected(dense.logits(h), ids)
    torch.testing.assert_close(found.logprob, wanted["logprob"])
    (d_hidden,) = torch.autograd.grad(found.logprob[1].sum() + found.lse.sum(), h.hidden)
    assert d_hidden.isfinite().all()
    ids[1] = torch.tensor([0, 1, 2, 3, 4, -100])  # a whole set of them
    found = linear_selected_logprobs(h.hidden, h.weight, ids, bias=h.bias, outputs=NAMES)
    assert found.in_set_lse[1] == -torch.inf and found.tail_logprob[1] == 0
    assert found.in_set_logprob[1, :5].isnan().all()


def test_backward_has_no_copy_of_kept_products():
    h, ids = problem(400, 8, 2000, 6)
    options = {"outputs": ("in_set_lse", "tail_logprob"), "workspace": 8 << 20}
    with plan.use_schedule("keep"):
        found = linear_selected_logprobs(h.hidden, h.weight, ids, **options)
        with Allocations() as used:
            found.in_set_lse.sum().backward()
    assert used.largest < SMALL


def test_head_rows_of_one_token_that_do_not_fit_are_not_gathered():
    hidden, weight = torch.randn(4, 512, requires_grad=True), torch.randn(20000, 512)
    ids = torch.randperm(20000)[: 4 * 400].view(4, 400)
    with Allocations() as used:
        found = linear_selected_logprobs(
            hidden, weight, ids, outputs=IN_SET[:1], workspace=SMALL
        ).in_set_logprob
        found.sum().backward()
    assert used.peak < SMALL  # twice 0.8 MiB, gathered


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"ids": [[1, 2], [3, 3]]}, ValueError, "ids: .* once, got 3 twice at token 1"),
        ({"ids": [[1, 2], [3, 40]]}, ValueError, r"ids: expected ids in \[0, 40\)"),
        ({"ids": [[1, -3], [3, 4]]}, ValueError, "got -3 at flat position 1"),
        ({"ids": [[1], [40]]}, ValueError, r"^ids: expected ids in \[0, 40\)"),
        ({"ids": [1, 2]}, ValueError, "ids: expected a tensor"),
        ({"ids": [[], []]}, ValueError, "ids: expected 1 to 512 ids"),
        ({"ids": [[1.0, 2.0], [3.0, 4.0]]}, TypeError, "ids: expected int64 or int32"),
        ({"outputs": "logprob"}, TypeError, "outputs: expected a tuple"),
        ({"outputs": ("entropy",)}, ValueError, "outputs: expected one of"),
        ({"gradient": "active"}, TypeError, "gradient"),
        ({"deterministic": 1}, TypeError, "deterministic"),
    ],
    ids=str,
)
def test_refusals(change, error, match):
    hidden, weight = torch.randn(2, 8), torch.randn(40, 8)
    ids = torch.tensor(change.pop("ids", [[1, 2], [3, 4]]))
    with pytest.raises(error, match=match):
        linear_selected_logprobs(hidden, weight, ids, **change)


def test_compiles():
    h, ids = problem(9, 8, 60, 4)

    def f(hidden, weight):
        found = linear_selected_logprobs(hidden, weight, ids, outputs=("logprob", "tail_logprob"))
        return found.logprob.sum(-1) + found.tail_logprob

    dense.assert_compiles(f, h.hidden, h.weight)


def test_named_in_the_package():
    assert {"linear_selected_logprobs", "linear_topk", "TopK"} <= {*ift_kernels.__all__}
