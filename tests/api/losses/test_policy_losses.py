"""What policy gradients are weighed with, and what they tell of their ratios."""

import pytest
import torch

from ift import losses


def test_advantages():
    rewards = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, torch.nan, 1.0, 3.0])
    group = losses.group_advantages(rewards, 3)
    torch.testing.assert_close(group[:3], torch.tensor([-1.0, 0.0, 1.0]) / 1.0001)
    assert (group[3:7] == 0).all() and group[7] == -group[8]
    none = losses.group_advantages(rewards, 3, scale="none")
    assert none[:3].tolist() == [-1.0, 0.0, 1.0]
    assert losses.rloo_advantages(rewards, 3).tolist() == [-1.5, 0, 1.5, 0, 0, 0, 0, -2, 2]
    assert (losses.rloo_advantages(rewards[:2], 1) == 0).all()
    mask = torch.tensor([[0, 1, 1, 1]])
    r, v = torch.tensor([[9.0, 0.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.5, 0.6, 0.7]])
    advantages, returns = losses.gae_advantages(r, v, mask, gamma=0.9, lam=0.8)
    d = [0.9 * 0.6 - 0.5, 0.9 * 0.7 - 0.6, 1 - 0.7]
    wanted = [0, d[0] + 0.72 * d[1] + 0.72**2 * d[2], d[1] + 0.72 * d[2], d[2]]
    torch.testing.assert_close(advantages, torch.tensor([wanted]))
    torch.testing.assert_close(returns, torch.where(mask > 0, advantages + v, 0))
    packed = losses.gae_advantages(
        torch.cat([r[0], r[0]]), torch.cat([v[0], v[0]]), torch.cat([mask[0], mask[0]]),
        gamma=0.9, lam=0.8, cu_seqlens=torch.tensor([0, 4, 8]),
    )[0]  # fmt: skip
    torch.testing.assert_close(packed, advantages[0].repeat(2))


def test_value_loss_and_importance():
    values = torch.tensor([[1.0, 2.0, 9.0]]).requires_grad_()
    mask, returns = torch.tensor([[1, 1, 0]]), torch.tensor([[0.0, 3.0, 0.0]])
    old = torch.tensor([[0.5, 2.0, 0.0]])
    metrics = {}
    loss = losses.value_loss(values, mask, returns, old, metrics=metrics)
    # Clipped to 0.7 the first error would be smaller: the larger, unclipped one counts.
    assert loss.item() == pytest.approx((1 + 1) / 2 / 2)
    assert metrics["value_clip_fraction"] == 0
    total = losses.ppo_loss(
        torch.zeros(1, 3), mask, torch.ones(1), values=values, returns=returns, value_coef=0.5
    )
    assert total.item() == pytest.approx(-1 + 0.5 * 0.5)
    weights = losses.importance_weights(
        torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.4, 0.1]])),
        torch.ones(1, 2),
    )  # fmt: skip
    torch.testing.assert_close(weights, torch.tensor([[1.25, 2.0]]))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates(kind):
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(8, generator=g, dtype=torch.float64).mul(0.3).log_softmax(-1) for _ in "pq")
    exact = (p.exp() * (p - q)).sum()
    estimate = (p.exp() * losses.kl_estimate(p, q, kind)).sum()
    if kind == "k2":
        assert estimate.item() == pytest.approx(exact.item(), rel=0.2)
    else:
        torch.testing.assert_close(estimate, exact)


def gae(rewards, values, gamma, lam):
    """The recurrence of arXiv 1506.02438 over one row of response tokens."""
    found, later, after = [], 0.0, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        later = r + gamma * after - v + gamma * lam * later
        found.append(later)
        after = v
    return found[::-1]


@pytest.mark.parametrize("packed", [False, True])
def test_advantages_over_a_gap(packed):
    """What a tool answered between two turns neither ends the row nor discounts anything."""
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 0]])
    g = torch.Generator().manual_seed(0)
    r, v = torch.randn(2, 3, 7, generator=g)
    r, v = (x.masked_fill(mask == 0, torch.nan) for x in (r, v))
    wanted = torch.zeros(3, 7)
    for row, kept in enumerate(mask.bool()):
        wanted[row, kept] = torch.tensor(
            gae(r[row, kept].tolist(), v[row, kept].tolist(), 0.9, 0.8)
        )
    given = (r, v, mask)
    if packed:
        given, wanted = [x.flatten() for x in given], wanted.flatten()
    cu = torch.tensor([0, 7, 14, 21]) if packed else None
    found, returns = losses.gae_advantages(*given, gamma=0.9, lam=0.8, cu_seqlens=cu)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(returns, torch.where(given[2] > 0, wanted + given[1], 0))
    nothing = losses.gae_advantages(*given[:2], torch.zeros_like(given[2]), cu_seqlens=cu)
    assert not any(x.any() for x in nothing)


@pytest.mark.parametrize("advantages", [losses.group_advantages, losses.rloo_advantages])
def test_advantages_of_bf16_rewards_are_those_of_float32(advantages):
    rewards = torch.tensor([100.5, 101.0, 101.0, 100.5, 99.5, 102.0], dtype=torch.bfloat16)
    found = advantages(rewards, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, advantages(rewards.float(), 3), rtol=0, atol=0)
    assert advantages(rewards.double(), 3).dtype == torch.float64


def test_clip_fraction_counts_what_delta_cuts():
    """The share without a gradient, by autograd."""
    ratio = torch.tensor([[0.5, 0.9, 1.5, 3.0, 3.0, 1.5, 0.5, 9.0]])
    advantages = torch.tensor([[-1.0, -1, -1, -1, 1, 1, 1, 0.0]])
    old = torch.full_like(ratio, -3.0)
    logprob = (ratio.log() + old).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    shares = {}
    for delta in (None, 2.0):
        metrics = {}
        loss = losses.grpo_loss(logprob, mask, advantages, old, delta=delta, metrics=metrics)
        (gradient,) = torch.autograd.grad(loss, logprob)
        assert metrics["clip_fraction"] == ((gradient == 0) & (mask == 1)).sum() / 7
        shares[delta] = {k: round(float(v) * 7) for k, v in metrics.items() if "clip" in k}
    assert shares[None] == {"clip_low": 1, "clip_high": 2, "clip_fraction": 3}
    assert shares[2.0] == {"clip_low": 1, "clip_high": 2, "clip_delta": 1, "clip_fraction": 4}
    metrics = {}
    losses.ppo_loss(logprob, mask, advantages, old, dual_clip=2.0, metrics=metrics)
    assert round(float(metrics["clip_fraction"]) * 7) == 4


def test_vespo_takes_importance_in_16_bits():
    """Its logarithms are those of the numbers that it holds, not rounded once more."""
    logprob, mask = -torch.rand(2, 40), torch.ones(2, 40)
    importance = (1 + torch.rand(2, 40) / 8).to(torch.bfloat16)
    one, two = (
        losses.grpo_loss(logprob, mask, torch.tensor([1.0, -1.0]), kind="vespo", importance=x)
        for x in (importance, importance.double())
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
