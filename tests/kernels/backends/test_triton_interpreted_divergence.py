"""Epilogues of two heads, and of a softmax's gradient, in Triton's interpreter: against fp64."""

import pytest
import test_divergence_epilogues as epilogues
import test_triton_interpreted as interpreted
import torch

import dense
import ift_kernels as K
from ift_kernels.backends import reference as ref
from ift_kernels.backends import triton as backend
from ift_kernels.backends.contract import Chunk
from ift_kernels.backends.triton import launch
from serving import DTYPES

KINDS = epilogues.KINDS
served_by_triton, blocks = interpreted.served_by_triton, interpreted.blocks


def in_double(chunk):
    bias = None if chunk.bias is None else chunk.bias.double()
    return chunk._replace(x=chunk.x.double(), bias=bias)


def both(student, teacher, kind, norm, upstream):
    """Value, centre and gradient, and the value that "forward" adds on the way: ours, and fp64."""
    found = []
    for side, wide in ((backend, False), (ref, True)):
        s, t = (in_double(c) if wide else c._replace(x=c.x.clone()) for c in (student, teacher))
        values = norm.double() if wide else norm
        value, centre = torch.full((2, len(s.x)), 0.5, dtype=torch.float64)
        side.divergence_terms(s, t, kind, 0.3, values, value, centre)
        extra = torch.full_like(value, 0.5) if kind == "forward" else None
        side.divergence_gradient_(s, t, kind, 0.3, values, centre - 0.5, upstream, extra)
        found.append((value, centre, value if extra is None else extra, s.x.double()))
    return found


