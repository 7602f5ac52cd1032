"""The active set and the sync-free mode of the Triton backend in Triton's interpreter."""

import contextlib
import functools

import pytest
import torch

import active_examples
import dense
import ift_kernels as K
import interpreter
from dense import distance
from ift_kernels.backends import reference
from ift_kernels.backends import triton as backend
from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.triton import launch
from ift_kernels.common import sync_free
from ift_kernels.common.transform import LogitTransform
from ift_kernels.operators import head_call, linear_stats

interpreter.like_a_gpu()


SOME = K.ActiveSet(threshold=2.0**-5, block=32, tail_bucket=64)


@pytest.fixture(autouse=True)
def served_by_triton(sparse):
    small = {"COLUMNS": 64, "INNER": 16, "num_warps": 1}  # each step costs, however small
    with K.use_backend("triton"), launch.use_config("fused", small):
        yield


def gradients(h, gradient, backend_name="triton"):
    outputs = "logprob", "entropy"
    with K.use_backend(backend_name):
        stats = K.linear_logprobs(*h.args, outputs=outputs, gradient=gradient, **h.kwargs)
        up = dense.upstream(h, outputs)
        inputs = [t for t in h.inputs if t.requires_grad]
        return [stats.logprob, *dense.gradients(dense.send(stats, up), inputs)]


@functools.cache
def active_head(dtype, full):
    options = dense.TRANSFORM if full else {}
    return dense.head(35, 13, 139, dtype, bias=full, seed=3, **options)


@pytest.mark.parametrize(
    ("trained", "dtype", "full"),
    [(True, torch.float32, True), (True, torch.bfloat16, False), (False, torch.bfloat16, True)],
)
def test_active_gradients(full, dtype, trained):
    h = active_head(dtype, full)
    if not trained:
        h = dense.Head(h.hidden, h.weight.detach(), h.target, options=h.options)
    exact = gradients(h.double(), "exact", "reference")
    dense_error = [
        distance(*two) for two in zip(gradients(h, "exact", "reference"), exact, strict=False)
    ]
    everything = gradients(h, K.ActiveSet(threshold=0.0, block=32, tail_bucket=64))
    rounding = 4e-6 if dtype == torch.float32 else 4e-3
    for a, b, error in zip(everything, exact, dense_error, strict=False):
        assert distance(a, b) <= 2 * error + rounding
    ours, theirs = gradients(h, SOME), gradients(h, SOME, "reference")
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= rounding
    assert distance(theirs[1], exact[1]) > 2 * rounding  # it does approximate


def certain_head():
    """Every token is its target's for sure: its gradient is a small difference of large numbers."""
    h = dense.head(33, 16, 139, torch.bfloat16, ignored=0.0, seed=5)
    with torch.no_grad():
        h.hidden.copy_(h.weight[h.target] * 1.37)
    return h


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_of_certain_tokens(trained):
    h = certain_head()
    weight = h.weight if trained else h.weight.detach()
    stats = K.linear_logprobs(h.hidden, weight, h.target, gradient="active")
    ours = torch.autograd.grad(-stats.logprob.sum(), h.inputs if trained else [h.hidden])
    double = h.double()
    exact = dense.gradients(-dense.stats(double)["logprob"].sum(), double.inputs)
    rounded = dense.gradients(-dense.stats(h)["logprob"].sum(), h.inputs)
    for a, b, c in zip(ours, exact, rounded, strict=False):
        assert distance(a, b) <= 2 * distance(c, b) + 4e-3


def test_active_set_is_reported():
    h = active_head(torch.float32, False)
    with K.record_active_sets() as report:
        gradients(h, SOME)
    assert 0 < report[0].share < 1 and 0 < report[0].tail_mean < 1 and report[0].tiles == 1


def test_nan_reaches_active_gradients():
    h = dense.head(40, 13, 139, ignored=0.0)
    with torch.no_grad():
        h.hidden[35, 3] = torch.nan
    _, d_hidden, d_weight = gradients(h, SOME)
    assert d_hidden[35].isnan().all() and d_weight.isnan().any(1).all()
    assert d_hidden[:32].isfinite().all()


