"""linear_expected_embedding against softmax over full logits, in fp64: value and all gradients."""

import pytest
import torch

import dense
from ift.numerics import oracle
from ift_kernels import linear_expected_embedding

SMALL = 1 << 20


def table(v, e, dtype=torch.float32, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(v, e, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def by_definition(h, embedding):
    return oracle.expected_embedding(dense.logits(h), embedding)


def call(h, embedding, **options):
    return linear_expected_embedding(h.hidden, h.weight, embedding, **h.kwargs, **options)


def check(h, embedding, **options):
    """The value and the gradients of every tensor, for an upstream gradient of both signs."""
    exact, wide = h.double(), embedding.detach().double().requires_grad_()
    values = call(h, embedding, **options), by_definition(h, embedding), by_definition(exact, wide)
    assert values[0].dtype == embedding.dtype
    dense.assert_as_accurate(*values, "value")
    generator = torch.Generator().manual_seed(9)
    up = torch.randn(values[0].shape, generator=generator, dtype=torch.float64)
    grads = [
        dense.gradients((value * up.to(value.dtype)).sum(), [*x.inputs, e])
        for value, x, e in zip(values, (h, h, exact), (embedding, embedding, wide), strict=True)
    ]
    for i, (ours, theirs, wanted) in enumerate(zip(*grads, strict=True)):
        assert ours.dtype == [*h.inputs, embedding][i].dtype
        dense.assert_as_accurate(ours, theirs, wanted, f"gradient {i}")


# V: one, under a vector, a block of 1024 and one, a real vocabulary. D and E: odd, one, unequal.
@pytest.mark.parametrize(
    ("n", "d", "v", "e"),
    [(1, 1, 1, 1), (5, 7, 3, 1), (129, 16, 1025, 33), (40, 9, 3001, 8), (5, 6, 50257, 3)],
)
@pytest.mark.parametrize("transform", [{}, dense.TRANSFORM], ids=["plain", "transformed"])
def test_value_and_gradients(dtype, n, d, v, e, transform):
    check(dense.head(n, d, v, dtype, bias=True, **transform), table(v, e, dtype))


# The vocabulary is read in pieces with a running maximum: increasing logits move it every time,
# decreasing ones never.
@pytest.mark.parametrize("slope", [-20.0, 0.0, 20.0])
def test_running_maximum(dtype, slope):
    v = 4000
    h = dense.head(300, 5, v, dtype, bias=True)
    h.bias.data += torch.linspace(-slope, slope, v).to(dtype)
    check(h, table(v, 6, dtype), workspace=SMALL)


# Of a nearly certain token, Σ p·g cancels against its own g: both must be rounded alike.
def test_gradients_of_certain_tokens(dtype):
    h, embedding = dense.head(200, 17, 900, dtype, logit_scale=10.0), table(900, 5, dtype)
    check(h, embedding)
    exact = h.double()
    certain = dense.logits(exact).softmax(-1).amax(-1) > 1 - 1e-7
    assert certain.sum() > 10
    (got,) = dense.gradients(call(h, embedding).sum(), [h.hidden])
    wide = embedding.detach().double()
    (wanted,) = dense.gradients(by_definition(exact, wide).sum(), [exact.hidden])
    # Uncertain tokens have gradients of about 10.
    assert (got - wanted)[certain].abs().max() < 1e-4


def test_tied_with_the_head(backend):
    """One tensor as head and as embedding: its gradient is the sum of both."""
    h = dense.head(20, 6, 200)
    ours, theirs = call(h, h.weight), by_definition(h, h.weight)
    torch.testing.assert_close(ours, theirs)
    up = torch.randn(20, 6)
    a, b = (torch.autograd.grad((x * up).sum(), [h.hidden, h.weight]) for x in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", range(1, 16), ids=lambda n: f"needs-{n:04b}")
def test_gradients_only_of_what_needs_them(backend, needs):
    h, embedding = dense.head(20, 6, 200, bias=True), table(200, 4)
    tensors = [*h.inputs, embedding]
    whole = dense.gradients(by_definition(h, embedding).square().sum(), tensors)

    def loss():
        return call(h, embedding).square().sum()

    dense.assert_only_needed(tensors, needs, loss, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (2, 0), (2, 3, 4)], ids=str)
def test_every_batch_shape(backend, shape):
    h, embedding = dense.head(shape, 6, 40), table(40, 5)
    value = call(h, embedding)
    assert value.shape == (*shape, 5)
    torch.testing.assert_close(value, by_definition(h, embedding))
    value.sum().backward()
    assert embedding.grad.shape == (40, 5) and h.hidden.grad.shape == (*shape, 6)


def test_embedding_of_another_dtype(backend):
    h, embedding = dense.head(20, 6, 200), table(200, 4)
    half = call(h, embedding.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), by_definition(h, embedding), rtol=2e-2, atol=2e-2)


def test_layouts(backend):
    h, embedding = dense.head((4, 5), 6, 200, bias=True), table(200, 4)
    wanted = call(h, embedding)

    def gappy(t):
        return torch.stack([t.detach(), t.detach() + 1], -1)[..., 0].requires_grad_()

    moved, e = h.map(gappy), gappy(embedding)
    got = call(moved, e)
    torch.testing.assert_close(got, wanted)
    # An expanded upstream gradient, with no memory of its own.
    a = dense.gradients(got.sum(), [*moved.inputs, e])
    b = dense.gradients(wanted.sum(), [*h.inputs, embedding])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workspace", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_tokens_are_as_if_they_were_not_there(backend, workspace, dtype):
    h, embedding = dense.head(300, 8, 3000, dtype, bias=True), table(3000, 5, dtype)
    open_ = torch.ones(3000, dtype=torch.bool)
    open_[:1100] = open_[2999] = False  # the whole first tile of the small workspace too
    bias = torch.where(open_, h.bias.detach(), -torch.inf).requires_grad_()
    masked = dense.replace(h, bias=bias)
    left = dense.replace(
        h.map(lambda t: (t.detach()[open_] if len(t) == 3000 else t.detach()).requires_grad_())
    )
    few = embedding.detach()[open_].requires_grad_()
    values = call(masked, embedding, workspace=workspace), by_definition(left, few)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*values, **tolerance)
    ours = dense.gradients(values[0].sum(), [*masked.inputs, embedding])
    wanted = dense.gradients(values[1].sum(), [*left.inputs, few])
    for mine, theirs in zip(ours, wanted, strict=True):
        if len(mine) == 3000:
            assert (mine[~open_] == 0).all()
            mine = mine[open_]
        assert (mine - theirs).norm() <= (3e-2 if tolerance else 1e-4) * theirs.norm()