def assert_same(found, dtype, nan=False):
    ours, wanted = found
    for a, b in zip(ours[:3], wanted[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=nan)
    # Log-probabilities of 20 and more in float32 are off by a few 1e-6, and so is their difference.
    eps = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(ours[3], wanted[3], rtol=eps, atol=1e-5, equal_nan=nan)


# Rows: few are cut in parts. Columns: one; several blocks and a tail.
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(4, 1, torch.float32), (1, 300, torch.bfloat16), *((5, 150, dtype) for dtype in DTYPES)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence(kind, rows, columns, dtype, blocks):
    for number, (own, other) in enumerate((("plain", "capped"), ("capped", "plain"))):
        biased = bool((number + rows) % 2)
        student = epilogues.side(rows, columns, dtype, own, biased, 1)
        teacher = epilogues.side(rows, columns, DTYPES[number + 1], other, not biased, 2)
        norm, upstream = epilogues.norm(student, teacher), torch.linspace(-1, 1, rows)
        assert_same(both(student, teacher, kind, norm, upstream), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_tokens_infinities_and_nan(kind, blocks):
    student, teacher = (
        epilogues.side(7, 90, torch.float32, "plain", biased, seed)
        for biased, seed in ((True, 3), (False, 4))
    )
    student.bias[3] = -torch.inf
    teacher.x[:, 3] = -torch.inf  # both rule it out
    student.x[1, 5] = -torch.inf  # the student alone: forward KL is infinite
    teacher.x[2, 5] = -torch.inf  # the teacher alone: reverse KL is
    student.x[3, 9] = torch.nan
    teacher.x[4, 9] = torch.nan
    student.x[5, 11] = torch.inf
    student.x[6, 80] = torch.nan  # of a row without upstream gradient
    upstream = torch.ones(7)
    upstream[6] = 0
    found = both(student, teacher, kind, epilogues.norm(student, teacher), upstream)
    assert_same(found, torch.float32, nan=True)
    value, gradient = found[0][0], found[0][3]
    assert value[0].isfinite() and value[3:].isnan().all()
    assert value[1].isinf() == (kind == "forward") and value[2].isinf() == (kind == "reverse")
    assert not gradient[6].any()


@pytest.mark.parametrize("kind", KINDS)
def test_certain_and_opposed_rows(kind, blocks):
    """Logits hundreds apart: probabilities of 1 and of exactly 0."""
    student, teacher = (Chunk(torch.zeros(3, 140)) for _ in range(2))
    student.x[:2, 0], teacher.x[0, 0], teacher.x[1, 1] = 300.0, 300.0, 300.0
    found = both(student, teacher, kind, epilogues.norm(student, teacher), torch.ones(3))
    assert_same(found, torch.float32)
    assert abs(found[0][0][0] - 0.5) < 1e-6 and found[0][0][1] > 1


def test_wrong_layouts_are_refused():
    student, teacher = (epilogues.side(4, 30, torch.float32, "plain", False, s) for s in (1, 2))
    norm, sums = epilogues.norm(student, teacher), torch.zeros(4, dtype=torch.float64)
    for other, values, rows, word in (
        (teacher, norm[:, :, :3], sums, "norm"), (teacher, norm.double(), sums, "norm"),
        (teacher, norm[0], sums, "norm"), (teacher, norm, sums.float(), "float64"),
        (teacher._replace(x=teacher.x[:, :29]), norm, sums, "products"),
        (teacher._replace(x=teacher.x.T.contiguous().T), norm, sums, "x: expected consecutive"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=word):
            backend.divergence_terms(student, other, "jsd", 0.5, values, rows, rows)
    with pytest.raises(RuntimeError, match="value: only of kind 'forward'"):
        backend.divergence_gradient_(student, teacher, "jsd", 0.5, norm, sums, sums.float(), sums)


@pytest.mark.parametrize(("dtype", "transform", "bias"), interpreted.CASES)
@pytest.mark.parametrize("with_prob", [False, True])
def test_softmax_gradient(dtype, transform, bias, with_prob, blocks):
    x, b, _ = interpreted.products(7, 300, dtype, bias)
    if b is not None:
        b[5] = -torch.inf
    norm = torch.stack([x.float().nan_to_num(0, 9, -9).amax(1), torch.rand(7) + 3])
    d_prob, centre = torch.randn(7, 305)[:, :300], torch.randn(7)
    found = []
    for side, wide in ((backend, False), (ref, True)):
        chunk = Chunk(x.clone(), b, transform, 100)
        chunk = in_double(chunk) if wide else chunk
        up, values, mean = (t.double() if wide else t.clone() for t in (d_prob, norm, centre))
        prob = torch.full((7, 310), torch.nan, dtype=chunk.x.dtype)[:, :300] if with_prob else None
        side.softmax_gradient_(chunk, up, values, mean, prob)
        found.append([chunk.x.to(dtype)] + ([prob.to(dtype)] if with_prob else []))
    for ours, wanted in zip(*found, strict=True):
        eps = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(ours, wanted, rtol=eps, atol=1e-5, equal_nan=True)
    if b is not None:  # its softcap is flat at a bias of −∞
        assert found[0][0][4:, 5].abs().max() < 1e-6


def test_wrong_layouts_of_a_softmax_gradient_are_refused():
    x, norm = torch.zeros(4, 10), torch.zeros(2, 4)
    for d_prob, rows, prob, word in (
        (torch.zeros(4, 9), norm, None, "d_prob"), (torch.zeros(3, 10), norm, None, "d_prob"),
        (torch.zeros(4, 10), norm[:, :3], None, "norm"), (x.clone(), norm, x.T, "prob"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=word):
            backend.softmax_gradient_(Chunk(x), d_prob, rows, torch.zeros(4), prob)


# --- the operations -------------------------------------------------------------------------------


@pytest.fixture
def small():
    """Each step of the interpreter costs, however small its blocks are."""
    with launch.use_config("divergence", {"BLOCK": 128, "num_warps": 1}):
        yield


@pytest.mark.parametrize(("kind", "dtype"), [*zip(KINDS, DTYPES, strict=True)], ids=str)
def test_linear_divergence(kind, dtype, small):
    """Not one call of the reference's epilogues."""
    student, teacher = (dense.head(9, d, 130, dtype, bias=True, seed=d) for d in (12, 8))
    options = {"kind": kind, "beta": 0.3, **dense.TRANSFORM, "teacher_softcap": 8.0}

    def by(s, t):
        value = K.linear_divergence(
            s.hidden, s.weight, t.hidden.detach(), t.weight.detach(), bias=s.bias,
            teacher_bias=t.bias.detach(), **options,
        )  # fmt: skip
        return [value, *dense.gradients(value.sum(), s.inputs)]

    ours = by(student, teacher)
    wanted = by(student.double(), teacher.double())  # fp64 is served by the reference
    for a, b in zip(ours, wanted, strict=True):
        rounding = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert dense.distance(a.double(), b) < rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_expected_embedding(dtype, small):
    h = dense.head(9, 12, 130, dtype, bias=True, **dense.TRANSFORM)
    table = torch.randn(130, 6).to(dtype).requires_grad_()

    def by(h, table):
        soft = K.linear_expected_embedding(h.hidden, h.weight, table, **h.kwargs)
        return [soft, *dense.gradients(soft.sin().sum(), [*h.inputs, table])]

    ours, wanted = by(h, table), by(h.double(), table.detach().double().requires_grad_())
    for a, b in zip(ours, wanted, strict=True):
        rounding = 2e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
        assert dense.distance(a.double(), b) < rounding


def test_gradients_of_certain_tokens():
    """Of a nearly certain token, Σ p·g cancels against its own g: both are in float32."""
    h = dense.head(40, 17, 130, torch.bfloat16, logit_scale=10.0, ignored=0.0)
    table = torch.randn(130, 5).bfloat16().requires_grad_()
    wide = h.double()
    certain = dense.logits(wide).softmax(-1).amax(-1) > 1 - 1e-7
    assert certain.sum() > 2
    soft = K.linear_expected_embedding(h.hidden, h.weight, table, **h.kwargs)
    (got,) = dense.gradients(soft.sum(), [h.hidden])
    exact = dense.logits(wide).softmax(-1) @ table.detach().double()
    (wanted,) = dense.gradients(exact.sum(), [wide.hidden])
    assert (got.double() - wanted)[certain].abs().max() < 1e-4


def test_no_epilogue_is_served_by_plain_torch(monkeypatch):
    """But for what is listed; neither here nor in an operation on two heads."""
    assert K.backends.plain_torch(backend) == ["top_k_update of k > 64"]
    for name in K.backends.EPILOGUES:
        monkeypatch.setattr(ref, name, lambda *a, **k: pytest.fail("the reference was called"))
    student, teacher = (dense.head(5, d, 70, seed=d) for d in (12, 8))
    K.linear_divergence(
        student.hidden, student.weight, teacher.hidden.detach(), teacher.weight.detach()
    ).sum().backward()
    table = torch.randn(70, 3, requires_grad=True)
    K.linear_expected_embedding(student.hidden, student.weight, table).sum().backward()
    for layout in (lambda w: w.T.contiguous().T, torch.Tensor.double):
        weight = layout(torch.randn(70, 8))
        assert len(backend.bucket_sums(weight, 32, torch.ones(70))) == 3
