"""The Triton backend in Triton's interpreter, on small shapes: run by test_triton.py.

Every function of the contract against the reference, every operation against fp64.
"""

import contextlib
import math

import pytest
import test_backends
import torch
import triton

import dense
import ift_kernels as K
import interpreter
from ift_kernels import backends
from ift_kernels.backends import reference as ref
from ift_kernels.backends import triton as backend
from ift_kernels.backends.contract import TRACK_ALL, Chunk, RowGradient, Selected, new_state
from ift_kernels.backends.triton import launch, sampling
from ift_kernels.common.transform import LogitTransform
from ift_kernels.operators import linear_stats
from serving import DTYPES

interpreter.like_a_gpu()

PLAIN, FULL = LogitTransform(), LogitTransform(0.7, 5.0, 1.3)
# Blocks much smaller than the rows, so that every loop goes round several times.
SMALL = {
    "stats": {"BLOCK": 64, "num_warps": 1},
    "dlogits": {"BLOCK": 128, "num_warps": 1},
    "divergence": {"BLOCK": 64, "num_warps": 1},
    "top_k": {"BLOCK": 64, "num_warps": 1},
    "gumbel": {"BLOCK": 64, "num_warps": 1},
    "mask": {"ROWS": 16, "BLOCK": 64, "num_warps": 1},
    "split": {"ROWS": 8, "BLOCK": 32, "num_warps": 1},
    "segments": {"ITEMS": 4, "BLOCK": 16, "num_warps": 1},
    "scan": {"BLOCK": 16, "num_warps": 1},
    "residual": {"BLOCK": 16, "num_warps": 1},
}


@pytest.fixture(autouse=True)
def served_by_triton():
    with K.use_backend("triton"):
        yield


@pytest.fixture(params=["small", "committed"])
def blocks(request):
    """Both the committed block sizes and ones that make every loop go round."""
    with contextlib.ExitStack() as stack:
        if request.param == "small":
            for kernel, values in SMALL.items():
                stack.enter_context(launch.use_config(kernel, values))
        yield


def products(n, c, dtype, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    padded = torch.full((n, c + 5), torch.nan, dtype=dtype)  # what lies between rows is not read
    x = padded[:, :c]
    x.copy_(torch.randn(n, c, generator=generator) * 3)
    x[0, :3] = torch.tensor([float("nan"), 1.0, float("inf")])
    if n > 3:
        x[1] = -torch.inf
        x[2, 1] = torch.inf
        x[3] = 1.5  # all equal: the lowest id wins
    target = torch.randint(-20, c + 40, (n,), generator=generator)
    return x, torch.randn(c, generator=generator) if bias else None, target


SIDES = backend, ref


def close(ours, wanted, dtype=torch.float32):
    eps = max(torch.finfo(dtype).eps, 2**-22)
    torch.testing.assert_close(ours, wanted, rtol=8 * eps, atol=8 * eps, equal_nan=True)


CASES = [
    pytest.param(dtype, transform, bias, id=f"{dtype}-{'full' if bias else 'plain'}")
    for dtype, transform, bias in (
        (torch.float32, FULL, True), (torch.float16, PLAIN, False), (torch.bfloat16, FULL, True)
    )
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "transform", "bias"), CASES)
@pytest.mark.parametrize("track", [0, TRACK_ALL])
def test_statistics(dtype, transform, bias, track, blocks):
    n = 5  # of each kind of row that `products` makes
    ours, theirs = (new_state(n, torch.device("cpu")) for _ in SIDES)
    for seed, (offset, c) in enumerate(((0, 131), (131, 64), (195, 1))):
        x, b, target = products(n, c, dtype, bias, seed) if c > 2 else (
            torch.zeros(n, c, dtype=dtype), None, torch.full((n,), 195))  # fmt: skip
        chunk = Chunk(x, b, transform, offset)
        before = x.clone()
        backend.stats_update(chunk, target, ours, track)
        ref.stats_update(chunk, target, theirs, track)
        torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    values = (linear_stats.row_values(*state, 196, track) for state in (ours, theirs))
    for i, (a, b) in enumerate(zip(*values, strict=True)):
        if linear_stats.tracked(track)[i] and linear_stats.Statistics._fields[i] != "norm":
            close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selected_columns(dtype):
    """Out of one chunk and into another, at its edges; nothing else is touched."""
    ids = torch.tensor([[-1, 3, 100, 104], [-1, -1, -1, -1], [99, 139, 140, 900]])
    results = []
    for side in SIDES:
        torch.manual_seed(0)
        x, (taken, put) = torch.randn(3, 43).to(dtype)[:, :40], torch.randn(2, 3, 4)
        chunk = Chunk(x, None, LogitTransform(-1.0), 100)
        side.take_selected(chunk, Selected(ids, taken))
        between = x.clone()
        side.put_selected(chunk, Selected(ids, put))
        results.append((between, taken, x))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (between == torch.inf).sum() == 3


