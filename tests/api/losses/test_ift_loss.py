"""The IFT loss against the plain port, the closed form, and each other; the SFT loss."""

import itertools

import pytest
import torch

from bench.peers import naive_ift
from dense import assert_compiles
from ift.losses import IFTLoss, SFTLoss, ift_loss, sft_loss
from ift_kernels import discounted_cumsum
from refusals import assert_refused

RELEASED = [
    {"propagation": kind, "side": side, "norm": norm}
    for kind, side, norm in itertools.product(
        ("loss", "logps", "mask"), ("left", "right"), ("L1", "L2", "softmax", "log")
    )
]
OBJECTIVES = [*RELEASED, {"objective": "paper"}, {"objective": "algorithm1"}]


def name(options):
    return "-".join(options.values()) or "default"


def batch(rows=4, length=24, dtype=torch.float64, seed=0):
    """Log-probabilities between −4 and −0.05, and a mask with gaps and at least one token a row."""
    g = torch.Generator().manual_seed(seed)
    logprob = -4 * torch.rand(rows, length, generator=g, dtype=torch.float64) - 0.05
    mask = torch.rand(rows, length, generator=g) > 0.4
    mask[:, length // 2] = True
    return logprob.to(dtype).requires_grad_(), mask


def value_and_grad(loss, logprob):
    return loss.detach(), torch.autograd.grad(loss, logprob)[0]


def as_port(options):
    return {"kind" if key == "propagation" else key: value for key, value in options.items()}


@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("options", OBJECTIVES, ids=name)
def test_equals_the_port(backend, options, gamma, detach):
    logprob, mask = batch(dtype=torch.float32)
    ours = ift_loss(logprob, mask, gamma=gamma, detach_weights=detach, **options)
    port = naive_ift.naive_propagation_loss(
        logprob, mask, gamma=gamma, detach=detach, **as_port(options)
    )
    value, grad = value_and_grad(ours, logprob)
    expected, expected_grad = value_and_grad(port, logprob)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    # Relative to the largest entry: single ones may cancel.
    error = (grad - expected_grad).abs().max() / expected_grad.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("options", OBJECTIVES, ids=name)
def test_equals_the_port_in_fp64(options):
    logprob, mask = batch()
    ours = value_and_grad(ift_loss(logprob, mask, **options), logprob)
    port = naive_ift.naive_propagation_loss(logprob, mask, **as_port(options))
    torch.testing.assert_close(ours, value_and_grad(port, logprob), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.3, 0.95, 1.0])
def test_gradient_is_the_closed_form(gamma):
    logprob, mask = batch(rows=1, length=60)
    loss = -logprob.detach() * mask
    position = torch.arange(60)
    distance = position[None] - position[:, None]
    u_matrix = torch.where(distance >= 0, gamma ** distance.clamp(min=0).double(), 0)
    m = mask[0].double()
    c = m * (u_matrix @ loss[0])
    p = m * (u_matrix.T @ loss[0])
    u = m * (u_matrix.T @ m)
    row = (c * loss[0]).sum() / c.sum()
    g = m * (c + p - row * u) / c.sum()
    value, grad = value_and_grad(ift_loss(logprob, mask, gamma=gamma), logprob)
    assert abs(value - row) < 1e-12
    assert (-grad[0] - g).abs().max() < 1e-10
    assert abs((g * loss[0]).sum() - row) < 1e-10  # Euler: the loss is homogeneous of degree one
    assert g[mask[0]].min() < 0  # un-trains easy tokens, as documented
    detached = value_and_grad(ift_loss(logprob, mask, gamma=gamma, detach_weights=True), logprob)[1]
    assert (-detached[0] - c / c.sum()).abs().max() < 1e-10


def test_gradient_is_two_scans(monkeypatch):
    from ift_kernels import propagation

    calls = []
    scan = propagation.backends.get(torch.zeros(1)).scan
    chosen = propagation.backends.get(torch.zeros(1))
    monkeypatch.setattr(chosen, "scan", lambda *a: calls.append(a[-1]) or scan(*a))
    logprob, mask = batch(dtype=torch.float32)
    ift_loss(logprob, mask).backward()
    assert calls == [True, False]  # U forward, its transpose backward


def test_check_values_of_constant_losses():
    ones = torch.ones(1, 10, dtype=torch.float64)
    weights = {}
    for objective in ("released", "paper"):
        logprob = (-0.5 * ones).requires_grad_()
        loss = ift_loss(logprob, ones, objective=objective, detach_weights=True)
        weights[objective] = -torch.autograd.grad(loss, logprob)[0][0]
    paper = weights["paper"]
    assert paper[0] == 1 and round(paper[9].item(), 2) == 8.03
    i = torch.arange(10)
    torch.testing.assert_close(paper, (1 - 0.95 ** (i + 1.0).double()) / 0.05)
    released = 10 * weights["released"]
    assert round(released[0].item(), 2) == 1.69 and round(released[9].item(), 2) == 0.21


