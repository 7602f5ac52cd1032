"""linear_logprobs: every output and gradient against full logits in fp64, whatever the schedule."""

import functools

import pytest
import torch

import dense
from ift_kernels import linear_logprobs
from ift_kernels.schedule import plan
from serving import DTYPES

SMALL = 1 << 20  # the smallest workspace allowed

SHAPES = {
    "one-of-all": (1, 1, 1),
    "under-a-vector": (1, 7, 3),  # fewer columns than any vector register has lanes
    "vector-and-tail": (127, 33, 63),
    "one-block": (128, 64, 1024),  # the C++ statistics work on blocks of 1024 columns
    "block-and-one": (3, 5, 1025),
    "groups-of-rows-and-tail": (129, 31, 1001),  # 32 rows are transposed at a time
    "gpt2": (9, 16, 50257),
    "qwen": (9, 9, 151936),
}


def call(h, outputs=dense.OUTPUTS, **options):
    return linear_logprobs(*h.args, outputs=outputs, **h.kwargs, **options)


def check(h, outputs=dense.OUTPUTS, **options):
    """All of `outputs` and their gradients, under non-uniform upstream gradients of both signs."""
    names = tuple(name for name in dense.DIFFERENTIABLE if name in outputs)
    dense.assert_stats_and_gradients(call(h, outputs, **options), h, names)


# Few outputs of a plain head go another way through the C++ code than all of them.
FORMS = {
    "plain": (dense.OUTPUTS, {}),
    "transformed": (dense.OUTPUTS, {"bias": True, **dense.TRANSFORM}),
    "few": (("logprob", "lse", "argmax"), {"temperature": 0.7}),
    "entropy": (("logprob", "entropy"), {}),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients(dtype, shape, form):
    if shape == SHAPES["qwen"] and form not in ("plain", "transformed"):
        pytest.skip("gpt2 has whole blocks and a tail as well")
    outputs, options = FORMS[form]
    check(dense.head(*shape, dtype, **options), outputs)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_scale": -2.5},
        {"logit_scale": 0.0},  # uniform distribution, no gradient to hidden
        {"softcap": 0.5},  # saturates: tanh near ±1
        {"softcap": 1000.0},  # never bends: tanh of tiny arguments
        {"temperature": 0.05},
        {"temperature": 40.0},
    ],
    ids=str,
)
def test_each_option_alone(dtype, options):
    check(dense.head(20, 11, 300, dtype, bias=True, **options))


@pytest.mark.parametrize("name", dense.DIFFERENTIABLE)
def test_gradient_of_each_output_alone(dtype, name):
    check(dense.head(30, 8, 1100, dtype), outputs=(name,))


@pytest.mark.parametrize("name", dense.OUTPUTS)
def test_one_output_alone_is_the_same_and_the_rest_is_none(backend, name):
    h = dense.head(40, 9, 2600)
    alone, all_of_them = call(h, (name,)), call(h)
    for field in dense.FIELDS:
        if field == name:
            torch.testing.assert_close(getattr(alone, field), getattr(all_of_them, field))
        else:
            assert getattr(alone, field) is None
    assert call(h, ()) == (None,) * len(dense.FIELDS)


def test_dtypes_and_which_outputs_carry_gradient(dtype):
    stats = call(dense.head(4, 6, 50, dtype))
    for field, value in stats._asdict().items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert value.dtype == (torch.int64 if field == "argmax" else wide)
        assert value.requires_grad == (field in dense.DIFFERENTIABLE)


# Each subset of inputs that need a gradient: a frozen head, a frozen trunk, the bias alone.
@pytest.mark.parametrize("needs", range(1, 8), ids=lambda n: f"needs-{n:03b}")
@pytest.mark.parametrize("workspace", [SMALL, None], ids=["small", "default"])
def test_gradients_only_of_what_needs_them(backend, needs, workspace):
    h = dense.head(520, 6, 1500, bias=True, **dense.TRANSFORM)
    up = dense.upstream(h)
    whole = dense.gradients(dense.send(call(h), up), h.inputs)
    part = h.map(lambda t: t.detach().clone())

    def loss():
        return dense.send(call(part, workspace=workspace), up)

    dense.assert_only_needed(part.inputs, needs, loss, whole, rtol=1e-5, atol=1e-4)


# Products of 520 x 2500 do not fit 1 MiB in either direction, and 311 wide, neither does the
# running sum of the hidden gradient in half types: dh and dW then come from separate passes.
MANY = (520, 311, 2500)


def keeps(dtype):
    """A workspace where some products stay until backward, the rest do not fit."""
    return (4 if dtype.itemsize == 2 else 5) * SMALL + 4321


SCHEDULES = {
    "tiles": ("recompute", lambda dtype: SMALL),
    "keep-some": ("keep", keeps),
    "keep-all": ("keep", lambda dtype: None),
}