@pytest.mark.parametrize("gradient", ["exact", SOME], ids=["exact", "active"])
def test_sync_free(gradient, monkeypatch):
    h = dense.head(35, 13, 139, torch.float32, bias=True, seed=3, **dense.TRANSFORM)
    with torch.no_grad():
        h.hidden[h.target == -100] = torch.nan  # of rows that do not count
    wanted = gradients(h, "exact")  # how many columns are active depends on data
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse_on_data(getattr(torch.Tensor, name)))
        for module in (linear_stats, head_call):  # it looks on the CPU alone
            patch.setattr(module, "check_targets", lambda *_: None)
        with sync_free.sync_free():
            ours = gradients(h, gradient)
    for a, b in zip(ours, wanted, strict=True):
        assert distance(a, b) < 2e-6
    assert not ours[1][h.target == -100].any()


def refuse_on_data(original):
    """What would wait for a GPU, unless a kernel of the interpreter does."""
    import traceback

    def wrapper(tensor, *args):
        callers = traceback.extract_stack()[:-1]
        in_triton = any("/triton/runtime/" in frame.filename for frame in callers)
        assert in_triton or "autograd" in callers[-1].filename, f"asks for data: {callers[-1]}"
        return original(tensor, *args)

    return wrapper


def test_sync_free_loss():
    h = active_head(torch.float32, False)
    for kwargs in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}):
        results = []
        for mode in (False, True):
            with sync_free.sync_free() if mode else K.use_backend("triton"):
                loss = K.linear_cross_entropy(h.hidden, h.weight, h.target, **kwargs)
                results.append([loss, *torch.autograd.grad(loss, h.inputs)])
        for a, b in zip(*results, strict=True):
            assert distance(a, b) < 2e-6


def small_blocks(bucket):
    """Of all kernels, or their loops would hardly go round."""
    stack = contextlib.ExitStack()
    for name, values in {
        "mark": {"ROWS": 64, "BLOCK": 128 if bucket == 64 else 32},
        "mask": {"ROWS": 32, "BLOCK": 64},
        "list": {"BLOCK": 32},
        "take": {"ROWS": 8, "BLOCK": 32},
    }.items():
        stack.enter_context(launch.use_config(name, values | {"num_warps": 1}))
    return stack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [True, False], ids=["small", "committed"])
@pytest.mark.parametrize(
    ("rows", "columns", "block", "bucket", "gap"),
    [(70, 200, 32, 64, 5), (96, 128, 32, 128, 0), (40, 300, 64, 192, 20), (70, 150, 32, 2048, 2)],
)
def test_take_active(rows, columns, block, bucket, gap, small, dtype):
    dz, mask = active_examples.example(rows, columns, dtype, block, bucket, gap=gap)
    tail_weights = torch.rand(columns, generator=torch.Generator().manual_seed(columns))
    tail_weights[::7] = 0
    tail_weights[bucket : 2 * bucket] = 0  # a tail with nothing to spread it over
    # Every loop goes round, and a bucket may end within a block of columns.
    with small_blocks(bucket) if small else contextlib.nullcontext():
        active_examples.assert_same(backend, Chunk(dz), mask, block, bucket, tail_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(None, offset=7),
        Chunk(None, torch.empty(0), LogitTransform(0.7, 5.0, 1.3)),
        Chunk(None, torch.empty(0), LogitTransform(1.3), 1000),
    ],
    ids=["plain", "softcap", "bias"],
)
@pytest.mark.parametrize(
    ("rows", "columns", "block", "bucket", "gap"),
    [(70, 200, 32, 64, 8), (40, 301, 64, 192, 19), (33, 150, 32, 2048, 3)],
)
def test_take_of_products(rows, columns, block, bucket, gap, chunk, dtype):
    """Gradients are formed meanwhile, rows padded or not; rows without upstream have no NaN."""
    x, mask = active_examples.example(rows, columns, dtype, block, bucket, gap=gap)
    x[3, 1:20] = torch.nan
    if chunk.bias is not None:
        bias = torch.linspace(-1, 1, columns)
        bias[5::9] = -torch.inf
        chunk = chunk._replace(bias=bias)
    of = active_examples.row_gradient(rows, columns, chunk.offset)
    weights = active_examples.tail_weights(columns)
    active_examples.assert_same(backend, chunk._replace(x=x), mask, block, bucket, weights, of)


