"""Discounted sums and the propagation weights, against dense matrices and the plain port."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ift_kernels
from bench.peers.naive_ift import naive_weights
from dense import assert_compiles
from ift_kernels import discounted_cumsum, propagation_weights
from refusals import assert_refused
from serving import BACKENDS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = list(
    itertools.product(("loss", "logps", "mask"), ("left", "right"), ("L1", "L2", "softmax", "log"))
)


def dense(x, gamma, side, mask=None):
    """`discounted_cumsum` by its definition, in fp64."""
    position = torch.arange(x.shape[-1])
    distance = position[None] - position[:, None]
    u = torch.where(distance >= 0, float(gamma) ** distance.clamp(min=0).double(), 0)
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    x = x.double().masked_fill(~mask, 0)
    return (x @ (u.T if side == "left" else u)).masked_fill(~mask, 0)


def batch(rows, length, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.rand(rows, length, generator=generator) > 0.3


# 1 and 2: no step and one step of the doubling; 127 to 129: either side of a power of two.
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cumsum_equals_dense(backend, length, side, gamma, dtype):
    x, mask = batch(3, length, dtype)
    for m in (None, mask, mask.float(), mask.long()):
        got = discounted_cumsum(x, gamma, side, mask=m)
        assert got.dtype == dtype and got.shape == x.shape
        expected = dense(x, gamma, side, m)
        scale = dense(x.abs(), gamma, side, m)  # of the terms: sums may cancel
        # One rounding for half types; fp32 in the reference rounds at each of log2(T) steps.
        bound = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
        assert ((got.double() - expected).abs() <= bound * scale + 1e-30).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_reach_the_end_of_their_document(backend, dtype, gamma, value):
    """As ``y[t] = x[t] + gamma * y[t - 1]`` takes them, also where gamma's powers underflow."""
    x, mask = batch(1, 3000, dtype)
    x, mask = x[0], mask[0]
    x[400], mask[400] = value, True
    cu, position = torch.tensor([0, 10, 2900, 3000]), torch.arange(3000)
    for m in (None, mask):
        kept = torch.ones_like(mask) if m is None else m
        for side in ("left", "right"):
            got = discounted_cumsum(x, gamma, side, mask=m, cu_seqlens=cu)
            reached = position <= 400 if side == "left" else position >= 400
            reached &= (position >= 10) & (position < 2900) & kept
            if gamma == 0:
                reached = position == 400
            torch.testing.assert_close(
                got[reached], torch.full_like(got[reached], value), equal_nan=True
            )
            assert got[~reached].isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_cumsum_of_long_rows_and_many_rows(backend, side):
    # Enough values to be worth threads, in both shapes that the loop over rows can take.
    for rows, length in ((1, 40_000), (2000, 17)):
        x, mask = batch(rows, length, torch.float32)
        packed = torch.arange(0, rows * length + 1, length)
        got = discounted_cumsum(x, 0.9, side, mask=mask)
        again = discounted_cumsum(x.flatten(), 0.9, side, mask=mask.flatten(), cu_seqlens=packed)
        assert torch.equal(got.flatten(), again)
        with ift_kernels.use_backend("reference"):
            expected = discounted_cumsum(x.double(), 0.9, side, mask=mask)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_cumsum_packed_equals_each_document(backend, side, dtype):
    x, mask = batch(1, 40, torch.float32)
    x, mask = x[0], mask[0]
    cu = torch.tensor([0, 0, 1, 8, 8, 23, 40, 40], dtype=dtype)  # empty documents at both ends
    got = discounted_cumsum(x, 0.9, side, mask=mask, cu_seqlens=cu)
    for begin, end in itertools.pairwise(cu.tolist()):
        alone = discounted_cumsum(x[begin:end], 0.9, side, mask=mask[begin:end])
        torch.testing.assert_close(got[begin:end], alone, rtol=1e-6, atol=1e-6)
    folded = discounted_cumsum(x.view(4, 10), 0.9, side, mask=mask.view(4, 10), cu_seqlens=cu)
    assert torch.equal(folded.flatten(), got)


@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_reaches_its_row_only_and_never_from_under_the_mask(backend, side):
    x, mask = torch.ones(2, 9), torch.ones(2, 9, dtype=torch.bool)
    x[0, 4], mask[0, 4] = torch.nan, False
    assert discounted_cumsum(x, 0.9, side, mask=mask).isfinite().all()
    out = discounted_cumsum(x, 0.9, side)
    reached = out[0, :5] if side == "left" else out[0, 4:]
    assert reached.isnan().all() and out.isnan().sum() == 5
    packed = discounted_cumsum(x[0], 0.9, side, cu_seqlens=torch.tensor([0, 3, 6, 9]))
    assert not packed[:3].isnan().any() and not packed[6:].isnan().any() and packed.isnan().any()
    assert discounted_cumsum(x, 0.0, side).isnan().sum() == 1


