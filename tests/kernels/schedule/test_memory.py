"""The operations stay inside their workspace, and never hold a matrix of tokens by vocabulary.

What torch's CPU allocator hands out is read from its profiler: that sees every tensor, also those
that an operator makes and frees inside.
"""

import pytest
import torch

import dense
import ift_kernels
from allocations import MIB, Allocations, allowed, size
from ift_kernels import (
    backends,
    linear_cross_entropy,
    linear_divergence,
    linear_expected_embedding,
    linear_logprobs,
    linear_token,
)
from ift_kernels.schedule import plan
from serving import BACKENDS, needs_cpp


@pytest.fixture
def no_products(monkeypatch):
    """16-bit products are zeros: a CPU without AVX-512 takes minutes for them, and peaks of memory
    do not depend on their values."""
    mm, addmm_ = torch.mm, torch.Tensor.addmm_

    def zeros(a, b, *, out=None):
        if a.element_size() != 2:
            return mm(a, b) if out is None else mm(a, b, out=out)
        return a.new_zeros(a.shape[0], b.shape[1]) if out is None else out.zero_()

    def unchanged(total, a, b):
        return total if a.element_size() == 2 else addmm_(total, a, b)

    monkeypatch.setattr(torch, "mm", zeros)
    monkeypatch.setattr(torch.Tensor, "addmm_", unchanged)


def test_the_instrument():
    """A matrix made and freed inside the block is seen, and so is one that stays."""
    with Allocations() as seen:
        torch.ones(1000, 1000).add_(1)
        keep = torch.empty(10, 1000)
    assert 4_000_000 <= seen.peak < 4_100_000 and seen.largest == 4_000_000
    assert seen.alive == keep.numel() * 4


# N·V of products would be 6 to 40 times the workspace. D: narrow, so that nothing but the
# products is large; and 300, where sums over D and casts of the head count too.
CASES = {
    "fp32": (264, 12, 151936, torch.float32, False),
    "bf16": (264, 12, 151936, torch.bfloat16, False),
    "wide-fp32": (264, 300, 30000, torch.float32, False),
    "wide-bf16": (264, 300, 50257, torch.bfloat16, False),
    "autocast": (264, 300, 50257, torch.float32, True),
    "autocast-few-tokens": (3, 300, 50257, torch.float32, True),
}
OPERATIONS = {
    "logprobs": lambda h, w: linear_logprobs(*h.args, outputs=dense.OUTPUTS, workspace=w).logprob,
    "cross-entropy": lambda h, w: linear_cross_entropy(*h.args, workspace=w),
    "expected-embedding": lambda h, w: linear_expected_embedding(
        h.hidden, h.weight, h.weight.detach()[:, :8], workspace=w
    ),
}


def peaks(call):
    """Of `call()` and of its backward, what it returns, and the bytes reserved between them."""
    start = plan.ledger.reserved
    with Allocations() as forward:
        out = call()
    held = plan.ledger.reserved - start
    loss = out.sum()
    with Allocations() as backward:
        loss.backward()
    assert plan.ledger.reserved == start
    return forward, backward, out, held


def measure(operation, h, workspace=4 * MIB):
    """Forward and backward of `operation` stay inside `workspace` beside results and gradients."""
    forward, backward, out, held = peaks(lambda: operation(h, workspace))
    assert held <= workspace
    assert forward.peak - size(out) <= allowed(h, workspace), f"forward {forward.peak / MIB} MiB"
    peak = backward.peak + held - size(h.hidden.grad, h.weight.grad)
    assert peak <= allowed(h, workspace), f"backward {peak / MIB} MiB"


@needs_cpp
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_peak_of_forward_and_backward(case, operation, no_products):
    n, d, v, dtype, autocast = case
    with ift_kernels.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        measure(operation, dense.head(n, d, v, dtype, ignored=0))