@pytest.mark.parametrize("options", RELEASED, ids=name)
def test_without_discount_it_is_sft(backend, options):
    logprob, mask = batch(dtype=torch.float32)
    mask[2] = False
    ours = value_and_grad(ift_loss(logprob, mask, gamma=0, **options), logprob)
    sft = value_and_grad(sft_loss(logprob, mask, reduction="row_mean"), logprob)
    rows = [-logprob[r][mask[r]].mean() for r in (0, 1, 3)]
    by_hand = value_and_grad(torch.stack(rows).mean(), logprob)
    torch.testing.assert_close(ours, sft, rtol=0, atol=0)
    torch.testing.assert_close(ours, by_hand)


# Side "right" is not in this list: it couples the rows of one forward, by definition.
@pytest.mark.parametrize("options", [o for o in OBJECTIVES if o.get("side") != "right"], ids=name)
def test_accumulation_gives_the_gradient_of_the_whole(backend, options):
    logprob, mask = batch(rows=5, dtype=torch.float32)
    mask[1] = False  # no response: must not count
    whole = torch.autograd.grad(ift_loss(logprob, mask, **options), logprob)[0]
    for num_rows in (4, 4.0, torch.tensor(4)):
        parts = [
            ift_loss(logprob[r : r + 1], mask[r : r + 1], num_rows=num_rows, **options)
            for r in range(5)
        ]
        grad = torch.autograd.grad(sum(parts), logprob)[0]
        torch.testing.assert_close(grad, whole, rtol=1e-6, atol=1e-7)


def test_side_right_couples_the_rows_of_a_forward():
    logprob, mask = batch()
    alone = ift_loss(logprob[:1], mask[:1], side="right", reduction="none")
    with torch.no_grad():
        logprob[3] *= 0.01  # now the smallest value of the batch is in another row
    together = ift_loss(logprob, mask, side="right", reduction="none")
    assert abs(alone[0] - together[0]) > 1e-3


def packed(tensor, lengths):
    return torch.cat([row[:length] for row, length in zip(tensor, lengths, strict=True)])


@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("options", OBJECTIVES, ids=name)
def test_packed_equals_padded(options, detach):
    logprob, mask = batch()
    lengths = [24, 0, 13, 1]
    for row, length in enumerate(lengths):
        mask[row, length:] = False
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options = {"detach_weights": detach, **options}
    padded = ift_loss(logprob, mask, reduction="none", **options)
    flat, flat_mask = packed(logprob, lengths), packed(mask, lengths)
    rows = ift_loss(flat, flat_mask, cu_seqlens=cu, reduction="none", **options)
    torch.testing.assert_close(rows, padded, rtol=1e-12, atol=1e-12)
    expected = value_and_grad(ift_loss(logprob, mask, **options), logprob)
    got = value_and_grad(ift_loss(flat, flat_mask, cu_seqlens=cu, **options), logprob)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_packed_equals_padded_in_fp32(backend):
    logprob, mask = batch(dtype=torch.float32)
    cu = torch.arange(0, 97, 24)
    expected = value_and_grad(ift_loss(logprob, mask), logprob)
    flat = ift_loss(logprob.flatten(), mask.flatten(), cu_seqlens=cu)
    torch.testing.assert_close(value_and_grad(flat, logprob), expected, rtol=1e-5, atol=1e-7)


def test_plain_vector_is_one_row():
    logprob, mask = batch(rows=1)
    assert torch.equal(ift_loss(logprob[0], mask[0]), ift_loss(logprob, mask))
    assert ift_loss(logprob[0], mask[0], reduction="none").shape == (1,)


@pytest.mark.parametrize("options", OBJECTIVES, ids=name)
def test_rows_without_response_or_loss_are_finite(backend, options):
    logprob, mask = batch(dtype=torch.float32)
    with torch.no_grad():
        logprob[1] = 0.0
    mask[0] = False
    value, grad = value_and_grad(ift_loss(logprob, mask, **options), logprob)
    assert value > 0 and grad.isfinite().all() and (grad[0] == 0).all()
    rows = ift_loss(logprob, mask, reduction="none", **options)
    assert rows[0] == 0 and rows[1] == 0 and (rows[2:] > 0).all()
    torch.testing.assert_close(value, rows.sum() / 3)
    # A batch of nothing else.
    for part in (slice(0, 1), slice(1, 2), slice(0, 0)):
        value, grad = value_and_grad(ift_loss(logprob[part], mask[part], **options), logprob)
        assert value == 0 and grad.isfinite().all()