def test_cumsum_takes_strides_and_empty_batches_and_changes_nothing(backend):
    x, mask = batch(6, 10, torch.float32)
    kept, kept_mask = x.clone(), mask.clone()
    torch.testing.assert_close(
        discounted_cumsum(x.T, 0.9, mask=mask.T),
        discounted_cumsum(x.T.contiguous(), 0.9, mask=mask.T.contiguous()),
    )
    torch.testing.assert_close(
        discounted_cumsum(x[:, ::2], 0.9), discounted_cumsum(x[:, ::2].contiguous(), 0.9)
    )
    assert torch.equal(x, kept) and torch.equal(mask, kept_mask)
    for shape in ((0, 4), (4, 0), (0,)):
        empty = torch.zeros(shape, requires_grad=True)
        out = discounted_cumsum(empty, 0.9)
        assert out.shape == shape
        out.sum().backward()
        assert empty.grad.shape == shape


finite = st.floats(-10, 10, allow_nan=False, width=32)


@st.composite
def problems(draw):
    length = draw(st.integers(1, 40))
    vector = st.lists(finite, min_size=length, max_size=length)
    x, y = (torch.tensor(draw(vector), dtype=torch.float64) for _ in range(2))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    cu = torch.tensor([0, *cuts, length])
    return x, y, mask, cu, draw(st.floats(0, 1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), finite)
@pytest.mark.parametrize("name", BACKENDS)
def test_linear_and_adjoint(name, problem, scale):
    x, y, mask, cu, gamma = problem

    def run(v, side):
        return discounted_cumsum(v, gamma, side, mask=mask, cu_seqlens=cu)

    with ift_kernels.use_backend(name):
        size = run(x.abs(), "left").sum() + run(y.abs(), "left").sum() + 1
        together = run(x + scale * y, "left")
        apart = run(x, "left") + scale * run(y, "left")
        assert (together - apart).abs().max() <= 1e-13 * (1 + abs(scale)) * size
        forth, back = (run(x, "left") * y).sum(), (x * run(y, "right")).sum()
        assert abs(forth - back) <= 1e-12 * size * (1 + y.abs().max() + x.abs().max())


def test_linear_and_adjoint_in_fp32(backend):
    # The hypothesis test is in fp64, which the reference serves; this one is the backend's own.
    x, mask = batch(4, 300, torch.float32, seed=1)
    y, _ = batch(4, 300, torch.float32, seed=2)
    forth = (discounted_cumsum(x, 0.97, "left", mask=mask).double() * y).sum()
    back = (x.double() * discounted_cumsum(y, 0.97, "right", mask=mask)).sum()
    assert abs(forth - back) < 1e-3  # of terms whose magnitudes sum to about 4e4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_cumsum_gradients_of_every_order(side, packed):
    x, mask = batch(2, 7)
    cu = torch.tensor([0, 3, 9, 14]) if packed else None
    x.requires_grad_()

    def run(v):
        return discounted_cumsum(v, 0.8, side, mask=mask, cu_seqlens=cu)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(lambda v: run(v).square(), x)


def test_cumsum_backward_twice_and_not_needed(backend):
    x, mask = batch(2, 30, torch.float32)
    x.requires_grad_()
    out = discounted_cumsum(x, 0.9, mask=mask)
    g, _ = batch(2, 30, torch.float32, seed=3)
    first = torch.autograd.grad(out, x, g, retain_graph=True)[0]
    second = torch.autograd.grad(out, x, g)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), dense(g, 0.9, "right", mask), rtol=1e-5, atol=1e-6)
    assert not discounted_cumsum(x.detach(), 0.9).requires_grad


def test_cumsum_contract_with_torch_library():
    x, mask = batch(2, 9, torch.float32)
    op = torch.ops.ift_kernels.discounted_cumsum
    torch.library.opcheck(op, (x.requires_grad_(), mask, None, 0.9, True))
    packed = (
        x.detach().reshape(1, -1).requires_grad_(),
        None,
        torch.tensor([0, 4, 18]),
        0.9,
        False,
    )
    torch.library.opcheck(op, packed)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_cumsum_compiles_to_one_graph(backend, packed):
    x, mask = batch(2, 9, torch.float32)
    cu = torch.tensor([0, 4, 18]) if packed else None

    def run(v):
        return (discounted_cumsum(v, 0.9, "left", mask=mask, cu_seqlens=cu) * v).sum()

    assert_compiles(run, x.requires_grad_())


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"gamma": 1.5}, ValueError, r"expected a float in \[0, 1\], got 1.5"),
        ({"gamma": float("nan")}, ValueError, ".*got nan"),
        ({"gamma": "much"}, TypeError, ".*got str"),
        ({"side": "up"}, ValueError, r"expected one of \['left', 'right'\], got 'up'"),
        ({"x": torch.arange(6).view(2, 3)}, TypeError, ".*got torch.int64"),
        ({"x": torch.zeros(1, 2, 3)}, ValueError, r"expected shape \(B, T\).*got \(1, 2, 3\)"),
        ({"mask": torch.ones(3, 2)}, ValueError, r".*\(2, 3\), got \(3, 2\)"),
        ({"mask": [1]}, TypeError, ".*got list"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, ".*got torch.float32"),
        (
            {"cu_seqlens": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "expected on cpu .*got meta",
        ),
        ({"cu_seqlens": torch.tensor(6)}, ValueError, r".*got \(\)"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, ".*decreasing"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, ".*0 to 6.*got 0 to 5"),
        ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, ".*0 to 6.*got 1 to 6"),
    ],
)
def test_cumsum_errors(arguments, error, said):
    given = {"x": torch.zeros(2, 3), "gamma": 0.9}
    assert_refused(discounted_cumsum, arguments, error, said, **given)


