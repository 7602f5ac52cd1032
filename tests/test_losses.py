"""What holds of every loss: its gradient on logits, edges, accumulation, packed rows."""

import math

import pytest
import torch
from torch.nn import functional as F

import ift
from ift import losses

PAIRS, LENGTH, VOCABULARY = 3, 5, 11
ADVANTAGES = torch.tensor([1.0, -1.2, 0.4, -0.3, 2.0, -1.9])
REWARDS = torch.tensor([1.0, -1.0, 0.5, 0.25, 0.0, 3.0])
DESIRABLE = torch.tensor([True, False, True, True, False, False])

# name → (loss of (logprob, mask, reference), does it compare with a reference?)
LOSSES = {
    "sft": lambda x, m, r, **k: losses.sft_loss(x, m, **k),
    "dft": lambda x, m, r, **k: losses.sft_loss(x, m, scaling="dft", **k),
    "ift": lambda x, m, r, **k: losses.ift_loss(x, m, **k),
    **{
        f"dpo-{kind}": lambda x, m, r, kind=kind, **k: losses.dpo_loss(
            x, m, r, kind=kind, label_smoothing=0.1 if kind in ("exo", "robust") else 0.0, **k
        )
        for kind in losses.dpo.FORMULAS
    },
    **{
        f"dpo-{name}": lambda x, m, r, name=name, **k: losses.dpo_loss(
            x, m, r, divergence=name, **k
        )
        for name in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "cpo": lambda x, m, r, **k: losses.cpo_loss(x, m, **k),
    "simpo": lambda x, m, r, **k: losses.simpo_loss(x, m, **k),
    "orpo": lambda x, m, r, **k: losses.orpo_loss(x, m, **k),
    "slic": lambda x, m, r, **k: losses.slic_loss(x, m, **k),
    "kto": lambda x, m, r, **k: losses.kto_loss(x, m, DESIRABLE, r, **k),
    **{
        kind: lambda x, m, r, kind=kind, **k: losses.grpo_loss(
            x, m, ADVANTAGES, r, kind=kind, kl_coef=0.1, reference=r,
            max_length=7 if kind == "dr_grpo" else None, **k,
        )
        for kind in losses.policy.KINDS
    },
    "ppo": lambda x, m, r, **k: losses.ppo_loss(x, m, ADVANTAGES, r, dual_clip=3.0, **k),
    "reinforce": lambda x, m, r, **k: losses.reinforce_loss(x, m, ADVANTAGES, **k),
    "rloo": lambda x, m, r, **k: losses.rloo_loss(x, m, REWARDS, r, group_size=3, **k),
}  # fmt: skip


def batch(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logprob = -3 * torch.rand(2 * PAIRS, LENGTH, generator=g, dtype=dtype) - 0.05
    reference = (logprob + 0.3 * torch.randn(logprob.shape, generator=g, dtype=dtype)).clamp(max=0)
    lengths = torch.tensor([5, 2, 3, 4, 1, 5])
    mask = torch.arange(LENGTH) < lengths[:, None]
    return logprob.requires_grad_(), mask, reference


def finite(value, logprob):
    (gradient,) = torch.autograd.grad(value, logprob)
    assert value.isfinite().all() and gradient.isfinite().all()
    return gradient


@pytest.mark.parametrize("name", LOSSES)
def test_packed_equals_padded_and_ignores_what_is_masked(name):
    logprob, mask, reference = batch()
    poisoned = logprob.detach().clone().masked_fill_(~mask, torch.nan).requires_grad_()
    value = LOSSES[name](poisoned, mask, reference)
    gradient = finite(value, poisoned)
    assert (gradient[~mask] == 0).all()
    cu = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).long()
    flat, other = logprob.detach()[mask].requires_grad_(), reference[mask]
    ones = torch.ones_like(flat)
    packed = LOSSES[name](flat, ones, other, cu_seqlens=cu)
    torch.testing.assert_close(packed, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(finite(packed, flat), gradient[mask], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [0.0, 1e4, -1e4])
def test_extremes_are_finite(name, margin):
    # One row of each pair at -1e4 nats under a reference at 0, or the other way; identical at 0.
    chosen, rejected = min(0.0, margin), min(0.0, -margin)
    logprob = torch.tensor([[chosen]] * 3 + [[rejected]] * 3).repeat(1, 4) / 4
    logprob = logprob.float().requires_grad_()
    reference = torch.zeros(6, 4)
    for ours, theirs in ((logprob, reference), (logprob, logprob.detach() * 0 - 2500)):
        value = LOSSES[name](ours, torch.ones(6, 4), theirs)
        finite(value, logprob)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_responses_and_empty_batches(name):
    logprob, mask, reference = batch(1)
    mask[1] = mask[5] = False
    gradient = finite(LOSSES[name](logprob, mask, reference), logprob)
    assert (gradient[~mask] == 0).all() and gradient.abs().max() > 0
    nothing = torch.zeros_like(mask)
    value = LOSSES[name](logprob, nothing, reference)
    assert value == 0 and (finite(value, logprob) == 0).all()


PAIRED = [name for name in LOSSES if name.startswith("dpo")] + ["cpo", "simpo", "orpo", "slic"]
WHOLE = {  # the argument of the divisor over an optimizer step
    **dict.fromkeys([n for n in PAIRED if "aot" not in n], "num_pairs"),
    **dict.fromkeys(["kto", "ift", "grpo", "gspo", "sapo", "luspo", "dr_grpo"], "num_rows"),
    **dict.fromkeys(["sft", "dft", "bnpo", "dapo", "cispo", "ppo"], "num_items"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_accumulation(name):
    """A step of pieces has the gradient of the whole."""
    logprob, mask, reference = batch(2)
    # Pairs for the paired losses, rows for the others; each piece sees its own of every tensor.
    pieces = [[i, i + PAIRS] for i in range(PAIRS)]
    if name == "dpo-rejected_free":
        count = 2 * PAIRS
    else:
        count = {"num_pairs": PAIRS, "num_rows": 2 * PAIRS, "num_items": int(mask.sum())}[
            WHOLE[name]
        ]
    options = {WHOLE[name]: count}
    if name == "cpo":
        options["num_items"] = mask[:PAIRS].sum()
    whole = torch.autograd.grad(LOSSES[name](logprob, mask, reference), logprob)[0]
    total = torch.zeros_like(whole)
    module = globals()
    advantages, desirable = ADVANTAGES, DESIRABLE
    try:
        for rows in pieces:
            module["ADVANTAGES"], module["DESIRABLE"] = advantages[rows], desirable[rows]
            value = LOSSES[name](logprob[rows], mask[rows], reference[rows], **options)
            total += torch.autograd.grad(value, logprob)[0]
    finally:
        module["ADVANTAGES"], module["DESIRABLE"] = advantages, desirable
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)


# --- gradients on the logits: the table of docs/losses.md -----------------------------------------


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


BETA = 0.3
OLD = torch.tensor([[-2.0], [-2.4]], dtype=torch.float64).expand(2, 4)


def two(chosen, rejected):
    """Factors (rows, tokens) from those of the two rows."""
    return torch.stack([torch.as_tensor(x).expand(4) for x in (chosen, rejected)])


def ratio_factor(x, advantages=(1.0, -0.7)):
    """Of clipped surrogates: −A·r where active, by the quadrants of the docs."""
    r, a = (x - OLD).exp(), torch.tensor(advantages, dtype=torch.float64)[:, None]
    active = torch.where(a > 0, r < 1.2, r > 0.8)
    return torch.where(active, a * r, 0)


def sigmoid(h):
    return 1 / (1 + math.e**-h)


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
        u = torch.tensor([[0.95 ** (j - t) * (j >= t) for j in range(4)] for t in range(4)])
        u = u.double()
        c = u @ row
        level = (c * row).sum() / c.sum()
        out.append((c + u.T @ row - level * u.T.sum(1)) / c.sum() / 2)
    return torch.stack(out)


A2 = torch.tensor([1.0, -0.7], dtype=torch.float64)
# G = factor · (p − e_y) per token, with these factors; `x` are the tokens' log-probabilities.
TABLE = {
    "SFT": (losses.sft_loss, lambda x: torch.full((2, 4), 1 / 8)),
    "DFT": (lambda x, m: losses.sft_loss(x, m, scaling="dft"), lambda x: x.exp() / 8),
    "IFT": (losses.ift_loss, ift_factor),
    "DPO": (
        lambda x, m: losses.dpo_loss(x, m, beta=BETA),
        lambda x: BETA * sigmoid(-h(x)) * two(1.0, -1.0),
    ),
    "DPO hinge": (
        lambda x, m: losses.dpo_loss(x, m, beta=BETA, kind="hinge"),
        lambda x: BETA * (h(x) < 1) * two(1.0, -1.0),
    ),
    "IPO": (
        lambda x, m: losses.dpo_loss(x, m, beta=BETA, kind="ipo"),
        lambda x: 2 * (1 / (2 * BETA) - h(x) / BETA) * two(1.0, -1.0),
    ),
    "rejected-free": (
        lambda x, m: losses.dpo_loss(x, m, beta=BETA, kind="rejected_free"),
        lambda x: BETA * sigmoid(-BETA * x.sum(1))[:, None].expand(2, 4) / 2,
    ),
    "APO-zero": (
        lambda x, m: losses.dpo_loss(x, m, beta=BETA, kind="apo_zero"),
        lambda x: two(*(
            sign * BETA * sigmoid(BETA * s) * sigmoid(-BETA * s)
            for sign, s in zip((1, -1), x.sum(1), strict=True)
        )),
    ),
    "SimPO": (
        lambda x, m: losses.simpo_loss(x, m, beta=2.0, gamma=0.4),
        lambda x: 2 * sigmoid(-(2 * (x.mean(1)[0] - x.mean(1)[1]) - 0.4)) / 4 * two(1.0, -1.0),
    ),
    "CPO": (
        lambda x, m: losses.cpo_loss(x, m, beta=BETA, nll_weight=0.5),
        lambda x: BETA * sigmoid(-h(x)) * two(1.0, -1.0) + two(0.5 / 4, 0.0),
    ),
    "ORPO": (lambda x, m: losses.orpo_loss(x, m, beta=BETA), orpo_factor),
    "SLiC": (
        lambda x, m: losses.slic_loss(x, m, beta=BETA, delta=1.0),
        lambda x: BETA * (h(x) < 1) * two(1.0, -1.0),
    ),
    "KTO": (
        lambda x, m: losses.kto_loss(x, m, torch.tensor([1, 0]), beta=BETA, kl=0.5),
        kto_factor,
    ),
    "REINFORCE": (
        lambda x, m: losses.reinforce_loss(x, m, A2),
        lambda x: A2[:, None].expand(2, 4) / 2,
    ),
    "PPO": (lambda x, m: losses.ppo_loss(x, m, A2, OLD), lambda x: ratio_factor(x) / 8),
    "GRPO": (lambda x, m: losses.grpo_loss(x, m, A2, OLD), lambda x: ratio_factor(x) / 8),
    "CISPO": (
        lambda x, m: losses.grpo_loss(x, m, A2, OLD, kind="cispo"),
        lambda x: (x - OLD).exp().clamp(max=1.2) * A2[:, None] / 8,
    ),
    "SAPO": (
        lambda x, m: losses.grpo_loss(x, m, A2, OLD, kind="sapo", temperatures=(1.5, 1.5)),
        lambda x: 4 * sigmoid(1.5 * ((x - OLD).exp() - 1)) * sigmoid(1.5 * (1 - (x - OLD).exp()))
        * (x - OLD).exp() * A2[:, None] / 8,
    ),
    "GSPO": (
        lambda x, m: losses.grpo_loss(x, m, A2, OLD, kind="gspo"),
        lambda x: ratio_factor(x.mean(1, keepdim=True).expand(2, 4)) / 8,
    ),
    "RLOO": (
        lambda x, m: losses.rloo_loss(x, m, torch.tensor([1.0, 0.0]), group_size=2),
        lambda x: torch.tensor([[1.0], [-1.0]]).expand(2, 4) / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_gradient_on_logits(name):
    loss, factor = TABLE[name]
    gradient, direction, logp = logit_gradients(loss)
    expected = factor(logp)[..., None] * direction
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12, check_dtype=False)


def test_the_table_of_the_docs_has_every_row():
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert set(TABLE) <= rows


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
        assert metrics["clip_fraction"] == (not active)
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


# --- parts ----------------------------------------------------------------------------------------


def test_from_hidden_is_the_loss_of_the_log_probabilities():
    hidden = torch.randn(6, 5, 8, dtype=torch.float64).requires_grad_()
    weight = torch.randn(30, 8, dtype=torch.float64).requires_grad_()
    bias = torch.randn(30, dtype=torch.float64).requires_grad_()
    target = torch.randint(30, (6, 5)).masked_fill_(torch.rand(6, 5) < 0.3, -100)
    other = losses.Head(torch.randn(6, 5, 8).double(), torch.randn(30, 8).double(), softcap=9.0)
    transform = {"logit_scale": 0.8, "softcap": 6.0, "temperature": 1.2}

    def dense(h, w, b, scale, cap):
        z = scale * (h @ w.T + (0 if b is None else b))
        z = cap * torch.tanh(z / cap) / 1.2
        return z.log_softmax(-1), z

    mask = target != -100
    every, z = dense(hidden, weight, bias, 0.8, 6.0)
    pick = lambda x: x.gather(-1, target.masked_fill(~mask, 0)[..., None])[..., 0]  # noqa: E731
    logp, entropy = pick(every), -(every.exp() * every).sum(-1)
    frozen = pick(dense(other.hidden, other.weight, None, 1.0, 9.0)[0])
    cases = {
        "dpo": (losses.DPOLoss(beta=0.4), (), losses.dpo_loss(logp, mask, frozen, beta=0.4)),
        "grpo": (
            losses.GRPOLoss(kl_coef=0.1, entropy_coef=0.3), (ADVANTAGES,),
            losses.grpo_loss(
                logp, mask, ADVANTAGES, kl_coef=0.1, reference=frozen, entropy_coef=0.3,
                entropy=entropy,
            ),
        ),
        "sft": (
            losses.SFTLoss(label_smoothing=0.1, z_loss=0.01), (),
            losses.sft_loss(
                logp, mask, label_smoothing=0.1, z_loss=0.01, lse=z.logsumexp(-1),
                mean_logit=z.mean(-1),
            ),
        ),
    }  # fmt: skip
    for name, (module, rows, wanted) in cases.items():
        reference = {} if name == "sft" else {"reference": other}
        value = module.from_hidden(
            hidden, weight, target, *rows, bias=bias, **transform, **reference
        )
        torch.testing.assert_close(value, wanted)
        inputs = (hidden, weight, bias)
        pairs = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (value, wanted))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)
        right = (every.argmax(-1) == target)[mask].double().mean()
        assert module.metrics["token_accuracy"].item() == pytest.approx(right.item())
        assert module.metrics["entropy"].item() == pytest.approx(entropy[mask].mean().item())
        assert module.metrics["perplexity"].item() == pytest.approx(math.exp(-logp[mask].mean()))
        assert not any(v.requires_grad for v in module.metrics.values())
    flat = F.cross_entropy(z[mask], target[mask], label_smoothing=0.1)
    flat = flat + 0.01 * z.logsumexp(-1)[mask].square().mean()
    torch.testing.assert_close(cases["sft"][2], flat)


def test_position_ids_are_packed_rows():
    logprob, mask, reference = batch(3)
    position = torch.arange(LENGTH).repeat(2 * PAIRS)
    loss = losses.DPOLoss()
    wanted = loss(logprob, mask, reference)
    flat = loss(logprob.flatten(), mask.flatten(), reference.flatten(), position_ids=position)
    torch.testing.assert_close(flat, wanted)
    sums = (reference * mask).sum(1)
    torch.testing.assert_close(losses.dpo_loss(logprob, mask, sums), wanted)


def test_robust_is_an_unbiased_sigmoid():
    logprob, mask, reference = batch(4)
    clean = losses.dpo_loss(logprob, mask, reference)
    halves = torch.arange(6).roll(3)
    flipped = [logprob[halves], mask[halves], reference[halves]]
    eps, options = 0.2, {"kind": "robust", "label_smoothing": 0.2}
    seen = losses.dpo_loss(logprob, mask, reference, **options)
    other = losses.dpo_loss(*flipped, **options)
    torch.testing.assert_close((1 - eps) * seen + eps * other, clean)


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


X = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: losses.DPOLoss(kind="x"), ValueError, "kind: expected one of .*got 'x'"),
        (lambda: losses.DPOLoss(beta=0.0), ValueError, "beta: expected a finite number above 0"),
        (lambda: losses.DPOLoss(gamma=1.0), TypeError, "gamma: expected an option of .*'beta'"),
        (lambda: losses.DPOLoss(kind="exo"), ValueError, "label_smoothing: expected above 0"),
        (
            lambda: losses.DPOLoss(kind="hinge", label_smoothing=0.1), ValueError,
            "label_smoothing: expected 0 with kind 'hinge'",
        ),
        (
            lambda: losses.DPOLoss(kind="ipo", divergence="forward_kl"), ValueError,
            "divergence: expected 'reverse_kl' with kind 'ipo'",
        ),
        (lambda: losses.GRPOLoss(delta=1.1), ValueError, r"delta: expected above 1 \+ epsilon"),
        (lambda: losses.GRPOLoss(kind="dr_grpo"), ValueError, "max_length: expected a length"),
        (
            lambda: losses.dpo_loss(torch.zeros(3, 2), torch.ones(3, 2)), ValueError,
            "logprob: expected the chosen rows, .*got 3 rows",
        ),
        (
            lambda: losses.dpo_loss(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(3)),
            ValueError, r"reference: expected the shape of logprob, .*got \(3,\)",
        ),
        (
            lambda: losses.kto_loss(torch.zeros(2, 2), torch.ones(2, 2), torch.ones(3)),
            ValueError, r"desirable: expected shape \(2,\), got \(3,\)",
        ),
        (
            lambda: losses.grpo_loss(X, torch.ones(2, 2), torch.ones(2), num_items=3),
            ValueError, "num_items: expected None with a mean over 'row_mean'",
        ),
        (
            lambda: losses.sft_loss(torch.zeros(2, 2), torch.ones(2, 2), z_loss=0.1),
            ValueError, "lse: expected a tensor",
        ),
        (lambda: losses.group_advantages(torch.zeros(4), 3), ValueError, "group_size: .*got 3"),
    ],
)  # fmt: skip
def test_errors(make, error, said):
    with pytest.raises(error, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_noisy_recipe():
    noisy = ift.IFTConfig.noisy(warmup_steps=10, seed=3)
    assert noisy.lam_noise and noisy.lambda_schedule == "linear" and noisy.lam == 0.2
    assert len({noisy.lam_at(step) for step in range(20)}) > 10