# Odd sizes: oneDNN's 16-bit products read past an odd row into the next.
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [7, 1101])
def test_poisoned_hidden_stays_in_its_row(backend, value, dtype, v):
    h, embedding = dense.head(70, 5, v, dtype), table(v, 3, dtype)
    bad = torch.zeros(70, dtype=torch.bool)
    bad[[0, 31, 69]] = True
    poisoned = dense.fill_rows(h, bad, value, 4)
    soft, clean = call(poisoned, embedding), call(h, embedding)
    assert soft[bad].isnan().all()
    torch.testing.assert_close(soft[~bad], clean[~bad])
    d_hidden, d_weight, d_embedding = dense.gradients(soft.sum(), [*poisoned.inputs, embedding])
    assert torch.equal(d_hidden.isnan().any(1), bad) and d_hidden[bad].isnan().all()
    assert d_weight.isnan().all() and d_embedding.isnan().all()


def test_large_logits(backend):
    h, embedding = dense.head(60, 17, 900), table(900, 5)
    h = h.map(lambda t: (60 * t.detach()).requires_grad_())  # of spread 10⁴: one token each
    soft = call(h, embedding)
    torch.testing.assert_close(soft, embedding[dense.logits(h).argmax(1)], rtol=1e-3, atol=1e-3)