def test_compiled_caller_cannot_read_outside():
    # A trace cannot look at values, so the operation itself must, before pointers are followed.
    run = torch.compile(discounted_cumsum, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens"):
        run(torch.zeros(6), 0.9, cu_seqlens=torch.tensor([0, 60]))


@pytest.mark.parametrize(("kind", "side", "norm"), OPTIONS)
def test_weights_equal_the_port(backend, kind, side, norm):
    generator = torch.Generator().manual_seed(5)
    logprob = -4 * torch.rand(4, 33, generator=generator) - 0.05
    mask = torch.rand(4, 33, generator=generator) > 0.4
    options = {"gamma": 0.95, "kind": kind, "side": side, "norm": norm}
    got = propagation_weights(logprob, mask, **options)
    torch.testing.assert_close(got, naive_weights(logprob, mask, **options), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.sum(-1), mask.sum(-1).float(), rtol=1e-6, atol=0)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize(("kind", "side", "norm"), OPTIONS)
def test_weights_packed_equal_padded(kind, side, norm):
    logprob, mask = batch(3, 12)
    logprob = -logprob.abs()
    lengths = [12, 5, 9]
    for row, length in enumerate(lengths):
        mask[row, length:] = False
    options = {"kind": kind, "side": side, "norm": norm}
    padded = propagation_weights(logprob, mask, **options)
    cut = [slice(0, length) for length in lengths]
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    packed = propagation_weights(
        torch.cat([r[c] for r, c in zip(logprob, cut, strict=True)]),
        torch.cat([r[c] for r, c in zip(mask, cut, strict=True)]),
        cu_seqlens=cu,
        **options,
    )
    expected = torch.cat([r[c] for r, c in zip(padded, cut, strict=True)])
    torch.testing.assert_close(packed, expected, rtol=1e-12, atol=1e-12)


def test_weights_of_constant_losses():
    logprob, mask = torch.full((1, 10), -0.7, dtype=torch.float64), torch.ones(1, 10)
    weights = propagation_weights(logprob, mask, gamma=0.95)[0]
    assert round(weights[0].item(), 2) == 1.69 and round(weights[-1].item(), 2) == 0.21


def test_weights_without_discount_or_tokens_or_losses():
    logprob, mask = torch.full((3, 4), -1.0), torch.ones(3, 4, dtype=torch.bool)
    mask[0] = False
    logprob[1] = 0
    for kind, side, norm in OPTIONS:
        options = {"kind": kind, "side": side, "norm": norm}
        assert torch.equal(propagation_weights(logprob, mask, gamma=0, **options), mask.float())
        weights = propagation_weights(logprob, mask, **options)
        assert weights.isfinite().all() and (weights[0] == 0).all()
        torch.testing.assert_close(weights[2].sum(), torch.tensor(4.0))
    assert propagation_weights(logprob[:, :0], mask[:, :0]).shape == (3, 0)


def test_weights_stay_finite_where_exponentials_would_not():
    logprob, mask = torch.full((2, 50), -90.0), torch.ones(2, 50)
    logprob[1] *= 1e-3  # far below the other row: a shift by the batch's peak would lose it
    weights = propagation_weights(logprob, mask, kind="logps", norm="softmax")
    torch.testing.assert_close(weights.sum(-1), torch.tensor([50.0, 50.0]))
    small = propagation_weights(logprob * 1e-7, mask, kind="logps", side="right", norm="softmax")
    torch.testing.assert_close(small.sum(-1), torch.tensor([50.0, 50.0]))


@pytest.mark.parametrize("name", ["kind", "side", "norm"])
def test_weights_errors(name):
    with pytest.raises(ValueError, match=f"{name}: expected one of .*got 'other'"):
        propagation_weights(torch.zeros(2, 3), torch.ones(2, 3), **{name: "other"})
    with pytest.raises(TypeError, match=r"logprob: .*got torch.int64"):
        propagation_weights(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_transposed_input_compiles(backend):
    # The operator returns consecutive elements whatever it is given; its fake must say the same.
    x = torch.rand(7, 3).T
    with ift_kernels.use_backend(backend):
        torch.library.opcheck(
            torch.ops.ift_kernels.discounted_cumsum.default, (x, None, None, 0.9, True)
        )
