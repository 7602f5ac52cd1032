"""The k best tokens and the nucleus among them, against a sort of the full logits."""

import pytest
import torch

import ift_kernels
from ift_kernels import linear_selected_logprobs, linear_topk
from ift_kernels.backends import reference
from ift_kernels.backends.contract import Chunk

LIMITS = [{}, {"top_p": 0.8}, {"top_p": 1.0}, {"min_p": 0.05}, {"top_p": 0.9, "min_p": 0.02}]


def problem(n, v, dtype=torch.float32):
    """Every token twice, so that there are ties, and one that is forbidden."""
    hidden, weight, bias = torch.randn(n, 8), torch.randn(v, 8), torch.randn(v)
    weight[v // 2 :], bias[v // 2 :] = weight[: v - v // 2].clone(), bias[: v - v // 2].clone()
    bias[3] = -torch.inf
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def expected(hidden, weight, bias, k, temperature, top_p=None, min_p=None):
    x = hidden @ weight.T
    z = ((x if x.dtype == torch.float64 else x.float()) + bias) / temperature
    logp, order = z.double().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    p, keep = logp.exp(), logp > -torch.inf
    if top_p is not None and top_p < 1:
        keep &= p.cumsum(-1) - p < top_p
    if min_p is not None:
        keep &= p >= min_p * p[:, :1]
    out = ~keep[:, :k]
    ids, logprob = order[:, :k].masked_fill(out, -100), logp[:, :k].masked_fill(out, 0)
    limited = top_p is not None or min_p is not None
    return ids, logprob, (keep.sum(-1) > k) & limited


@pytest.mark.parametrize(
    "shape", [(9, 40, 40), (9, 1500, 64), (4, 3000, 512), (7, 50, 20)], ids=str
)
def test_ids_and_logprobs(dtype, shape):
    n, v, k = shape
    given = problem(n, v, dtype)
    for limits in LIMITS:
        options = {"bias": given[2], "temperature": 0.8, "workspace": 1 << 20}
        found = linear_topk(*given[:2], k, **limits, **options)
        ids, logprob, truncated = expected(*given, k, 0.8, **limits)
        same = found.ids == ids
        # Tiles may round a product otherwise, and logits that nearly tie change places.
        assert same.double().mean() >= (0.9 if dtype.itemsize == 2 else 0.97)
        assert (found.truncated == truncated).double().mean() >= (0.7 if dtype.itemsize == 2 else 1)
        rounding = {2: 0.05, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
        assert (found.logprob - logprob).abs()[same].max() <= rounding
        assert (found.logprob[found.ids == -100] == 0).all()


def test_the_sampler_s_support_in_linear_selected_logprobs():
    hidden, weight, _ = problem(6, 90)
    found = linear_topk(hidden, weight, 30, top_p=0.6)
    again = linear_selected_logprobs(
        hidden, weight, found.ids, outputs=("logprob", "in_set_lse", "lse")
    )
    torch.testing.assert_close(again.logprob, found.logprob)
    mass = (again.in_set_lse - again.lse).exp()[~found.truncated]
    assert len(mass) and (mass >= 0.6 - 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_from_narrow_chunks(dtype):
    """Fewer columns than k, -inf beside placeholders, both zeros, a NaN."""
    x = torch.randn(4, 70).to(dtype).round()
    x[0, ::3], x[1], x[2, 5] = -torch.inf, -torch.inf, torch.nan
    x[3, :9] = torch.tensor([0.0, -0.0] * 4 + [1.0])
    values, ids = torch.full((4, 40), -torch.inf, dtype=dtype), torch.full((4, 40), -1)
    for start in range(0, 70, 7):
        reference.top_k_update(Chunk(x[:, start : start + 7], offset=start), values, ids)
    wanted, order = (x + 0.0).sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :40])
    torch.testing.assert_close(values, wanted[:, :40], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.5, "min_p": 0.1}], ids=str)
def test_a_token_all_of_whose_logits_are_minus_infinity_has_no_ids(backend, limits):
    hidden, weight, bias = problem(3, 50)
    found = linear_topk(hidden, weight, 5, bias=torch.full_like(bias, -torch.inf), **limits)
    assert (found.ids == -100).all() and (found.logprob == 0).all()
    assert not found.truncated.any()


def test_a_negative_scale_makes_a_forbidden_token_of_a_capped_head_the_best():
    hidden, weight, bias = problem(5, 60)
    options = {"logit_scale": -1.5, "softcap": 2.0}
    found = linear_topk(hidden, weight, 4, bias=bias, **options)
    z = 2 * torch.tanh(-1.5 * (hidden @ weight.T + bias) / 2)
    assert z[0, 3] == 2 and (found.ids[:, 0] == 3).all()
    torch.testing.assert_close(found.logprob, z.log_softmax(-1).gather(1, found.ids))


def test_a_token_of_nan_stays_one():
    hidden, weight, _ = problem(3, 50)
    hidden[1] = torch.nan
    found = linear_topk(hidden, weight, 5, top_p=0.7)
    assert found.logprob[1].isnan().any() and found.logprob[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": 0}, ValueError, r"k: expected in \[1, 50\], got 0"),
        ({"k": 51}, ValueError, "got 51"),
        ({"k": 1.5}, TypeError, "k: expected an int"),
        ({"top_p": 0.0}, ValueError, "top_p: expected None or a number"),
        ({"top_p": float("nan")}, ValueError, "top_p"),
        ({"min_p": 1.1}, ValueError, "min_p: expected None or a number"),
        ({"min_p": "1"}, TypeError, "min_p: expected a number"),
    ],
    ids=str,
)
def test_refusals(change, error, match):
    hidden, weight, _ = problem(3, 50)
    with pytest.raises(error, match=match):
        linear_topk(hidden, weight, change.pop("k", 3), **change)


def test_no_gradient():
    hidden, weight, _ = problem(3, 50)
    found = ift_kernels.linear_topk(hidden.requires_grad_(), weight, 3)
    assert not found.logprob.requires_grad and found.truncated.dtype == torch.bool
