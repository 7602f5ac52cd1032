"""As on 132 multiprocessors, where few rows are cut in up to 64 parts: in the interpreter."""

import math

import pytest
import test_triton_interpreted as interpreted
import torch

import certain_targets as certain
import dense
import ift_kernels as K
from bench.harness import data
from ift_kernels.backends import reference as ref
from ift_kernels.backends import triton as backend
from ift_kernels.backends.contract import STATE_ROWS, TRACK_ALL, Chunk, RowGradient, new_state
from ift_kernels.backends.triton import fused, launch, statistics
from ift_kernels.operators import linear_stats

served_by_triton = interpreted.served_by_triton
KERNELS = "active", "fused"  # which have epilogues of their own
BLOCK = 64  # of columns; a program of the interpreter takes 20 ms, so there are few


@pytest.fixture(autouse=True)
def large_device(monkeypatch):
    for module in (statistics, fused):
        monkeypatch.setattr(module, "multiprocessors", lambda index: 132)
    with launch.use_config("stats", {"BLOCK": BLOCK, "num_warps": 1}):
        yield


@pytest.mark.parametrize(("dtype", "transform", "bias"), interpreted.CASES)
def test_statistics_of_many_parts(dtype, transform, bias):
    rows, columns = (1, 64 * BLOCK) if dtype == torch.float32 else (4, 1003)
    parts = statistics.parts_of(rows, columns, BLOCK, torch.device("cpu"))
    assert parts == min(64, -(-columns // BLOCK))
    ours, theirs = (new_state(rows, torch.device("cpu")) for _ in range(2))
    for seed, offset in enumerate((0, columns)):
        x, b, target = interpreted.products(rows, columns, dtype, bias, seed)
        for side, state in ((backend, ours), (ref, theirs)):
            side.stats_update(Chunk(x, b, transform, offset), target + offset, state, TRACK_ALL)
    assert torch.equal(ours.argmax, theirs.argmax)
    for row in range(STATE_ROWS):  # of the last row: others have infinities
        interpreted.close(ours.values[row, 3:], theirs.values[row, 3:])
    values = (linear_stats.row_values(*state, 2 * columns, TRACK_ALL) for state in (ours, theirs))
    for name, a, b in zip(linear_stats.Statistics._fields, *values, strict=True):
        if name != "norm":
            interpreted.close(a, b)


@interpreted.HEADS
def test_fused_statistics_of_many_parts(options, dtype):
    h = dense.head(16, 20, 1003, dtype, bias=bool(options), **options)
    small = {"ROWS": 16, "COLUMNS": 16, "INNER": 32, "num_warps": 1}  # 16 parts of 64 columns
    forward = launch.use_config("forward", {"FUSED": 1})
    with torch.no_grad(), forward, launch.use_config("fused", small):
        stats = K.linear_logprobs(*h.args, outputs=dense.OUTPUTS, **h.kwargs)
    dense.assert_stats(stats, h)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [*((name, "recompute") for name in certain.TRANSFORMS), *(("softcap", k) for k in KERNELS)],
)
def test_gradient_of_a_nearly_certain_target(name, schedule, sparse):
    transform = certain.TRANSFORMS[name]
    for columns, dtype in ((150, torch.float32), (70, torch.bfloat16)):
        given = certain.tokens(columns, dtype, transform, copies=1)
        if schedule == "fused":  # without a backward
            small = {"ROWS": 16, "COLUMNS": 16, "INNER": 32, "num_warps": 1}
            forward = launch.use_config("forward", {"FUSED": 1})
            with torch.no_grad(), forward, launch.use_config("fused", small):
                certain.assert_logprob(given, transform)
        else:
            certain.assert_gradient(given, transform, schedule)


def true_mask(z, target, threshold, block):
    """Which columns any row of a block gives more than `threshold`, or has as its target."""
    above = z.log_softmax(1) > math.log(threshold)
    above.scatter_(1, target[:, None], True)
    return above.view(-1, block, z.shape[1]).any(1)


def undecided(z, target, threshold, block, tolerance):
    """Columns of a block that rounding may move across the threshold."""
    low, high = (true_mask(z, target, threshold * math.exp(s * tolerance), block) for s in (1, -1))
    return high & ~low


@pytest.mark.parametrize(
    ("dtype", "threshold"), [(torch.float32, 2.0**-12), (torch.bfloat16, 2.0**-8)], ids=str
)
def test_marked_columns_are_those_of_the_final_sum(dtype, threshold):
    """A part's own sum is smaller than the whole one: it would mark several times as many."""
    rows, vocabulary, block, part = 32, 2048, 32, 512
    some = data.generate(rows, 32, vocabulary, dtype=dtype, seed=1)
    x = some.hidden @ some.weight.T
    state = new_state(rows, x.device)
    with launch.use_config("stats", {"BLOCK": part, "num_warps": 1}):
        assert statistics.parts_of(rows, vocabulary, part, x.device) == 4
        backend.stats_update(Chunk(x), some.target, state, 0)
    norm = linear_stats.row_values(*state, vocabulary, 0).norm
    of = RowGradient(some.target, norm.float(), torch.ones(4, rows))
    weights = torch.ones(vocabulary)
    with launch.use_config("mark", {"ROWS": 32, "BLOCK": 128, "num_warps": 1}):
        marked = backend.mark_active(Chunk(x), of, math.log(threshold), block, 512, weights)
    mask = marked.mask.bool()
    z = x.double()
    wanted = true_mask(z, some.target, threshold, block)
    open_ = undecided(z, some.target, threshold, block, 1e-5)
    assert torch.equal(mask[~open_], wanted[~open_]) and open_.sum() <= 8
    share = float(wanted.double().mean())
    assert abs(float(mask.double().mean()) - share) <= float(open_.double().mean())
    # By the sum of each part alone, more would be marked.
    first = torch.zeros_like(some.target)
    by_part = [true_mask(some_z, first, threshold, block) for some_z in z.split(part, 1)]
    assert float(torch.cat(by_part, 1).double().mean()) > 1.5 * share


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_share_of_a_call_is_the_true_one(trained):
    some = data.generate(32, 32, 2048, seed=2)
    hidden = some.hidden.requires_grad_()
    weight = some.weight.requires_grad_(trained)
    options = K.ActiveSet(threshold=2.0**-9, block=32, tail_bucket=512)
    stats = launch.use_config("stats", {"BLOCK": 512, "num_warps": 1})  # four parts
    with stats, K.record_active_sets() as report:
        logprob = K.linear_logprobs(hidden, weight, some.target, gradient=options).logprob
        logprob.sum().backward()
    z = hidden.detach().double() @ weight.detach().double().T
    wanted = true_mask(z, some.target, options.threshold, options.block)
    doubtful = undecided(z, some.target, options.threshold, options.block, 1e-5)
    assert report[0].dense_tiles == 0
    assert abs(report[0].share - float(wanted.double().mean())) <= float(doubtful.double().mean())
