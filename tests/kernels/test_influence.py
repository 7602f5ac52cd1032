"""`influence` against autograd and against real SGD steps, in fp64, and its memory."""

import itertools

import pytest
import torch

import dense
import ift_kernels
from allocations import Allocations
from ift_kernels import exact_influence, influence
from refusals import assert_refused
from serving import BACKENDS

NAMES = ("d_logprob", "d_entropy", "d_lse")


def case(p=7, n=11, d=9, v=203, dtype=torch.float64, **options):
    probe, train = dense.head(p, d, v, dtype, **options), dense.head(n, d, v, dtype, seed=3)
    return probe, dense.Head(train.hidden, probe.weight, train.target, probe.bias, probe.options)


def call(probe, train):
    """Arguments of `influence`."""
    return probe.hidden, probe.target, train.hidden, train.target, train.weight


def by_autograd(probe, train, upstream, lr):
    """Directional derivative of every probe along the gradient of every training token."""
    probe, train = probe.double(), train.double()
    shared = [train.weight] + ([] if train.bias is None else [train.bias])
    watched = dense.Head(probe.hidden, train.weight, probe.target, train.bias, probe.options)
    values, trained = dense.stats(watched)["logprob"], dense.stats(train)
    losses = sum(trained[name.removeprefix("d_")] * g.double() for name, g in upstream.items())
    out = torch.zeros(values.shape[0], losses.shape[0], dtype=torch.float64)
    for o, value in enumerate(values):
        up = torch.autograd.grad(value, shared, retain_graph=True)
        for u, loss in enumerate(losses):
            down = torch.autograd.grad(loss, shared, retain_graph=True)
            out[o, u] = -lr * sum((a * b).sum() for a, b in zip(up, down, strict=True))
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, **dense.TRANSFORM}], ids=["plain", "all"])
@pytest.mark.parametrize("asked", [(), ("d_logprob",), NAMES], ids=["sft", "dpo", "any"])
def test_equals_autograd(backend, dtype, options, asked):
    probe, train = case(dtype=dtype, **options)
    g = torch.Generator().manual_seed(5)
    upstream = {k: torch.randn(train.target.shape, generator=g) for k in asked}
    expected = upstream or {"d_logprob": -torch.ones(train.target.shape)}
    exact = by_autograd(probe, train, expected, 0.3)
    ours = influence(*call(probe, train), bias=train.bias, lr=0.3, **train.options, **upstream)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not ours.requires_grad
    bound = 1e-12 if dtype == torch.float64 else 1e-5  # 16 bits are computed in float32
    assert (ours - exact).abs().max() <= bound * exact.abs().max()
    assert (ours[probe.target == -100] == 0).all() and (ours[:, train.target == -100] == 0).all()


def test_chunks_of_the_vocabulary():
    probe, train = case(v=5003, dtype=torch.float32, n=900)
    args = call(probe, train)
    small, large = influence(*args, workspace=1 << 20), influence(*args)
    assert (small - large).abs().max() <= 1e-5 * large.abs().max()


# The claim is about a step that is really taken: its error is of second order.
def test_error_falls_with_the_square_of_the_step():
    """Relative error 10× smaller, absolute 100×, for each 10× smaller η."""
    probe, train = case(p=20, n=16, d=12, v=301)
    p, t = probe.double(), train.double()
    with torch.no_grad():
        before = dense.stats(dense.Head(p.hidden, t.weight, p.target))["logprob"]
    (gradient,) = torch.autograd.grad(-dense.stats(t)["logprob"].sum(), [t.weight])
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        with torch.no_grad():
            moved = dense.Head(p.hidden, t.weight - lr * gradient, p.target)
            change = dense.stats(moved)["logprob"] - before
        predicted = influence(*call(p, t), lr=lr).sum(1)
        errors.append((predicted - change).abs().max().item())
    assert all(50 <= a / b <= 200 for a, b in itertools.pairwise(errors)), errors


def test_exact_influence_of_the_head_is_influence():
    probe, train = case(bias=True)
    rows = probe.target != -100, train.target != -100

    def each(states, target, p):
        logp = (states @ p["w"].T + p["b"]).log_softmax(-1)
        return logp.gather(-1, target[:, None])[:, 0]

    exact = exact_influence(
        lambda p: each(probe.hidden[rows[0]], probe.target[rows[0]], p),
        lambda p: -each(train.hidden[rows[1]], train.target[rows[1]], p),
        {"w": train.weight, "b": train.bias},
        lr=0.1,
    )
    ours = influence(
        probe.hidden[rows[0]], probe.target[rows[0]], train.hidden[rows[1]],
        train.target[rows[1]], train.weight, bias=train.bias, lr=0.1,
    )  # fmt: skip
    torch.testing.assert_close(exact, ours, rtol=1e-10, atol=1e-12)


