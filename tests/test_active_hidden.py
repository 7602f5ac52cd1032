"""``gradient="active"`` of a trained head: its exact gradient, and dh from the active columns."""

import math

import pytest
import torch

import dense
import ift_kernels as K
from ift_kernels import active_hidden, backends, plan
from ift_kernels.active_set import ActiveSet
from ift_kernels.backends import reference_active
from serving import BACKENDS
from test_active_set import (
    DTYPES,
    OUTPUTS,
    ROUNDING,
    SMALL,
    distance,
    exact,
    gradients,
    lm,
    with_a_constant_column,
)
from test_memory import Allocations, allowed, size

MIB = 1 << 20


@pytest.fixture
def sparse(monkeypatch):
    """No tile is left dense, however many of its columns are active."""
    monkeypatch.setattr(active_hidden, "DENSE_SHARE", 2.0)


# --- the epilogue --------------------------------------------------------------------------------


def by_the_definition(dz, marks, block, tile, profile):
    """Means of tails and active columns, entry by entry in float64."""
    rows, columns = dz.shape
    mean = torch.zeros(-(-columns // tile), rows, dtype=torch.float64)
    parts = []
    for number, marked in enumerate(marks.tolist()):
        ids = [v for v in range(columns) if marked[v]]
        part = torch.zeros(block, -(-len(ids) // 32) * 32, dtype=torch.float64)
        for r in range(number * block, min(rows, (number + 1) * block)):
            for t in range(len(mean)):
                tail = [v for v in range(t * tile, min((t + 1) * tile, columns)) if not marked[v]]
                if tail and profile[tail].any():
                    mean[t, r] = dz[r, tail].double().sum() / profile[tail].double().sum()
            for k, v in enumerate(ids):
                of_tail = mean[v // tile, r] * profile[v].double()
                part[r - number * block, k] = dz[r, v].double() - of_tail
        parts.append(part)
    return mean, parts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "tile"), [(70, 200, 64), (32, 64, 64), (1, 333, 128), (100, 31, 64)]
)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_rows_and_means(backend, dtype, rows, columns, tile, share):
    generator = torch.Generator().manual_seed(rows + columns)
    wide = torch.randn(rows, columns + 9, generator=generator).to(dtype)
    dz, block = wide[:, :columns], 32
    marks = (torch.rand(-(-rows // block), columns, generator=generator) < share).to(torch.uint8)
    if share and len(marks) > 1:
        marks[1] = 0  # a block where nothing is active
    if share == 0.2:
        at = int(marks[0].argmax())
        dz[0, at] = math.nan  # active: it must not reach the mean
        dz[rows - 1, int((marks[-1] == 0).nonzero()[0])] = math.nan  # of the tail: it must
    before = wide.clone()
    profile = torch.rand(columns, generator=generator)
    profile[::7] = profile[64:128] = 0  # a tile of zeros, where there are more
    mean, parts = by_the_definition(dz, marks, block, tile, profile)
    found = torch.full(mean.shape, 7.0)
    active = torch.full((sum(p.numel() for p in parts) + 40,), 7.0, dtype=dtype)
    with K.use_backend(backend):
        backends.get(dz).active_rows(dz, marks, block, tile, profile, found, active)
    assert torch.equal(wide.nan_to_num(9), before.nan_to_num(9))
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-6, equal_nan=True)
    start = 0
    for number, part in enumerate(parts):
        there = min(rows - number * block, block)
        mine = active[start : start + part.numel()].view(part.shape)[:there].double()
        torch.testing.assert_close(mine, part[:there], rtol=rounding, atol=1e-6, equal_nan=True)
        start += part.numel()
    assert (active[start:] == 7).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
def test_too_little_room_is_refused():
    dz, marks = torch.randn(64, 64), torch.ones(2, 64, dtype=torch.uint8)
    with K.use_backend("cpu"), pytest.raises(RuntimeError, match="active: too few elements"):
        backends.get(dz).active_rows(
            dz, marks, 32, 64, torch.ones(64), torch.empty(1, 64), torch.empty(4095)
        )


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, MIB], ids=["default", "1MiB"])
@pytest.mark.parametrize("transform", [{}, dense.TRANSFORM], ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_zero_is_exact(dtype, transform, workspace, backend, sparse):
    h = dense.head(301, 24, 1333, dtype, bias=True, **transform)
    options = ActiveSet(threshold=0.0, **SMALL)
    with K.use_backend(backend):
        found = gradients(h, options, OUTPUTS, workspace=workspace)
    for mine, true, like in zip(found, exact(h, OUTPUTS), h.inputs, strict=True):
        assert mine.dtype == like.dtype
        assert distance(mine, true) <= ROUNDING[dtype] * 2


def loss_gradients(h, gradient, **options):
    value = K.linear_cross_entropy(
        h.hidden, h.weight, h.target, gradient=gradient, **h.kwargs, **options
    )
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
        found = loss_gradients(h, ActiveSet(tail_tile=512), **given)
    assert len(report) == 1 and report[0].recomputed_tiles == 0
    assert (report[0].kept_bytes == 0) == forward
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


def test_error_bound_of_a_row(sparse):
    # ‖Σ_v (dz − dz')‖₁ ≤ 2·|a|·tail mass: seen through a head whose rows are unit vectors.
    torch.manual_seed(0)
    v, threshold = 512, 2.0**-7
    logits = 3 * torch.randn(64, v)
    target = logits.softmax(-1).multinomial(1)[:, 0]
    h = dense.Head(logits.clone().requires_grad_(), torch.eye(v, requires_grad=True), target)
    a = torch.rand(1, 64) + 0.5
    found, _ = gradients(h, ActiveSet(threshold, 32, 128), weights=a)
    p = logits.double().softmax(-1)
    onehot = torch.nn.functional.one_hot(target, v)
    true = a[0, :, None].double() * (onehot - p)
    marked = ((p > threshold) | onehot.bool()).view(2, 32, v).any(1).repeat_interleave(32, 0)
    tail = torch.where(marked, 0.0, p).sum(1)
    error = (found - true).abs().sum(1)
    assert (error <= 2 * a[0] * tail + 1e-5).all()
    assert error.max() > 1e-3  # the threshold is high enough for the bound to say something
    assert (found - true)[marked].abs().max() <= 1e-5  # active columns are exact


@pytest.mark.parametrize("outputs", [OUTPUTS, ("logprob",), ("entropy",)], ids=str)
def test_rows_keep_their_sum(outputs, sparse):
    h = with_a_constant_column(lm())
    found, true = gradients(h, ActiveSet(threshold=2.0**-6), outputs)[0], exact(h, outputs)[0]
    assert (found[:, -1].double() - true[:, -1]).abs().max() <= 2e-5


def test_flat_logits_are_exact():
    torch.manual_seed(0)
    hidden, weight = torch.randn(128, 32), torch.randn(2000, 32) / 32**0.5
    h = dense.Head(hidden.requires_grad_(), weight.requires_grad_(), torch.randint(2000, (128,)))
    for mine, other in zip(gradients(h, "active"), gradients(h, "exact"), strict=True):
        assert distance(mine, other) <= 1e-6


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        h = lm(dtype=torch.bfloat16)
        one, two = gradients(h, "active"), gradients(h, "active")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
@pytest.mark.parametrize("scalar", [False, True], ids=["per-token", "scalar"])
@pytest.mark.parametrize(
    ("n", "d", "v", "dtype", "workspace"),
    [
        (512, 32, 40000, torch.float32, 8 * MIB),
        (512, 32, 40000, torch.bfloat16, 8 * MIB),
        (300, 300, 20000, torch.bfloat16, 16 * MIB),
        (300, 300, 20000, torch.bfloat16, 4 * MIB),
        (3, 300, 50000, torch.bfloat16, 4 * MIB),
        (512, 300, 50000, torch.float32, 4 * MIB),
        (512, 64, 30000, torch.float32, MIB),
        (512, 64, 30000, torch.bfloat16, MIB),
    ],
    ids=str,
)
@pytest.mark.parametrize("tail_tile", [64, 2048])
def test_peak(n, d, v, dtype, workspace, tail_tile, scalar, sparse):
    h = lm(n=n, d=d, v=v, dtype=dtype)
    operation = K.linear_cross_entropy if scalar else K.linear_logprobs
    start = plan.ledger.held
    options = ActiveSet(threshold=2.0**-9, tail_tile=tail_tile)
    with K.use_backend("cpu"):
        with Allocations() as forward:
            out = operation(h.hidden, h.weight, h.target, workspace=workspace, gradient=options)
            out = out if scalar else out.logprob
        held = plan.ledger.held - start
        gradients_there = scalar and forward.alive > size(h.hidden, h.weight)
        returned = size(h.hidden, h.weight) if gradients_there else 0
        assert forward.peak - returned <= allowed(h, workspace)
        total = out.sum()
        with Allocations() as backward:
            total.backward()
    before = 0 if gradients_there else held
    peak = backward.peak + before - size(h.hidden.grad, h.weight.grad)
    assert peak <= allowed(h, workspace), f"{peak / MIB} MiB"
    assert plan.ledger.held == start


def test_the_reference_takes_any_layout():
    dz = torch.randn(40, 50).T  # not rows of consecutive elements
    marks = (torch.rand(2, 40) < 0.5).to(torch.uint8)
    profile = torch.rand(40)
    mean, parts = by_the_definition(dz, marks, 32, 64, profile)
    found, active = torch.empty(1, 50), torch.empty(sum(p.numel() for p in parts))
    reference_active.active_rows(dz, marks, 32, 64, profile, found, active)
    torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-6)
