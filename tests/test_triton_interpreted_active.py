"""The active set and the sync-free mode of the Triton backend in Triton's interpreter."""

import contextlib
import functools

import pytest
import torch

import dense
import ift_kernels as K
import interpreter
import taken_apart
from ift_kernels import active_hidden, active_op, head_call, linear_ops, syncfree
from ift_kernels.backends import reference
from ift_kernels.backends import triton as backend
from ift_kernels.backends.triton import active_schedule, gathered, launch
from ift_kernels.transform import LogitTransform

interpreter.round_to_nearest()


@pytest.fixture(autouse=True)
def served_by_triton(monkeypatch):
    monkeypatch.setattr(active_hidden, "DENSE_SHARE", 2.0)  # no tile is left dense
    small = {"COLUMNS": 64, "INNER": 16, "num_warps": 1}  # each step costs, however small
    with K.use_backend("triton"), launch.use_config("fused", small):
        yield


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradients(h, gradient, backend_name="triton", sync_free=False, workspace=None):
    with K.use_backend(backend_name):
        if sync_free:
            with syncfree.sync_free():
                return gradients(h, gradient, backend_name, False, workspace)
        stats = K.linear_logprobs(
            h.hidden, h.weight, h.target, outputs=("logprob", "entropy"), gradient=gradient,
            workspace=workspace, **h.kwargs,
        )  # fmt: skip
        up = dense.upstream(h, ("logprob", "entropy"))
        return [stats.logprob, *dense.gradients(dense.send(stats, up), h.inputs)]


@functools.cache
def active_head(dtype, full):
    options = dense.TRANSFORM if full else {}
    return dense.head(35, 13, 139, dtype, bias=full, seed=3, **options)


@pytest.mark.parametrize(
    ("dW", "dtype", "full"),
    [
        ("active", torch.float32, True),
        ("active", torch.bfloat16, False),
        ("active", torch.bfloat16, True),
        ("dense", torch.bfloat16, False),
    ],
)
def test_active_gradients(full, dtype, dW):
    h = active_head(dtype, full)
    exact = gradients(h.double(), "exact", "reference")
    dense_error = [
        distance(*two) for two in zip(gradients(h, "exact", "reference"), exact, strict=True)
    ]
    everything = gradients(h, K.ActiveSet(threshold=0.0, block=32, tail_tile=64, dW=dW))
    rounding = 4e-6 if dtype == torch.float32 else 4e-3
    for a, b, error in zip(everything, exact, dense_error, strict=True):
        assert distance(a, b) <= 2 * error + rounding
    some = K.ActiveSet(threshold=2.0**-5, block=32, tail_tile=64, dW=dW)
    ours, theirs = gradients(h, some), gradients(h, some, "reference")
    for a, b, c in zip(ours, theirs, exact, strict=True):
        # Marked against a smaller log-sum-exp: a superset, so as near at least.
        assert distance(a, c) <= 1.1 * distance(b, c) + rounding


def test_active_gradients_in_several_ranges(monkeypatch):
    h = active_head(torch.float32, True)
    chosen = K.ActiveSet(threshold=2.0**-5, block=32, tail_tile=64, dW="active")
    whole, calls = gradients(h, chosen), []
    ranges = active_schedule._ranges
    monkeypatch.setattr(
        active_schedule, "_ranges",
        lambda marks, tail, capacity: calls.extend(ranges(marks, tail, 30)) or iter(calls),
    )  # fmt: skip
    for a, b in zip(gradients(h, chosen), whole, strict=True):
        assert distance(a, b) < 1e-6
    assert len(calls) > 2


def test_active_gradients_of_a_frozen_head():
    h = active_head(torch.float32, False)
    chosen = K.ActiveSet(threshold=2.0**-5, block=32, tail_tile=64)
    both = gradients(h, K.ActiveSet(threshold=2.0**-5, block=32, tail_tile=64, dW="active"))
    frozen = K.linear_logprobs(
        h.hidden, h.weight.detach(), h.target, outputs=("logprob", "entropy"), gradient=chosen
    )
    up = dense.send(frozen, dense.upstream(h, ("logprob", "entropy")))
    assert distance(torch.autograd.grad(up, h.hidden)[0], both[1]) < 1e-6


def certain_head():
    """Every token is its target's for sure: its gradient is a small difference of large numbers."""
    h = dense.head(33, 16, 139, torch.bfloat16, ignored=0.0, seed=5)
    with torch.no_grad():
        h.hidden.copy_(h.weight[h.target] * 1.37)
    return h


