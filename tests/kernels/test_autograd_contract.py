"""What autograd, checkpointing, autocast and torch.compile may expect of the linear operations."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dense
import ift_kernels
from ift_kernels import (
    linear_cross_entropy,
    linear_expected_embedding,
    linear_logprobs,
    linear_token,
)
from ift_kernels.schedule import plan

SMALL = 1 << 20


def logprobs(h, **options):
    names = ("logprob", "lse", "entropy", "mean_logit")
    s = linear_logprobs(*h.args, outputs=names, **h.kwargs, **options)
    weight = torch.linspace(-1, 2, s.logprob.numel(), dtype=s.logprob.dtype).view_as(s.logprob)
    return (weight * (s.logprob + 0.5 * s.entropy - 0.1 * s.lse + s.mean_logit)).sum()


def mean_loss(h, **options):
    return linear_cross_entropy(*h.args, z_loss=1e-3, **h.kwargs, **options)


def soft(h, **options):
    # The head is also the embedding, as in tied models.
    value = linear_expected_embedding(h.hidden, h.weight, h.weight, **h.kwargs, **options)
    return value.sin().sum()


OPERATIONS = {"logprobs": logprobs, "cross-entropy": mean_loss, "expected-embedding": soft}


@pytest.fixture(params=OPERATIONS.values(), ids=OPERATIONS)
def operation(request):
    return request.param


def bits(tensors):
    """The exact contents, NaN and sign of zero included."""
    return [t.detach().flatten().contiguous().view(torch.uint8).clone() for t in tensors]


def close(ours, wanted, **tolerance):
    torch.testing.assert_close(ours, wanted, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


# Everything fits and is kept; some products are kept; tiles. In bfloat16 all fits into "some" too.
@pytest.mark.parametrize(
    ("dtype", "rows", "workspace"),
    [
        pytest.param(torch.float32, 260, None, id="float32-all"),
        pytest.param(torch.float32, 260, 5 * SMALL // 2, id="float32-some"),
        pytest.param(torch.float32, 260, SMALL, id="float32-tiles"),
        pytest.param(torch.bfloat16, 260, None, id="bfloat16-all"),
        pytest.param(torch.bfloat16, 520, SMALL, id="bfloat16-tiles"),
    ],
)
def test_second_and_third_backward(backend, schedule, operation, rows, workspace, dtype):
    h = dense.head(rows, 11, 2500, dtype, bias=True)
    loss = operation(h, workspace=workspace)
    grads = [torch.autograd.grad(loss, h.inputs, retain_graph=i < 2) for i in range(3)]
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    close(grads[1], grads[0], **tolerance)
    close(grads[2], grads[0], **tolerance)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_backward_with_another_upstream_the_second_time(backend, schedule):
    h = dense.head(100, 11, 2500)
    stats = linear_logprobs(*h.args)
    loss = mean_loss(h)
    for output, size in ((stats.logprob, (100,)), (loss, ())):
        up = [torch.randn(size) for _ in range(3)]
        grads = [torch.autograd.grad(output, h.inputs, u, retain_graph=True) for u in up]
        both = torch.autograd.grad(output, h.inputs, up[0] + up[1])
        close(both, [a + b for a, b in zip(*grads[:2], strict=True)], rtol=1e-4, atol=1e-5)


def test_one_input_at_a_time(backend, schedule, operation):
    """backward(inputs=...) for one, then for the other, is backward for both."""
    h = dense.head(100, 11, 1100)
    wanted = torch.autograd.grad(operation(h), h.inputs)
    loss = operation(h)
    loss.backward(inputs=[h.hidden], retain_graph=True)
    assert h.weight.grad is None
    loss.backward(inputs=[h.weight])
    close([t.grad for t in h.inputs], wanted)


def test_one_tensor_as_hidden_and_as_head(backend, schedule):
    """Both gradients go to the same tensor."""
    both, target = torch.randn(50, 7, requires_grad=True), torch.randint(50, (50,))
    loss = linear_cross_entropy(both, both, target)
    wanted = torch.nn.functional.cross_entropy(both @ both.T, target)
    close(torch.autograd.grad(loss, both), torch.autograd.grad(wanted, both))


def test_outputs_used_by_different_losses(backend, schedule):
    """Backward through one output, then through another, of the same call."""
    h = dense.head(100, 11, 2500)
    s = linear_logprobs(*h.args, outputs=("logprob", "entropy"))
    one = torch.autograd.grad(s.logprob.sum(), h.inputs, retain_graph=True)
    two = torch.autograd.grad(s.entropy.sum(), h.inputs)
    for name, ours in (("logprob", one), ("entropy", two)):
        wanted = dense.gradients(dense.stats(h)[name].sum(), h.inputs)
        close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_never_change(backend, schedule, operation, dtype):
    # Each in the middle of a larger buffer, whose rest must not change either.
    def inside(t):
        buffer = torch.randn(t.numel() + 128).to(t.dtype)
        buffer[64:-64] = t.detach().flatten()
        buffers.append(buffer)
        return buffer[64:-64].view(t.shape).requires_grad_()

    buffers = []
    h = dense.head(129, 11, 1100, dtype, bias=True).map(inside)
    tensors = [*buffers, h.target]
    before, versions = bits(tensors), [t._version for t in tensors]
    loss = operation(h, workspace=SMALL)
    loss.backward(retain_graph=True)
    loss.backward()
    linear_token(h.hidden, h.weight, bias=h.bias, rule="sample")
    torch.testing.assert_close(bits(tensors), before, rtol=0, atol=0)
    assert versions == [t._version for t in tensors]


def test_saved_tensors_never_change(backend, schedule, operation):
    saved = []
    h = dense.head(129, 11, 1100, bias=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = operation(h)
    assert saved
    before = bits(saved)
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(saved), strict=True))


def test_changing_an_input_before_backward_is_noticed(backend, schedule, operation):
    h = dense.head(20, 11, 300, bias=True)
    loss = operation(h)
    with torch.no_grad():
        h.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_outputs_may_be_changed_before_backward(backend, schedule):
    """Or it is noticed; but never silently wrong."""
    h = dense.head(20, 11, 300)
    wanted = dense.gradients(linear_logprobs(*h.args).logprob.sum(), h.inputs)
    stats = linear_logprobs(*h.args, outputs=("logprob", "entropy"))
    stats.logprob.mul_(3)
    close(dense.gradients((stats.logprob / 3).sum(), h.inputs), wanted)
    stats = linear_logprobs(*h.args, outputs=("logprob", "entropy"))
    with torch.no_grad():
        stats.entropy.zero_()  # saved for backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (stats.logprob + stats.entropy).sum().backward()


def test_double_backward_is_refused(backend, schedule, operation):
    h = dense.head(20, 11, 300, bias=True)
    grads = torch.autograd.grad(operation(h), h.inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        sum(g.square().sum() for g in grads).backward()


def test_create_graph_alone_is_harmless(backend, schedule, operation):
    h = dense.head(20, 11, 300, bias=True)
    close(
        torch.autograd.grad(operation(h), h.inputs, create_graph=True),
        torch.autograd.grad(operation(h), h.inputs),
    )


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing(backend, schedule, operation, reentrant, dtype):
    h = dense.head(129, 11, 1100, dtype, bias=True)
    wanted = torch.autograd.grad(operation(h), h.inputs)

    def run(hidden):
        return operation(dense.replace(h, hidden=hidden * 1.0))

    checkpoint(run, h.hidden, use_reentrant=reentrant).backward()
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    close([t.grad for t in h.inputs], wanted, **tolerance)


def test_checkpoint_beside_a_call_that_holds_memory(backend):
    """What another call keeps changes the plan, and may not change what is saved."""
    h = dense.head(129, 11, 1100)
    wanted = torch.autograd.grad(mean_loss(h, workspace=2 * SMALL), h.inputs)
    other = mean_loss(h, workspace=2 * SMALL)
    loss = checkpoint(lambda x: mean_loss(dense.replace(h, hidden=x), workspace=2 * SMALL),
                      h.hidden, use_reentrant=False)  # fmt: skip
    other.backward()
    for tensor in h.inputs:
        tensor.grad = None
    loss.backward()
    close([t.grad for t in h.inputs], wanted)


def test_offloaded_saved_tensors(backend, schedule, operation):
    h = dense.head(129, 11, 1100, bias=True)
    wanted = torch.autograd.grad(operation(h), h.inputs)
    with torch.autograd.graph.save_on_cpu():
        loss = operation(h)
    close(torch.autograd.grad(loss, h.inputs), wanted)


def test_what_is_kept_is_given_back(backend, operation):
    """After backward, and without one."""
    gc.collect()
    start = plan.ledger.reserved
    h = dense.head(129, 11, 1100, bias=True)
    operation(h).backward()
    loss = operation(h)
    with torch.no_grad():
        operation(h)
    assert plan.ledger.reserved >= start
    del loss
    gc.collect()
    assert plan.ledger.reserved == start


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, schedule, operation, hidden, kind):
    """Products in autocast's dtype, gradients in each tensor's own; equal to casting by hand."""
    h = dense.head(129, 12, 1100, bias=True)
    h = dense.replace(h, hidden=h.hidden.detach().to(hidden).requires_grad_())
    with torch.autocast("cpu", dtype=kind):
        loss = operation(h, workspace=SMALL)
    assert loss.dtype == torch.float32
    grads = dense.gradients(loss, h.inputs)
    cast = h.map(lambda t: t.detach().to(kind).requires_grad_())
    by_hand = operation(dense.replace(cast, bias=h.bias))
    torch.testing.assert_close(loss.float(), by_hand.float(), rtol=1e-2, atol=1e-2)
    wanted = dense.gradients(by_hand, [*cast.inputs[:2], h.bias])
    for tensor, a, b in zip(h.inputs, grads, wanted, strict=True):
        assert a.dtype == tensor.dtype
        assert (a.double() - b.double()).norm() <= 2e-2 * b.double().norm()


@pytest.mark.parametrize("rule", ["greedy", "kth", "sample"])
def test_autocast_of_token_choice(backend, rule):
    h = dense.head(129, 12, 1100, bias=True).map(torch.Tensor.detach)
    half = dense.replace(h, hidden=h.hidden.bfloat16(), weight=h.weight.bfloat16())
    wanted = linear_token(half.hidden, half.weight, bias=h.bias, rule=rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (h, dense.replace(h, hidden=half.hidden), half):
            got = linear_token(x.hidden, x.weight, bias=x.bias, rule=rule)
            assert torch.equal(got.ids, wanted.ids) and torch.equal(got.logprob, wanted.logprob)


def test_autocast_leaves_double_alone(operation):
    h = dense.head(9, 5, 70, torch.float64)
    wanted = operation(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operation(h), wanted)


# 1e-6 steps in fp64: every term of every gradient, per element, at random.
@pytest.mark.parametrize("transform", [{}, dense.TRANSFORM], ids=["plain", "transformed"])
def test_gradcheck(schedule, operation, transform):
    h = dense.head(5, 3, 11, torch.float64, bias=True, **transform)

    def run(hidden, weight, bias):
        return operation(dense.replace(h, hidden=hidden, weight=weight, bias=bias))

    assert torch.autograd.gradcheck(run, h.inputs)


def test_gradcheck_of_every_output(schedule):
    h = dense.head(4, 3, 7, torch.float64, bias=True, **dense.TRANSFORM)

    def run(*tensors):
        x = dense.replace(h, **dict(zip(("hidden", "weight", "bias"), tensors, strict=True)))
        s = linear_logprobs(*x.args, outputs=dense.DIFFERENTIABLE, **x.kwargs)
        return tuple(getattr(s, name) for name in dense.DIFFERENTIABLE)

    assert torch.autograd.gradcheck(run, h.inputs)


def test_the_same_call_twice_is_the_same_to_the_bit(backend, schedule, operation):
    h = dense.head(520, 11, 1300, torch.bfloat16, bias=True)
    results = []
    for _ in range(2):
        loss = operation(h, workspace=2 * SMALL)
        results.append(bits([loss, *dense.gradients(loss, h.inputs)]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_calls_from_several_threads(backend, operation):
    """Forward and backward of six calls at once, two threads at a time in the same function."""
    heads = [dense.head(200, 11, 1300 + i, bias=True, seed=i) for i in range(6)]

    def run(h):
        loss = operation(h, workspace=SMALL)
        return [loss, *dense.gradients(loss, h.inputs)]

    wanted = [run(h) for h in heads]
    held = plan.ledger.reserved

    def work(h):
        with ift_kernels.use_backend(backend):  # a new thread starts with no choice of its own
            return run(h)

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(work, heads))
    close(got, wanted)  # not to the bit: what one call keeps changes the tiles of the others
    assert plan.ledger.reserved == held


def test_gradients_add_up_in_leaves(backend, schedule):
    """.grad accumulation does not alias what a call keeps."""
    h = dense.head(60, 7, 500)
    for _ in range(2):
        mean_loss(h).backward()
    wanted = dense.gradients(mean_loss(h), h.inputs)
    close([t.grad for t in h.inputs], [2 * g for g in wanted])
    h.hidden.grad.zero_()
    close(dense.gradients(mean_loss(h), h.inputs), wanted)
