"""The linear operations under torch.compile, and torch's own checks of each operator."""

import pytest
import torch
import torch._dynamo.testing

import dense
import ift_kernels
from ift_kernels import (
    linear_cross_entropy,
    linear_expected_embedding,
    linear_logprobs,
    linear_token,
)
from ift_kernels.backends.contract import TRACK_ALL
from ift_kernels.schedule import plan
from serving import BACKENDS

SMALL = 1 << 20


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def logprobs(hidden, weight, bias, target):
    s = linear_logprobs(
        hidden, weight, target, bias=bias, outputs=("logprob", "entropy", "lse", "argmax")
    )
    return s.logprob * 2 - s.entropy + s.lse * 0.1 + 0 * s.argmax


def loss(hidden, weight, bias, target):
    return linear_cross_entropy(hidden, weight, target, bias=bias, label_smoothing=0.1, z_loss=1e-3)


def soft(hidden, weight, bias, target):
    return linear_expected_embedding(hidden, weight, weight, bias=bias, softcap=20.0)


FUNCTIONS = {"logprobs": logprobs, "cross-entropy": loss, "expected-embedding": soft}


def run(function, h):
    out = function(h.hidden, h.weight, h.bias, h.target)
    return [out, *dense.gradients(out.square().sum(), h.inputs)]


def assert_same(ours, wanted, dtype=torch.float32, rtol=1e-5):
    tolerance = {"rtol": rtol, "atol": 1e-5}
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 3e-2, "atol": 3e-2}
    for a, b in zip(ours, wanted, strict=True):
        assert a.stride() == b.stride() or not a.numel()
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_graph_forward_and_backward(function, dtype):
    h = dense.head((3, 9), 6, 300, dtype, bias=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, h), run(function, h), dtype)


def test_whole_graph_of_token_choice():
    h = dense.head((3, 9), 6, 300, bias=True)

    def choose(hidden, weight, bias):
        kwargs = {"bias": bias, "temperature": 0.7}
        return [
            linear_token(hidden, weight, rule=rule, **kwargs)
            for rule in ("greedy", "kth", "sample")
        ]

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*h.inputs), choose(*h.inputs))


def test_one_graph_for_every_batch_size():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(logprobs, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (5, 64, 300, 33):  # 300: several tiles would do too
        h = dense.head(n, 6, 300, bias=True)
        assert_same(run(compiled, h), run(logprobs, h))
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1  # the first size's graph served the others


def test_changing_float_options():
    """A temperature schedule makes the option a symbolic number in the third call's trace."""
    h = dense.head(20, 6, 90)

    def at(temperature):
        s = linear_logprobs(*h.args, temperature=temperature, softcap=30.0)
        return s.logprob, linear_token(h.hidden, h.weight, temperature=temperature).logprob

    compiled = torch.compile(at, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 0.7, 0.4, 1.3):
        assert_same(compiled(temperature), at(temperature))


def test_inductor_with_surrounding_work():
    """What is around them is fused; strides that the fake kernels promise are asserted here."""
    h = dense.head((4, 8), 6, 90, bias=True)

    def model(hidden, weight, bias, target):
        x = torch.nn.functional.rms_norm(hidden.mT.relu().mT, (6,))
        return (logprobs(x, weight, bias, target) * 1.5).sum() + loss(x, weight, bias, target)

    # What is fused rounds otherwise, and the norm of a small row multiplies that.
    assert_same(run(torch.compile(model, fullgraph=True), h), run(model, h), rtol=1e-4)


LAYOUTS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts(layout):
    change = LAYOUTS[layout]
    h = dense.head((5, 7), 6, 90, bias=True)

    def model(hidden, weight, bias, target):
        return logprobs(change(hidden), change(weight), bias, target)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, h), run(model, h))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_autocast(function):
    h = dense.head(20, 6, 90, bias=True)

    def model(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*args).float()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, h), run(model, h), torch.bfloat16)


def test_errors_are_the_same():
    h = dense.head(20, 6, 90)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"target: expected ids in \[0, 90\)"):
        compiled(h.hidden, h.weight, None, h.target + 200)


# --- torch.library.opcheck: schema, autograd registration, fakes, tracing with dynamic shapes ----


def stats_args(h, track):
    options = (-100, 1.0, 0.0, 1.0, SMALL, h.hidden.dtype, False)
    needs = [True] * 3 + [False] * 3
    tensors = (h.hidden, h.weight, h.bias, h.target)
    return (*tensors, *options, track, needs, "recompute", [], None, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", [0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("track", [0, TRACK_ALL], ids=["logprob", "everything"])
def test_opcheck_of_linear_stats(backend, ignored, dtype, track):
    h = dense.head(20, 6, 90, dtype, bias=True, ignored=ignored)
    with ift_kernels.use_backend(backend):
        torch.library.opcheck(torch.ops.ift_kernels.linear_stats, stats_args(h, track))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_linear_token(backend):
    h = dense.head(20, 6, 90, bias=True).map(torch.Tensor.detach)
    with ift_kernels.use_backend(backend):
        for k, sample in ((1, False), (3, False), (1, True)):
            args = (h.hidden, h.weight, h.bias, 1.0, 0.0, 1.0, k, sample, 7, 0, SMALL)
            more = (torch.float32, False, None, None, None)
            torch.library.opcheck(torch.ops.ift_kernels.linear_token, (*args, *more))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_expected_embedding(backend, dtype):
    h = dense.head(20, 6, 90, dtype, bias=True)
    embedding = torch.randn(90, 5).to(dtype).requires_grad_()
    args = (h.hidden, h.weight, h.bias, embedding, 1.0, 0.0, 1.0, SMALL, dtype)
    with ift_kernels.use_backend(backend):
        torch.library.opcheck(torch.ops.ift_kernels.linear_expected_embedding, args)


BACKWARDS = {
    "linear_stats_backward",
    "linear_stats_backward_kept",
    "linear_expected_embedding_backward",
    "linear_loss",
}


def signature(func, args):
    """The operator, the layout of its tensors, everything else as it is."""

    def of(argument):
        if isinstance(argument, torch.Tensor):
            return argument.shape, argument.stride(), argument.dtype
        return tuple(map(of, argument)) if isinstance(argument, (list, tuple)) else argument

    return func, *map(of, args)


@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
@pytest.mark.parametrize("ignored", [0, 0.5])
def test_opcheck_of_what_backward_calls(layout, ignored):
    """The operators that autograd calls, with the arguments that it calls them with."""
    seen = []

    def copy(argument):  # what is kept is consumed by the call
        if not isinstance(argument, torch.Tensor):
            return argument
        clone = argument.detach().clone()
        return clone if clone.stride() == argument.stride() else argument.detach()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.removeprefix("ift_kernels::")
            if name in BACKWARDS:
                seen.append((func, tuple(map(copy, args))))
            return func(*args, **(kwargs or {}))

    h = dense.head(20, 6, 90, bias=True, ignored=ignored)
    hidden = LAYOUTS[layout](h.hidden.detach()).requires_grad_()
    for name in plan.SCHEDULES:
        with plan.use_schedule(name), Record():
            for function in FUNCTIONS.values():
                function(hidden, h.weight, h.bias, h.target).sum().backward()
    assert {func._schema.name.removeprefix("ift_kernels::") for func, _ in seen} == BACKWARDS
    # Calls of one signature are one check: most schedules call most operators alike.
    for func, args in {signature(*call): call for call in seen}.values():
        # They refuse to be differentiated, which is what test_autograd_registration would try.
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
