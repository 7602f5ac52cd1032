"""Float32 logits of 16-bit operands, as a GPU's vendor forms them: numbers, launches and bytes.

Its products are emulated on a CPU, and counted on tensors without memory as planned for an H200.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_gpu_schedules import SLOW

import dense
import ift_kernels
from allocations import MIB
from bench.gpu import roofline
from bench.suites import counts
from dense import distance
from ift.numerics import oracle
from ift_kernels import (
    linear_cross_entropy,
    linear_divergence,
    linear_expected_embedding,
    linear_logprobs,
    linear_selected_logprobs,
    linear_token,
)
from ift_kernels.schedule import accumulate, cost, device, gpu_plan, plan
from ift_kernels.schedule import head as head_module
from ift_kernels.schedule.accumulate import common_factor
from ift_kernels.schedule.device import H200

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def formed(monkeypatch):
    """`aten::mm.dtype` and `aten::addmm.dtype` of CUDA; dtypes of operands whose logits came."""
    found = []

    def product(a, b, out):
        found.append(a.dtype)
        torch.mm(a.float(), b.float(), out=out)

    def add(total, a, b):
        total.addmm_(a.float(), b.float())

    monkeypatch.setattr(accumulate, "adds_fp32_products", lambda like: like.dtype.itemsize == 2)
    monkeypatch.setattr(accumulate, "add_fp32_product", add)
    monkeypatch.setattr(head_module, "fp32_product", product)
    monkeypatch.setattr(device, "of", lambda place: SLOW)
    monkeypatch.setattr(gpu_plan, "MIN_TILE_ROWS", 128)
    return found


def head(dtype=BF16, rows=200, vocabulary=3100, **options):
    return dense.head(rows, 64, vocabulary, dtype, bias=True, **options)


def assert_near(found, h, exact_value, e):
    """Gradients as far from exact ones as two roundings: of a tile's gradient, and of the sum."""
    exact = torch.autograd.grad(exact_value, e.inputs)
    for mine, x, wanted in zip(found, h.inputs, exact, strict=True):
        once = distance(wanted.to(x.dtype), wanted)
        assert mine.dtype == x.dtype and distance(mine, wanted) <= 2 * once


@pytest.mark.parametrize(
    ("dtype", "schedule", "workspace"),
    [(FP16, None, 4), *((BF16, s, w) for s in (None, *plan.SCHEDULES) for w in (1, 16))],
)
def test_operands_stay_in_16_bits(backend, formed, dtype, schedule, workspace):
    h = head(dtype, softcap=9.0)
    options = {**h.kwargs, "logits_dtype": FP32, "workspace": workspace * MIB}
    e, forced = h.double(), nullcontext() if schedule is None else plan.use_schedule(schedule)
    with forced:
        stats = linear_logprobs(*h.args, outputs=dense.OUTPUTS, **options)
        up = torch.linspace(64, 128, 200)
        got = torch.autograd.grad((stats.logprob * up).sum(), h.inputs)
        loss = linear_cross_entropy(*h.args, reduction="sum", **options)
        of_loss = torch.autograd.grad(loss, h.inputs)
    assert formed and set(formed) == {dtype}
    exact = dense.stats(e)
    for name in ("logprob", "lse", "entropy", "sum_sq"):
        assert (getattr(stats, name) - exact[name]).abs().max() < 4e-6
    assert_near(got, h, (exact["logprob"] * up).sum(), e)
    assert_near(of_loss, h, dense.cross_entropy(e, reduction="sum"), e)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("schedule", plan.SCHEDULES)
def test_the_factor_of_a_mean_is_no_bias(formed, dtype, schedule):
    """1/255 is half a unit of bfloat16 off, in every row; in float16 p/255 underflows."""
    h = dense.head(255, 64, 1500, dtype, bias=True, ignored=0)
    e, s = h.double(), h.map(lambda t: t.detach().float().requires_grad_())
    exact, theirs = (torch.autograd.grad(dense.cross_entropy(x), x.inputs) for x in (e, s))
    options = {"bias": h.bias, "logits_dtype": FP32, "workspace": 2 * MIB}
    with plan.use_schedule(schedule):
        loss = linear_cross_entropy(*h.args, **options)
        logprob = linear_logprobs(*h.args, **options).logprob
    for value in (loss, -logprob.mean()):
        found = torch.autograd.grad(value, h.inputs)
        for mine, wanted, other in zip(found, exact, theirs, strict=True):
            # Bar of the contract: twice; what is left is the rounding of 1 - p and p.
            assert distance(mine, wanted) <= 1.3 * distance(other.to(dtype), wanted)


@pytest.mark.parametrize("sent", ["logprob", "in_set_logprob"])
def test_gradients_of_ids_have_the_factor_too(formed, sent):
    """Also where those of the rest are all 0."""
    h = head(softcap=9.0)
    e, ids = h.double(), torch.rand(200, 3100).topk(40).indices
    options = {"outputs": ("lse", sent), "logits_dtype": FP32, "workspace": 4 * MIB, **h.kwargs}
    found = linear_selected_logprobs(h.hidden, h.weight, ids, **options)
    up = {sent: torch.rand(200, 40) / 300}
    got = torch.autograd.grad(dense.send(found, up), h.inputs)
    assert formed
    assert_near(got, h, dense.send(oracle.selected(dense.logits(e), ids), up), e)


