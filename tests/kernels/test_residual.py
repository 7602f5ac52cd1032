"""The temporal residual against its eager equation, position by position."""

import pytest
import torch

from dense import assert_compiles
from ift_kernels import mixed_in_ids, temporal_residual
from refusals import assert_refused

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
V, E = 11, 5  # small: tokens repeat, so rows of the gradient have many parts; odd width


def problem(rows=3, length=8, dtype=torch.float64, seed=0, vocabulary=V, width=E):
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, width, generator=g, dtype=torch.float64).to(dtype)
    ids, predicted = torch.randint(vocabulary, (2, rows, length), generator=g)
    labels = torch.where(torch.rand(rows, length, generator=g) > 0.4, ids, -100)
    return table, ids, predicted, labels


def eager(table, ids, mixed_in, lam):
    return (1 - lam) * table[ids] + lam * table[mixed_in]


def expected_mixed_in(ids, predicted, labels, cu=(), ignore_index=-100):
    """The rule in words: one position at a time."""
    mixed_in = ids.clone()
    for row in range(ids.shape[0]):
        for t in range(1, ids.shape[1]):
            starts = row * ids.shape[1] + t in cu
            if labels[row, t] != ignore_index and not starts:
                mixed_in[row, t] = predicted[row, t - 1]
    return mixed_in


def test_which_token_is_mixed_in():
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    predicted = torch.tensor([[6, 7, 8, 9, 10]])
    labels = torch.tensor([[-100, -100, 3, 4, -100]])
    # The first response token, 3, takes what the last prompt position, 2, predicts.
    assert mixed_in_ids(ids, predicted, labels).tolist() == [[1, 2, 7, 8, 5]]
    assert mixed_in_ids(ids, predicted, ids).tolist() == [[1, 6, 7, 8, 9]]
    cu = torch.tensor([0, 2, 2, 5])
    assert mixed_in_ids(ids, predicted, ids, cu_seqlens=cu).tolist() == [[1, 6, 3, 8, 9]]
    flat = mixed_in_ids(ids[0].int(), predicted[0], ids[0], cu_seqlens=cu.int())
    assert flat.tolist() == [1, 6, 3, 8, 9] and flat.dtype == torch.int64
    assert mixed_in_ids(ids, predicted, ids, ignore_index=4).tolist() == [[1, 6, 7, 4, 9]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lam", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_equals_eager(backend, dtype, lam, packed):
    table, ids, predicted, labels = problem(dtype=dtype)
    cu = torch.tensor([0, 3, 8, 13, 16, 24]) if packed else None
    got = temporal_residual(table, ids, predicted, labels, lam, cu_seqlens=cu)
    assert got.dtype == dtype and got.shape == (3, 8, E)
    mixed_in = expected_mixed_in(ids, predicted, labels, cu.tolist() if packed else ())
    assert (mixed_in != ids).any()
    expected = eager(table.double(), ids, mixed_in, lam)
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    alone = mixed_in == ids
    assert torch.equal(got[alone], table[ids][alone])  # bit for bit
    one_row = temporal_residual(table, ids[0], predicted[0], labels[0], lam)
    assert one_row.shape == (8, E)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradient_is_summed_in_fp32_and_rounded_once(backend, dtype, packed):
    # 1000 positions on 11 rows: sums long enough for half-precision accumulation to show.
    table, ids, predicted, labels = problem(5, 200, dtype)
    cu = torch.tensor([0, 100, 450, 1000]) if packed else None
    mixed_in = expected_mixed_in(ids, predicted, labels, cu.tolist() if packed else ())
    g = torch.randn(5, 200, E, generator=torch.Generator().manual_seed(1)).to(dtype)
    table.requires_grad_()
    temporal_residual(table, ids, predicted, labels, 0.2, cu_seqlens=cu).backward(g)
    exact = table.detach().double().requires_grad_()
    eager(exact, ids, mixed_in, 0.2).backward(g.double())
    # Half types: one rounding, to eps / 2. Otherwise the additions, about 100 to a row.
    bound = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 20)
    atol = 1e-13 if dtype == torch.float64 else 1e-5  # where the sum cancels
    torch.testing.assert_close(table.grad.double(), exact.grad, rtol=bound, atol=atol)
    assert table.grad.dtype == dtype


def test_gradient_covers_the_whole_table(backend):
    # Rows that do not occur must be written too, as zeros; more rows than one thread's share.
    table, ids, predicted, labels = problem(dtype=torch.float32, vocabulary=1000)
    table.requires_grad_()
    temporal_residual(table, ids, predicted, labels, 0.2).sum().backward()
    used = torch.unique(
        torch.cat([ids.flatten(), expected_mixed_in(ids, predicted, labels).flatten()])
    )
    unused = torch.ones(1000, dtype=torch.bool).index_fill(0, used, False)
    assert (table.grad[unused] == 0).all() and (table.grad[used] != 0).all()
    torch.testing.assert_close(table.grad.sum(), torch.tensor(float(ids.numel() * E)))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradients_of_every_order(packed):
    table, ids, predicted, labels = problem()
    cu = torch.tensor([0, 3, 24]) if packed else None
    table.requires_grad_()

    def run(t):
        return temporal_residual(t, ids, predicted, labels, 0.3, cu_seqlens=cu)

    assert torch.autograd.gradcheck(run, table)
    assert torch.autograd.gradgradcheck(lambda t: run(t).square(), table)


