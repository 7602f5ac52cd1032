"""Each emulated CUDA kernel against the reference, at layouts and values that the engine avoids."""

import math
import sys

import pytest
import torch

import active_examples
import cuda_emulator
from ift_kernels.backends import cuda, reference
from ift_kernels.backends.contract import (
    STATE_ROWS,
    TRACK_ALL,
    Chunk,
    RowGradient,
    Selected,
    new_state,
)
from ift_kernels.common.transform import LogitTransform
from serving import DTYPES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")
INF, NAN = math.inf, math.nan
PLAIN, CAPPED = LogitTransform(1.3), LogitTransform(1.3, 20.0, 0.7)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    cuda_emulator.serve(monkeypatch.setattr)


def product_of(rows, cols, dtype, start=0, gap=0, spread=4.0):
    """Products whose rows begin `start` elements into memory and stand `gap` elements apart."""
    storage = torch.full((start + rows * (cols + gap),), NAN, dtype=dtype)
    x = storage[start:].view(rows, cols + gap)[:, :cols]
    return x.copy_(torch.randn(rows, cols) * spread), storage


def close(ours, theirs, what=""):
    # In the dtype's own rounding where results have it, else float32's over sums of some thousand.
    tolerance = max(2e-5, torch.finfo(ours.dtype).eps * 2 if ours.is_floating_point() else 0)
    scale = max(1.0, theirs.double().nan_to_num(0, 0, 0).abs().max().item())
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * scale * 0.1, equal_nan=True, msg=what or None
    )


def states(x, bias, transform, target):
    """The running state of each backend; their argmax is the same."""
    both = []
    for backend in (cuda, reference):
        state = new_state(len(x), x.device)
        for offset in (0, x.shape[1]):  # the same products twice: the first of equal ids stays
            backend.stats_update(Chunk(x, bias, transform, offset), target, state, TRACK_ALL)
        both.append(state)
    (ours, at), (theirs, their_at) = both
    assert torch.equal(at, their_at)
    return ours, theirs