@pytest.mark.parametrize(("dtype", "transform", "bias"), CASES)
def test_gradient_and_probabilities(dtype, transform, bias, blocks):
    x, b, target = products(7, 300, dtype, bias)
    norm = torch.stack([x.float().nan_to_num(0, 9, -9).amax(1), torch.rand(7) + 3])
    coef = torch.randn(4, 7)
    coef[:, 0] = coef[:, 5] = 0  # row 0 has a NaN and no upstream gradient
    transposed, row_gradient = x.new_empty(300, 7), RowGradient(target, norm, coef)
    ours, theirs = x.clone(), x.clone()
    ref.dlogits_(Chunk(theirs, b, transform, 100), row_gradient)
    backend.dlogits_(Chunk(ours, b, transform, 100), row_gradient, transposed)
    close(ours, theirs, dtype)
    assert not ours[0].any() and torch.equal(transposed.isnan(), ours.T.isnan())
    close(transposed, ours.T)
    ours, theirs = x.clone(), x.clone()
    ref.probabilities_(Chunk(theirs, b, transform, 100), norm)
    backend.probabilities_(Chunk(ours, b, transform, 100), norm)
    close(ours, theirs, dtype)


@pytest.mark.parametrize(("dtype", "transform", "bias"), CASES[:2])
@pytest.mark.parametrize("k", [1, 5])
def test_top_k(dtype, transform, bias, k, blocks):
    both = []
    for b in (backend, ref):
        values, ids = torch.full((7, k), -torch.inf), torch.full((7, k), -1)
        for seed, (offset, c) in enumerate(((0, 131), (131, 70))):
            x, extra, _ = products(7, c, dtype, bias, seed)
            b.top_k_update(Chunk(x, extra, transform, offset), values, ids)
        both.append((values, ids))
    close(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])


@pytest.mark.parametrize(("offset", "seed"), [(0, -1), (3, 0), (64, 2**63 - 5)])
def test_gumbel(offset, seed, blocks):
    x, bias, _ = products(7, 201, torch.float32, True)
    rows = torch.tensor([0, 1, 2, 2**31, 2**32 + 7, 2**40, 6])
    both = []
    for b in (backend, ref):
        best, logit = torch.full((2, 7), -torch.inf)
        ids = torch.zeros(7, dtype=torch.int64)
        b.gumbel_update(Chunk(x, bias, FULL, offset), seed, rows, best, logit, ids)
        both.append((best, logit, ids))
    for a, b in zip(*both, strict=True):
        close(a, b) if a.is_floating_point() else torch.testing.assert_close(a, b)


def test_gumbel_noise_is_that_of_its_formula():
    """In fp64, at both ends of the range and in between."""
    bits = torch.tensor([0, 1, 2, 1 << 8, 1 << 20, 1 << 31, (1 << 32) - 300, (1 << 32) - 1])

    @triton.jit
    def kernel(bits, out):
        at = triton.language.arange(0, 8)
        words = triton.language.load(bits + at).to(triton.language.uint32)
        triton.language.store(out + at, sampling.minus_log_exponential(words))

    out = torch.empty(8)
    kernel[(1,)](bits, out)
    u = ((bits.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24).double()
    torch.testing.assert_close(out.double(), -torch.log(-torch.log1p(-u)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "transform", "bias"), CASES)
def test_mark_active(dtype, transform, bias, blocks):
    x, b, target = products(70, 200, dtype, bias)
    x[1:4] = torch.randn(3, 200)
    if b is not None:
        b[[3, 150]] = -torch.inf
    norm = torch.stack([x.float().nan_to_num(0, 9, -9).amax(1), torch.zeros(70)])
    norm[0, 7] = torch.nan
    of = RowGradient(target, norm, torch.zeros(4, 70))
    given = Chunk(x, b, transform, 30), of, -2.0, 32, 64, None
    ours, theirs = (side.mark_active(*given) for side in SIDES)
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.counts, theirs.counts)
    assert 0 < ours.mask.sum() < ours.mask.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bucket_sums(dtype, blocks):
    matrix, weights = torch.randn(50, 21).to(dtype), torch.rand(50)
    weights[3:7] = 0
    close(*(side.bucket_sums(matrix, 16, weights) for side in SIDES))


# Of the committed blocks, in which the interpreter goes through a thousand elements, half: each
# gamma and each direction.
def scans(*gammas):
    small = [(gamma, left, "small") for gamma in gammas for left in (True, False)]
    committed = [(gamma, number % 2 == 0, "committed") for number, gamma in enumerate(gammas)]
    return pytest.mark.parametrize(
        ("gamma", "left", "blocks"), small + committed, indirect=["blocks"]
    )


