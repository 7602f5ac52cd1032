"""``gradient="active"`` of a trained head: its exact gradient, and dh from the active columns."""

import math

import pytest
import torch
from test_active_set import MIB, OUTPUTS, ROUNDING, exact, frozen, gradients, lm

import active_examples
import dense
import ift_kernels as K
from allocations import Allocations, allowed, size
from dense import distance
from ift_kernels import backends
from ift_kernels.backends import reference
from ift_kernels.backends.contract import ActiveColumns, Chunk
from ift_kernels.backends.reference.active import bucket_counts
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.schedule import active_groups, plan
from serving import DTYPES, needs_cpp

# --- the epilogue --------------------------------------------------------------------------------


def by_the_definition(dz, mask, block, bucket, tail_weights):
    """Tail gradients and active columns, entry by entry in float64."""
    rows, columns = dz.shape
    tail_gradient = torch.zeros(-(-columns // bucket), rows, dtype=torch.float64)
    parts = []
    for number, active_columns in enumerate(mask.tolist()):
        ids = [v for v in range(columns) if active_columns[v]]
        part = torch.zeros(block, -(-len(ids) // 32) * 32, dtype=torch.float64)
        for r in range(number * block, min(rows, (number + 1) * block)):
            for t in range(len(tail_gradient)):
                whole = range(t * bucket, min((t + 1) * bucket, columns))
                tail = [v for v in whole if not active_columns[v]]
                if tail and tail_weights[tail].any():
                    weight = tail_weights[tail].double().sum()
                    tail_gradient[t, r] = dz[r, tail].double().sum() / weight
            for k, v in enumerate(ids):
                of_tail = tail_gradient[v // bucket, r] * tail_weights[v].double()
                part[r - number * block, k] = dz[r, v].double() - of_tail
        parts.append(part)
    return tail_gradient, parts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "bucket"), [(70, 200, 64), (32, 64, 64), (1, 333, 128), (100, 31, 64)]
)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_take_active(backend, dtype, rows, columns, bucket, share):
    generator = torch.Generator().manual_seed(rows + columns)
    wide = torch.randn(rows, columns + 9, generator=generator).to(dtype)
    dz, block = wide[:, :columns], 32
    mask = (torch.rand(-(-rows // block), columns, generator=generator) < share).to(torch.uint8)
    if share and len(mask) > 1:
        mask[1] = 0  # a block where nothing is active
    if share == 0.2:
        at = int(mask[0].argmax())
        dz[0, at] = math.nan  # active: it must not reach the tail
        dz[rows - 1, int((mask[-1] == 0).nonzero()[0])] = math.nan  # of the tail: it must
    before = wide.clone()
    tail_weights = torch.rand(columns, generator=generator)
    tail_weights[::7] = tail_weights[64:128] = 0  # a bucket of zeros, where there are more
    tail_gradient, parts = by_the_definition(dz, mask, block, bucket, tail_weights)
    found, active, ids, counts = active_examples.take(
        backends.get(dz), Chunk(dz), mask, block, bucket, tail_weights
    )
    assert torch.equal(ids, mask.nonzero()[:, 1]) and torch.equal(counts, mask.sum(1).int())
    assert torch.equal(wide.nan_to_num(9), before.nan_to_num(9))
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(found.double(), tail_gradient, rtol=1e-5, atol=1e-6, equal_nan=True)
    start = 0
    for number, part in enumerate(parts):
        there = min(rows - number * block, block)
        mine = active[start : start + part.numel()].view(part.shape)[:there].double()
        torch.testing.assert_close(mine, part[:there], rtol=rounding, atol=1e-6, equal_nan=True)
        start += part.numel()
    assert (active[start:] == 7).all()


@pytest.mark.parametrize("widths", [(128, 128, 40), (96, 100, 100)], ids=str)
def test_counts_are_of_buckets_whatever_the_tiles(backend, widths):
    """Of each tile, of all of them, and of some of their columns."""
    bucket, rows = 64, 70
    of = active_examples.row_gradient(rows, sum(widths), 0)
    tiles = [
        backends.get(x).mark_active(Chunk(x), of, -1.5, 32, bucket, None)
        for x in (torch.randn(rows, width) for width in widths)
    ]
    joined = active_groups.join(tiles, bucket)
    parts = (slice(0, widths[0]), slice(widths[0], sum(widths)), slice(64, 100))
    for some in (*tiles, joined, *(active_groups.part_of(joined, p, bucket) for p in parts)):
        assert 0 < some.mask.sum() < some.mask.numel()
        assert torch.equal(some.counts, bucket_counts(some.mask, bucket))


@needs_cpp
def test_too_little_space_is_refused():
    dz, mask = torch.randn(64, 64), torch.ones(2, 64, dtype=torch.uint8)
    columns = ActiveColumns(mask, torch.full((2, 1), 64), None)
    with K.use_backend("cpu"), pytest.raises(RuntimeError, match="active: too few elements"):
        backends.get(dz).take_active(
            Chunk(dz), columns, 32, 64, torch.ones(64), torch.empty(4095), [64, 64]
        )


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("outputs", [("logprob",), ("logprob", "entropy")], ids=len)
def test_hidden_a_block_of_rows_at_a_time(trained, outputs, sparse):
    """Where the float32 sum of dh does not fit, its active columns form it all the same."""
    h = lm(n=260, d=1024, v=1100, dtype=torch.bfloat16)
    h = h if trained else frozen(h)
    chosen = ActiveSet(block=32, tail_bucket=512)
    explained = plan.Problem(260, 1100, 1024, torch.bfloat16, MIB, True, trained, active=chosen)
    assert plan.make(explained).hidden_rows < 260
    with plan.use_schedule("recompute"), K.record_active_sets() as report:
        d_hidden = gradients(h, chosen, outputs, workspace=MIB)[0]
    assert len(report) == 1 and report[0].share < 0.9 and report[0].tail_mean > 0
    assert 1e-4 < distance(d_hidden, exact(h, outputs)[0]) <= 0.02


def loss_gradients(h, gradient, **options):
    value = K.linear_cross_entropy(*h.args, gradient=gradient, **h.kwargs, **options)
    return torch.autograd.grad(value * 3, h.inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("forward", [False, True], ids=["kept", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scalar_loss(dtype, forward, smoothing):
    workspace = {torch.float32: 8, torch.bfloat16: 5}[dtype] * MIB if forward else None
    h = lm(n=512, d=48, v=6000, dtype=dtype)
    h.target[::7] = -100
    given = {"label_smoothing": smoothing, "z_loss": 1e-3, "workspace": workspace}
    with K.record_active_sets() as report:
        found = loss_gradients(h, ActiveSet(tail_bucket=512), **given)
    assert len(report) == 1 and 0 < report[0].share < 1
    true = loss_gradients(h.double(), "exact", **given)
    assert 1e-6 < distance(found[0], true[0]) <= 0.015
    assert distance(found[1], true[1]) <= ROUNDING[dtype] * 2
    assert (found[0][::7] == 0).all()


def test_dW_and_db_are_those_of_the_exact_gradient():
    h = lm(n=300, d=64, v=5000)
    bias = torch.randn(5000, generator=torch.Generator().manual_seed(1)).mul_(0.1)
    h = dense.Head(h.hidden, h.weight, h.target, bias.requires_grad_())
    found, true = gradients(h, "active", OUTPUTS), gradients(h, "exact", OUTPUTS)
    assert 1e-6 < distance(found[0], true[0]) <= 0.015
    for mine, other in zip(found[1:], true[1:], strict=True):
        assert distance(mine, other) <= 1e-6


def test_only_a_bias_is_trained():
    h = lm()
    bias, weight = torch.zeros(len(h.weight), requires_grad=True), h.weight.detach()
    h = dense.Head(h.hidden, weight, h.target, bias)
    found = gradients(h, "active", inputs=[h.hidden, bias])
    true = gradients(h, "exact", inputs=[h.hidden, bias])
    assert distance(found[0], true[0]) <= 0.015 and distance(found[1], true[1]) <= 1e-6


def test_a_head_alone_is_exact():
    h = lm()
    h = dense.Head(h.hidden.detach(), h.weight, h.target)
    (found,), (true,) = (gradients(h, g, inputs=[h.weight]) for g in ("active", "exact"))
    assert torch.equal(found, true)


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(threads, set_num_threads):
    set_num_threads(threads)
    h = lm(dtype=torch.bfloat16)
    one, two = gradients(h, "active"), gradients(h, "active")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# --- memory --------------------------------------------------------------------------------------


SHAPES = [
    (512, 32, 40000, torch.float32, 8 * MIB),
    (512, 32, 40000, torch.bfloat16, 8 * MIB),
    (300, 300, 20000, torch.bfloat16, 16 * MIB),
    (300, 300, 20000, torch.bfloat16, 4 * MIB),
    (3, 300, 50000, torch.bfloat16, 4 * MIB),
    (512, 300, 50000, torch.float32, 4 * MIB),
    (512, 64, 30000, torch.float32, MIB),
    (512, 64, 30000, torch.bfloat16, MIB),
]


def peaks(shapes, of, tail_bucket, scalar):
    """Cases of `test_peak`; products of 16 bits take longest, so not each shape has every form."""
    name = f"{'trained' if of is trained else 'frozen'}-{tail_bucket}"
    kind = "scalar" if scalar else "per-token"
    return [pytest.param(*s, of, tail_bucket, scalar, id=f"{name}-{s}-{kind}") for s in shapes]


def trained(h):
    return h


@needs_cpp
@pytest.mark.parametrize(
    ("n", "d", "v", "dtype", "workspace", "of", "tail_bucket", "scalar"),
    [
        *peaks(SHAPES, trained, 64, False),
        *peaks([SHAPES[0], *SHAPES[3:7]], trained, 64, True),
        # Buckets of 2048 columns have fewer sums than those of 64, but wider ones.
        *peaks(SHAPES[3:5] + SHAPES[6:7], trained, 2048, False),
        *peaks(SHAPES[2:], frozen, 64, False),
        *peaks(SHAPES[5:7], frozen, 64, True),
    ],
)
def test_peak(n, d, v, dtype, workspace, of, tail_bucket, scalar, sparse):
    h = of(lm(n=n, d=d, v=v, dtype=dtype))
    operation = K.linear_cross_entropy if scalar else K.linear_logprobs
    start = plan.ledger.reserved
    options = ActiveSet(threshold=2.0**-9, tail_bucket=tail_bucket)
    with K.use_backend("cpu"):
        with Allocations() as forward:
            out = operation(h.hidden, h.weight, h.target, workspace=workspace, gradient=options)
            out = out if scalar else out.logprob
        held = plan.ledger.reserved - start
        wanted = [t for t in (h.hidden, h.weight) if t.requires_grad]
        in_forward = (scalar or len(wanted) == 1) and forward.alive > size(*wanted)
        returned = size(*wanted) if in_forward else 0
        assert forward.peak - returned <= allowed(h, workspace)
        total = out.sum()
        with Allocations() as backward:
            total.backward()
    before = 0 if in_forward else held
    peak = backward.peak + before - size(*(t.grad for t in wanted))
    assert peak <= allowed(h, workspace), f"{peak / MIB} MiB"
    assert plan.ledger.reserved == start


def test_the_reference_takes_any_layout():
    dz = torch.randn(40, 50).T  # not rows of consecutive elements
    mask = (torch.rand(2, 40) < 0.5).to(torch.uint8)
    tail_weights = torch.rand(40)
    tail_gradient, _ = by_the_definition(dz, mask, 32, 64, tail_weights)
    found, *_ = active_examples.take(reference, Chunk(dz), mask, 32, 64, tail_weights)
    torch.testing.assert_close(found.double(), tail_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [390, 250, 1])
def test_a_gradient_of_mean_logit_in_some_rows(start, sparse):
    """It is the same for all ids, so the tail is uniform, whichever block of rows it is in."""
    h = frozen(lm(n=400, d=512, v=700, dtype=torch.bfloat16))
    mean = (torch.arange(400) >= start).double()

    def gradient(head, stats):
        value = (stats["logprob"] * (1 - mean)).sum() + (stats["mean_logit"] * mean).sum()
        return torch.autograd.grad(value, head.hidden)[0][start:]

    with plan.use_schedule("recompute"):
        chosen = ActiveSet(block=32, tail_bucket=512)
        outputs = "logprob", "mean_logit"
        stats = K.linear_logprobs(*h.args, outputs=outputs, gradient=chosen, workspace=MIB)
        found = gradient(h, stats._asdict())
    double = h.double()
    assert distance(found, gradient(double, dense.stats(double))) <= 0.02
