"""What trains in place of cross-entropy, against the published formulas on the logits."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from ift import losses

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 5, 8, 50


def inputs(seed=0):
    """Hidden states, head and targets of mixed lengths, and a frozen model's."""
    g = torch.Generator().manual_seed(seed)
    hidden, other = torch.randn(2, ROWS, LENGTH, WIDTH, generator=g, dtype=torch.float64)
    weight, frozen = torch.randn(2, VOCABULARY, WIDTH, generator=g, dtype=torch.float64)
    # From flat to certain distributions.
    hidden = (hidden * torch.logspace(-2, 0.3, LENGTH)[:, None]).requires_grad_()
    target = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=g)
    target[1, 3:] = -100
    return hidden, weight.requires_grad_(), target, losses.Head(other, frozen)


def tokens(hidden, weight, target, reference):
    """Logits, losses, and the frozen model's logits of the tokens that count."""
    mask = target != -100
    z, q = (hidden @ weight.T)[mask], (reference.hidden @ reference.weight.T)[mask]
    return z, F.cross_entropy(z, target[mask], reduction="none"), q


def asft(z, nll, q):
    """hiyouga/LLaMA-Factory, train/trainer_utils.py; zhuchichi56/ASFT, train.py, mode "asft"."""
    kl = F.kl_div(z.log_softmax(-1), q.softmax(-1), reduction="none").sum(-1)
    return (nll * (-nll).exp().detach()).mean() + 0.1 * kl.mean()


def sft_kl(z, nll, q):
    """zhuchichi56/ASFT, train.py, mode "sft+kl"."""
    return (nll + 0.1 * F.kl_div(z.log_softmax(-1), q.softmax(-1), reduction="none").sum(-1)).mean()


def deft(z, nll, q):
    """luludus/DEFT, trainer/fsdp_sft_trainer.py; without the 1e-6 beside the divisor."""
    alpha = z.softmax(-1).square().sum(-1).detach()
    return (-(torch.exp(alpha * -nll) - 1) / alpha).mean()


def eaft(z, nll, q):
    """The gate of arXiv 2601.02151 with the entropy of all tokens."""
    gate = torch.distributions.Categorical(logits=z.detach()).entropy() / math.log(20)
    return (nll * gate.clamp(max=1)).mean()


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        (asft, {"scaling": "dft", "kl_coef": 0.1}),
        (sft_kl, {"kl_coef": 0.1}),
        (deft, {"scaling": "deft"}),
        (eaft, {"scaling": "eaft"}),
    ],
)
@pytest.mark.parametrize("held_by", ["a module", "the function", "a partial"])
def test_published_formula_from_hidden(formula, options, held_by):
    """Value and gradients; the statistics come from the pass, whatever holds the options."""
    hidden, weight, target, reference = inputs()
    wanted = formula(*tokens(hidden, weight, target, reference))
    loss, call = {
        "a module": (losses.SFTLoss(**options), {}),
        "the function": (losses.sft_loss, options),
        "a partial": (functools.partial(losses.sft_loss, **options), {}),
    }[held_by]
    if "kl_coef" in options:
        call = {**call, "reference": reference}
    value = losses.from_hidden(loss, hidden, weight, target, **call)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-8)
    for got, expected in zip(
        torch.autograd.grad(value, (hidden, weight)),
        torch.autograd.grad(wanted, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [math.log(20), 3.0], ids=["axolotl", "LLaMA-Factory"])
def test_eaft_with_the_entropy_of_the_largest_logits(scale):
    """monkeypatch/loss/eaft.py and train/trainer_utils.py: their entropy of 20 logits, given."""
    hidden, weight, target, reference = inputs(1)
    z, nll, _ = tokens(hidden, weight, target, reference)
    top = z.detach().topk(20, -1).values.softmax(-1)
    entropy = -(top * top.log()).sum(-1)
    wanted = (nll * entropy / scale).mean()
    mask = target != -100
    given = torch.zeros(mask.shape).double().masked_scatter(mask, entropy * math.log(20) / scale)
    logprob = torch.zeros(mask.shape).double().masked_scatter(mask, -nll)
    value = losses.sft_loss(logprob, mask, scaling="eaft", entropy=given)
    torch.testing.assert_close(value, wanted)


def test_memft_is_a_choice_of_weights():
    """axolotl's monkeypatch/loss/memft.py, variant "ot": the mean over tokens below p = 1/2."""
    logprob = -3 * torch.rand(4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.7
    low = mask & (logprob < -math.log(2))
    wanted = -logprob[low].sum() / (low.sum() + 1e-8)
    value = losses.sft_loss(logprob, mask, weights=low.double(), num_items=low.sum())
    torch.testing.assert_close(value, wanted)


def test_deft_of_the_flattest_distribution_is_the_log_likelihood():
    logprob = torch.tensor([[-3.0, -40.0]], dtype=torch.float64).requires_grad_()
    ones = torch.ones(1, 2)
    for flat in (0.0, 1e-9):
        value = losses.sft_loss(logprob, ones, scaling="deft", sum_sq=torch.full((1, 2), flat))
        torch.testing.assert_close(value, losses.sft_loss(logprob, ones))
        torch.testing.assert_close(*(torch.autograd.grad(x, logprob)[0] for x in
                                     (value, losses.sft_loss(logprob, ones))))  # fmt: skip


@pytest.mark.parametrize("scaling", ["dft", "deft", "eaft"])
def test_a_token_without_probability(scaling):
    """Its gradient is 0, and so is its loss, or 1/α; a NaN stays one."""
    logprob = torch.tensor([[-torch.inf, -0.0, -1e4]]).requires_grad_()
    statistic = {"deft": "sum_sq", "eaft": "entropy"}.get(scaling)
    given = {statistic: torch.tensor([[0.0, 0.5, 0.5]] if scaling == "eaft" else [[0.5] * 3])}
    given = given if statistic else {}
    ones = torch.ones(1, 3)
    value = losses.sft_loss(logprob, ones, scaling=scaling, reduction="none", **given)
    gate = 1e4 * 0.5 / math.log(20)
    wanted = {"dft": [0.0, 0.0, 0.0], "deft": [2.0, 0.0, 2.0], "eaft": [0.0, 0.0, gate]}[scaling]
    torch.testing.assert_close(value, torch.tensor([wanted]))
    assert torch.autograd.grad(value.sum(), logprob)[0].isfinite().all()
    unknown = torch.full((1, 3), torch.nan)
    given = dict.fromkeys(given, unknown)
    x = logprob if given else unknown
    assert losses.sft_loss(x, ones, scaling=scaling, **given).isnan()


def test_a_statistic_that_is_given_is_not_replaced():
    hidden, weight, target, _ = inputs(2)
    entropy = torch.full(target.shape, 0.3).double()
    by_hand = losses.from_hidden(losses.sft_loss, hidden, weight, target) * 0.3 / math.log(20)
    for loss, call in (
        (losses.SFTLoss(scaling="eaft"), {"entropy": entropy}),
        (functools.partial(losses.sft_loss, scaling="eaft", entropy=entropy), {}),
    ):
        value = losses.from_hidden(loss, hidden, weight, target, **call)
        torch.testing.assert_close(value, by_hand)
