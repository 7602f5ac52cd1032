"""linear_soft_cross_entropy: values and gradients against full logits, whole rows and few ids."""

import pytest
import torch
import torch.nn.functional as F

import dense
from ift.numerics import oracle
from ift_kernels import linear_soft_cross_entropy
from ift_kernels.common.sync_free import sync_free
from refusals import assert_refused

SMALL = 1 << 20
WEIGHT = torch.arange(3000) % 9 / 4 + 0.25  # exact in 16 bits
LEARNED = torch.ones(5, 30, requires_grad=True)


def problem(n, d, v, k=None, dtype=torch.float32, **options):
    """A head; probabilities (..., V), of which k ids have any; those ids and probabilities."""
    h, g = dense.head(n, d, v, dtype, **options), torch.Generator().manual_seed(3)
    q = torch.randn(*h.target.shape, v, generator=g).mul(2).softmax(-1)
    if k is None:
        return h, q, {"probs": lambda start, stop: q[..., start:stop]}
    ids = torch.rand(*h.target.shape, v, generator=g).topk(k).indices
    ids[torch.rand(ids.shape, generator=g) < 0.15] = -100
    there, at = ids != -100, ids.clamp(min=0)
    probs = q.gather(-1, at)
    q = torch.zeros_like(q).scatter_add(-1, at, probs.masked_fill(~there, 0))
    return h, q, {"probs": probs, "ids": ids}


def check(h, q, given, workspace=None, **options):
    valid = h.target != -100
    ours = linear_soft_cross_entropy(
        h.hidden, h.weight, **given, mask=valid, workspace=workspace, **h.kwargs, **options
    )
    if "ids" in given:
        valid = valid & (given["ids"] != -100).any(-1)
    exact = h.double()
    plain, wanted = (
        oracle.soft_cross_entropy(dense.logits(x), q, valid, **options) for x in (h, exact)
    )
    dense.assert_as_accurate(ours, plain, wanted, "loss")
    up = torch.as_tensor(1.0) if ours.dim() == 0 else dense.upstream(h, ("logprob",))["logprob"]
    sent = [(loss * up.to(loss.dtype)).sum() for loss in (ours, plain, wanted)]
    dense.assert_gradients(dense.gradients(sent[0], h.inputs), h, *sent[1:], exact.inputs)


@pytest.mark.parametrize("k", [None, 17, 1])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "z_loss": 1e-2}], ids=str)
def test_values_and_gradients(dtype, k, options):
    h, *rest = problem((3, 11), 12, 300, k, dtype, bias=True, logit_scale=0.7, temperature=1.3)
    check(h, *rest, class_weight=WEIGHT[:300], label_smoothing=0.2, **options)


@pytest.mark.parametrize(
    "options", [{"reduction": "sum"}, {"num_items": 70}, {"reduction": "none"}], ids=str
)
@pytest.mark.parametrize("k", [None, 9])
def test_softcap_and_reductions(k, options):
    check(*problem(40, 8, 90, k, bias=True, softcap=2.0), label_smoothing=0.1, **options)