def test_a_factor_is_no_nan():
    """Whatever one row sends; a row that sends none has none to divide by."""
    coef = torch.tensor([[0.0, -3e-4, torch.nan], [0.0, 1e-4, -torch.inf]])
    assert common_factor(coef) == torch.tensor(3e-4)
    assert common_factor(300 * coef / 3e-4) == 300 / 256 and common_factor(0 * coef[:, :1]) > 0


@pytest.mark.parametrize("schedule", [None, "forward", "keep"])
@pytest.mark.parametrize("trained", [0, 1])
def test_one_side_frozen(formed, schedule, trained):
    h = dense.head(300, 64, 4100, BF16)
    h.inputs[1 - trained].requires_grad_(False)
    with nullcontext() if schedule is None else plan.use_schedule(schedule):
        out = linear_logprobs(*h.args, logits_dtype=FP32, workspace=4 * MIB).logprob
    (got,) = torch.autograd.grad(out.sum(), h.inputs[trained])
    e = h.double()
    (wanted,) = torch.autograd.grad(dense.stats(e)["logprob"].sum(), e.inputs[trained])
    assert formed and distance(got, wanted) < 3.4e-3


@pytest.mark.parametrize("kind", ["auto", "float32"])
def test_dw_of_many_blocks_is_a_float32_sum(formed, kind):
    h = dense.head(500, 64, 4100, BF16)
    with plan.use_schedule("forward"):
        loss = linear_cross_entropy(
            *h.args, logits_dtype=FP32, weight_grad_sum=kind, workspace=3 * MIB
        )
    found, e = torch.autograd.grad(loss, h.inputs), h.double()
    assert_near(found, h, dense.cross_entropy(e), e)


def test_active_columns_are_all(formed):
    """Exact: columns would have to be gathered in two dtypes."""
    h = dense.head(300, 64, 4100, BF16)
    h.weight.requires_grad_(False)
    options = {"logits_dtype": FP32, "workspace": 16 * MIB}
    with ift_kernels.record_active_sets() as report:
        found = [
            torch.autograd.grad(
                linear_logprobs(*h.args, gradient=gradient, **options).logprob.sum(), h.hidden
            )[0]
            for gradient in ("exact", "active")
        ]
    assert torch.equal(*found) and report[0].share == 1


@pytest.mark.parametrize("workspace", [1, 5, 64])
@pytest.mark.parametrize(
    ("kind", "reduction"), [("forward", "mean"), ("jsd", "mean"), ("reverse", "none")]
)
def test_divergence(formed, workspace, kind, reduction):
    h, t = head(), dense.head(200, 40, 3100, BF16, seed=1)
    e = h.double()
    options = {"kind": kind, "reduction": reduction}
    value, exact = (
        linear_divergence(
            x.hidden, x.weight, y.hidden, y.weight, bias=x.bias, **options, **more
        ).sum()
        for x, y, more in (
            (h, t, {"logits_dtype": FP32, "workspace": workspace * MIB}), (e, t.double(), {})
        )
    )  # fmt: skip
    assert abs(value - exact) <= 1e-5 * abs(exact) and set(formed) == {BF16}
    assert_near(torch.autograd.grad(value, h.inputs), h, exact, e)


@pytest.mark.parametrize("workspace", [1, 64])
@pytest.mark.parametrize("table_dtype", [BF16, FP32], ids=str)
def test_expected_embedding(formed, workspace, table_dtype):
    h = head()
    table = torch.randn(3100, 24, dtype=torch.float64).to(table_dtype).requires_grad_()
    e, exact_table = h.double(), table.detach().double().requires_grad_()
    got = linear_expected_embedding(
        h.hidden, h.weight, table, bias=h.bias, logits_dtype=FP32, workspace=workspace * MIB
    )
    wanted = dense.logits(e).softmax(-1) @ exact_table
    assert set(formed) == {BF16} and distance(got, wanted) < 2.5e-3
    up = (torch.arange(got.numel()) % 7 - 3).view_as(got)
    leaves = ((got, [*h.inputs, table]), (wanted, [*e.inputs, exact_table]))
    found, exact = (torch.autograd.grad((out * up).sum(), of) for out, of in leaves)
    for a, b in zip(found, exact, strict=True):
        assert distance(a, b) < 5e-3


@pytest.mark.parametrize("rule", ["greedy", "kth", "sample"])
def test_token_choice_and_influence(formed, rule):
    h = head(rows=100)
    got = linear_token(h.hidden, h.weight, bias=h.bias, rule=rule, logits_dtype=FP32)
    assert set(formed) == {BF16}
    s = h.map(lambda t: t.detach().float())
    wanted = linear_token(s.hidden, s.weight, bias=s.bias, rule=rule)
    assert torch.equal(got.ids, wanted.ids)
    torch.testing.assert_close(got.logprob, wanted.logprob, rtol=0, atol=3e-6)
    found, exact = (  # in float32 of its own accord, hidden states of both sides included
        ift_kernels.influence(x.hidden[:9], h.target[:9], x.hidden, h.target, x.weight)
        for x in (h, h.map(lambda t: t.detach().double()))
    )
    assert distance(found, exact) < 1e-6


