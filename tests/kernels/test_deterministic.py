"""deterministic=True: a token's results depend on no other token, to the bit."""

import contextlib
import re

import pytest
import torch

import dense
from bench.suites import counts
from ift.numerics.invariance import threads
from ift_kernels import (
    explain,
    linear_cross_entropy,
    linear_logprobs,
    linear_token,
    use_backend,
)
from ift_kernels.schedule import deterministic, plan
from serving import BACKENDS

MIB = 1 << 20
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# dtype of the inputs, and logits_dtype.
KINDS = ((FLOAT32, None), (BFLOAT16, None), (BFLOAT16, FLOAT32))


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Products of few rows and columns, so that small calls have several."""
    monkeypatch.setattr(deterministic, "ROWS", 128)
    monkeypatch.setattr(deterministic, "SMALL", (64,))
    monkeypatch.setattr(deterministic, "COLUMNS", 512)


def differing(found, wanted, index=...):
    """The statistics that are not the same to the bit."""
    pairs = ((name, getattr(found, name), getattr(wanted, name)) for name in found._fields)
    return [name for name, a, b in pairs if a is not None and not torch.equal(a, b[index])]


def call(h, rows=..., **options):
    options = {"outputs": dense.OUTPUTS, "deterministic": True, **h.kwargs, **options}
    return linear_logprobs(h.hidden[rows], h.weight, h.target[rows], **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "logits_dtype"), KINDS, ids=str)
def test_a_token_has_the_same_results_whatever_is_with_it(backend, dtype, logits_dtype):
    """Alone, in batches of other sizes and orders, beside ignored rows, with 1 and 2 threads, with
    and without gradients, in every schedule and workspace.
    """
    n = 300
    h = dense.head(n, 24, 1300, dtype, bias=True, **dense.TRANSFORM).map(torch.Tensor.detach)
    numerics = {"logits_dtype": logits_dtype}
    generator = torch.Generator().manual_seed(3)
    with use_backend(backend):
        with threads(1):
            wanted = call(h, **numerics)
        for count in (1, 2):
            with threads(count):
                for size in (1, 2, 63, 64, 65, 129, 300):
                    rows = torch.randperm(n, generator=generator)[:size]
                    assert not differing(call(h, rows, **numerics), wanted, rows), (count, size)
        for schedule in plan.SCHEDULES:
            for workspace in (2 * MIB, 3 * MIB, 64 * MIB):
                trained = h.map(lambda t: t.clone().requires_grad_())
                with plan.use_schedule(schedule):
                    found = call(trained, workspace=workspace, **numerics)
                    frozen = call(
                        dense.Head(
                            trained.hidden, h.weight, h.target, h.bias, h.options
                        ), workspace=workspace, **numerics,
                    )  # fmt: skip
                assert not differing(found, wanted), (schedule, workspace)
                assert not differing(frozen, wanted), (schedule, workspace)
        rows = h.target != -100  # as of a packed batch: without the rows that are ignored
        assert not differing(call(h, rows, **numerics), wanted, rows)


@pytest.mark.parametrize("schedule", plan.SCHEDULES)
@pytest.mark.parametrize(("dtype", "logits_dtype"), KINDS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_exact_and_depend_on_no_number_of_threads(
    schedule, dtype, logits_dtype, reduction
):
    h = dense.head(300, 24, 1300, dtype, bias=True, **dense.TRANSFORM)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": reduction}

    def gradients(count, backend, head, **numerics):
        with threads(count), use_backend(backend), plan.use_schedule(schedule):
            loss = linear_cross_entropy(
                *head.args, **head.kwargs, **options, workspace=3 * MIB, **numerics
            )
            weights = torch.linspace(-1, 1, loss.numel()).view(loss.shape)
            return loss, torch.autograd.grad((loss * weights.to(loss)).sum(), head.inputs)

    numerics = {"logits_dtype": logits_dtype, "deterministic": True}
    loss, found = gradients(1, "cpu" if "cpu" in BACKENDS else "reference", h, **numerics)
    again_loss, again = gradients(2, "cpu" if "cpu" in BACKENDS else "reference", h, **numerics)
    assert torch.equal(loss, again_loss)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    exact_loss, exact = gradients(1, "reference", h.double())
    bound = 1e-6 if dtype == FLOAT32 else 5e-3 if logits_dtype else 2e-2
    assert (loss - exact_loss).abs().max() < 20 * bound
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() < 4 * bound * b.abs().max()


@pytest.mark.parametrize("rule", ["greedy", "kth", "sample"])
def test_the_chosen_token_too(rule):
    h = dense.head(300, 24, 1300, BFLOAT16).map(torch.Tensor.detach)

    def choose(start, stop):
        return linear_token(
            h.hidden[start:stop], h.weight, rule=rule, row_offset=start, deterministic=True
        )

    together = choose(0, 300)
    assert torch.equal(together.ids, linear_token(h.hidden, h.weight, rule=rule).ids)
    for start, stop in ((0, 1), (7, 8), (100, 300)):
        alone = choose(start, stop)
        assert torch.equal(alone.ids, together.ids[start:stop])
        assert torch.equal(alone.logprob, together.logprob[start:stop])


def test_nothing_is_made_of_the_rows_that_fill_a_product():
    """A bias with -inf and NaN: what the added rows of zeros would have there reaches no result."""
    h = dense.head(70, 24, 600, bias=True, ignored=0)
    bias = h.bias.detach().clone()
    bias[5] = -torch.inf
    h = dense.Head(h.hidden, h.weight, h.target.masked_fill(h.target == 5, 6), bias)
    for schedule in plan.SCHEDULES:
        with plan.use_schedule(schedule):
            loss = linear_cross_entropy(*h.args, **h.kwargs, deterministic=True)
        for gradient in torch.autograd.grad(loss, (h.hidden, h.weight)):
            assert gradient.isfinite().all()
        nothing = h.target.new_full(h.target.shape, -100)
        with plan.use_schedule(schedule):
            loss = linear_cross_entropy(h.hidden, h.weight, nothing, bias=bias, deterministic=True)
        assert loss == 0 and not torch.autograd.grad(loss, h.weight)[0].any()


def test_kept_products_of_which_few_rows_have_a_gradient():
    """Backward counts the valid rows itself: those that fill a product are among the kept."""
    h = dense.head(300, 24, 1300, seed=2)
    for share in (0.1, 0.9):
        upstream = (torch.arange(300) < share * 300).double()
        with plan.use_schedule("keep"):
            out = linear_logprobs(*h.args, deterministic=True).logprob
        found = torch.autograd.grad(out, (h.hidden, h.weight), upstream.float())
        double = h.double()
        with use_backend("reference"):
            out = linear_logprobs(*double.args).logprob
        wanted = torch.autograd.grad(out, (double.hidden, double.weight), upstream)
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() < 2e-6 * b.abs().max()


def test_sizes_that_are_not_the_same_are_not_used(monkeypatch):
    h = dense.head(70, 24, 600).map(torch.Tensor.detach)
    found = call(h)
    monkeypatch.setattr(deterministic, "sizes", lambda *a: ())
    problem = plan.Problem(70, 600, 24, FLOAT32, MIB, deterministic=True)
    assert deterministic.padded_rows(problem, torch.device("cpu")) == 128
    assert not differing(call(h), found)


@pytest.mark.parametrize(
    ("differs", "what"), [(1, "its place"), (2, "strides"), (4, "the number of threads")]
)
def test_a_machine_whose_products_depend_on_more_is_refused(monkeypatch, differs, what):
    original, calls = torch.equal, []

    def same(a, b):
        calls.append(1)
        return original(a, b) and len(calls) != differs

    monkeypatch.setattr(torch, "equal", same)
    deterministic.sizes.cache_clear()
    h = dense.head(3, 24, 600)
    with (
        threads(2),
        pytest.raises(RuntimeError, match=f"deterministic: .*D=24.* depend on {what} here"),
    ):
        call(h)
    deterministic.sizes.cache_clear()


def test_refusals():
    h = dense.head(3, 2048, 600, BFLOAT16)
    with pytest.raises(ValueError, match=r"workspace: expected at least \d+ bytes with determin"):
        call(h, workspace=MIB, logits_dtype=FLOAT32)  # a chunk of the head takes more
    with pytest.raises(ValueError, match=r"gradient: expected 'exact' with deterministic=True"):
        call(h, gradient="active")
    with pytest.raises(TypeError, match="deterministic: expected True or False, got 1"):
        call(h, deterministic=1)


def test_autocast_around_the_call_reaches_no_probe():
    """16-bit inputs with float32 logits, as a trainer calls it."""
    h = dense.head(70, 40, 600, BFLOAT16).map(torch.Tensor.detach)
    deterministic.sizes.cache_clear()
    with threads(2), torch.autocast("cpu", BFLOAT16):
        found = call(h, logits_dtype=FLOAT32)
    assert not differing(call(h, logits_dtype=FLOAT32), found)


def test_gradients_of_a_scalar_loss_in_every_schedule_and_workspace():
    """So what other calls keep, which decides the schedule, does not change them either."""
    h = dense.head(500, 24, 1300, bias=True)
    found = []
    for schedule in (None, *plan.SCHEDULES):
        for workspace in (3 * MIB, 64 * MIB):
            with plan.use_schedule(schedule) if schedule else contextlib.nullcontext():
                loss = linear_cross_entropy(
                    *h.args, **h.kwargs, workspace=workspace, deterministic=True
                )
            found.append((loss, *torch.autograd.grad(loss, h.inputs)))
    for loss, *others in found[1:]:
        assert (loss - found[0][0]).abs() <= 2**-23 * loss.abs()  # a sum over tokens
        assert all(torch.equal(a, b) for a, b in zip(others, found[0][1:], strict=True))


def test_what_a_workspace_is_refused_for_is_enough():
    """Also where rows are dropped, whose copy takes of it, in forward and in backward."""
    h = dense.head(300, 512, 4096, ignored=0)

    def run(workspace):
        out = linear_logprobs(*h.args, workspace=workspace, deterministic=True).logprob
        torch.autograd.grad(out, h.inputs, (torch.arange(300) > 3).float())

    with pytest.raises(ValueError, match=r"expected at least \d+ bytes .* got 1048576$") as error:
        run(MIB)
    run(int(re.search(r"at least (\d+)", str(error.value))[1]))


def test_other_sizes_in_backward(monkeypatch):
    """Forward's products are then formed again where their memory does not hold the rows."""
    h = dense.head(70, 24, 600, ignored=0)
    with plan.use_schedule("keep"):
        out = linear_logprobs(*h.args, deterministic=True).logprob
    wanted = torch.autograd.grad(out.sum(), h.inputs, retain_graph=False)
    with plan.use_schedule("keep"):
        out = linear_logprobs(*h.args, deterministic=True).logprob
    monkeypatch.setattr(deterministic, "SMALL", ())
    found = torch.autograd.grad(out.sum(), h.inputs)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 2e-6 * b.abs().max()


def test_explain_counts_what_fills_products():
    found = explain(100, 32000, 64, FLOAT32, deterministic=True)
    assert found.product_rows == 128 and found.tile_columns == 512


def test_the_gpu_schedule_reads_no_more_from_the_device():
    """On tensors without memory, with the record of an H200: as many waits, few more products."""
    pytest.importorskip("triton")
    n, d, v = 2048, 896, 151936
    found = []
    with counts.planned_for_h200():
        hidden, weight = (
            torch.empty(size, d, dtype=BFLOAT16, device="meta", requires_grad=True)
            for size in (n, v)
        )
        target = torch.empty(n, dtype=torch.int64, device="meta")
        for same in (False, True):

            def call(same=same):
                out = linear_logprobs(hidden, weight, target, deterministic=same).logprob
                return torch.autograd.grad(out.sum(), (hidden, weight))

            found.append(counts.dispatched(call))
    default, deterministic_call = found
    assert deterministic_call["reads"] == default["reads"]
    assert deterministic_call["flops"] <= 1.02 * default["flops"]
    assert deterministic_call["peak"] <= 640 * MIB
