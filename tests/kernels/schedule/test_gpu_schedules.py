"""The plans of a GPU, carried out on a CPU: right, and inside their workspace."""

from dataclasses import replace

import pytest
import torch

import ift_kernels
import serving
from allocations import MIB, Allocations, size
from bench.suites import counts
from ift_kernels import backends, linear_cross_entropy, linear_logprobs
from ift_kernels.backends.cuda.active import ids_of_known_count
from ift_kernels.common.transform import LogitTransform
from ift_kernels.schedule import accumulate, cost, device, divergence_plan, gpu_plan, plan
from ift_kernels.schedule.device import H200
from ift_kernels.schedule.head import Head

N, D, V = 512, 256, 8192
# On so small and slow a GPU small tensors take whole waves and longer than launches, as do large
# ones on an H200.
RATES = ("bandwidth", "flops_16", "flops_32")
SLOW = replace(H200, multiprocessors=2, **{name: getattr(H200, name) / 1e4 for name in RATES})


@pytest.fixture
def made(monkeypatch):
    """Every call plans for SLOW; the plans."""
    plans, original = [], plan.make
    monkeypatch.setattr(device, "of", lambda place: SLOW)
    monkeypatch.setattr(plan, "make", lambda *a: plans.append(original(*a)) or plans[-1])
    return plans


def distance(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def leaves(dtype, rows=N, vocabulary=V, frozen=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, D, generator=generator, dtype=torch.float64) / 8
    target = torch.randint(vocabulary, (rows,), generator=generator)
    return (
        hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen), target
    )  # fmt: skip


