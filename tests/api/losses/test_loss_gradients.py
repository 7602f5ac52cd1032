"""Gradients on the logits: the table of docs/losses.md, by autograd."""

import functools
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ift import losses

VOCABULARY = 11


def logit_gradients(loss):
    """A loss of per-token logps of 2 rows (chosen, rejected): G, p − e_y and sums, by autograd."""
    g = torch.Generator().manual_seed(5)
    z = torch.randn(2, 4, VOCABULARY, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randint(VOCABULARY, (2, 4), generator=g)
    logp = z.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    value = loss(logp, torch.ones(2, 4))
    gradient = torch.autograd.grad(value, z)[0]
    direction = z.detach().softmax(-1) - F.one_hot(target, VOCABULARY)
    return gradient, direction, logp.detach()


BETA, EPS = 0.3, 0.1
OLD = torch.tensor([[-2.0], [-2.4]], dtype=torch.float64).expand(2, 4)


def two(chosen, rejected):
    """Factors (rows, tokens) from those of the two rows."""
    return torch.stack(
        [torch.as_tensor(x, dtype=torch.float64).expand(4) for x in (chosen, rejected)]
    )


def ratio_factor(x, advantages=(1.0, -0.7)):
    """Of clipped surrogates: −A·r where active, by the quadrants of the docs."""
    r, a = (x - OLD).exp(), torch.tensor(advantages, dtype=torch.float64)[:, None]
    active = torch.where(a > 0, r < 1.2, r > 0.8)
    return torch.where(active, a * r, 0)


def sigmoid(h):
    return 1 / (1 + math.e**-h)


def slope(h):
    return sigmoid(h) * sigmoid(-h)


def discopop(h, tau=0.5):
    m, logistic, exponential = sigmoid(h / tau), torch.log1p((-h).exp()), (-h).exp()
    turning = m * (1 - m) * (logistic - exponential) / tau
    return (1 - m) * sigmoid(-h) + m * exponential + turning


def orpo_factor(x):
    a, b = x.mean(1)
    odds = (a - b) - (torch.log(1 - a.exp()) - torch.log(1 - b.exp()))
    k = BETA * sigmoid(-odds)
    return two((1 + k / (1 - a.exp())) / 4, -k / (1 - b.exp()) / 4)


def h(x):
    s = x.sum(1)
    return BETA * (s[0] - s[1])


def kto_factor(x):
    s = [sigmoid(BETA * (x.sum(1)[0] - 0.5)), sigmoid(BETA * (0.5 - x.sum(1)[1]))]
    return two(BETA * s[0] * (1 - s[0]) / 2, -BETA * s[1] * (1 - s[1]) / 2)


def ift_factor(x):
    loss = -x
    out = []
    for row in loss:
        discount = [[0.95 ** (j - t) * (j >= t) for j in range(4)] for t in range(4)]
        u = torch.tensor(discount, dtype=torch.float64)
        c = u @ row
        level = (c * row).sum() / c.sum()
        out.append((c + u.T @ row - level * u.T.sum(1)) / c.sum() / 2)
    return torch.stack(out)


def apo_zero_factor(x):
    chosen, rejected = x.sum(1)
    return two(BETA * slope(BETA * chosen), -BETA * slope(BETA * rejected))


def with_beta(loss, **options):
    return functools.partial(loss, beta=BETA, **options)


def dpo(kind, **options):
    return with_beta(losses.dpo_loss, kind=kind, **options)


def forward_kl(x, mask):  # of u = -0.4 and 0.2
    reference = x.detach() + two(0.1, -0.05)
    return losses.dpo_loss(x, mask, reference, beta=BETA, divergence="forward_kl")


def grpo(x, mask, **options):
    return losses.grpo_loss(x, mask, A2, OLD, **options)


def vespo_factor(x):
    log_w = (x - OLD).sum(1, keepdim=True)
    shape, rate = torch.tensor([[2.0], [3.0]]), torch.tensor([[3.0], [2.0]])
    return (shape * log_w + rate * (1 - log_w.exp())).exp() * A2[:, None] / 8


A2 = torch.tensor([1.0, -0.7], dtype=torch.float64)
SPREAD = torch.linspace(0.1, 0.9, 8, dtype=torch.float64).reshape(2, 4)
PAIR = two(1.0, -1.0)
# G = factor · (p − e_y) per token, with these factors; `x` are the tokens' log-probabilities.
TABLE = {
    "SFT": (losses.sft_loss, lambda x: torch.full((2, 4), 1 / 8)),
    "DFT": (lambda x, m: losses.sft_loss(x, m, scaling="dft"), lambda x: x.exp() / 8),
    "DEFT": (
        lambda x, m: losses.sft_loss(x, m, scaling="deft", sum_sq=SPREAD),
        lambda x: (SPREAD * x).exp() / 8,
    ),
    "EAFT": (
        lambda x, m: losses.sft_loss(x, m, scaling="eaft", entropy=5 * SPREAD),
        lambda x: (5 * SPREAD / math.log(20)).clamp(max=1) / 8,
    ),
    "PSFT": (
        lambda x, m: losses.grpo_loss(x, m, torch.ones(2), OLD, kind="dapo"),
        lambda x: ratio_factor(x, (1.0, 1.0)) / 8,
    ),
    "IFT": (losses.ift_loss, ift_factor),
    "DPO": (with_beta(losses.dpo_loss), lambda x: BETA * sigmoid(-h(x)) * PAIR),
    "DPO hinge": (dpo("hinge"), lambda x: BETA * PAIR * (h(x) < 1)),
    "IPO": (dpo("ipo"), lambda x: 2 * (1 / (2 * BETA) - h(x) / BETA) * PAIR),
    "DPO conservative": (
        with_beta(losses.dpo_loss, label_smoothing=EPS),
        lambda x: BETA * (sigmoid(-h(x)) - EPS) * PAIR,
    ),
    "DPO robust": (
        dpo("robust", label_smoothing=EPS),
        lambda x: BETA * ((1 - EPS) * sigmoid(-h(x)) + EPS * sigmoid(h(x))) / (1 - 2 * EPS) * PAIR,
    ),
    "EXO": (
        dpo("exo", label_smoothing=EPS),
        lambda x: BETA * slope(h(x)) * (math.log((1 - EPS) / EPS) - h(x)) * PAIR,
    ),
    "NCA": (
        dpo("nca"),
        lambda x: two(
            BETA * (sigmoid(-BETA * x.sum(1)[0]) - sigmoid(BETA * x.sum(1)[0]) / 2),
            -BETA * sigmoid(BETA * x.sum(1)[1]) / 2,
        ),
    ),
    "BCO": (
        dpo("bco"),
        lambda x: two(BETA * sigmoid(-BETA * x.sum(1)[0]), -BETA * sigmoid(BETA * x.sum(1)[1])),
    ),
    "SPPO": (
        dpo("sppo"),
        lambda x: two(2 * (1 / (2 * BETA) - x.sum(1)[0]), -2 * (1 / (2 * BETA) + x.sum(1)[1])),
    ),
    "APO-down": (
        dpo("apo_down"),
        lambda x: two(BETA * (slope(h(x)) - slope(BETA * x.sum(1)[0])), -BETA * slope(h(x))),
    ),
    "DiscoPOP": (dpo("discopop", discopop_tau=0.5), lambda x: BETA * discopop(h(x)) * PAIR),
    "DPO with forward KL": (
        forward_kl,
        lambda x: (
            BETA
            * sigmoid(-BETA * (math.exp(-0.2) - math.exp(0.4)))
            * two(math.exp(0.4), -math.exp(-0.2))
        ),
    ),
    "rejected-free": (
        dpo("rejected_free"),
        lambda x: BETA * sigmoid(-BETA * x.sum(1))[:, None].expand(2, 4) / 2,
    ),
    "DPO + NLL": (
        with_beta(losses.dpo_loss, nll_weight=0.5),
        lambda x: BETA * sigmoid(-h(x)) * PAIR + two(0.5 / 4, 0.0),
    ),
    "APO-zero": (dpo("apo_zero"), apo_zero_factor),
    "SimPO": (
        lambda x, m: losses.simpo_loss(x, m, beta=2.0, gamma=0.4),
        lambda x: 2 * sigmoid(-(2 * (x.mean(1)[0] - x.mean(1)[1]) - 0.4)) / 4 * PAIR,
    ),
    "CPO": (
        with_beta(losses.cpo_loss, nll_weight=0.5),
        lambda x: BETA * sigmoid(-h(x)) * PAIR + two(0.5 / 4, 0.0),
    ),
    "CPO, length-normalized": (
        with_beta(losses.cpo_loss, nll_weight=0.5, length_normalized=True),
        lambda x: BETA * sigmoid(-h(x) / 4) / 4 * PAIR + two(0.5 / 4, 0.0),
    ),
    "ORPO": (with_beta(losses.orpo_loss), orpo_factor),
    "SLiC": (with_beta(losses.slic_loss, delta=1.0), lambda x: BETA * PAIR * (h(x) < 1)),
    "KTO": (with_beta(losses.kto_loss, desirable=torch.tensor([1, 0]), kl=0.5), kto_factor),
    "KTO, length-normalized": (
        with_beta(losses.kto_loss, desirable=torch.tensor([1, 0]), kl=0.5, length_normalized=True),
        lambda x: kto_factor(x / 4) / 4,
    ),
    "REINFORCE": (
        lambda x, m: losses.reinforce_loss(x, m, A2),
        lambda x: A2[:, None].expand(2, 4) / 2,
    ),
    "PPO": (lambda x, m: losses.ppo_loss(x, m, A2, OLD), lambda x: ratio_factor(x) / 8),
    "GRPO": (grpo, lambda x: ratio_factor(x) / 8),
    "CISPO": (
        functools.partial(grpo, kind="cispo"),
        lambda x: (x - OLD).exp().clamp(max=1.2) * A2[:, None] / 8,
    ),
    "VESPO": (functools.partial(grpo, kind="vespo"), vespo_factor),
    "SAPO": (
        functools.partial(grpo, kind="sapo", temperatures=(1.5, 1.5)),
        lambda x: 4 * slope(1.5 * ((x - OLD).exp() - 1)) * (x - OLD).exp() * A2[:, None] / 8,
    ),
    "GSPO": (
        functools.partial(grpo, kind="gspo"),
        lambda x: ratio_factor(x.mean(1, keepdim=True).expand(2, 4)) / 8,
    ),
    "RLOO": (
        lambda x, m: losses.rloo_loss(x, m, torch.tensor([1.0, 0.0]), group_size=2),
        lambda x: torch.tensor([[1.0], [-1.0]]).expand(2, 4) / 2,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_gradient_on_logits(name):
    loss, factor = TABLE[name]
    gradient, direction, logp = logit_gradients(loss)
    expected = factor(logp)[..., None] * direction
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12, check_dtype=False)


def test_gradient_of_an_anchor_is_that_of_the_whole_distribution():
    """ASFT: the KL from a frozen distribution q adds kl_coef · (p − q) / N."""
    z = torch.randn(2, 4, VOCABULARY, dtype=torch.float64).requires_grad_()
    q = torch.randn(2, 4, VOCABULARY, dtype=torch.float64).log_softmax(-1)
    logp, target = z.log_softmax(-1), torch.randint(VOCABULARY, (2, 4))
    own = logp.gather(-1, target[..., None])[..., 0]
    kl = (q.exp() * (q - logp)).sum(-1)
    value = losses.sft_loss(own, torch.ones(2, 4), scaling="dft", kl_coef=0.3, reference_kl=kl)
    (gradient,) = torch.autograd.grad(value, z)
    p, e = logp.detach().exp(), F.one_hot(target, VOCABULARY)
    wanted = (own.detach().exp()[..., None] * (p - e) + 0.3 * (p - q.exp())) / 8
    torch.testing.assert_close(gradient, wanted)


def test_the_table_of_the_docs_has_every_row():
    page = (Path(__file__).parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert {*TABLE, "ASFT"} <= rows


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5, 4.0])
def test_quadrants_of_the_clip(advantage, ratio):
    """Active for A > 0 iff r < 1 + ε, for A < 0 iff r > 1 − ε; and below `delta`."""
    logprob = torch.tensor([[math.log(ratio)]]).double() - 2
    logprob.requires_grad_()
    old, mask, a = torch.full_like(logprob, -2.0), torch.ones(1, 1), torch.tensor([advantage])
    active = ratio < 1.2 if advantage > 0 else ratio > 0.8
    for options, on in (({}, active), ({"delta": 2.0}, active and (ratio < 2 or advantage > 0))):
        metrics = {}
        value = losses.grpo_loss(logprob, mask, a, old, metrics=metrics, **options)
        (gradient,) = torch.autograd.grad(value, logprob)
        wanted = -advantage * ratio if on else 0.0
        assert gradient.item() == pytest.approx(wanted)
        assert metrics["clip_fraction"] == (not on)
    dual = losses.ppo_loss(logprob, mask, a, old, dual_clip=2.0)
    torch.testing.assert_close(dual, value)


def test_what_training_does_to_probabilities():
    """The squeezing view of the docs: one step on a peaked and on a flat distribution."""
    z = torch.zeros(20, dtype=torch.float64)
    z[0], z[1] = 6.0, 2.0
    p = z.softmax(-1)

    def step(gradient):
        return (z - 0.5 * gradient).log_softmax(-1) - z.log_softmax(-1)

    e = torch.eye(20, dtype=torch.float64)
    up, down = step(p - e[7]), step(-(p - e[7]))
    assert up[7] > 0 and up[0] < 0
    # A negative gradient on an unlikely token: the argmax takes what it and most others lose.
    assert down[7] < 0 and down[0] > 0 and (down[2:7] < 0).all()