# Rows on 16 bytes or not; a warp, a block and several blocks per row; no whole pack.
LAYOUTS = [(3, 5, 0, 0), (9, 2048, 0, 8), (9, 2047, 3, 0), (2, 5000, 1, 1), (1, 40000, 0, 0)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_statistics_and_gradients(layout, dtype, transform):
    rows, cols, start, gap = layout
    x, storage = product_of(rows, cols, dtype, start, gap)
    bias = None if transform is PLAIN else torch.randn(cols)
    target = torch.randint(2 * cols, (rows,))
    ours, theirs = states(x, bias, transform, target)
    for row in range(STATE_ROWS):
        close(ours[row], theirs[row], f"state {row}")
    norm = torch.stack([theirs[0], theirs[1].log()]).float()
    coef = torch.randn(4, rows)
    coef[2, ::2] = 0
    coef[:, -1] = 0
    calls = {"dlogits_": RowGradient(target, norm, coef), "probabilities_": norm}
    for function, given in calls.items():
        results = []
        for backend in (reference, cuda):
            wide = storage.clone()[start:].view(rows, cols + gap)
            getattr(backend, function)(Chunk(wide[:, :cols], bias, transform, cols), given)
            results.append(wide[:, :cols])
        close(results[1], results[0], function)
        assert wide[:, cols:].isnan().all()  # nothing beside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selected_columns(dtype):
    """Out of one chunk and into another, at its edges; nothing else is touched."""
    ids = torch.tensor([[-1, 3, 100, 104], [-1, -1, -1, -1], [99, 139, 140, 900]])
    for sign in (1.0, -1.0):
        results = []
        for backend in (cuda, reference):
            torch.manual_seed(0)
            x, storage = product_of(3, 40, dtype, start=1, gap=3)
            selected = Selected(ids, torch.full(ids.shape, NAN))
            chunk = Chunk(x, None, LogitTransform(sign), 100)
            backend.take_selected(chunk, selected)
            taken, found = storage.clone(), selected.values.clone()
            transposed = x.new_zeros(40, 3)
            backend.put_selected(chunk, Selected(ids, torch.randn(ids.shape)), transposed)
            if backend is cuda:
                assert torch.equal(transposed, x.T)
            results.append((taken, found, storage))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert (taken == -sign * INF).sum() == 3 and found.isnan().sum() == 9


@pytest.mark.parametrize("cols", [40, 3000, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(cols, dtype):
    """NaN, infinities, rows of -inf, ties: state and argmax as the reference has them."""
    x, _ = product_of(9, cols, dtype)
    x[0, 7] = NAN
    x[1, 5] = x[1, 30] = NAN
    x[2, cols - 1] = INF
    x[3] = -INF
    x[4, ::2] = -INF
    x[5, 3] = x[5, 9] = x[5, 39] = 50.0
    x[6, 0] = -INF
    x[7] = 0.0
    x[8] = -INF
    x[8, 11] = NAN
    target = torch.arange(9)
    for bias in (None, torch.zeros(cols)):
        ours, theirs = states(x, bias, PLAIN, target)
        for row in range(STATE_ROWS):
            # A second largest beside infinity or NaN has no use.
            rows = slice(3, 8) if row == 6 else slice(None)
            close(ours[row, rows], theirs[row, rows], f"state {row}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cols", "start", "gap"), [(41, 3, 0), (300, 5, 3), (9001, 7, 2)])
def test_the_first_of_equal_maxima(cols, start, gap, dtype):
    """Of rows that begin anywhere; `states` compares argmax with the reference."""
    for spread in (0.0, 0.5):
        x, _ = product_of(12, cols, dtype, start, gap)
        x.copy_(torch.randint(-3, 4, x.shape) * spread)
        x[0], x[1, 5:] = -INF, NAN
        x[2, 0] = x[2, cols - 1] = x[3, cols - 2] = x[3, cols - 1] = 9.0
        states(x, None, PLAIN, torch.randint(2 * cols, (12,)))


@pytest.mark.parametrize("cols", [9, 700, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_choice(cols, dtype):
    x, _ = product_of(7, cols, dtype, start=1, gap=2)
    x[3] = x[3].round()  # many equal values
    x[4, 5:] = -INF
    bias = torch.randn(cols)
    numbers = torch.arange(7) + 2**33
    k = 5
    results = []
    for backend in (cuda, reference):
        values = torch.full((7, k), -INF)
        ids = torch.full((7, k), -1)
        best, logit = torch.full((7,), -INF), torch.full((7,), -INF)
        drawn = torch.zeros(7, dtype=torch.int64)
        # Offsets that are no multiple of 4 cut through a group of random words.
        for part, offset in ((x, 0), (x[:, :6], cols), (x, cols + 6)):
            chunk = Chunk(part, bias[: part.shape[1]], CAPPED, offset)
            backend.top_k_update(chunk, values, ids)
            backend.gumbel_update(chunk, -3, numbers, best, logit, drawn)
        results.append((values, ids, best, logit, drawn))
    for ours, theirs in zip(*results, strict=True):
        if theirs.is_floating_point():
            close(ours, theirs)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "cols", "block"), [(70, 300, 32), (200, 5003, 96), (40, 520, 4096)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_mark_active(rows, cols, block, dtype, transform):
    x, _ = product_of(rows, cols, dtype, gap=-cols % 64)
    x[3, 17] = NAN
    bias = None
    if transform is CAPPED:
        bias = torch.randn(cols)
        bias[::7] = -INF
    target = torch.randint(-cols, 2 * cols, (rows,))
    norm = torch.randn(2, rows) * 0.1
    of = RowGradient(target, norm, torch.zeros(4, rows))
    given = Chunk(x, bias, transform, 5), of, 6.0 if transform is PLAIN else 8.0, block, 96, None
    ours, theirs = (backend.mark_active(*given) for backend in (cuda, reference))
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.counts, theirs.counts)
    assert 0 < ours.mask.sum() < ours.mask.numel()


# Rows on 16 bytes or not; buckets of a strip of 2048 columns, of several, and of part of one.
@pytest.mark.parametrize(
    ("rows", "cols", "block", "bucket", "start", "gap"),
    [
        (70, 300, 32, 64, 0, 20),
        (200, 5003, 96, 2048, 0, 5),
        (130, 4500, 64, 4096, 3, 4),
        (70, 5000, 32, 4352, 0, 8),
        (40, 520, 4096, 192, 0, 0),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take_active(rows, cols, block, bucket, start, gap, dtype):
    dz, mask = active_examples.example(rows, cols, dtype, block, bucket, start, gap)
    tail_weights = active_examples.tail_weights(cols)
    tail_weights[cols // bucket * bucket :] = 0  # of a tail that is there
    active_examples.assert_same(cuda, Chunk(dz), mask, block, bucket, tail_weights)
    of = active_examples.row_gradient(rows, cols, 0)
    chunk = Chunk(dz, None, CAPPED)
    active_examples.assert_same(cuda, chunk, mask, block, bucket, tail_weights, of, rounded=True)


def test_take_active_refuses_other_layouts():
    too_few = "tail_weights", lambda t: t[1:], "200"
    in_double = "tail_weights", torch.Tensor.double, "tail_weights"
    active_examples.assert_refuses_other_layouts(cuda, "blocks of 40", too_few, in_double)


@pytest.mark.parametrize("width", [1, 24, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bucket_sums(width, dtype):
    matrix = torch.randn(45, width + 3).to(dtype)[:, :width]
    weights = active_examples.tail_weights(45)
    for bucket in (16, 20):
        sums = [side.bucket_sums(matrix, bucket, weights) for side in (cuda, reference)]
        close(*sums)
    with pytest.raises(RuntimeError, match="45"):
        cuda.bucket_sums(matrix, 20, weights[1:])
    with pytest.raises(RuntimeError, match="tail_weights"):
        cuda.bucket_sums(matrix, 20, weights.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95, 1.0])
def test_scan(dtype, left, gamma):
    """Rows that begin anywhere, longer than a block; documents; infinity stays what it is."""

    def assert_same(x, mask, cu):
        close(*(side.scan(x, mask, cu, gamma, left) for side in (cuda, reference)))

    for rows, length in ((3, 7), (2, 5001), (5, 64)):
        x = torch.randn(rows, length).to(dtype)
        mask = torch.rand(rows, length) < 0.7
        for some in (None, mask):
            assert_same(x, some, None)
    x = torch.randn(1, 3000).to(dtype)
    assert_same(x, None, torch.tensor([0, 1, 1, 9, 700, 2900, 3000]))
    # Over more positions than gamma's powers have exponents, and than a block has values.
    x = torch.randn(3, 5000).to(dtype)
    x[0, 2500], x[1, 2400], x[2, 2321] = INF, -INF, NAN
    assert_same(x, None, None)
