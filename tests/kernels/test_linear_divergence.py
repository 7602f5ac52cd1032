"""`linear_divergence` against the dense formula: values, gradients, every schedule, its budget."""

import itertools
import math

import pytest
import torch

import dense
import ift_kernels
from ift.numerics import oracle
from ift_kernels.common.transform import LogitTransform
from ift_kernels.schedule import divergence_plan
from ift_kernels.schedule.head import Head
from refusals import assert_refused

KINDS = ["forward", "reverse", "jsd"]
OPTIONS = {
    "plain": {},
    "transforms": {
        "logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3, "teacher_softcap": 8.0,
        "teacher_logit_scale": 1.2,
    },
}  # fmt: skip


def inputs(n=37, v=300, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    student = [normal(n, 12), normal(v, 12) * 0.8, normal(v) * 0.3]
    teacher = [normal(n, 20), normal(v, 20) * 0.7, normal(v) * 0.3]
    mask = torch.rand(n, generator=g) > 0.2
    student = [t.to(dtype).requires_grad_() for t in student]
    return student, [t.to(dtype) for t in teacher], mask


def reference(student, teacher, mask, kind, beta=0.3, **o):
    """As the docstring has it, with logits held."""
    shared = {"temperature": o.get("temperature", 1.0)}
    s, t = (
        oracle.logits(
            *head,
            logit_scale=o.get(f"{of}logit_scale", 1.0),
            softcap=o.get(f"{of}softcap"),
            **shared,
        )
        for of, head in (("", student), ("teacher_", teacher))
    )
    return torch.where(mask, oracle.divergence(s, t, kind, beta), 0)


def ours(student, teacher, mask, kind, **options):
    (h, w, b), (th, tw, tb) = student, teacher
    return ift_kernels.linear_divergence(
        h, w, th, tw, bias=b, teacher_bias=tb, mask=mask, kind=kind, beta=0.3, **options
    )


# Workspace in elements of `inputs`, and the fewest rows of a block.
SCHEDULES = {
    "whole": (None, 64),  # everything at once
    "held": (16000, 8),  # blocks of rows; in 16 bits all their gradients stay for dW
    "blocks": (9000, 8),  # some of the gradients
    "sweeps": (9000, 10**9),  # products formed anew for every look
    "tiny": (1000, 64),  # and dh by rows, too
}


def shrink(monkeypatch, name):
    """Sizes for `inputs` instead of for real heads; returns the workspace in elements."""
    elements, least = SCHEDULES[name]
    monkeypatch.setattr(divergence_plan, "MIN_BLOCK", least)
    monkeypatch.setattr(divergence_plan, "ALIGN", 4)
    monkeypatch.setattr(divergence_plan, "BLOCK_COST", 1)
    monkeypatch.setattr(ift_kernels.schedule.problem, "ALIGN", 16)
    return elements


@pytest.fixture(params=SCHEDULES)
def schedule(request, monkeypatch):
    """Workspace, as a function of the dtype."""
    elements = shrink(monkeypatch, request.param)
    monkeypatch.setattr(ift_kernels.common.checks, "MIN_WORKSPACE", 1)
    return lambda dtype: None if elements is None else elements * dtype.itemsize


def layout(monkeypatch, name, dtype, n=29):
    elements = shrink(monkeypatch, name)
    heads = [
        Head(
            ift_kernels.backends.get(torch.empty(0, dtype=dtype)), torch.empty(n, d, dtype=dtype),
            torch.empty(300, d, dtype=dtype), None, LogitTransform(),
        )
        for d in (12, 20)
    ]  # fmt: skip
    workspace = 1 << 28 if elements is None else elements * dtype.itemsize
    return divergence_plan.layout(tuple(heads), workspace, True, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_schedules_are_what_they_are_called(monkeypatch, dtype):
    whole, held, blocks, sweeps, tiny = (layout(monkeypatch, name, dtype) for name in SCHEDULES)
    narrow = dtype.itemsize == 2
    assert whole.block == 29 and whole.held == 300
    assert 8 <= held.block < 29 and held.held == (300 if narrow else 0)
    assert 8 <= blocks.block < 29 and (0 < blocks.held < 300 if narrow else blocks.held == 0)
    assert sweeps.block == 0 and sweeps.hidden_rows == 29
    assert tiny.block == 0 and tiny.hidden_rows < 29


@pytest.mark.parametrize(("kind", "options"), list(itertools.product(KINDS, OPTIONS)))
def test_values_and_gradients(kind, options, schedule):
    student, teacher, mask = inputs()
    given = OPTIONS[options]
    upstream = torch.randn(37, dtype=torch.float64).masked_fill_(torch.arange(37) % 5 == 0, 0)
    dense_value = reference(student, teacher, mask, kind, **given)
    for reduction in ("none", "sum", "mean"):
        value = ours(
            student, teacher, mask, kind, reduction=reduction, workspace=schedule(torch.float64),
            **given,
        )  # fmt: skip
        wanted = dense_value if reduction == "none" else dense_value.sum()
        wanted = wanted / mask.sum() if reduction == "mean" else wanted
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)
        send = upstream if reduction == "none" else torch.tensor(-2.5, dtype=torch.float64)
        got = torch.autograd.grad(value, student, send, retain_graph=True)
        exact = torch.autograd.grad(wanted, student, send, retain_graph=True)
        again = torch.autograd.grad(value, student, send)
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(again, got, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_dense(kind, dtype, options, backend, schedule, request):
    if "tiny" in request.node.callspec.id and (kind, options) != ("jsd", "transforms"):
        pytest.skip("its many tiles take seconds; all kinds go through it above")
    student, teacher, mask = inputs(dtype=dtype)
    given, workspace = OPTIONS[options], schedule(dtype)
    upstream = torch.linspace(-1, 2, 37).masked_fill_(torch.arange(37) % 5 == 0, 0)
    exact_student = [t.detach().double().requires_grad_() for t in student]
    exact = reference(exact_student, [t.double() for t in teacher], mask, kind, **given)
    naive = reference(student, teacher, mask, kind, **given)
    for reduction in ("sum", "none"):
        send = upstream if reduction == "none" else torch.ones(37)
        value = ours(
            student, teacher, mask, kind, reduction=reduction, workspace=workspace, **given
        )
        dense.assert_as_accurate(
            value, *((x if reduction == "none" else x.sum()) for x in (naive, exact)), "value"
        )
        weighed = value if reduction == "sum" else (value * send).sum()
        grads = [
            torch.autograd.grad(x, s, retain_graph=True)
            for x, s in (
                (weighed, student),
                ((naive * send).sum(), student),
                ((exact * send).sum(), exact_student),
            )
        ]
        for name, a, b, c in zip(("hidden", "weight", "bias"), *grads, strict=True):
            assert a.dtype == dtype
            dense.assert_as_accurate(a, b, c, name)


def test_a_row_with_nan_teaches_only_itself(schedule):
    """Also in 16 bits, where products read beyond the rows of their first operand."""
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), KINDS):
        student, teacher, mask = inputs(dtype=dtype)
        mask[:] = True
        student[0].data[7] = torch.nan
        value = ours(student, teacher, mask, kind, reduction="none", workspace=schedule(dtype))
        assert value.isnan().nonzero()[:, 0].tolist() == [7]
        (d_hidden,) = torch.autograd.grad(value.sum(), student[0], retain_graph=True)
        assert d_hidden.isnan().any(1).nonzero()[:, 0].tolist() == [7]
        upstream = torch.ones(37).index_fill_(0, torch.tensor([7]), 0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, student, upstream))
        loss = ours(student, teacher, mask, kind, reduction="sum", workspace=schedule(dtype))
        (d_hidden,) = torch.autograd.grad(loss, student[0])
        assert d_hidden.isnan().any(1).nonzero()[:, 0].tolist() == [7]