def exact(hidden, weight, target, upstream=None):
    h, w = (t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight))
    logprob = -torch.nn.functional.cross_entropy(h @ w.T, target, reduction="none")
    value = -logprob.sum() / (target >= 0).sum() if upstream is None else (logprob * upstream).sum()
    wanted = [t for t in (h, w) if t.requires_grad]
    return torch.autograd.grad(value, wanted)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "workspace", "schedule"),
    [
        (512, 8192, 64, "keep"),  # all columns
        (512, 8192, 14, "keep"),  # some
        (512, 8200, 4, "recompute"),
        (1000, 8192, 5, "recompute"),  # tiles of some of the rows
        (3, 5000, 1, "keep"),
    ],
)
def test_per_token(made, monkeypatch, rows, vocabulary, workspace, schedule):
    monkeypatch.setattr(gpu_plan, "MIN_TILE_ROWS", 128)
    hidden, weight, target = leaves(torch.float32, rows, vocabulary)
    upstream = torch.linspace(0.1, 1, rows)
    out = linear_logprobs(hidden, weight, target, workspace=workspace * MIB).logprob
    got = torch.autograd.grad(out, [hidden, weight], upstream)
    assert made[-2].schedule == schedule
    for a, b in zip(got, exact(hidden, weight, target, upstream.double()), strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("workspace", [5, 12])
def test_frozen(made, workspace):
    hidden, weight, target = leaves(torch.float32, frozen=True)
    upstream = torch.linspace(0.1, 1, N)
    out = linear_logprobs(hidden, weight, target, workspace=workspace * MIB).logprob
    (got,) = torch.autograd.grad(out, [hidden], upstream)
    assert made[-1].schedule == "forward"
    assert distance(got, exact(hidden, weight, target, upstream.double())[0]) < 1e-5


@pytest.mark.parametrize(
    ("rows", "vocabulary", "workspace"), [(512, 8192, 5), (500, 8192, 5), (256, 7744, 5)]
)
def test_products_wait_in_dw(made, rows, vocabulary, workspace):
    hidden, weight, target = leaves(torch.float32, rows, vocabulary)
    target[::7] = -100
    with plan.use_schedule("forward"), Allocations() as seen:
        loss = linear_cross_entropy(hidden, weight, target, workspace=workspace * MIB)
    assert 0 < made[-1].first_columns < vocabulary
    got = torch.autograd.grad(loss, [hidden, weight])
    if "cpu" in serving.BACKENDS:  # the reference makes a dozen temporaries of a tile
        assert seen.peak - size(*got) <= 1.25 * workspace * MIB
    for a, b in zip(got, exact(hidden, weight, target), strict=True):
        assert distance(a, b) < 1e-5


def test_three_roundings_of_dw_err_by_sqrt_two_of_one(made):
    hidden, weight, target = leaves(torch.bfloat16)
    wanted, errors = exact(hidden, weight, target), {}
    for workspace in (64, 2.6):
        with plan.use_schedule("forward"), ift_kernels.use_backend("reference"):
            loss = linear_cross_entropy(hidden, weight, target, workspace=int(workspace * MIB))
        blocks = len(made[-1].blocks(N))
        got = torch.autograd.grad(loss, [hidden, weight])
        errors[blocks] = [distance(a, b) for a, b in zip(got, wanted, strict=True)]
    assert sorted(errors) == [1, 3]
    assert errors[3][1] <= 2**0.5 * errors[1][1]
    # dh of the first block is a float32 sum of products that are rounded to 16 bits each.
    assert errors[3][0] <= 2**0.5 * errors[1][0]


@pytest.fixture
def unrounded(monkeypatch):
    """Products are added to float32 sums unrounded, as on CUDA."""
    monkeypatch.setattr(accumulate, "adds_fp32_products", lambda like: like.dtype.itemsize == 2)
    monkeypatch.setattr(
        accumulate, "add_fp32_product", lambda total, a, b: total.addmm_(a.float(), b.float())
    )


def test_float32_sums_of_dw_err_as_a_single_rounding(made, unrounded, monkeypatch):
    """Three roundings on the way err by sqrt(2) of one."""
    hidden, weight, target = leaves(torch.bfloat16, N, 4096)
    wanted, errors = exact(hidden, weight, target)[1], []
    for kind, workspace, blocks, summed in (
        ("auto", 8, 1, 0), ("auto", 1.3, 3, 0), ("float32", 1.3, 4, 2048), ("float32", 3.7, 4, 4096)
    ):  # fmt: skip
        if summed == 4096:
            monkeypatch.setattr(gpu_plan, "SUMMED_EIGHTHS", 8)  # all columns
        options = {"weight_grad_sum": kind, "workspace": int(workspace * MIB)}
        with plan.use_schedule("forward"), ift_kernels.use_backend("reference"):
            loss = linear_cross_entropy(hidden, weight, target, **options)
        assert (len(made[-1].blocks(N)), made[-1].sum_columns) == (blocks, summed)
        errors.append(distance(torch.autograd.grad(loss, weight)[0], wanted))
    once, thrice, of_some, of_all = errors
    assert 1.25 * once < thrice < 1.45 * once
    assert max(of_some, of_all) < 1.02 * once


@pytest.mark.parametrize(
    ("rows", "vocabulary", "workspace", "softcap"),
    [(596, 4096, 3, None), (500, 4100, 3, 20.0), (700, 3001, 2.2, None)],
)
def test_dw_of_some_columns_is_summed_and_of_others_formed_again(
    made, rows, vocabulary, workspace, softcap
):
    """With either backend; the other columns in tiles of all rows, also behind ignored ones."""
    hidden, weight, target = leaves(torch.bfloat16, rows, vocabulary)
    bias = torch.linspace(-1, 1, vocabulary).bfloat16().requires_grad_()
    target[::7] = -100
    inputs, workspace = [hidden, weight, bias], int(workspace * MIB)
    with plan.use_schedule("forward"), Allocations() as seen:
        loss = linear_cross_entropy(
            hidden, weight, target, bias=bias, softcap=softcap, weight_grad_sum="float32",
            workspace=workspace,
        )  # fmt: skip
    got = torch.autograd.grad(loss, inputs)
    assert made[-1].schedule == "forward" and len(made[-1].blocks(rows)) > 1
    assert 0 < made[-1].sum_columns < vocabulary and 3 < made[-1].products < 4
    if "cpu" in serving.BACKENDS:  # the reference makes a dozen temporaries of a tile
        assert seen.peak - size(*got) <= 1.25 * workspace
    h, w, b = (t.detach().double().requires_grad_() for t in inputs)
    logits = h @ w.T + b
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    value = torch.nn.functional.cross_entropy(logits, target)
    for found, wanted in zip(got, torch.autograd.grad(value, (h, w, b)), strict=True):
        assert distance(found, wanted) < 6e-3


@pytest.mark.parametrize("share", [1.0, 0.2])  # of rows with an upstream gradient
def test_backward_plans_for_what_is_left(made, share):
    hidden, weight, target = leaves(torch.float32)
    upstream = (torch.arange(N) < share * N).float()
    workspace = 14 * MIB
    out = linear_logprobs(hidden, weight, target, workspace=workspace).logprob
    kept = made[-1].kept_bytes
    got = torch.autograd.grad(out, [hidden, weight], upstream)
    assert kept and kept + made[-1].peak_bytes <= workspace
    for a, b in zip(got, exact(hidden, weight, target, upstream.double()), strict=True):
        assert distance(a, b) < 1e-5


def test_backward_fits_beside_what_forward_kept():
    p = plan.Problem(
        N, V, D, torch.bfloat16, 7 * MIB, need_hidden=True, need_weight=True, device=SLOW
    )
    forward = plan.make(p)
    assert 0 < forward.keep_columns < V
    backward = plan.make(p, 0, "recompute", forward.kept_bytes)
    assert forward.kept_bytes + backward.peak_bytes <= p.workspace
    alone = plan.make(p, 0, "recompute")
    assert alone.tile_columns > backward.tile_columns  # there it has the whole workspace


@pytest.mark.parametrize(
    ("shape", "products"), [((8192, 4096, 128256), 3.5), ((32768, 896, 151936), 3.375)], ids=str
)
def test_float32_sums_of_dw_at_full_size(shape, products):
    """As counted on tensors without memory: products, and work memory beside the results."""
    pytest.importorskip("triton")
    n, d, v = shape
    with counts.planned_for_h200():
        hidden, weight = (
            torch.empty(size, d, dtype=torch.bfloat16, device="meta", requires_grad=True)
            for size in (n, v)
        )
        target = torch.empty(n, dtype=torch.int64, device="meta")

        def call():
            loss = linear_cross_entropy(hidden, weight, target, weight_grad_sum="float32")
            return torch.autograd.grad(loss, (hidden, weight))

        found = counts.dispatched(call)
    assert found["flops"] <= 1.001 * products * 2 * n * d * v
    assert found["peak"] <= 640 * MIB and found["reads"] == 1


# --- the active set ------------------------------------------------------------------------------


def peaked(rows, vocabulary, dtype=torch.float32):
    """Hidden states to which few ids matter, whichever row; the first ids matter to more."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocabulary, D, generator=generator) / D**0.5
    weight[: vocabulary // 16] *= 1.5
    target = torch.randint(vocabulary, (rows,), generator=generator)
    hidden = torch.randn(rows, D, generator=generator) * 2 + 8 * weight[target]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), target


@pytest.fixture
def reads(monkeypatch):
    """Lists that were made of tensors: on a GPU each waits for the device."""
    found, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: found.append(x.shape) or original(x))
    return found


@pytest.mark.parametrize(
    ("rows", "vocabulary", "workspace", "block", "bucket"),
    [
        (512, 8192, 10, 32, 512),
        (500, 8200, 10, 32, 2048),  # ragged blocks of rows, a ragged tile
        (512, 8192, 64, 128, 1024),
        (96, 5000, 4, 32, 512),
    ],
)
def test_active_columns_are_counted_once_a_block_of_rows(
    made, monkeypatch, reads, rows, vocabulary, workspace, block, bucket
):
    monkeypatch.setattr(cost, "dense_hidden", lambda *a: cost.Cost(products=1e9))
    hidden, weight, target = peaked(rows, vocabulary)
    upstream = torch.linspace(0.1, 1, rows)
    chosen = ift_kernels.ActiveSet(2.0**-9, block, bucket)
    with ift_kernels.record_active_sets() as report, plan.use_schedule("forward"):
        out = linear_logprobs(
            hidden, weight, target, gradient=chosen, workspace=workspace * MIB
        ).logprob
    assert made[-1].schedule == "forward"
    assert len(reads) == len(made[-1].blocks(rows))
    (got,) = torch.autograd.grad(out, hidden, upstream)
    (wanted,) = exact(hidden, weight, target, upstream.double())
    assert 0 < report[0].share < 0.8 and 0 < report[0].tail_mean <= report[0].tail_max
    assert 1e-6 < distance(got, wanted) < 0.05


@pytest.mark.parametrize("united", [False, True])
def test_blocks_are_united_where_that_is_faster(made, monkeypatch, united):
    """More rows of a product have more active columns, but fewer head rows are gathered."""
    hidden, weight, target = peaked(256, 8192)
    chosen = ift_kernels.ActiveSet(2.0**-9, 32, 512)
    seen = []

    def seconds(problem, rows, columns, block, share):
        """The largest blocks are the fastest, or the slowest; all faster than an exact dh."""
        seen.append((block, share))
        return cost.Cost(products=1e-9 / block if united else 1e-9 * block)

    with ift_kernels.record_active_sets() as report, plan.use_schedule("forward"):
        monkeypatch.setattr(cost, "active_hidden", seconds)
        monkeypatch.setattr(cost, "dense_hidden", lambda *a: cost.Cost(products=1e9))
        out = linear_logprobs(hidden, weight, target, gradient=chosen, workspace=64 * MIB)
    (got,) = torch.autograd.grad(out.logprob.sum(), hidden)
    wanted = exact(hidden, weight, target, torch.ones(256, dtype=torch.float64))[0]
    last, best = seen[-5:], 256 if united else 32  # of the call, after the plan's
    assert [block for block, _ in last] == [32, 64, 128, 256, best]
    assert report[0].share == pytest.approx(dict(last)[best])
    assert last[0][1] < last[3][1] and distance(got, wanted) < 0.05


@pytest.mark.parametrize(
    ("way", "bias", "formed", "error"),
    [
        ("split", False, False, 0.05),  # what is active is taken from the products
        ("split", True, True, 0.05),
        ("all active", False, True, 1e-5),
        ("dense", False, True, 1e-5),
        ("dense", True, True, 1e-5),
    ],
)
def test_kept_products_become_gradients_where_they_are_needed(
    made, monkeypatch, way, bias, formed, error
):
    """A frozen head's only for a dense product; a bias has its own sum of them."""
    slow = "active_hidden" if way == "dense" else "dense_hidden"
    monkeypatch.setattr(cost, slow, lambda *a: cost.Cost(products=1e9))
    monkeypatch.setattr(gpu_plan, "_gpu_columns", lambda p, rows: [p.vocabulary])
    hidden, weight, target = peaked(300, 8200)
    backend, found = backends.get(hidden), []
    original = backend.dlogits_
    monkeypatch.setattr(backend, "dlogits_", lambda *a: found.append(a) or original(*a))
    b = torch.zeros(8200, requires_grad=bias)
    options = ift_kernels.ActiveSet(0.0 if way == "all active" else 2.0**-9, 32, 512)
    with plan.use_schedule("forward"):
        loss = linear_cross_entropy(
            hidden, weight, target, bias=b, reduction="sum", gradient=options, workspace=64 * MIB
        )
    assert made[-1].schedule == "forward" and bool(found) == formed
    got = torch.autograd.grad(loss, [hidden, b] if bias else [hidden])
    upstream = -torch.ones(300, dtype=torch.float64)
    assert distance(got[0], exact(hidden, weight, target, upstream)[0]) < error
    if bias:
        p = (hidden.detach().double() @ weight.double().T).softmax(1)
        assert distance(got[1], p.sum(0) - target.bincount(minlength=8200)) < 1e-5


@pytest.mark.parametrize("workspace", [3, 14])
def test_tiles_formed_again_are_exact(made, reads, workspace):
    """Their active columns would have to be counted tile by tile."""
    hidden, weight, target = peaked(512, 8192)
    weight.requires_grad_()
    out = linear_logprobs(
        hidden, weight, target, gradient="active", workspace=workspace * MIB
    ).logprob
    got = torch.autograd.grad(out.sum(), [hidden, weight])
    assert len(reads) <= 1
    wanted = exact(hidden, weight, target, torch.ones(512, dtype=torch.float64))
    assert distance(got[1], wanted[1]) < 1e-5
    if made[-2].schedule == "recompute":
        assert distance(got[0], wanted[0]) < 1e-5


@pytest.mark.parametrize(
    ("rows", "frozen", "scalar", "schedule"),
    [
        (512, True, False, "forward"),
        (500, True, True, "forward"),
        (300, False, False, "keep"),
        (512, False, True, "forward"),
    ],
)
def test_the_call_is_exact_where_the_active_set_is_slower(
    made, monkeypatch, reads, rows, frozen, scalar, schedule
):
    """As where masks and launches take longer than the products that are saved."""
    monkeypatch.setattr(device, "of", lambda place: replace(SLOW, launch_gap=10.0))
    hidden, weight, target = peaked(rows, 8192)
    weight.requires_grad_(not frozen)
    target[::5] = -100
    found = []
    for gradient in ("exact", "active"):
        options = {"gradient": gradient, "workspace": 32 * MIB}
        with ift_kernels.record_active_sets() as report:
            if scalar:
                value = linear_cross_entropy(hidden, weight, target, **options)
            else:
                value = linear_logprobs(hidden, weight, target, **options).logprob.sum()
            found.append(
                torch.autograd.grad(value, [t for t in (hidden, weight) if t.requires_grad])
            )
        assert made[-1 - (schedule == "keep")].schedule == schedule
    for wanted, got in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    assert report == [ift_kernels.ActiveSetStats(1.0, 0.0, 0.0, 0, 0)]
    assert not reads


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (5, 33)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_ids_of_a_known_number(shape, share):
    """Without a read: the same as those that are counted."""
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share).to(torch.uint8)
    found = ids_of_known_count(mask, int(mask.sum()))
    assert torch.equal(found, mask.nonzero()[:, 1])


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(3, 300, 40000), (64, 512, 20000)])
def test_one_cast_of_the_head_at_a_time(made, monkeypatch, trained, rows, width, vocabulary):
    """Where it is of another dtype: for products and gradients of a tile alike."""
    monkeypatch.setattr(device, "of", lambda place: replace(H200, fp32_out=False))
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) / 16).requires_grad_(trained)
    target = torch.randint(vocabulary, (rows,))
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast, plan.use_schedule("recompute"), Allocations() as seen:
        out = linear_logprobs(hidden, weight, target, workspace=8 * MIB).logprob
        got = torch.autograd.grad(out.sum(), leaves)
    limit = max(chosen.peak_bytes for chosen in made) + size(*got) + MIB
    if "cpu" in serving.BACKENDS:
        assert seen.peak <= limit, (seen.peak / MIB, limit / MIB)
    wanted = exact(hidden, weight, target, torch.ones(rows, dtype=torch.float64))
    for a, b in zip(got, wanted, strict=True):
        assert distance(a, b) < 0.02