def test_dtypes_that_differ_are_cast(formed):
    h = dense.head(30, 64, 500, BF16)
    weight = h.weight.detach().float().requires_grad_()
    out = linear_logprobs(h.hidden, weight, h.target, logits_dtype=FP32).logprob
    d_hidden, d_weight = torch.autograd.grad(out.sum(), [h.hidden, weight])
    e = h.double()
    exact = torch.autograd.grad(dense.stats(e)["logprob"].sum(), e.inputs)
    assert not formed  # no 16-bit product, and so no 16-bit gradient of logits
    assert distance(d_hidden, exact[0]) < 2e-3 and distance(d_weight, exact[1]) < 1e-6


# --- as planned for an H200 ----------------------------------------------------------------------

SHAPE = 8192, 4096, 128256
# Products of N·V·D and MiB of work memory.
CALLS = {
    "statistics": (1, 300),
    "token": (4, 768),
    "frozen": (2, 768),
    "scalar": (4, 768),
    "divergence": (6, 768),
}


@pytest.mark.parametrize("name", CALLS)
def test_counts_at_full_size(monkeypatch, name):
    """Products, all of 16-bit operands, work memory, launches and waits of the host."""
    pytest.importorskip("triton")
    (n, d, v), (most, mib), dtypes = SHAPE, CALLS[name], set()

    def note(module, function):
        original = getattr(module, function)

        def noted(*args, **keywords):
            dtypes.update(x.dtype for x in args[-2:])
            return original(*args, **keywords)

        monkeypatch.setattr(module, function, noted)

    note(torch, "mm")
    note(accumulate, "add_fp32_product")
    with counts.planned_for_h200() as launched:
        hidden, weight = (
            torch.empty(rows, d, dtype=BF16, device="meta", requires_grad=True) for rows in (n, v)
        )
        frozen, target = weight.detach(), torch.empty(n, dtype=torch.int64, device="meta")

        def call():
            options = {"logits_dtype": FP32}
            if name == "statistics":
                with torch.no_grad():
                    return linear_logprobs(hidden, weight, target, **options)
            if name == "scalar":
                value = linear_cross_entropy(hidden, weight, target, **options)
            elif name == "divergence":
                value = linear_divergence(hidden, weight, hidden.detach(), frozen, **options)
            else:
                head = frozen if name == "frozen" else weight
                value = linear_logprobs(hidden, head, target, **options).logprob
            of = [hidden] if name == "frozen" else [hidden, weight]
            return torch.autograd.grad(value, of, torch.ones_like(value))

        found = counts.dispatched(call)
    assert found["flops"] <= 1.001 * most * 2 * n * d * v, found["flops"] / (2 * n * d * v)
    assert found["peak"] <= 1.1 * mib * MIB, found["peak"] / MIB
    assert found["reads"] <= 2 and len(launched) <= 400 and dtypes <= {BF16}


@pytest.mark.parametrize(
    ("case", "most"), [("statistics", 1.06), ("token", 1.10), ("frozen", 1.18), ("scalar", 1.40)]
)
def test_seconds_of_a_large_head(case, most):
    """By the model, in those of 16-bit logits: tiles of twice the bytes, and one more pass."""
    p = roofline.problem(case, roofline.LARGE)
    q = replace(p, dtype=FP32, operand_dtype=BF16, workspace=768 * MIB)
    taken = [cost.seconds(x, plan.make(x)).device for x in (p, q)]
    assert taken[0] < taken[1] <= most * taken[0]
    assert cost.seconds(q, plan.make(q)).device <= 1.10 * cost.floor(q, plan.make(q))


@pytest.mark.parametrize("workspace", [8, 100, 768, 4096])
@pytest.mark.parametrize("case", roofline.CASES)
def test_plans_fit(case, workspace):
    for shape in ((1, 64, 10), (77, 896, 5000), (5000, 300, 50257)):
        p = replace(
            roofline.problem(case, shape, H200, FP32, workspace * MIB), operand_dtype=BF16,
            active=None,
        )  # fmt: skip
        made = plan.make(p)
        backward = plan.make(p, 0, "recompute", made.kept_bytes)
        assert made.peak_bytes <= p.workspace and not made.first_rows
        if p.any_gradient:
            assert made.kept_bytes + backward.peak_bytes <= p.workspace


def test_a_plan_is_explained():
    sizes = 8192, 128256, 4096
    found = ift_kernels.explain(*sizes, logits_dtype=FP32, device=H200)
    p = roofline.problem("token", roofline.LARGE, H200, FP32, 768 * MIB)
    assert found == plan.make(replace(p, operand_dtype=BF16))
    cast = ift_kernels.explain(*sizes, logits_dtype=FP32, device=replace(H200, fp32_out=False))
    assert cast.tile_columns < found.tile_columns