def test_a_row_of_zero_losses_gets_no_gradient_by_default():
    logprob, mask = batch()
    with torch.no_grad():
        logprob[1] = 0.0
    grad = value_and_grad(ift_loss(logprob, mask), logprob)[1]
    assert (grad[1] == 0).all() and (grad[0] != 0).any()


@pytest.mark.parametrize("options", OBJECTIVES, ids=name)
def test_nan_under_the_mask_is_not_read_and_elsewhere_not_hidden(options):
    logprob, mask = batch()
    clean = value_and_grad(ift_loss(logprob, mask, **options), logprob)
    dirty = logprob.detach().masked_fill(~mask, torch.nan).requires_grad_()
    found = value_and_grad(ift_loss(dirty, mask, **options), dirty)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    bad = logprob.detach().clone()
    bad[0, 12] = torch.nan
    assert ift_loss(bad, mask, **options).isnan()
    rows = ift_loss(bad, mask, reduction="none", **options)
    assert rows[0].isnan() and (options.get("side") == "right" or rows[1:].isfinite().all())


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("options", OBJECTIVES, ids=name)
def test_mask_may_be_zeros_and_ones(options, dtype):
    logprob, mask = batch()
    assert torch.equal(
        ift_loss(logprob, mask.to(dtype), **options), ift_loss(logprob, mask, **options)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_give_fp32_losses(backend, dtype):
    logprob, mask = batch(dtype=dtype)
    loss = ift_loss(logprob, mask)
    wide = ift_loss(logprob.detach().float(), mask)
    assert loss.dtype == torch.float32 and torch.equal(loss.detach(), wide)
    assert torch.autograd.grad(loss, logprob)[0].dtype == dtype


@pytest.mark.parametrize("options", OBJECTIVES, ids=name)
def test_gradcheck_of_first_and_second_order(options):
    logprob, mask = batch(rows=2, length=6)
    assert torch.autograd.gradcheck(lambda x: ift_loss(x, mask, **options), logprob)
    assert torch.autograd.gradgradcheck(lambda x: ift_loss(x, mask, **options), logprob)


@pytest.mark.parametrize("packed_rows", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [RELEASED[0], RELEASED[6], {"objective": "paper"}, {"objective": "algorithm1"}],
    ids=name,
)
def test_compiles_to_one_graph(backend, options, packed_rows):
    torch.compiler.reset()
    logprob, mask = batch(dtype=torch.float32)
    if packed_rows:
        logprob, mask = logprob.detach().flatten().requires_grad_(), mask.flatten()
    cu = torch.arange(0, 97, 24) if packed_rows else None
    assert_compiles(lambda x: ift_loss(x, mask, cu_seqlens=cu, **options), logprob)


def test_inputs_do_not_change_and_backward_repeats(backend):
    logprob, mask = batch(dtype=torch.float32)
    kept, kept_mask = logprob.detach().clone(), mask.clone()
    loss = ift_loss(logprob, mask)
    first = torch.autograd.grad(loss, logprob, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logprob)[0])
    assert torch.equal(logprob, kept) and torch.equal(mask, kept_mask)


def test_modules_hold_the_options():
    logprob, mask = batch()
    for options in OBJECTIVES:
        module = IFTLoss(gamma=0.9, **options)
        assert torch.equal(module(logprob, mask), ift_loss(logprob, mask, gamma=0.9, **options))
    module = IFTLoss(detach_weights=True)
    assert torch.equal(
        module(logprob.flatten(), mask.flatten(), cu_seqlens=torch.arange(0, 97, 24), num_rows=7),
        ift_loss(logprob, mask, detach_weights=True, num_rows=7),
    )
    assert IFTLoss(reduction="none")(logprob, mask).shape == (4,)
    assert "gamma=0.95" in repr(IFTLoss()) and "row_mean" in repr(SFTLoss(reduction="row_mean"))
    assert torch.equal(SFTLoss()(logprob, mask, num_items=3), sft_loss(logprob, mask, num_items=3))
    for bad in ({"gamma": 2.0}, {"objective": "x"}, {"reduction": "sum"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            IFTLoss(**bad)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"gamma": -0.5}, ValueError, r"expected a float in \[0, 1\], got -0.5"),
        ({"gamma": 7, "objective": "paper"}, ValueError, ".*got 7"),
        ({"objective": "both"}, ValueError, "expected one of .*'released'.*got 'both'"),
        ({"propagation": "p"}, ValueError, ".*got 'p'"),
        ({"side": "up"}, ValueError, ".*got 'up'"),
        ({"norm": "L3"}, ValueError, ".*got 'L3'"),
        ({"norm": "L2", "objective": "algorithm1"}, ValueError, "expected 'L1' with .*'L2'"),
        ({"side": "right", "objective": "paper"}, ValueError, "expected 'left' with .*'right'"),
        ({"reduction": "sum"}, ValueError, ".*got 'sum'"),
        ({"logprob": X.long()}, TypeError, ".*got torch.int64"),
        ({"logprob": X[None]}, ValueError, r"expected shape .*got \(1, 2, 3\)"),
        ({"mask": X[:, :2]}, ValueError, r".*\(2, 3\), got \(2, 2\)"),
        ({"num_rows": -1}, ValueError, "expected at least 0, got -1"),
        ({"num_rows": True}, TypeError, "expected a number, got bool"),
        ({"num_rows": X}, ValueError, r"expected one number, got shape \(2, 3\)"),
        ({"num_rows": 2, "reduction": "none"}, ValueError, "expected None"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, ".*0 to 6.*got 0 to 9"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, ".*decreasing"),
    ],
)
def test_errors(arguments, error, said):
    assert_refused(ift_loss, arguments, error, said, logprob=X, mask=torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(1, 2, 3), ()], ids=str)