@functools.cache
def many(dtype):
    """Such a head, upstream gradients, and what they give in plain torch in its dtype and fp64."""
    h = dense.head(*MANY, dtype, bias=True)
    up = dense.upstream(h, ("logprob", "entropy"))
    grads = [dense.gradients(dense.send(dense.stats(x), up), x.inputs) for x in (h, h.double())]
    return h, up, list(zip(*grads, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tiles_and_schedules_do_not_matter(dtype, schedule):
    name, workspace = SCHEDULES[schedule]
    h, up, wanted = many(dtype)
    with plan.use_schedule(name):
        stats = call(h, tuple(up), workspace=workspace(dtype))
        grads = dense.gradients(dense.send(stats, up), h.inputs)
    dense.assert_stats(stats, h)
    for ours, (theirs, exact) in zip(grads, wanted, strict=True):
        assert ours.dtype == dtype
        dense.assert_as_accurate(ours, theirs, exact)


def test_the_small_workspaces_reach_every_path():
    """Or the test above would say less than it seems to."""
    n, d, v = MANY
    both = plan.explain(n, v, d, torch.bfloat16, workspace=SMALL)
    assert both.hidden_rows < n and both.tile_columns < v
    both = plan.explain(n, v, d, torch.float32, workspace=SMALL)
    assert both.tile_rows < n and both.tile_columns < v
    for dtype in DTYPES:
        some = plan.explain(n, v, d, dtype, workspace=keeps(dtype))
        assert some.schedule == "keep" and 0 < some.keep_columns < v
    frozen = plan.explain(n, v, d, torch.bfloat16, need_weight=False, workspace=SMALL)
    assert frozen.tile_rows < n


@pytest.mark.parametrize("frozen", ["head", "trunk"])
def test_one_sided_gradients_in_tiles(dtype, frozen):
    h, up, wanted = many(dtype)
    i = int(frozen == "trunk")
    h = h.map(lambda t: t.detach())
    h.inputs[i].requires_grad_()
    (ours,) = dense.gradients(dense.send(call(h, tuple(up), workspace=SMALL), up), [h.inputs[i]])
    dense.assert_as_accurate(ours, *wanted[i])


def strided(t):
    """The same values behind gaps, the fastest dimension not unit stride."""
    buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7)
    buffer[..., 1::2] = t
    return buffer[..., 1::2]


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else strided(t),
    "strided": strided,
    "sliced": lambda t: torch.cat([t, t])[: len(t)],
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(37,), (5, 7)], ids=["flat", "batched"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_layouts(backend, layout, batch, half):
    h = dense.head(batch, 9, 130, torch.bfloat16 if half else torch.float32, bias=True)
    change = LAYOUTS[layout]
    moved = dense.replace(
        h.map(lambda t: change(t.detach()).requires_grad_()), target=change(h.target)
    )
    up = dense.upstream(h)
    results = [(call(x), x) for x in (h, moved)]
    grads = [dense.gradients(dense.send(s, up), x.inputs) for s, x in results]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
    mine, theirs = ((*results[i][0], *grads[i]) for i in (1, 0))
    torch.testing.assert_close(mine, theirs, **tolerance)
    for tensor, grad in zip(moved.inputs, grads[1], strict=True):
        assert grad.shape == tensor.shape


def test_expanded_inputs(backend):
    hidden = torch.randn(1, 6).expand(8, 6)
    weight = torch.randn(1, 6).expand(20, 6)  # a uniform distribution
    target = torch.tensor(3).expand(8)
    got = linear_logprobs(hidden, weight, target).logprob
    torch.testing.assert_close(got, torch.full((8,), -torch.tensor(20.0).log()))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (2, 0), (2, 0, 3), (2, 3, 4)], ids=str)
def test_every_batch_shape(backend, shape):
    h = dense.head(shape, 6, 40, bias=True, ignored=0.3)
    stats = call(h)
    dense.assert_stats(stats, h)
    sum(getattr(stats, name).sum() for name in dense.DIFFERENTIABLE).backward()
    for tensor in h.inputs:
        assert tensor.grad.shape == tensor.shape
        if 0 in shape:
            assert (tensor.grad == 0).all()


@pytest.mark.parametrize("schedule", plan.SCHEDULES)
def test_everything_ignored(dtype, schedule):
    h = dense.head((3, 5), 6, 40, dtype, bias=True)
    h.target.fill_(-100)
    with plan.use_schedule(schedule):
        stats = call(h)
        for value in stats:
            assert value.shape == (3, 5) and (value == 0).all()
        grads = dense.gradients(dense.send(stats, dense.upstream(h)), h.inputs)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("ignore_index", [-1, 0, 7, 2**40], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_ignore_index_and_kinds_of_target(backend, ignore_index, kind):
    if kind == torch.int32 and ignore_index > 2**31:
        ignore_index = -(2**31)
    h = dense.head(50, 6, 12, ignored=0)
    h.target[::3] = ignore_index
    got = linear_logprobs(h.hidden, h.weight, h.target.to(kind), ignore_index=ignore_index)
    wanted = dense.stats(h, ignore_index)["logprob"]
    torch.testing.assert_close(got.logprob, wanted, rtol=1e-5, atol=1e-5)
    mine, theirs = (dense.gradients(x.sum(), h.inputs) for x in (got.logprob, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert (mine[0][::3] == 0).all()