def test_backward_twice_and_not_needed(backend):
    table, ids, predicted, labels = problem(dtype=torch.float32)
    kept = [t.clone() for t in (table, ids, predicted, labels)]
    assert not temporal_residual(table, ids, predicted, labels, 0.2).requires_grad
    out = temporal_residual(table.requires_grad_(), ids, predicted, labels, 0.2)
    g = torch.randn_like(out)
    first = torch.autograd.grad(out, table, g, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, table, g)[0])
    assert all(map(torch.equal, (table.detach(), ids, predicted, labels), kept))


def test_strides_and_empty(backend):
    table, ids, predicted, labels = problem(dtype=torch.float32)
    expected = temporal_residual(table, ids, predicted, labels, 0.2)
    wide = torch.randn(V, 2 * E)
    wide[:, ::2] = table
    strided = [t.T.contiguous().T for t in (ids, predicted, labels)]
    assert torch.equal(temporal_residual(wide[:, ::2], *strided, 0.2), expected)
    table.requires_grad_()
    for shape in ((0, 4), (4, 0), (0,)):
        none = torch.zeros(shape, dtype=torch.int64)
        out = temporal_residual(table, none, none, none, 0.2)
        assert out.shape == (*shape, E)
        assert (torch.autograd.grad(out.sum(), table)[0] == 0).all()


def test_nan_in_the_table_stays_with_its_token(backend):
    table, ids, predicted, labels = problem(dtype=torch.float32)
    table[3] = torch.nan
    out = temporal_residual(table, ids, predicted, labels, 0.2)
    mixed_in = expected_mixed_in(ids, predicted, labels)
    assert torch.equal(out.isnan().all(-1), (ids == 3) | (mixed_in == 3))


def test_predictions_that_are_not_mixed_in_are_not_read(backend):
    table, ids, predicted, labels = problem(dtype=torch.float32)
    expected = temporal_residual(table, ids, predicted, labels, 0.2)
    read = torch.zeros_like(ids, dtype=torch.bool)
    read[:, :-1] = labels[:, 1:] != -100
    garbage = predicted.masked_fill(~read, -(10**12))
    assert torch.equal(temporal_residual(table, ids, garbage, labels, 0.2), expected)


def test_contract_with_torch_library():
    table, ids, predicted, labels = problem(dtype=torch.float32)
    cu = torch.tensor([0, 3, 24])
    op = torch.ops.ift_kernels.temporal_residual
    torch.library.opcheck(op, (table.requires_grad_(), ids, predicted, labels, cu, 0.2, -100))
    g = torch.randn(3, 8, E, requires_grad=True)
    op = torch.ops.ift_kernels.temporal_residual_adjoint
    torch.library.opcheck(op, (g, ids, predicted, labels, None, 0.2, -100, V))


def test_compiles_to_one_graph(backend):
    table, ids, predicted, labels = problem(dtype=torch.float32)

    def run(t):
        return temporal_residual(t, ids, predicted, labels, 0.2).square().sum()

    assert_compiles(run, table.requires_grad_())
    traced = torch.compile(mixed_in_ids, fullgraph=True, backend="aot_eager")
    cu = torch.tensor([0, 3, 24])
    assert torch.equal(
        traced(ids, predicted, labels, cu_seqlens=cu),
        mixed_in_ids(ids, predicted, labels, cu_seqlens=cu),
    )


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"lam": 1.2}, ValueError, r"expected a float in \[0, 1\], got 1.2"),
        ({"lam": -0.1}, ValueError, ".*got -0.1"),
        ({"lam": None}, TypeError, ".*got NoneType"),
        ({"embedding": torch.zeros(4)}, ValueError, r"expected shape \(V, E\), got \(4,\)"),
        ({"embedding": IDS}, TypeError, ".*got torch.int64"),
        ({"ids": IDS.float()}, TypeError, ".*got torch.float32"),
        ({"ids": IDS[None]}, ValueError, r".*got \(1, 2, 3\)"),
        ({"predicted": IDS.T}, ValueError, r".*ids, \(2, 3\), got \(3, 2\)"),
        ({"labels": IDS.bool()}, TypeError, ".*got torch.bool"),
        ({"labels": IDS[:, :2]}, ValueError, r".*got \(2, 2\)"),
        ({"ids": IDS + 4}, ValueError, r"expected tokens in \[0, 4\), .*got 4"),
        ({"ids": IDS - 1}, ValueError, r".*got -1"),
        ({"predicted": IDS + 9}, ValueError, r".*\[0, 4\), .*got 9"),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, ".*0 to 6.*got 0 to 7"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 6])}, ValueError, ".*decreasing"),
    ],
)
def test_errors(backend, arguments, error, said):
    good = {"embedding": torch.zeros(4, 2), "ids": IDS, "predicted": IDS, "labels": IDS, "lam": 0.2}
    assert_refused(temporal_residual, arguments, error, said, **good)