@scans(0.0, 0.95, 1.0)
def test_scan(gamma, left, blocks):
    dtype = {0.0: torch.bfloat16, 0.95: torch.float32, 1.0: torch.float16}[gamma]
    x, mask = torch.randn(2, 53).to(dtype), torch.rand(2, 53) < 0.7
    x[~mask] = torch.nan
    for arguments in (
        (x, mask, None),
        (x.nan_to_num(1), None, None),
        (x.view(1, -1), mask.view(1, -1), torch.tensor([0, 0, 17, 18, 80, 106])),
    ):
        ours, theirs = (b.scan(*arguments, gamma, left) for b in (backend, ref))
        close(ours, theirs, dtype)


@scans(1e-60, 1e-3)
def test_infinity_where_powers_of_gamma_underflow(gamma, left, blocks):
    """It reaches the end of its document as the recurrence takes it, and goes no further."""
    n = 112  # seven of the small blocks
    x, mask = torch.randn(3, n), torch.rand(3, n) < 0.7
    at = n - 20 if left else 20
    x[0, at], x[1, at], x[2, at] = torch.inf, -torch.inf, torch.nan
    mask[:, at] = True
    for some in (None, mask):
        close(*(b.scan(x, some, None, gamma, left) for b in (backend, ref)))
    packed = x.view(1, -1), mask.view(1, -1), torch.tensor([0, 5, n - 2, n - 2, n, 2 * n, 3 * n])
    close(*(b.scan(*packed, gamma, left) for b in (backend, ref)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_residual(dtype, packed, blocks):
    rows, length, vocabulary, width = (1, 60, 11, 19) if packed else (4, 15, 11, 19)
    table = torch.randn(vocabulary, width).to(dtype)
    ids, predicted = torch.randint(0, vocabulary, (2, rows, length))
    labels = torch.where(torch.rand(rows, length) < 0.4, -100, ids)
    predicted[0, 3] = ids[0, 4]
    cu = torch.tensor([0, 7, 7, 30, 60]) if packed else None
    arguments = ids, predicted, labels, cu, 0.2, -100
    close(backend.residual(table, *arguments), ref.residual(table, *arguments), dtype)
    grad = torch.randn(rows, length, width).to(dtype)
    ours, theirs = (b.residual_grad(grad, *arguments, vocabulary) for b in (backend, ref))
    close(ours, theirs, dtype)


def test_every_operation_equals_the_reference(monkeypatch):
    monkeypatch.setattr(test_backends, "SHAPES", ((2, 3, 1), (4, 5, 131)))
    dtype = torch.float32
    test_backends.assert_same(
        test_backends.results(dtype), test_backends.of_the_reference(dtype), dtype
    )


HEADS = pytest.mark.parametrize(
    ("options", "dtype"),
    [(dense.TRANSFORM, torch.float32), ({}, torch.bfloat16), (dense.TRANSFORM, torch.float16)],
    ids=["float32", "bfloat16", "float16"],
)


@HEADS
def test_against_fp64(options, dtype):
    h = dense.head(9, 17, 131, dtype, bias=bool(options), **options)
    stats = K.linear_logprobs(*h.args, outputs=dense.OUTPUTS, **h.kwargs)
    dense.assert_stats_and_gradients(stats, h)


@HEADS
def test_fused_statistics(options, dtype):
    h = dense.head(19, 20, 291, dtype, bias=bool(options), **options)
    small = {"ROWS": 16, "COLUMNS": 32, "INNER": 16, "num_warps": 1}
    for name, values in (("none", {}), ("fused", small)):
        fused = launch.use_config("forward", {"FUSED": 1})
        with torch.no_grad(), fused, launch.use_config(name, values):
            for outputs in (dense.OUTPUTS, ("logprob", "argmax")):
                stats = K.linear_logprobs(*h.args, outputs=outputs, **h.kwargs)
                dense.assert_stats(stats, h)


def test_fused_statistics_of_rows_that_are_not_finite():
    h = dense.fill_rows(dense.head(20, 20, 300), 1, torch.nan, 0)
    h = dense.fill_rows(h, 2, torch.inf, 0)
    bias = torch.zeros(300)
    bias[7] = -torch.inf
    results = []
    for fused in (0, 1):
        with torch.no_grad(), launch.use_config("forward", {"FUSED": fused}):
            results.append(K.linear_logprobs(*h.args, bias=bias, outputs=dense.OUTPUTS))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
        elif a is not None:
            assert torch.equal(a, b)


def test_the_interpreter_rounds_as_a_gpu():
    @triton.jit
    def kernel(x, out):
        at = triton.language.arange(0, 1024)
        triton.language.store(out + at, triton.language.load(x + at))

    x, out = torch.randn(1024) * 1e3, torch.empty(1024, dtype=torch.bfloat16)
    x[:3] = torch.tensor([torch.inf, -torch.inf, 3.4e38])
    kernel[(1,)](x, out)
    assert torch.equal(out, x.bfloat16())


def test_greedy_and_the_rest():
    h = dense.head(11, 8, 400, torch.bfloat16)
    z = dense.logits(h)
    chosen = K.linear_token(h.hidden, h.weight)
    assert torch.equal(chosen.ids, z.argmax(-1)) and math.isfinite(float(chosen.logprob.sum()))
    assert backends.get(h.hidden) is backend


def test_bytes_that_kernels_ask_for():
    """bench.gpu.traffic: an address once per access of a program, against once at all."""
    from bench.gpu import traffic

    x, target = torch.randn(8, 1024).bfloat16(), torch.zeros(8, dtype=torch.int64)
    row_gradient = RowGradient(target, torch.zeros(2, 8), torch.ones(4, 8))

    def work():
        backend.dlogits_(Chunk(x), row_gradient)
        backend.dlogits_(Chunk(x, torch.zeros(1024)), row_gradient)

    found = traffic.count("sm_90", work)
    plain, biased = (found[f"dlogits BLOCK=1024 {b}PADDED bf16"] for b in ("", "HAS_BIAS "))
    assert 4 < plain.least <= plain.requested < 4.1  # two bytes each way, and a few per row
    # Float32, read by every row, and once more where the row's target is.
    assert biased.requested == plain.requested + 4 + 4 / 1024
    assert biased.least == plain.least + 4 / 8
    about = "bf16 argmax_stride=1 HAS_BIAS PADDED PRECISION=tf32 BLOCK=1024 num_warps=4"
    assert traffic.key("dlogits", about) in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (70, 701), (1, 4096)])