@needs_cpp
@pytest.mark.parametrize("gradient", ["exact", "active"])
@pytest.mark.parametrize(("rows", "mib"), [(1, 1), (3, 2), (40, 1), (130, 1), (260, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_of_few_rows(rows, mib, dtype, gradient, no_products):
    """Transposes have whole cache lines, active columns whole blocks of rows."""

    def operation(h, workspace):
        return linear_logprobs(*h.args, workspace=workspace, gradient=gradient).logprob

    with ift_kernels.use_backend("cpu"):
        measure(operation, dense.head(rows, 64, 30000, dtype, ignored=0), mib * MIB)


@needs_cpp
@pytest.mark.parametrize("frozen", ["head", "trunk"])
@pytest.mark.parametrize("case", ["wide-fp32", "wide-bf16"])
def test_peak_with_one_side_frozen(case, frozen, no_products):
    n, d, v, dtype, _ = CASES[case]
    h = dense.head(n, d, v, dtype, ignored=0)
    (h.weight if frozen == "head" else h.hidden).requires_grad_(False)
    with ift_kernels.use_backend("cpu"):
        measure(OPERATIONS["logprobs"], h)


# Gradients formed in forward where D is large beside V: sums, casts and transposes weigh as much as
# products. (rows, D, V, dtype, whether the head is trained, workspace in MiB)
WIDE = {
    "bf16": (600, 1024, 4000, torch.bfloat16, True, 5),
    "bf16-two-blocks": (1000, 1024, 8000, torch.bfloat16, True, 16),
    "bf16-summed": (3000, 64, 4000, torch.bfloat16, True, 8),
    "fp32": (1000, 2048, 4000, torch.float32, True, 8),
    "autocast": (600, 2048, 8000, torch.float32, False, 24),
    "odd-width": (4000, 100, 4000, torch.bfloat16, False, 5),
}


@needs_cpp
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_peak_of_gradients_formed_in_forward(case, no_products):
    rows, width, vocabulary, dtype, trained, mib = case

    def operation(h, workspace):
        out = (linear_cross_entropy if trained else linear_logprobs)(*h.args, workspace=workspace)
        return out if trained else out.logprob

    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=trained)
    target = torch.randint(vocabulary, (rows,))
    h = dense.Head(hidden, weight, target)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32 and not trained)
    with ift_kernels.use_backend("cpu"), plan.use_schedule("forward"), autocast:
        operation(h, mib * MIB).sum().backward()  # the vendor's own memory, once
        hidden.grad = weight.grad = None
        forward, backward, _, formed = peaks(lambda: operation(h, mib * MIB))
    assert formed == size(hidden, weight if trained else None)
    assert forward.peak - formed <= mib * MIB + 64 * 8 * rows + MIB // 4
    assert backward.peak <= mib * MIB + 64 * 8 * rows  # some head rows, where it is frozen


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_of_the_reference(operation, dtype, no_products):
    # 210 MB of products in fp32, 4 times what is allowed.
    with ift_kernels.use_backend("reference"):
        measure(operation, dense.head(1050, 12, 50257, dtype, ignored=0))


# Rows of both heads that keep their products; a share of 16-bit gradients held; sweeps alone.
@pytest.mark.parametrize("workspace", [40 * MIB, 24 * MIB, 2 * MIB], ids=lambda w: f"{w >> 20}MiB")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [12, 300])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_peak_of_divergence(workspace, dtype, width, reduction, no_products):
    h = dense.head(264, width, 30000, dtype, ignored=0)  # 32 or 63 MB of products for the two
    teacher = dense.head(264, 20, 30000, dtype, ignored=0, seed=1)
    heads = h.hidden, h.weight, teacher.hidden.detach(), teacher.weight.detach()
    forward, backward, *_ = peaks(
        lambda: linear_divergence(*heads, reduction=reduction, workspace=workspace)
    )
    results = size(h.hidden, h.weight) if reduction == "sum" else 0
    backend = backends.get(h.hidden).__name__
    with ift_kernels.use_backend("cpu" if backend.endswith("cpu") else "reference"):
        limit = allowed(h, workspace)
    assert forward.peak - results <= limit, f"forward {forward.peak / MIB} MiB"
    grads = 0 if reduction == "sum" else size(h.hidden.grad, h.weight.grad)
    assert backward.peak - grads <= limit, f"backward {backward.peak / MIB} MiB"


@pytest.mark.parametrize("rule", ["greedy", "kth", "sample"])
@pytest.mark.parametrize("name", BACKENDS)
def test_peak_of_token_choice(name, rule):
    h = dense.head(1050, 12, 20000)  # 84 MB of products
    # The reference draws its random words in int64.
    budget = 3 * MIB if (name, rule) == ("reference", "sample") else MIB
    with ift_kernels.use_backend(name):
        with Allocations() as seen:
            linear_token(h.hidden, h.weight, rule=rule, workspace=MIB)
        assert seen.peak <= allowed(h, budget), seen.peak / MIB


@needs_cpp
def test_peak_of_token_choice_under_autocast():
    """The head, 60 MB, is cast piece by piece."""
    h = dense.head(3, 300, 50257)
    with ift_kernels.use_backend("cpu"):
        with torch.autocast("cpu", dtype=torch.bfloat16), Allocations() as seen:
            linear_token(h.hidden, h.weight, workspace=4 * MIB)
        assert seen.peak <= allowed(h, 4 * MIB), seen.peak / MIB