def test_teacher_in_another_dtype():
    """Student and teacher may be served by different backends."""
    student, teacher, mask = inputs()
    exact = reference(student, teacher, mask, "jsd").sum()
    wanted = torch.autograd.grad(exact, student)
    for own, other in itertools.permutations((torch.float64, torch.float32, torch.bfloat16), 2):
        mine = [t.detach().to(own).requires_grad_() for t in student]
        value = ours(mine, [t.to(other) for t in teacher], mask, "jsd", reduction="sum")
        tolerance = 0.03 if torch.bfloat16 in (own, other) else 1e-5
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=0)
        for a, b in zip(torch.autograd.grad(value, mine), wanted, strict=True):
            assert (a - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_heads_and_forbidden_tokens(kind):
    student, _, mask = inputs(dtype=torch.float32)
    same = [t.detach() for t in student]
    value = ours(student, same, mask, kind, reduction="sum")
    assert abs(value.item()) < 1e-5
    assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(value, student))
    # Both rule out token 3.
    for bias in (student[2].data, same[2]):
        bias[3] = -torch.inf
    value = ours(student, same, mask, kind, reduction="sum")
    grads = torch.autograd.grad(value, student)
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    assert (grads[1][3] == 0).all()


def test_nothing_to_learn_and_nan():
    student, teacher, mask = inputs(dtype=torch.float32)
    value = ours(student, teacher, torch.zeros_like(mask), "forward")
    assert value == 0 and all((g == 0).all() for g in torch.autograd.grad(value, student))
    student[0].data[0] = torch.nan
    mask[0] = True
    value = ours(student, teacher, mask, "forward")
    assert value.isnan() and torch.autograd.grad(value, student[0])[0][0].isnan().all()
    mask[0] = False
    value = ours(student, teacher, mask, "forward")
    assert value.isfinite() and torch.autograd.grad(value, student[1])[0].isfinite().all()