def test_errors_of_shape(shape):
    for loss in (ift_loss, sft_loss):
        with pytest.raises(ValueError, match=r"logprob: expected shape \(B, T\)"):
            loss(torch.zeros(shape), torch.ones(shape))


def test_discounted_relations_count_gaps():
    # Two response tokens three apart relate by γ³, whatever lies between them.
    logprob = torch.tensor([[-1.0, -9.0, -9.0, -2.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0, 1]])
    c = discounted_cumsum(-logprob, 0.5, mask=mask)
    assert c.tolist() == [[1.25, 0.0, 0.0, 2.0]]
    assert ift_loss(logprob, mask, gamma=0.5) == (1.25 * 1 + 2 * 2) / 3.25
    assert ift_loss(logprob, mask, gamma=0.5, objective="algorithm1") == 1.25 * 1 + 2 * 2
    assert ift_loss(logprob, mask, gamma=0.5, objective="paper") == 1 + (1 + 0.125) * 2


# --- the SFT loss and its divisors ----------------------------------------------------------------


def test_sft_reductions():
    logprob, mask = batch()
    mask[1] = False
    loss = -logprob.detach()[mask]
    assert torch.allclose(sft_loss(logprob, mask), loss.mean())
    assert torch.allclose(sft_loss(logprob, mask, reduction="sum"), loss.sum())
    assert torch.allclose(sft_loss(logprob, mask, num_items=7), loss.sum() / 7)
    assert torch.allclose(sft_loss(logprob, mask, num_items=torch.tensor(7)), loss.sum() / 7)
    none = sft_loss(logprob, mask, reduction="none")
    assert none.shape == mask.shape and torch.equal(none[mask], loss) and (none[~mask] == 0).all()
    rows = sft_loss(logprob, mask, reduction="row_mean")
    cu = torch.arange(0, 97, 24)
    flat = sft_loss(logprob.flatten(), mask.flatten(), reduction="row_mean", cu_seqlens=cu)
    torch.testing.assert_close(flat, rows, rtol=1e-12, atol=0)
    nothing = torch.zeros_like(mask)
    for reduction in ("mean", "sum", "row_mean"):
        value = sft_loss(logprob, nothing, reduction=reduction)
        grad = torch.autograd.grad(value, logprob)[0]
        assert value == 0 and (grad == 0).all()
    assert sft_loss(logprob, nothing, num_items=0) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"reduction": "avg"}, ".*got 'avg'"),
        ({"num_items": 3, "reduction": "sum"}, "expected None with reduction 'sum', got 3"),
        ({"num_rows": 3}, "expected None with reduction 'mean', got 3"),
        ({"num_items": -3}, "expected at least 0, got -3"),
    ],
)
def test_sft_errors(arguments, said):
    given = {"logprob": torch.zeros(2, 3), "mask": torch.ones(2, 3)}
    assert_refused(sft_loss, arguments, ValueError, said, **given)


@pytest.mark.parametrize("packed_rows", [False, True], ids=["padded", "packed"])
def test_long_rows_keep_their_digits(packed_rows):
    # 60 000 terms one after another in fp32 would be off by about 1e-5.
    logprob, _ = batch(rows=2, length=60_000, dtype=torch.float32)
    logprob, mask = logprob.detach(), torch.ones(2, 60_000)
    expected = sft_loss(logprob.double(), mask, reduction="row_mean")
    cu = None
    if packed_rows:
        logprob, mask, cu = logprob.flatten(), mask.flatten(), torch.tensor([0, 60_000, 120_000])
    got = sft_loss(logprob, mask, reduction="row_mean", cu_seqlens=cu)
    torch.testing.assert_close(got.double(), expected, rtol=2e-7, atol=0)
