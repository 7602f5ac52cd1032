"""What only a GPU can show, of every backend for GPUs.

TRITON_INTERPRET=1 IFT_BACKEND=triton runs the kernels of Triton in its interpreter, and
``PYTHONPATH=tests -p cuda_emulator`` those of CUDA C++ in tests/cuda_emulator, on any machine.
"""

import contextlib
import threading

import pytest
import torch

import dense
import ift_kernels as K
from ift_kernels import backends
from ift_kernels.backends import contract
from ift_kernels.common import sync_free
from serving import DTYPES

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CUDA and backends.requested() is None, reason="no GPU, and not interpreted either"
    ),
]
DEVICE = torch.device("cuda" if CUDA else "cpu")
# 151937: odd. The interpreter gets a thousandth of the work.
SHAPES = [(300, 256, 151937), (2048, 512, 32000)] if CUDA else [(5, 8, 131)]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def serving(request):
    """The backend under test."""
    reason = backends.BACKENDS[request.param].unsupported_reason(DEVICE, torch.float32)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with K.use_backend(request.param):
        yield request.param


def head(shape, dtype, bias=True, **options):
    """`dense.head` on the device."""
    h = dense.head(*shape, dtype, bias=bias, **options)
    h = h.map(lambda t: t.detach().to(DEVICE).requires_grad_())
    return dense.replace(h, target=h.target.to(DEVICE))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, dense.TRANSFORM], ids=["plain", "transform"])
def test_against_fp64(shape, dtype, options, serving):
    h = head(shape, dtype, **options)
    assert backends.get(h.hidden).__name__.endswith(serving)
    stats = K.linear_logprobs(*h.args, outputs=dense.OUTPUTS, **h.kwargs)
    dense.assert_stats_and_gradients(stats, h)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_active_set(trained, dtype):
    h = head((300, 64, 5001) if CUDA else (40, 8, 150), dtype, bias=False)
    weight = h.weight if trained else h.weight.detach()
    chosen = K.ActiveSet(threshold=0.0, block=32, tail_bucket=128)
    results = []
    for gradient in ("exact", chosen):
        stats = K.linear_logprobs(h.hidden, weight, h.target, gradient=gradient)
        up = dense.upstream(h, ("logprob",))
        results.append(dense.gradients(dense.send(stats, up), h.inputs[: 1 + trained]))
    for a, b in zip(*results, strict=True):
        assert dense.distance(a, b) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_more_than_2_31_elements_extension():
    """Offsets are 64 bits: a product of 2³¹ elements and more, in one tile."""
    rows, columns = (17000, 131072) if CUDA else (3, 200)
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    x[-1, -1] = 20.0
    backend, chunk = backends.get(x), contract.Chunk(x)
    target = torch.full((rows,), columns - 1, device=DEVICE)
    running = state, argmax = contract.new_state(rows, DEVICE)
    backend.stats_update(chunk, target, running, contract.TRACK_ARGMAX)
    assert int(argmax[-1]) == columns - 1 and float(state[2, -1]) == 20.0
    norm = torch.stack([state[0], state[1].log()]).float()
    coef = torch.zeros(4, rows, device=DEVICE)
    coef[1] = 1.0
    backend.dlogits_(chunk, contract.RowGradient(target, norm, coef))
    assert abs(float(x[-1].float().sum()) - 1.0) < 2e-2