@pytest.mark.parametrize(
    ("small", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(
    ("rows", "columns", "block", "bucket", "bias"),
    [
        (70, 200, 32, 64, False),
        (100, 150, 96, 64, True),  # a block that is no power of two
        (70, 150, 64, 2048, True),
        (200, 90, 160, 64, False),  # more rows than a program has
    ],
)
def test_mark_active(rows, columns, block, bucket, bias, small, dtype):
    """Mask, counts and tail gradient in one pass; a NaN is active, its row has one in its tail."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.full((rows, columns + 7), torch.nan, dtype=dtype)[:, :columns]
    x.copy_(torch.randn(rows, columns, generator=generator))
    of = active_examples.row_gradient(rows, columns, 7)
    of = of._replace(norm=torch.stack([torch.ones(rows), torch.rand(rows, generator=generator)]))
    x[3, 1:20] = torch.nan  # of a row without upstream gradient
    x[5, 2] = torch.nan
    b, transform = None, LogitTransform(1.3)
    if bias:
        b, transform = torch.linspace(-1, 1, columns), LogitTransform(0.7, 5.0, 1.3)
        b[5::9] = -torch.inf
    weights = active_examples.tail_weights(columns)
    given = Chunk(x, b, transform, 7), of, 1.7, block, bucket, weights
    wanted = reference.mark_active(*given)
    with small_blocks(bucket) if small else contextlib.nullcontext():
        found = backend.mark_active(*given)
        without = backend.mark_active(*given[:-1], None)
    assert 0 < found.mask.float().mean() < 1 and without.tail_gradient is None
    for ours in (found, without):
        assert torch.equal(ours.mask, wanted.mask) and torch.equal(ours.counts, wanted.counts)
    torch.testing.assert_close(found.tail_gradient, wanted.tail_gradient, rtol=1e-5, atol=4e-6,
                               equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [True, False], ids=["small", "committed"])
@pytest.mark.parametrize(
    ("rows", "width", "columns", "block"),
    [
        (70, 40, 200, 32),
        (96, 64, 500, 96),
        (40, 13, 300, 64),
        (300, 33, 90, 160),
        (1090, 5, 40, 32),
    ],
)
def test_products_of_active_columns(rows, width, columns, block, small, dtype):
    """Head rows that are not active are never read, nor is what pads the active columns."""
    generator = torch.Generator().manual_seed(rows)
    dz, mask = active_examples.example(rows, columns, dtype, block, 64)
    dz.nan_to_num_(0.5)
    weight = torch.randn(columns, width, generator=generator).to(dtype)
    weight[0] = torch.inf  # active in few blocks, if in any
    mask[:, 0] = 0
    zeros = torch.zeros(columns)
    _, active, ids, counts = active_examples.take(reference, Chunk(dz), mask, block, 64, zeros)
    active[active == active_examples.UNTOUCHED] = torch.nan  # rows beyond the last
    total = torch.randn(rows, width + 3, generator=generator)[:, :width]
    chosen = mask.repeat_interleave(block, 0)[:rows].bool()
    wanted = total.double() + torch.where(chosen, dz.double(), 0.0) @ weight.double().nan_to_num(
        posinf=0.0
    )
    values = {"ROWS": 16, "COLUMNS": 16, "INNER": 32, "num_warps": 1}
    with launch.use_config("gathered", values) if small else contextlib.nullcontext():
        operands = active, counts, block, ids, weight
        for parts in (1, 3):
            added = total.clone()
            assert backend.add_active_products(*operands, added, parts)
            torch.testing.assert_close(added.double(), wanted, rtol=1e-4, atol=1e-4)


def test_take_active_refuses_other_layouts():
    def columns_first(t):
        return t.T.contiguous().T

    active_examples.assert_refuses_other_layouts(
        backend,
        "blocks of 40",
        ("tail", columns_first, "tail_gradient"),
        ("tail", torch.Tensor.double, "tail_gradient"),
        ("chunk", lambda chunk: chunk._replace(x=columns_first(chunk.x)), "x: "),
        ("tail_weights", lambda t: t[1:], "tail_weights"),
    )


@pytest.mark.parametrize("name", ["transposed", "strided", "expanded"])
def test_layouts_of_hidden(name):
    """Kernels read rows of consecutive elements; the caller may have others."""
    h = dense.head(20, 13, 70, ignored=0)  # a choice of rows would be a copy
    with torch.no_grad():
        hidden = {
            "transposed": h.hidden.T.contiguous().T,
            "strided": h.hidden.repeat_interleave(2, 1)[:, ::2],
            "expanded": h.hidden[:1, :1].expand(h.hidden.shape),
        }[name]
    ours, wanted = (
        gradients(dense.replace(h, hidden=layout.requires_grad_()), SOME)
        for layout in (hidden.detach(), hidden.detach().contiguous())
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)