# --- divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "jsd"])
@pytest.mark.parametrize(("reduction", "workspace"), [("mean", 16), ("mean", 2), ("none", 1)])
def test_divergence(made, kind, reduction, workspace):
    hidden, weight, _ = leaves(torch.float32, 192, 2048)
    teacher = hidden.detach().roll(1, 0), weight.detach()
    options = {"kind": kind, "reduction": reduction, "workspace": workspace * MIB}
    up = torch.ones(()) if reduction == "mean" else torch.linspace(0.1, 1, 192)
    found = []
    for kind_of_number in (torch.float32, torch.float64):
        h, w = (t.detach().to(kind_of_number).requires_grad_() for t in (hidden, weight))
        other = (t.to(kind_of_number) for t in teacher)
        value = ift_kernels.linear_divergence(h, w, *other, **options)
        found.append(torch.autograd.grad(value, (h, w), up.to(kind_of_number)))
    for a, b in zip(*found, strict=True):
        assert distance(a, b) < 1e-5


def test_tiles_of_a_divergence_are_wide_on_a_gpu():
    """By hand, at full size: launches of narrow ones would take longer than what they do."""
    pytest.importorskip("triton")
    with counts.planned_for_h200():
        hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta")
                          for n in (8192, 128256))  # fmt: skip
        head = Head(backends.get(hidden), hidden, weight, None, LogitTransform())
        found = divergence_plan.layout((head, head), 512 * MIB, True, True)
    assert found.block >= 256 and found.block * found.block_columns >= 1 << 20
    assert found.held % found.block_columns == 0