# What is kept until backward counts over all calls: a model with many heads, or accumulation that
# calls backward at the end, has one budget.
def test_calls_share_what_they_keep():
    h = dense.head(100, 8, 20000)
    start = plan.ledger.reserved
    losses = [linear_cross_entropy(*h.args, workspace=16 * MIB)]
    first = plan.ledger.reserved - start
    assert 0 < first <= 16 * MIB
    losses += [linear_cross_entropy(*h.args, workspace=16 * MIB)] * 5
    losses += [linear_logprobs(*h.args, workspace=16 * MIB).logprob.sum()]
    assert plan.ledger.reserved - start <= 16 * MIB
    wanted = dense.gradients(7 * dense.cross_entropy(h), h.inputs)
    items = (h.target != -100).sum()
    grads = dense.gradients(sum(losses[:6]) - losses[6] / items, h.inputs)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "some_ignored"),
    [(dtype, some) for dtype in (torch.float32, torch.bfloat16) for some in (False, True)],
    ids=["fp32-all-valid", "fp32-some-ignored", "bf16-all-valid", "bf16-some-ignored"],
)
def test_copies_do_not_starve_the_tiles(dtype, some_ignored):
    """Tiles of a row or two would be hundreds of times slower than tiles of hundreds.

    hidden alone is 2 to 4 times the workspace here: a copy of it leaves nothing for the products.
    """
    h = dense.head(2000, 500, 1500, dtype, ignored=0.3 if some_ignored else 0)
    with Allocations() as seen:
        linear_logprobs(h.hidden, h.weight, h.target, workspace=MIB).logprob.sum().backward()
    # Tiles of a quarter of the workspace, and four products for each, would be 92 to 183 products.
    ideal = 4 * 2000 * 1500 * dtype.itemsize / (MIB / 4)
    assert seen.products <= 14 * ideal, seen.products  # 13 with the copy that odd widths take


def test_the_copy_of_rows_that_count_is_inside_the_workspace():
    """If that leaves a quarter of it for the products; the copy goes on top of a smaller one."""
    h = dense.head(4000, 1024, 200, torch.bfloat16, ignored=0.1)  # 8 MB of hidden states
    with ift_kernels.use_backend(BACKENDS[0]):
        for workspace, extra in ((11 * MIB, 0), (2 * MIB, 8 * MIB)):
            with torch.no_grad(), Allocations() as seen:
                linear_logprobs(h.hidden, h.weight, h.target, workspace=workspace)
            assert seen.peak <= allowed(h, workspace) + extra, seen.peak / MIB


@needs_cpp
def test_plan_says_what_is_true():
    """`explain`'s peak bounds the measured one."""
    for dtype in (torch.float32, torch.bfloat16):
        h = dense.head(400, 64, 9000, dtype, ignored=0)
        for workspace in (MIB, 3 * MIB, 30 * MIB):
            explained = plan.explain(400, 9000, 64, dtype, workspace=workspace)
            assert explained.peak_bytes <= workspace
            with Allocations() as seen, ift_kernels.use_backend("cpu"):
                linear_logprobs(h.hidden, h.weight, h.target, workspace=workspace)
            assert seen.peak <= explained.peak_bytes + 64 * 8 * 400 + MIB // 4


@pytest.mark.parametrize("name", BACKENDS)
def test_backward_of_a_loss_formed_in_forward_takes_nothing(name):
    """The gradients are there; autograd must not make zeros for the outputs that hold them."""
    h = dense.head(300, 40, 9000)
    with ift_kernels.use_backend(name), plan.use_schedule("forward"):
        loss = linear_cross_entropy(h.hidden, h.weight, h.target)
        with Allocations() as seen:
            grads = torch.autograd.grad(loss, [h.hidden, h.weight])
    assert seen.peak < MIB // 4, seen.peak / MIB
    assert grads[1].any()


@needs_cpp
@pytest.mark.parametrize("gradient", ["exact", "active"])
@pytest.mark.parametrize(("rows", "mib"), [(100, 7), (128, 8), (260, 17)])
def test_peak_of_backward_where_narrow_tiles_keep_all_products(rows, mib, gradient, no_products):
    """Backward has the narrow tiles of its forward."""
    h = dense.head(rows, 64, 30000, torch.bfloat16, ignored=0)
    with ift_kernels.use_backend("cpu"):
        _, backward, _, held = peaks(
            lambda: linear_logprobs(*h.args, workspace=mib * MIB, gradient=gradient).logprob
        )
    assert held == rows * 30000 * 2  # all
    peak = backward.peak + held - size(h.hidden.grad, h.weight.grad)
    assert peak <= mib * MIB + 64 * 8 * rows + MIB // 2, peak / MIB


@needs_cpp
@pytest.mark.parametrize("rows", [130, 264, 700])
@pytest.mark.parametrize("scalar", [True, False])
def test_peak_of_a_bias(rows, scalar, no_products):
    """Sums over the rows of a 16-bit tile cast a few rows at a time."""
    h = dense.head(rows, 12, 23424, torch.bfloat16, ignored=0, bias=True)
    h.weight.requires_grad_(False)

    def operation(h, workspace):
        operation = linear_cross_entropy if scalar else linear_logprobs
        out = operation(*h.args, bias=h.bias, workspace=workspace)
        return out if scalar else out.logprob

    with ift_kernels.use_backend("cpu"), plan.use_schedule("keep"):
        _, backward, _, held = peaks(lambda: operation(h, 4 * MIB))
    peak = backward.peak + held - size(h.hidden.grad, h.bias.grad)
    assert peak <= 4 * MIB + 64 * 8 * rows + MIB // 2, peak / MIB