def test_scale(dtype, shape):
    x = torch.randn(shape).to(dtype)
    for factor in (1.0, 0.3, 0.0, float("nan")):
        ours = x.clone()
        backend.scale_(ours, torch.tensor(factor))
        close(ours, (x.float() * factor).to(dtype), dtype)


def test_a_factor_of_one_moves_nothing():
    """Not a bit changes, so a NaN keeps its payload; and nothing but the factor is read."""
    x = torch.full((5000,), torch.nan)
    x.view(torch.int32)[::2] = 0x7FC12345
    before = x.view(torch.int32).clone()
    backend.scale_(x, torch.tensor(1.0))
    assert torch.equal(x.view(torch.int32), before)


@pytest.mark.parametrize("target", [-1, 196, 2**40])
def test_the_logit_of_a_target_outside_is_nan(target, blocks):
    state = new_state(2, torch.device("cpu"))
    x, ids = torch.randn(2, 196), torch.tensor([target, 5])
    backend.stats_update(Chunk(x), ids, state, 0)
    logprob = linear_stats.row_values(*state, 196, 0).logprob
    assert logprob[0].isnan() and not logprob[1].isnan()


@pytest.mark.parametrize("columns", [131, 1, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_odd_widths_of_padded_rows(columns, bias, blocks):
    """As the schedules have them: what is between rows has no part in anything, and may be 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((6, 160), torch.nan)[:, :columns]
    x.copy_(torch.randn(6, columns, generator=generator))
    b = torch.randn(columns, generator=generator) if bias else None
    target = torch.randint(columns, (6,), generator=generator)
    results = []
    for side in SIDES:
        y = x._base.clone()[:, :columns]
        state = new_state(6, torch.device("cpu"))
        side.stats_update(Chunk(y, b), target, state, TRACK_ALL)
        values, ids = torch.full((6, 3), -torch.inf), torch.full((6, 3), -1)
        side.top_k_update(Chunk(y, b), values, ids)
        best = torch.full((6,), -torch.inf)
        drawn = best, best.clone(), torch.zeros(6, dtype=torch.int64)
        side.gumbel_update(Chunk(y, b), 2**40 + 3, torch.arange(6), *drawn)
        norm = torch.stack([state.values[0], state.values[1].log()]).float()
        of = RowGradient(target, norm, torch.ones(4, 6))
        mask = side.mark_active(Chunk(y, b), of, -3.0, 32, 64, None).mask
        p = y._base.clone()[:, :columns]
        side.probabilities_(Chunk(p, b), norm)
        side.dlogits_(Chunk(y, b), of)
        results.append((*state, values, ids, *drawn, mask, p, y))
        beyond = y._base[:, columns:]
        assert (beyond.isnan() | (beyond == 0)).all()
    for ours, wanted in zip(results[0], results[1], strict=True):
        close(ours, wanted)
