"""The C++ epilogues of two heads against the reference ones: every kind, dtype, odd size."""

import itertools

import pytest
import torch

from ift_kernels import backends
from ift_kernels.backends import contract, cpu
from ift_kernels.backends import reference as ref
from ift_kernels.common.transform import LogitTransform
from serving import DTYPES, needs_cpp

pytestmark = needs_cpp
KINDS = contract.KINDS
TRANSFORMS = {"plain": LogitTransform(), "capped": LogitTransform(0.7, 9.0, 1.3)}


def side(rows, columns, dtype, transform, biased, seed):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, columns + 5, generator=g).mul_(6).to(dtype)
    bias = torch.randn(columns, generator=g) if biased else None
    return contract.Chunk(wide[:, :columns], bias, TRANSFORMS[transform])


def norm(*sides):
    found = []
    for x, bias, transform, _ in sides:
        z = transform.apply(x.double(), None if bias is None else bias.double())
        top = z.amax(1)
        found.append(torch.stack([top, (z - top[:, None]).exp().sum(1).log()]))
    return torch.stack(found).float()


def both(student, teacher, kind, values, start=0.0, upstream=None):
    """Sums (value, centre) and gradient by each backend, from the same norms."""
    out = []
    for backend in (cpu, ref):
        mine = student._replace(x=student.x.clone())
        rows = mine.x.shape[0]
        sums = torch.full((2, rows), start, dtype=torch.float64)
        backend.divergence_terms(mine, teacher, kind, 0.3, values, *sums)
        assert mine.x.equal(student.x) or mine.x.isnan().any()
        extra = torch.full((rows,), start, dtype=torch.float64) if kind == "forward" else None
        given = torch.linspace(-1, 1, rows) if upstream is None else upstream
        centre = sums[1] - start
        backend.divergence_gradient_(mine, teacher, kind, 0.3, values, centre, given, extra)
        out.append((sums[0], sums[1], mine.x.float(), sums[0] if extra is None else extra))
    return out


@pytest.mark.parametrize("columns", [1, 31, 1024, 1077, 2500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_the_reference(kind, dtype, columns):
    cases = itertools.product(TRANSFORMS, TRANSFORMS, (False, True))
    for number, (own, other, biased) in enumerate(cases):
        other_dtype = DTYPES[number % 3]
        student = side(5, columns, dtype, own, biased, 1)
        teacher = side(5, columns, other_dtype, other, not biased, 2)
        got, wanted = both(student, teacher, kind, norm(student, teacher), start=0.5)
        for a, b in zip((*got[:2], got[3]), (*wanted[:2], wanted[3]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        # 16-bit gradients may fall on the other side of a rounding.
        eps = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got[2], wanted[2], rtol=2 * eps, atol=1e-6)
        assert torch.equal(got[3], got[0]) or kind == "forward"


@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_tokens_infinities_and_nan(kind):
    student, teacher = (side(6, 70, torch.float32, "plain", False, seed) for seed in (3, 4))
    student.x[:, 3] = teacher.x[:, 3] = -torch.inf  # both rule it out
    student.x[1, 5] = -torch.inf  # the student alone: forward KL is infinite
    teacher.x[2, 5] = -torch.inf  # the teacher alone: reverse KL is
    student.x[3, 9] = torch.nan
    teacher.x[4, 9] = torch.nan
    student.x[5, 11] = torch.inf
    got, wanted = both(student, teacher, kind, norm(student, teacher), upstream=torch.ones(6))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert got[0][0].isfinite() and got[0][3:].isnan().all()
    assert got[0][1].isinf() == (kind == "forward") and got[0][2].isinf() == (kind == "reverse")
    silent, _ = both(student, teacher, kind, norm(student, teacher), upstream=torch.zeros(6))
    assert (silent[2] == 0).all()
    if kind == "forward":  # its value is there all the same
        torch.testing.assert_close(silent[3], got[3], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_certain_and_opposed_rows(kind):
    """Logits hundreds apart: probabilities of 1 and of exactly 0."""
    student, teacher = (contract.Chunk(torch.zeros(2, 40)) for _ in range(2))
    student.x[:, 0], teacher.x[0, 0], teacher.x[1, 1] = 300.0, 300.0, 300.0
    got, wanted = both(student, teacher, kind, norm(student, teacher), upstream=torch.ones(2))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert abs(got[0][0]) < 1e-6 and got[0][1] > 0.5


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 8), (33, 300), (70, 513)])
def test_transpose(dtype, rows, columns):
    x = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
    out = torch.full((columns, rows + 7), torch.nan, dtype=dtype)
    cpu.transpose(x, out[:, :rows])
    assert torch.equal(out[:, :rows], x.T) and out[:, rows:].isnan().all()


def test_wrong_layouts_are_refused():
    student, teacher = (side(4, 30, torch.float32, "plain", False, seed) for seed in (1, 2))
    values, rows = norm(student, teacher), torch.zeros(4, dtype=torch.float64)
    for change in (
        {"values": values[:, :, :3]}, {"values": values.double()}, {"rows": rows.float()},
        {"teacher": teacher._replace(x=teacher.x[:, :29])},
    ):  # fmt: skip
        given = {"teacher": teacher, "values": values, "rows": rows, **change}
        other, norms, sums = given.values()
        with pytest.raises(RuntimeError):
            cpu.divergence_terms(student, other, "jsd", 0.5, norms, sums, sums)
    with pytest.raises(RuntimeError, match="value: only of kind 'forward'"):
        cpu.divergence_gradient_(
            student, teacher, "jsd", 0.5, values, rows, torch.ones(4), torch.zeros_like(rows)
        )
    with pytest.raises(RuntimeError, match="transpose"):
        cpu.transpose(student.x, torch.empty(30, 4))
    assert backends.get(student.x) is cpu
