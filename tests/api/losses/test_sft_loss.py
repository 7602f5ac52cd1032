"""The SFT loss and its divisors."""

import pytest
import torch

from ift.losses import sft_loss

X = torch.zeros(2, 3)


def batch(rows=4, length=24, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logprob = -4 * torch.rand(rows, length, generator=g, dtype=torch.float64) - 0.05
    mask = torch.rand(rows, length, generator=g) > 0.4
    return logprob.to(dtype).requires_grad_(), mask


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
        ({"reduction": "avg"}, "reduction: .*got 'avg'"),
        (
            {"num_items": 3, "reduction": "sum"},
            "num_items: expected None with reduction 'sum', got 3",
        ),
        ({"num_rows": 3}, "num_rows: expected None with reduction 'mean', got 3"),
        ({"num_items": -3}, "num_items: expected at least 0, got -3"),
    ],
)
def test_sft_errors(arguments, said):
    with pytest.raises(ValueError, match=said):
        sft_loss(X, torch.ones(2, 3), **arguments)


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