def test_second_derivatives_are_refused():
    student, teacher, mask = inputs()
    value = ours(student, teacher, mask, "reverse")
    (first,) = torch.autograd.grad(value, student[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_divergence: second derivatives"):
        torch.autograd.grad(first.sum(), student[0])


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_to_one_graph(reduction):
    student, teacher, mask = inputs(dtype=torch.float32)

    def loss(h, w):
        return ift_kernels.linear_divergence(h, w, *teacher[:2], mask=mask, reduction=reduction)

    dense.assert_compiles(loss, *student[:2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "up"}, "expected one of .*got 'up'"),
        ({"beta": 1.0}, r"expected in \(0, 1\), got 1.0"),
        ({"reduction": "avg"}, ".*got 'avg'"),
        ({"num_items": 3, "reduction": "sum"}, "only divides"),
        ({"teacher_hidden": torch.zeros(3, 20)}, "expected shape"),
        ({"teacher_weight": torch.zeros(7, 20)}, ".*V=300"),
        ({"mask": torch.ones(3)}, "expected the shape"),
        ({"teacher_weight": torch.ones(3)}, r"expected shape \(V, D\)"),
        ({"teacher_bias": torch.ones(3)}, r"expected shape \(V,\)"),
        ({"teacher_hidden": torch.ones(3, 0)}, r"expected shape \(\.\.\., D\)"),
        ({"teacher_softcap": -1.0}, "expected None or"),
        ({"teacher_logit_scale": math.inf}, "expected a finite"),
    ],
)
def test_errors(change, said):
    (h, w, _), (th, tw, _), _ = inputs(dtype=torch.float32)
    given = {"hidden": h, "weight": w, "teacher_hidden": th, "teacher_weight": tw}
    assert_refused(ift_kernels.linear_divergence, change, ValueError, said, **given)


def test_errors_of_dtypes_name_the_teachers_weight():
    (h, w, _), (th, tw, _), _ = inputs(dtype=torch.float32)
    with pytest.raises(TypeError, match="^teacher_weight: .* like teacher_hidden"):
        ift_kernels.linear_divergence(h, w, th, tw.double())
    with pytest.raises(TypeError, match="^teacher_weight: expected a floating point tensor"):
        ift_kernels.linear_divergence(h, w, th, tw.long())