def test_two_calls_give_the_same_bits():
    h = head(SHAPES[-1], torch.bfloat16)
    results = []
    for _ in range(2):
        loss = K.linear_cross_entropy(h.hidden, h.weight, h.target, bias=h.bias)
        results.append([loss, *torch.autograd.grad(loss, h.inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", ["exact", K.ActiveSet(2.0**-7, 32, 128)], ids=str)
def test_cuda_graph(gradient):
    h = head((96, 64, 1000) if CUDA else (40, 8, 150), torch.float32, bias=False)

    def step():
        stats = K.linear_logprobs(*h.args, gradient=gradient)
        grads = torch.autograd.grad(stats.logprob.sum(), h.inputs)
        return [stats.logprob.detach(), *grads]

    def in_sync_free():
        with sync_free.sync_free():
            return step()

    wanted = in_sync_free()
    if not CUDA:
        captured, replay = in_sync_free(), lambda: None
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            in_sync_free()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # sync-free by itself
            captured = step()
        replay = graph.replay
    replay()
    for a, b in zip(captured, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        h.hidden.mul_(0.5)
    replay()
    if CUDA:
        for a, b in zip(captured, in_sync_free(), strict=True):
            torch.testing.assert_close(a, b)


def test_no_wait_for_the_device():
    h = head((96, 64, 1000) if CUDA else (7, 8, 150), torch.bfloat16, bias=False)
    loss = K.linear_cross_entropy(h.hidden, h.weight, h.target)  # compiles what there is to compile
    loss.backward()
    with contextlib.ExitStack() as stack:
        stack.enter_context(sync_free.sync_free())
        if CUDA:
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        K.linear_cross_entropy(h.hidden, h.weight, h.target).backward()


def test_token_choice_and_expected_embedding():
    h = head((64, 128, 5003) if CUDA else (5, 8, 131), torch.float32, bias=False)
    found = []
    for inputs in (h, h.double()):
        with torch.no_grad():
            rules = ({}, {"rule": "kth", "k": 3}, {"rule": "sample", "seed": 7})
            here = inputs.hidden, inputs.weight
            found.append([K.linear_token(*here, **rule).ids for rule in rules])
            found[-1].append(K.linear_expected_embedding(*here, inputs.weight))
    for ours, wanted in zip(*(f[:3] for f in found), strict=True):
        assert torch.equal(ours, wanted)
    torch.testing.assert_close(found[0][3].double(), found[1][3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergence(dtype):
    h = head((64, 128, 5003) if CUDA else (5, 8, 131), dtype, bias=False)
    teacher = (h.hidden.detach().roll(1, 0), h.weight.detach())
    value = K.linear_divergence(h.hidden, h.weight, *teacher)
    wanted = K.linear_divergence(*(t.detach().double() for t in (h.hidden, h.weight, *teacher)))
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(value.double(), wanted, rtol=bound, atol=bound)


def test_two_streams_and_two_threads(serving):
    """Each with its own work, all at once: nothing is shared that should not be.

    One after the other in Triton's interpreter, which has one state for all threads.
    """
    h = head((256, 128, 5003) if CUDA else (5, 8, 131), torch.float32, bias=False)
    results = {}

    def step(scale):
        leaf = (h.hidden.detach() * scale).requires_grad_()
        loss = K.linear_cross_entropy(leaf, h.weight.detach(), h.target)
        return [loss.detach(), torch.autograd.grad(loss, leaf)[0]]

    def work(scale):
        stream = torch.cuda.Stream() if CUDA else None
        with K.use_backend(serving), torch.cuda.stream(stream):
            for _ in range(5 if CUDA else 1):
                results[scale] = step(scale)
        if stream:
            stream.synchronize()

    wanted = {scale: step(scale) for scale in (0.5, 1.0)}
    if CUDA:
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(scale,)) for scale in wanted]
    for thread in threads:
        thread.start()
        if not CUDA and serving == "triton":
            thread.join()
    for thread in threads:
        thread.join()
    for scale, values in wanted.items():
        for a, b in zip(results[scale], values, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(not CUDA, reason="needs a compiler for the device")
def test_compiled_whole():
    h = head((64, 64, 1000), torch.bfloat16, bias=False)

    def loss(hidden, weight):
        return K.linear_cross_entropy(hidden, weight, h.target)

    compiled = torch.compile(loss, fullgraph=True)
    for f in (compiled, compiled):
        value = f(h.hidden, h.weight)
        assert torch.allclose(value, loss(h.hidden, h.weight), rtol=1e-3)
        assert torch.autograd.grad(value, h.hidden)[0].isfinite().all()


def test_scans_and_residual(serving):
    backend = backends.get(torch.ones(1, device=DEVICE))
    x = torch.randn(8, 4096 if CUDA else 40, device=DEVICE)
    for left in (True, False):
        with K.use_backend("reference"):
            wanted = K.discounted_cumsum(x.double(), 0.95, "left" if left else "right")
        found = backend.scan(x, None, None, 0.95, left).double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    table = torch.randn(1000, 65, device=DEVICE, requires_grad=True)
    ids, predicted = torch.randint(0, 1000, (2, 2, 33), device=DEVICE)
    results = []
    for name in (serving, "reference"):
        with K.use_backend(name):
            out = K.temporal_residual(table, ids, predicted, ids, 0.2)
            results.append([out, *torch.autograd.grad(out.sin().sum(), table)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
