"""linear_cross_entropy against torch's over full logits in fp64: options, reductions, schedules."""

import pytest
import torch
import torch.nn.functional as F

import dense
from ift_kernels import linear_cross_entropy
from ift_kernels.schedule import plan

SMALL = 1 << 20


def check(h, *, workspace=None, upstream=None, **options):
    """Loss and gradients; `upstream` into the loss, uneven by default for a loss per token."""
    ours = linear_cross_entropy(*h.args, **h.kwargs, workspace=workspace, **options)
    exact = h.double()
    losses = ours, dense.cross_entropy(h, **options), dense.cross_entropy(exact, **options)
    dense.assert_as_accurate(*losses, "loss")
    if upstream is None:
        upstream = 1.0 if ours.dim() == 0 else dense.upstream(h, ("logprob",))["logprob"]
    send = [(loss * torch.as_tensor(upstream).to(loss.dtype)).sum() for loss in losses]
    dense.assert_gradients(dense.gradients(send[0], h.inputs), h, *send[1:], exact.inputs)


LOSSES = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "both": {"label_smoothing": 0.3, "z_loss": 1e-3},
}
REDUCTIONS = {
    "mean": {"reduction": "mean"},
    "num-items": {"reduction": "mean", "num_items": 1000},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
def test_options(dtype, schedule, loss, reduction):
    # 45 rows: a group of 32 and a tail; 1300 columns: a block of 1024 and a tail.
    check(dense.head(45, 13, 1300, dtype, bias=True), **loss, **reduction)


# Blocks of tokens (forward) and tiles (the rest) in the smallest workspace. 200 tokens, because
# blocks have at least 128.
@pytest.mark.parametrize("loss", [{}, LOSSES["both"]], ids=["plain", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tiles(dtype, schedule, loss, reduction):
    h = dense.head(200, 24, 1900, dtype, bias=True, **dense.TRANSFORM)
    check(h, workspace=SMALL, reduction=reduction, **loss)


@pytest.mark.parametrize("v", [50257, 151936], ids=["gpt2", "qwen"])
def test_real_vocabularies(dtype, v):
    check(dense.head(9, 8, v, dtype), z_loss=1e-4)


@pytest.mark.parametrize("upstream", [1.0, -3.5, 0.0, 2.0**-20], ids=str)
def test_any_upstream_gradient(backend, schedule, upstream):
    check(dense.head(45, 13, 700), upstream=upstream, z_loss=1e-3)


@pytest.mark.parametrize("needs", range(1, 8), ids=lambda n: f"needs-{n:03b}")
def test_gradients_only_of_what_needs_them(backend, schedule, needs):
    h = dense.head(300, 6, 1500, bias=True)
    whole = dense.gradients(dense.cross_entropy(h), h.inputs)

    def loss():
        return linear_cross_entropy(*h.args, bias=h.bias, workspace=2 * SMALL)

    dense.assert_only_needed(h.inputs, needs, loss, whole, rtol=1e-5, atol=1e-6)


def test_equals_torch_as_documented(backend):
    h = dense.head((3, 7), 8, 90)
    z, target = dense.logits(h).flatten(0, 1), h.target.flatten()
    for options in ({}, {"label_smoothing": 0.2}, {"reduction": "sum"}):
        ours = linear_cross_entropy(*h.args, **options)
        torch.testing.assert_close(ours, F.cross_entropy(z, target, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (0,)], ids=str)
def test_nothing_to_learn_from(dtype, schedule, reduction, shape):
    h = dense.head(shape, 6, 40, dtype, bias=True)
    h.target.fill_(-100)
    options = {"reduction": reduction, **LOSSES["both"]}
    loss = linear_cross_entropy(*h.args, bias=h.bias, **options)
    assert loss.shape == (shape if reduction == "none" else ())
    assert (loss == 0).all()
    for tensor, grad in zip(h.inputs, dense.gradients(loss.sum(), h.inputs), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()


@pytest.mark.parametrize(
    "num_items", [77, torch.tensor(77), torch.tensor(77.0), torch.tensor([77])], ids=repr
)
def test_kinds_of_num_items(backend, schedule, num_items):
    h = dense.head(45, 13, 700)
    loss = linear_cross_entropy(*h.args, num_items=num_items)
    assert loss.shape == ()
    torch.testing.assert_close(loss, dense.cross_entropy(h, num_items=77))


def test_mean_over_several_calls(dtype, schedule):
    """Accumulating parts with num_items of the whole is the mean over the whole."""
    h = dense.head(60, 9, 300, dtype)
    items = int((h.target != -100).sum())
    parts = sum(
        linear_cross_entropy(h.hidden[i], h.weight, h.target[i], num_items=items)
        for i in torch.arange(60).chunk(4)
    )
    exact = h.double()
    wanted = dense.cross_entropy(h), dense.cross_entropy(exact)
    dense.assert_as_accurate(parts, *wanted)
    grads = dense.gradients(parts, h.inputs)
    if dtype == torch.float32 or dtype == torch.float64:  # half types round every part's gradient
        dense.assert_gradients(grads, h, *wanted, exact.inputs)


def test_double_precision_to_the_last_digits(schedule):
    """The divisor too: 1/3 in fp32 would cost half of the digits."""
    h = dense.head(3, 4, 20, torch.float64, ignored=0)
    for num_items in (None, 3, torch.tensor(3)):
        ours = linear_cross_entropy(*h.args, num_items=num_items)
        assert abs(ours.item() / dense.cross_entropy(h).item() - 1) < 1e-14


def test_masked_tokens_and_smoothing_are_infinite_as_in_torch(backend, schedule):
    h = dense.head(20, 6, 90)
    bias = torch.zeros(90).index_fill(0, torch.tensor([4]), -torch.inf)
    loss = linear_cross_entropy(*h.args, bias=bias, label_smoothing=0.1, reduction="sum")
    assert loss == torch.inf


@pytest.mark.parametrize("ignore_index", [-1, 5])
def test_ignore_index(backend, schedule, ignore_index):
    h = dense.head(45, 13, 30, ignored=0)
    h.target[::4] = ignore_index
    kwargs = {"ignore_index": ignore_index, "label_smoothing": 0.1}
    ours = linear_cross_entropy(*h.args, **kwargs)
    torch.testing.assert_close(ours, dense.cross_entropy(h, **kwargs))


@pytest.mark.parametrize("workspace", [2 * SMALL, None], ids=["small", "default"])
def test_forced_schedules_are_taken(schedule, workspace):
    """Or the tests here that force one would say less than they seem to."""
    explained = plan.explain(45, 700, 13, torch.float32, scalar=True, workspace=workspace)
    assert explained.schedule == schedule


def test_schedules_agree_and_are_all_reached():
    """One loss, three ways of getting it; the plan says which would be taken."""
    h = dense.head(300, 16, 2000)
    assert plan.explain(300, 2000, 16, torch.float32, scalar=True).schedule == "keep"
    explained = plan.explain(300, 2000, 16, torch.float32, scalar=True, workspace=2 * SMALL)
    assert explained.schedule == "forward"
    results = []
    for name in plan.SCHEDULES:
        with plan.use_schedule(name):
            loss = linear_cross_entropy(*h.args, workspace=2 * SMALL)
            results.append((loss, *dense.gradients(loss, h.inputs)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-5, atol=1e-7)


def test_loss_without_gradients(backend, schedule):
    h = dense.head(45, 13, 700).map(torch.Tensor.detach)
    wanted = dense.cross_entropy(h)
    loss = linear_cross_entropy(*h.args)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted)
    with torch.no_grad():
        h.hidden.requires_grad_()
        loss = linear_cross_entropy(*h.args)
        assert not loss.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(
            linear_cross_entropy(h.hidden.detach(), h.weight, h.target), wanted
        )
