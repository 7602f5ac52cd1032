"""Our losses from hidden states against Liger's chunked ones: values and gradients of both heads.

`liger_kernel.chunked_loss` is plain torch and runs on a CPU; Liger's Triton kernels, which compute
the same formulas, do not.
"""

import pytest
import torch

from ift import losses

reason = "Liger-Kernel is not installed (it is for Linux): no comparison with its formulas"
liger = pytest.importorskip("liger_kernel.chunked_loss", reason=reason)

ROWS, LENGTH, WIDTH, VOCABULARY = 6, 7, 16, 50


def inputs(seed=0, ignored=True):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    hidden = normal(ROWS, LENGTH, WIDTH).requires_grad_()
    weight = normal(VOCABULARY, WIDTH).mul(0.5).requires_grad_()
    target = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=g)
    if ignored:
        lengths = torch.randint(1, LENGTH, (ROWS,), generator=g)
        target = target.masked_fill(torch.arange(LENGTH) >= lengths[:, None], -100)
    reference = losses.Head(normal(ROWS, LENGTH, WIDTH), normal(VOCABULARY, WIDTH) * 0.5)
    return hidden, weight, target, reference


def same(ours, theirs, tensors):
    got, wanted = (torch.autograd.grad(x, tensors) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert b.abs().max() > 1e-3


DPO = {
    "sigmoid": "sigmoid", "hinge": "hinge", "exo": "exo_pair", "nca": "nca_pair",
    "robust": "robust", "bco": "bco_pair", "sppo": "sppo_hard", "apo_zero": "apo_zero",
    "apo_down": "apo_down", "discopop": "discopop",
}  # fmt: skip


@pytest.mark.parametrize("kind", DPO)
def test_dpo(kind):
    hidden, weight, target, reference = inputs()
    smoothing = 0.1 if kind in ("exo", "robust") else 0.0
    theirs = liger.LigerFusedLinearDPOLoss(
        compiled=False, loss_type=DPO[kind], label_smoothing=smoothing, beta=0.2
    )(weight, hidden, target, ref_input=reference.hidden, ref_weight=reference.weight)
    ours = losses.DPOLoss(kind=kind, beta=0.2, label_smoothing=smoothing).from_hidden(
        hidden, weight, target, reference=reference
    )
    same(ours, theirs[0], (hidden, weight))


@pytest.mark.parametrize("name", ["cpo", "cpo on means", "simpo", "orpo"])
def test_without_reference(name):
    hidden, weight, target, _ = inputs(1)
    theirs, ours = {
        "cpo": (
            liger.LigerFusedLinearCPOLoss(compiled=False, beta=0.3, alpha=0.7, label_smoothing=0.1),
            losses.CPOLoss(beta=0.3, nll_weight=0.7, label_smoothing=0.1),
        ),
        "cpo on means": (
            liger.LigerFusedLinearCPOLoss(compiled=False, beta=0.3, average_log_prob=True),
            losses.CPOLoss(beta=0.3, length_normalized=True),
        ),
        "simpo": (
            liger.LigerFusedLinearSimPOLoss(
                compiled=False, beta=2.0, gamma=0.5, compute_nll_loss=False
            ),
            losses.SimPOLoss(beta=2.0, gamma=0.5),
        ),
        "orpo": (
            liger.LigerFusedLinearORPOLoss(compiled=False, beta=0.3),
            losses.ORPOLoss(beta=0.3, nll="token"),
        ),
    }[name]
    wanted = theirs(weight, hidden, target)[0]
    same(ours.from_hidden(hidden, weight, target), wanted, (hidden, weight))


@pytest.mark.parametrize("means", [False, True])
def test_kto(means):
    hidden, weight, target, reference = inputs(2)
    desirable, kl = torch.tensor([True, False, True, True, False, False]), torch.tensor(0.4)
    theirs = liger.LigerFusedLinearKTOLoss(
        compiled=False, beta=0.2, use_ref_model=True, average_log_prob=means
    )(
        hidden, weight, target, preference_labels=desirable, ref_input=reference.hidden,
        ref_weight=reference.weight, kl=kl,
    )  # fmt: skip
    ours = losses.KTOLoss(beta=0.2, length_normalized=means).from_hidden(
        hidden, weight, target, desirable, reference=reference, kl=kl
    )
    same(ours, theirs[0], (hidden, weight))


@pytest.mark.parametrize(
    "kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "luspo", "vespo"]
)
def test_grpo(kind):
    hidden, weight, target, reference = inputs(3)
    mask = target != -100
    ids = target.masked_fill(~mask, 0)
    advantages = torch.tensor([1.0, -1.2, 0.4, -0.3, 2.0, -1.9])
    with torch.no_grad():
        logp = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        old = logp + 0.3 * torch.randn(logp.shape)
    level = "sequence" if kind in ("gspo", "luspo") else "token"
    # "luspo" with a KL term differs: see the next test.
    high, kl_coef = 0.25, 0.0 if kind == "luspo" else 0.05
    theirs = liger.LigerFusedLinearGRPOLoss(
        beta=kl_coef, compiled=False, use_ref_model=True, epsilon_low=0.15,
        epsilon_high=1 + high if kind == "cispo" else high, sapo_temperature_pos=1.0,
        loss_type="grpo" if kind == "gspo" else kind, importance_sampling_level=level,
        max_completion_length=20,
    )(
        hidden, weight, ids, mask.float(), advantages, old_per_token_logps=old,
        ref_input=reference.hidden, ref_weight=reference.weight,
    )  # fmt: skip
    ours = losses.GRPOLoss(
        kind=kind, epsilon=0.15, kl_coef=kl_coef,
        epsilon_high=None if kind in ("sapo", "vespo") else high,
        max_length=20 if kind == "dr_grpo" else None,
    ).from_hidden(
        hidden, weight, target, advantages, old, reference=reference if kl_coef else None
    )  # fmt: skip
    same(ours, theirs[0], (hidden, weight))


@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (9, 4, 1, 6), (2, 3, 2, 3)], ids=str)
def test_luspo_with_kl_differs(lengths):
    """Ours sums the KL of a row's tokens, as TRL does. Liger multiplies the row's length by the
    mean over the padded length, in which the KL of padding counts.
    """
    rows, length, beta = len(lengths), 9, 0.2
    hidden = torch.randn(rows, length, 16, requires_grad=True)
    weight = torch.randn(41, 16, requires_grad=True)
    ids, advantages = torch.randint(41, (rows, length)), torch.randn(rows)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    reference = losses.Head(hidden.detach() + 0.3 * torch.randn(hidden.shape), weight.detach())
    with torch.no_grad():
        logp, ref = (
            (h @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            for h in (hidden, reference.hidden)
        )
    theirs = liger.LigerFusedLinearGRPOLoss(
        beta=beta, compiled=False, use_ref_model=True, loss_type="luspo",
        importance_sampling_level="sequence",
    )(
        hidden, weight, ids, mask.float(), advantages, old_per_token_logps=logp,
        ref_input=reference.hidden, ref_weight=reference.weight,
    )[0]  # fmt: skip
    target = ids.masked_fill(~mask, -100)
    ours = losses.GRPOLoss(kind="luspo", kl_coef=beta).from_hidden(
        hidden, weight, target, advantages, logp, reference=reference
    )
    kl = (ref - logp).exp() - (ref - logp) - 1
    clip = -(advantages * mask.sum(1)).mean()  # the ratio is 1
    padded_mean = (kl.mean(1) * mask.sum(1)).mean()
    torch.testing.assert_close(ours.detach(), clip + beta * (kl * mask).sum(1).mean())
    torch.testing.assert_close(theirs.detach(), clip + beta * padded_mean)
    assert torch.isclose(ours, theirs, rtol=1e-4).item() == (min(lengths) == length)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3)])
def test_distillation(kind, beta):
    hidden, weight, target, teacher = inputs(4)
    theirs = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, temperature=1.5
    )(
        hidden.flatten(0, 1), weight, teacher.hidden.flatten(0, 1), teacher.weight,
        target.flatten(),
    )  # fmt: skip
    loss = losses.DistillationLoss(kind=kind, beta=beta if kind == "jsd" else 0.5, temperature=1.5)
    same(loss(hidden, weight, target, teacher), theirs, (hidden, weight))
    assert loss.metrics["divergence"] == pytest.approx(theirs.item(), rel=1e-5)