@pytest.mark.parametrize("k", [None, 5])
def test_output_dims(k):
    """Those of the heads, of which a chunk of probabilities has all, within the workspace."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=g, requires_grad=True)
    weight = torch.randn(90, 3, 2, 8, generator=g, requires_grad=True)
    bias = torch.randn(90, 3, 2, generator=g, requires_grad=True)
    q = torch.rand(2, 3, 3, 2, 90, generator=g)
    mask = torch.rand(2, 3, 3, 2, generator=g) < 0.8
    z = torch.einsum("btd,vijd->btijv", hidden, weight) + bias.movedim(0, -1)
    given = {"probs": lambda start, stop: q[..., start:stop]}
    if k:
        ids = torch.rand(q.shape, generator=g).topk(k).indices
        given = {"probs": q.gather(-1, ids), "ids": ids}
        q = torch.zeros_like(q).scatter(-1, ids, given["probs"])
    options = {"label_smoothing": 0.1, "class_weight": WEIGHT[:90], "z_loss": 1e-2}
    for reduction in ("mean", "none"):
        found, wanted = (
            linear_soft_cross_entropy(
                hidden, weight, **given, mask=mask, bias=bias, reduction=reduction, **options
            ),
            oracle.soft_cross_entropy(z, q, mask, reduction=reduction, **options),
        )
        torch.testing.assert_close(found, wanted)
        of_both = (
            torch.autograd.grad(loss.sum(), (hidden, weight, bias), retain_graph=True)
            for loss in (found, wanted)
        )
        torch.testing.assert_close(*of_both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_chunks(dtype):
    h, q, given = problem(200, 8, 3000, None, dtype, bias=True, softcap=9.0)
    chunks, of_q = [], given["probs"]
    given = {"probs": lambda start, stop: chunks.append((start, stop)) or of_q(start, stop)}
    check(h, q, given, workspace=SMALL, label_smoothing=0.1)
    assert chunks.pop(0) == (0, 1)  # whether it has a gradient
    half = chunks[: len(chunks) // 2]
    assert len(half) > 5 and chunks == 2 * half
    assert [a for a, _ in half[1:]] == [b for _, b in half[:-1]] and half[-1][1] == 3000


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("k", [None, 17])
def test_equals_torch_as_documented(k, options):
    h, q, given = problem(40, 8, 300, k, torch.float64, bias=True)
    weight = WEIGHT[:300].double()
    wanted = F.cross_entropy(dense.logits(h), q.double(), weight, **options)
    ours = linear_soft_cross_entropy(
        h.hidden, h.weight, **given, bias=h.bias, class_weight=weight, **options
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_probabilities_of_ids_have_a_gradient():
    h, _, given = problem(20, 8, 300, 6)
    probs = given["probs"].requires_grad_()
    loss = linear_soft_cross_entropy(
        h.hidden, h.weight, probs, ids=given["ids"], label_smoothing=0.1, reduction="sum"
    )
    (found,) = torch.autograd.grad(loss, probs)
    logp = oracle.selected(dense.logits(h), given["ids"])["logprob"]
    torch.testing.assert_close(found, -0.9 * logp.detach())


@pytest.mark.parametrize("k", [None, 6])
def test_float32_logits_and_autocast(k):
    h, q, given = problem(30, 16, 200, k, torch.bfloat16)
    valid = torch.ones(30, dtype=torch.bool)
    if k:
        valid = (given["ids"] != -100).any(-1)
    wanted = oracle.soft_cross_entropy(dense.logits(h.double()), q, valid)
    found = linear_soft_cross_entropy(h.hidden, h.weight, **given, logits_dtype=torch.float32)
    torch.testing.assert_close(found, wanted.float())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_soft_cross_entropy(h.hidden.float(), h.weight.float(), **given)
    torch.testing.assert_close(rounded, found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("k", [None, 6])
def test_rows_that_do_not_count_may_hold_anything(k):
    h, _, given = problem(20, 8, 300, k, ignored=0.0)
    mask = torch.arange(20) != 3
    bad = dense.fill_rows(h, [3, 5])
    if k is None:
        q = given["probs"](0, 300).index_fill(0, torch.tensor([3]), torch.nan)
        given = {"probs": lambda start, stop: q[:, start:stop]}
    for mode in (torch.enable_grad(), sync_free()):
        with mode:
            loss = linear_soft_cross_entropy(
                bad.hidden, bad.weight, **given, mask=mask, reduction="none", label_smoothing=0.1
            )
            assert loss[3] == 0 and loss[5].isnan() and loss[[0, 1, 2, 4]].isfinite().all()
            d_hidden, d_weight = torch.autograd.grad(loss[:2].sum(), (bad.hidden, bad.weight))
        assert d_weight.isfinite().all() and (d_hidden[2:] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)], ids=str)
@pytest.mark.parametrize("k", [None, 4])
def test_nothing_to_learn_from(k, shape):
    h, _, given = problem(shape, 8, 30, k, bias=True, ignored=0.0) if 0 not in shape else (
        dense.head(shape, 8, 30, bias=True), None,
        {"probs": lambda start, stop: torch.ones(*shape, stop - start)} if k is None
        else {"probs": torch.ones(*shape, k), "ids": torch.ones(*shape, k).long()},
    )  # fmt: skip
    mask = torch.zeros(shape)
    loss = linear_soft_cross_entropy(h.hidden, h.weight, **given, bias=h.bias, mask=mask)
    assert loss == 0
    assert all((grad == 0).all() for grad in dense.gradients(loss, h.inputs))


def test_forbidden_classes_of_probability_0():
    """0 times an infinity is 0, in forward and backward."""
    h, q, _ = problem(20, 8, 300, bias=True, ignored=0.0)
    q[:, :290] = 0
    with torch.no_grad():
        h.bias[:290] = -torch.inf
    valid = torch.ones(20, dtype=torch.bool)
    wanted = oracle.soft_cross_entropy(
        dense.logits(h.map(lambda t: t.detach()))[:, 290:], q[:, 290:], valid
    )
    ids = torch.arange(280, 300).expand(20, 20)
    for given in (
        {"probs": lambda start, stop: q[:, start:stop], "workspace": SMALL},
        {"probs": q[:, 280:], "ids": ids},
    ):
        loss = linear_soft_cross_entropy(h.hidden, h.weight, bias=h.bias, **given)
        torch.testing.assert_close(loss, wanted)
        assert all(g.isfinite().all() for g in dense.gradients(loss, h.inputs))


def test_a_large_common_logit_costs_no_digits():
    hidden, weight = torch.tensor([[1000.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    q = torch.tensor([[0.25, 0.75]])
    loss = linear_soft_cross_entropy(hidden, weight, lambda start, stop: q[:, start:stop])
    wanted = F.cross_entropy(torch.tensor([[0.0, 2.0]]), q)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"probs": torch.ones(5, 30)}, TypeError, "expected a function .* without ids"),
        ({"probs": lambda start, stop: 1.0}, TypeError, "expected a function to a Tensor"),
        ({"probs": lambda start, stop: torch.ones(5, 1)}, ValueError, r"expected shape \(5, 30\)"),
        ({"probs": lambda a, b: torch.ones(5, b - a).long()}, TypeError, "expected a floating"),
        (
            {"probs": lambda a, b: LEARNED[:, a:b]},
            ValueError, "expected a constant",
        ),
        ({"ignore_index": 0}, ValueError, "expected -100 without ids, got 0"),
        ({"probs": lambda a, b: None, "ids": torch.ones(5, 2).long()}, TypeError, "expected a ten"),
        ({"probs": torch.ones(5, 3), "ids": torch.arange(10).view(5, 2)}, ValueError, "expected"),
        ({"ids": torch.ones(5, 2), "probs": torch.ones(5, 2)}, TypeError, "expected int64"),
        ({"mask": torch.ones(4)}, ValueError, "expected the shape"),
        ({"class_weight": torch.ones(29)}, ValueError, "expected shape"),
        ({"bias": torch.ones(30), "weight": torch.ones(30, 2, 8)}, ValueError, "expected shape"),
        ({"mask": torch.ones(5), "weight": torch.ones(30, 2, 8)}, ValueError, "expected the shape"),
        ({"weight": torch.ones(30, 2, 9)}, ValueError, r"expected shape \(V, D\) with D=8"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "only divides"),
    ],
)  # fmt: skip
def test_refusals(options, error, said):
    given = {"hidden": torch.randn(5, 8), "weight": torch.randn(30, 8)}
    given["probs"] = lambda start, stop: torch.ones(5, stop - start)
    assert_refused(linear_soft_cross_entropy, options, error, said, **given)