@pytest.mark.parametrize("kept", ["kept", "formed again", "not kept"])
def test_gradients_of_certain_tokens(kept):
    """Forward and backward round products alike, whether or not forward left a set.

    With products rounded in one and not in the other, 1 − p would be off by up to 2⁻⁸·z.
    """
    h = certain_head()
    chosen = K.ActiveSet(threshold=2.0**-12, block=32, tail_tile=64, dW="active")
    with pytest.MonkeyPatch.context() as patch:
        if kept == "not kept":  # forward takes the vendor's products, and leaves nothing
            patch.setattr(active_op.active, "tiling", lambda *_: None)
        stats = K.linear_logprobs(h.hidden, h.weight, h.target, gradient=chosen)
    loss = -stats.logprob.sum()
    ours = torch.autograd.grad(loss, h.inputs, retain_graph=True)
    if kept == "formed again":
        ours = torch.autograd.grad(loss, h.inputs)
    double = h.double()
    exact = dense.gradients(-dense.stats(double)["logprob"].sum(), double.inputs)
    rounded = dense.gradients(-dense.stats(h)["logprob"].sum(), h.inputs)
    for a, b, c in zip(ours, exact, rounded, strict=True):
        assert distance(a, b) <= 2 * distance(c, b) + 4e-3
        assert distance(a, b) < 0.02  # float32 all the way, better than the dense formula


def test_active_set_is_reported():
    h = active_head(torch.float32, False)
    chosen = K.ActiveSet(threshold=2.0**-5, block=32, tail_tile=64, dW="active")
    with K.record_active_sets() as report:
        gradients(h, chosen)
    assert 0 < report[0].share < 1 and 0 < report[0].tail_mean < 1 and report[0].tiles == 1


@pytest.mark.parametrize("dW", ["dense", "active"])
def test_nan_reaches_active_gradients(dW):
    h = dense.head(40, 13, 139, ignored=0.0)
    with torch.no_grad():
        h.hidden[35, 3] = torch.nan
    chosen = K.ActiveSet(threshold=2.0**-5, block=32, tail_tile=64, dW=dW)
    _, d_hidden, d_weight = gradients(h, chosen)
    assert d_hidden[35].isnan().all() and d_weight.isnan().any(1).all()
    assert d_hidden[:32].isfinite().all()


@pytest.mark.parametrize(
    "gradient",
    ["exact", K.ActiveSet(0.0, 32, 64, "active"), K.ActiveSet(0.0, 32, 64)],
    ids=["exact", "active", "dense"],
)
def test_sync_free(gradient, monkeypatch):
    h = dense.head(35, 13, 139, torch.float32, bias=True, seed=3, **dense.TRANSFORM)
    with torch.no_grad():
        h.hidden[h.target == -100] = torch.nan  # of rows that do not count
    wanted = gradients(h, gradient)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse_on_data(getattr(torch.Tensor, name)))
        for module in (linear_ops, head_call):  # it looks on the CPU alone
            patch.setattr(module, "check_targets", lambda *_: None)
        ours = gradients(h, gradient, sync_free=True)
    for a, b in zip(ours, wanted, strict=True):
        assert distance(a, b) < 2e-6
    assert not ours[1][h.target == -100].any()


def refuse_on_data(original):
    """What would wait for a GPU, unless it asks the layout, which lives on the CPU, or a kernel
    of the interpreter does."""
    import traceback

    def wrapper(tensor, *args):
        callers = traceback.extract_stack()[:-1]
        if any("/triton/runtime/" in frame.filename for frame in callers):
            return original(tensor, *args)
        if "autograd" in callers[-1].filename or tensor.shape in ((3,), (2, 3)):
            return original(tensor, *args)
        raise AssertionError(f"asks for data: {callers[-1]}")

    return wrapper


def test_sync_free_overflow_is_not_silent(monkeypatch):
    h = active_head(torch.float32, False)
    chosen = K.ActiveSet(threshold=0.0, block=32, tail_tile=64, dW="active")
    ranges = active_schedule._ranges
    monkeypatch.setattr(active_schedule, "_ranges", lambda m, t, _: ranges(m, t, 50))
    value, d_hidden, d_weight = gradients(h, chosen, sync_free=True)
    counts = h.target != -100
    assert value.isfinite().all() and d_weight.isnan().all()
    assert d_hidden[counts].isnan().all() and not d_hidden[~counts].any()


