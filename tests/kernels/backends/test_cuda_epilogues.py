"""Each emulated CUDA kernel against the reference, at layouts and values that the engine avoids."""

import math
import sys

import pytest
import torch

import cuda_emulator
import split_examples
from ift_kernels.backends import cuda, reference
from ift_kernels.backends.contract import STATE_ROWS, TRACK_ALL, Chunk, RowGradient, new_state
from ift_kernels.common.transform import LogitTransform

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN, CAPPED = LogitTransform(1.3), LogitTransform(1.3, 20.0, 0.7)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    cuda_emulator.serve(monkeypatch.setattr)


def product_of(rows, cols, dtype, start=0, gap=0, spread=4.0):
    """Products whose rows begin `start` elements into memory and stand `gap` elements apart."""
    storage = torch.full((start + rows * (cols + gap),), NAN, dtype=dtype)
    x = storage[start:].view(rows, cols + gap)[:, :cols]
    return x.copy_(torch.randn(rows, cols) * spread), storage


def close(ours, theirs, dtype, what=""):
    # In the dtype's own rounding where results have it, else float32's over sums of some thousand.
    tolerance = max(2e-5, torch.finfo(ours.dtype).eps * 2 if ours.is_floating_point() else 0)
    scale = max(1.0, theirs.double().nan_to_num(0, 0, 0).abs().max().item())
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * scale * 0.1, equal_nan=True, msg=what or None
    )


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
    states = []
    for backend in (cuda, reference):
        state = new_state(rows, x.device)
        for offset in (0, cols):  # the same products twice: equal values, so the first id stays
            backend.stats_update(Chunk(x, bias, transform, offset), target, state, TRACK_ALL)
        states.append(state)
    (ours, at), (theirs, their_at) = states
    assert torch.equal(at, their_at)
    for row in range(STATE_ROWS):
        close(ours[row], theirs[row], dtype, f"state {row}")
    norm = torch.stack([theirs[0], theirs[1].log()]).float()
    coef = torch.randn(4, rows)
    coef[2, ::2] = 0
    coef[:, -1] = 0
    for function in ("dlogits_", "probabilities_"):
        results = []
        for backend in (cuda, reference):
            memory = storage.clone()
            product = memory[start:].view(rows, cols + gap)[:, :cols]
            chunk = Chunk(product, bias, transform, cols)
            if function == "dlogits_":
                backend.dlogits_(chunk, RowGradient(target, norm, coef))
            else:
                backend.probabilities_(chunk, norm)
            results.append((product, memory))
        close(results[0][0], results[1][0], dtype, function)
        outside = torch.ones(rows, cols + gap, dtype=torch.bool)
        outside[:, :cols] = False
        assert results[0][1][start:].view(rows, -1)[outside].isnan().all()  # nothing beside


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
    bias = torch.zeros(cols)
    for some_bias in (None, bias):
        states = []
        for backend in (cuda, reference):
            state = new_state(9, x.device)
            for offset in (0, cols):
                backend.stats_update(Chunk(x, some_bias, PLAIN, offset), target, state, TRACK_ALL)
            states.append(state)
        (ours, at), (theirs, their_at) = states
        assert torch.equal(at, their_at)
        for row in range(STATE_ROWS):
            if row == 6:  # a second largest beside infinity or NaN has no use
                keep = [3, 4, 5, 6, 7]
                close(ours[row, keep], theirs[row, keep], dtype, "second")
            else:
                close(ours[row], theirs[row], dtype, f"state {row}")


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
            close(ours, theirs, dtype)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "cols", "block"), [(70, 300, 32), (200, 5003, 96), (40, 520, 4096)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_active_mask(rows, cols, block, dtype, transform):
    x, _ = product_of(rows, cols, dtype, gap=-cols % 64)
    x[3, 17] = NAN
    bias = None
    if transform is CAPPED:
        bias = torch.randn(cols)
        bias[::7] = -INF
    target = torch.randint(-cols, 2 * cols, (rows,))
    level = torch.randn(rows) * 0.1 + (6.0 if transform is PLAIN else 8.0)
    ours, theirs = (
        backend.active_mask(Chunk(x, bias, transform, 5), target, level, block)
        for backend in (cuda, reference)
    )
    assert torch.equal(ours, theirs) and 0 < ours.sum() < ours.numel()


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
def test_split_active(rows, cols, block, bucket, start, gap, dtype):
    dz, mask = split_examples.example(rows, cols, dtype, block, bucket, start, gap)
    tail_weights, results = split_examples.tail_weights(cols), []
    tail_weights[cols // bucket * bucket :] = 0  # of a tail that is there
    for backend in (cuda, reference):
        tail_gradient, active = split_examples.outputs(dz, mask, block, bucket)
        backend.split_active(dz, mask, block, bucket, tail_weights, tail_gradient, active)
        results.append((tail_gradient, active))
    split_examples.close(*results, dtype)


def test_split_active_refuses_other_layouts():
    dz, mask = split_examples.example(70, 200, torch.float32, 32, 64)
    tail_gradient, active = split_examples.outputs(dz, mask, 32, 64)
    tail_weights = split_examples.tail_weights(200)
    for change, word in (
        ({"mask": mask[:2]}, "mask"), ({"tail_gradient": tail_gradient.double()}, "tail_gradient"),
        ({"active": active.half()}, "active"), ({"active": active[::2]}, "active"),
        ({"mask": mask[:2], "block": 40}, "blocks of 40"),
        ({"tail_weights": tail_weights[1:]}, "200"),
        ({"tail_weights": tail_weights.double()}, "tail_weights"),
    ):  # fmt: skip
        arguments = {
            "dz": dz,
            "mask": mask,
            "tail_gradient": tail_gradient,
            "active": active,
            "block": 32,
        }
        arguments["tail_weights"] = tail_weights
        with pytest.raises(RuntimeError, match=word):
            cuda.split_active(bucket=64, **(arguments | change))


@pytest.mark.parametrize("width", [1, 24, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bucket_sums(width, dtype):
    matrix = torch.randn(45, width + 3).to(dtype)[:, :width]
    weights = split_examples.tail_weights(45)
    for bucket in (16, 20):
        sums = [side.bucket_sums(matrix, bucket, weights) for side in (cuda, reference)]
        close(*sums, torch.float32)
    with pytest.raises(RuntimeError, match="45"):
        cuda.bucket_sums(matrix, 20, weights[1:])
    with pytest.raises(RuntimeError, match="tail_weights"):
        cuda.bucket_sums(matrix, 20, weights.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95, 1.0])
def test_scan(dtype, left, gamma):
    """Rows that begin anywhere, longer than a block; documents; infinity stays what it is."""
    for rows, length in ((3, 7), (2, 5001), (5, 64)):
        x = torch.randn(rows, length).to(dtype)
        mask = torch.rand(rows, length) < 0.7
        for some in (None, mask):
            ours = cuda.scan(x, some, None, gamma, left)
            close(ours, reference.scan(x, some, None, gamma, left), dtype)
    x = torch.randn(1, 3000).to(dtype)
    cu = torch.tensor([0, 1, 1, 9, 700, 2900, 3000])
    close(cuda.scan(x, None, cu, gamma, left), reference.scan(x, None, cu, gamma, left), dtype)
    # Over more positions than gamma's powers have exponents, and than a block has values.
    x = torch.randn(3, 5000).to(dtype)
    x[0, 2500], x[1, 2400], x[2, 2321] = INF, -INF, NAN
    close(cuda.scan(x, None, None, gamma, left), reference.scan(x, None, None, gamma, left), dtype)