def test_exact_influence_of_a_network():
    """The prediction of the whole network's step, and its second-order error."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6))
    net = net.double()
    parameters = {k: v.detach() for k, v in net.named_parameters()}
    x, o = torch.randn(4, 5).double(), torch.randn(3, 5).double()
    y = torch.tensor([0, 2, 5, 1])

    def probe(p):
        return torch.func.functional_call(net, p, (o,)).log_softmax(-1)

    def loss(p):
        return torch.nn.functional.cross_entropy(torch.func.functional_call(net, p, (x,)), y)

    gradient = torch.func.grad(loss)(parameters)
    errors = []
    for lr in (1e-2, 1e-3):
        predicted = exact_influence(probe, loss, parameters, lr=lr)
        assert predicted.shape == (3, 6)
        moved = {k: v - lr * gradient[k] for k, v in parameters.items()}
        errors.append((predicted - (probe(moved) - probe(parameters))).abs().max().item())
    assert 50 <= errors[0] / errors[1] <= 200, errors


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
def test_peak_memory_and_error_at_a_real_vocabulary():
    """V = 151936: one (N, V) matrix would be 56 MiB."""
    v, d, n = 151936, 16, 96
    probe, train = case(p=n, n=n, d=d, v=v, dtype=torch.float32, ignored=0)
    workspace = 8 << 20
    with ift_kernels.use_backend("cpu"), Allocations() as seen:
        ours = influence(*call(probe, train), workspace=workspace)
    assert seen.largest < 4 * n * v / 5 and seen.peak <= 1.25 * workspace + (1 << 20), seen.peak
    a, e = (_gradient(h) for h in (probe, train))
    kernel = probe.hidden.detach().double() @ train.hidden.detach().double().T
    exact = kernel * (a @ e.T)
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
@pytest.mark.parametrize("ignored", [False, True])
def test_memory_beside_a_large_result(ignored):
    """⟨h_o, h_u⟩ is as large as the result, and is never there as a whole."""
    probe, train = case(p=1500, n=2000, d=8, v=64, dtype=torch.float32)
    y_o, y_u = probe.target, train.target
    assert (y_o == -100).any() and (y_u == -100).any()
    if not ignored:
        y_o, y_u = y_o.clamp(min=0), y_u.clamp(min=0)
    workspace, result = 1 << 20, 4 * 1500 * 2000
    with ift_kernels.use_backend("cpu"), Allocations() as seen:
        influence(probe.hidden, y_o, train.hidden, y_u, train.weight, workspace=workspace)
    assert seen.peak <= (2 if ignored else 1) * result + 4 * workspace, seen.peak


def _gradient(h):
    """e_y − p, fp64, with ignored rows 0."""
    with torch.no_grad():
        a = -(h.hidden.double() @ h.weight.double().T).softmax(-1)
        keep = h.target != -100
        a[keep.nonzero()[:, 0], h.target[keep]] += 1
        return a * keep[:, None]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"probe_hidden": torch.zeros(2, 3, 4)}, ValueError, "expected shape"),
        ({"probe_hidden": torch.zeros(2, 5)}, ValueError, r".* D=4 like weight, got \(2, 5\)"),
        ({"probe_hidden": torch.zeros(2, 4).to_sparse()}, TypeError, "expected a dense tensor"),
        (
            {"probe_hidden": torch.zeros(2, 4, device="meta")},
            ValueError,
            "expected on cpu like weight, got meta",
        ),
        ({"probe_target": torch.tensor([0, 9])}, ValueError, r"expected ids in \[0, 9\)"),
        ({"probe_target": torch.zeros(2)}, TypeError, "expected int64"),
        ({"target": torch.tensor([0, 1, 99])}, ValueError, r"expected ids in \[0, 9\)"),
        ({"hidden": torch.zeros(3, 4).double()}, TypeError, "expected torch.float32"),
        ({"d_logprob": torch.zeros(2)}, ValueError, "expected the shape of target"),
        ({"lr": "x"}, TypeError, "expected a number"),
    ],
)
def test_errors(change, error, match):
    args = {
        "probe_hidden": torch.zeros(2, 4),
        "probe_target": torch.zeros(2, dtype=torch.int64),
        "hidden": torch.zeros(3, 4),
        "target": torch.zeros(3, dtype=torch.int64),
        "weight": torch.zeros(9, 4),
    }
    assert_refused(influence, change, error, match, **args)


def test_nothing_to_do():
    weight = torch.randn(9, 4)
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    some = torch.randn(3, 4), torch.tensor([1, -100, 2])
    assert influence(*none, *some, weight).shape == (0, 3)
    assert influence(*some, *none, weight).shape == (3, 0)