def test_sync_free_loss():
    h = active_head(torch.float32, False)
    for kwargs in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}):
        results = []
        for mode in (False, True):
            with syncfree.sync_free() if mode else K.use_backend("triton"):
                loss = K.linear_cross_entropy(h.hidden, h.weight, h.target, **kwargs)
                results.append([loss, *torch.autograd.grad(loss, h.inputs)])
        for a, b in zip(*results, strict=True):
            assert distance(a, b) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_items(dtype):
    """Products by id against whole ones, and what the epilogues of the reference make of them."""
    n, d, c, block, tile = 70, 21, 200, 32, 64
    rows, generator = 96, torch.Generator().manual_seed(4)

    def random(*size):
        return torch.randn(size, generator=generator)

    hidden, weight, bias = random(n, d).to(dtype), random(c, d).to(dtype), random(c)
    target = torch.randint(c, (n,), generator=generator)
    norm, coef, base, common = random(2, rows) + 5, random(4, rows), random(4, rows), random(4, d)
    coef[:, n:] = coef[:, 5] = 0
    profile = torch.rand(c, generator=generator)
    profile[::3] = 0
    marks = (torch.rand(3, c, generator=generator) < 0.3).to(torch.uint8)
    items, transform = gathered.Items.of(marks, int(marks.sum()), block), LogitTransform(0.7, 5.0)
    epilogue = bias, transform, target, 0, norm, coef, base, tile, profile
    store = items.gradients(hidden, weight, *epilogue)

    number, ids = items.pairs.T
    padded = torch.nn.functional.pad(hidden.float(), (0, 0, 0, rows - n)).view(3, block, d)
    wanted = torch.einsum("id,ibd->ib", weight[ids].float(), padded[number])
    reference.active_gradient_(wanted, items.pairs, n, *epilogue)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(store.float(), wanted, rtol=max(eps, 1e-5), atol=1e-5)

    out, wanted = torch.empty(2, c, d, dtype=dtype)
    items.weight_gradient(store, hidden, common, tile, profile, out)
    parts = torch.einsum("ib,ibd->id", store.float(), padded[number])
    reference.combine_rows(parts, ids, common, tile, profile, wanted, False)
    torch.testing.assert_close(out, wanted, rtol=max(eps, 1e-5), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [True, False], ids=["small", "committed"])
@pytest.mark.parametrize(
    ("rows", "columns", "block", "tile", "gap"),
    [(70, 200, 32, 64, 5), (96, 128, 32, 128, 0), (40, 300, 64, 192, 20), (70, 150, 32, 2048, 2)],
)
def test_active_rows(rows, columns, block, tile, gap, small, dtype):
    dz, marks = taken_apart.example(rows, columns, dtype, block, tile, gap=gap)
    profile = torch.rand(columns, generator=torch.Generator().manual_seed(columns))
    profile[::7] = 0
    profile[tile : 2 * tile] = 0  # a tail with nothing to spread it over
    results = []
    with contextlib.ExitStack() as stack:
        if small:  # every loop goes round, and a tile may end within a block of columns
            values = {"ROWS": 8, "BLOCK": 128 if tile == 64 else 32, "num_warps": 1}
            stack.enter_context(launch.use_config("rows", values))
        for side in (backend, reference):
            mean, active = taken_apart.outputs(dz, marks, block, tile)
            side.active_rows(dz, marks, block, tile, profile, mean, active)
            results.append((mean, active))
    taken_apart.close(*results, dtype)


def test_active_rows_refuses_other_layouts():
    dz, marks = taken_apart.example(70, 200, torch.float32, 32, 64)
    mean, active = taken_apart.outputs(dz, marks, 32, 64)
    profile = torch.ones(200)
    for change, word in (
        ({"marks": marks[:2]}, "marks"), ({"mean": mean.double()}, "mean"),
        ({"mean": mean.T.contiguous().T}, "mean"), ({"active": active.half()}, "active"),
        ({"active": active[::2]}, "active"), ({"dz": dz.T.contiguous().T}, "dz"),
        ({"profile": profile[1:]}, "profile"),
    ):  # fmt: skip
        arguments = {
            "dz": dz, "marks": marks, "profile": profile, "mean": mean, "active": active, **change
        }  # fmt: skip
        with pytest.raises(RuntimeError, match=word):
            backend.active_rows(block=32, tile=64, **arguments)
    with pytest.raises(RuntimeError, match="block: expected a multiple of 16, got 40"):
        backend.active_rows(dz, marks[:2], 40, 64, profile, mean, active)


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
    set_ = K.ActiveSet(threshold=2.0**-5, block=32, tail_tile=64, dW="active")
    ours, wanted = (
        gradients(dense.replace(h, hidden=layout.requires_grad_()), set_)
        for layout in (hidden.detach(), hidden.detach().contiguous())
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)
