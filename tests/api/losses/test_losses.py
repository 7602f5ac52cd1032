"""What holds of every loss: edges, accumulation, packed rows, from hidden states, errors."""

import inspect
import math
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch.distributed.utils import _apply_to_tensors
from torch.nn import functional as F

import dense
import ift
from ift import losses

PAIRS, LENGTH = 3, 5
ADVANTAGES = torch.tensor([1.0, -1.2, 0.4, -0.3, 2.0, -1.9])
REWARDS = torch.tensor([1.0, -1.0, 0.5, 0.25, 0.0, 3.0])
DESIRABLE = torch.tensor([True, False, True, True, False, False])

SMOOTHED = {kind: {"label_smoothing": 0.1} for kind in ("exo", "robust")}

# name → (loss of (logprob, mask, reference), does it compare with a reference?)
LOSSES = {
    "sft": lambda x, m, r, **k: losses.sft_loss(x, m, **k),
    "dft": lambda x, m, r, **k: losses.sft_loss(x, m, scaling="dft", **k),
    "deft": lambda x, m, r, **k: losses.sft_loss(x, m, scaling="deft", sum_sq=r.exp(), **k),
    "eaft": lambda x, m, r, **k: losses.sft_loss(x, m, scaling="eaft", entropy=-r, **k),
    "asft": lambda x, m, r, **k: losses.sft_loss(
        x, m, scaling="dft", kl_coef=0.1, reference_kl=r.square(), **k
    ),
    "ift": lambda x, m, r, **k: losses.ift_loss(x, m, **k),
    **{
        f"dpo-{kind}": partial(losses.dpo_loss, kind=kind, **SMOOTHED.get(kind, {}))
        for kind in losses.dpo.FORMULAS
    },
    **{
        f"dpo-{name}": partial(losses.dpo_loss, divergence=name)
        for name in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "dpo-nll": partial(losses.dpo_loss, nll_weight=0.5),
    "cpo": lambda x, m, r, **k: losses.cpo_loss(x, m, **k),
    "simpo": lambda x, m, r, **k: losses.simpo_loss(x, m, **k),
    "orpo": lambda x, m, r, **k: losses.orpo_loss(x, m, **k),
    "slic": lambda x, m, r, **k: losses.slic_loss(x, m, **k),
    "kto": lambda x, m, r, **k: losses.kto_loss(x, m, DESIRABLE, r, **k),
    "kto-normalized": lambda x, m, r, **k: losses.kto_loss(
        x, m, DESIRABLE, r, length_normalized=True, **k
    ),
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
    **dict.fromkeys(
        ["kto", "kto-normalized", "ift", "grpo", "gspo", "sapo", "luspo", "dr_grpo", "reinforce"],
        "num_rows",
    ),
    **dict.fromkeys(
        ["sft", "dft", "deft", "eaft", "asft", "bnpo", "dapo", "cispo", "vespo", "ppo"],
        "num_items",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_accumulation(name, monkeypatch):
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
    advantages, desirable = ADVANTAGES, DESIRABLE
    for rows in pieces:
        monkeypatch.setitem(globals(), "ADVANTAGES", advantages[rows])
        monkeypatch.setitem(globals(), "DESIRABLE", desirable[rows])
        value = LOSSES[name](logprob[rows], mask[rows], reference[rows], **options)
        total += torch.autograd.grad(value, logprob)[0]
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)


def test_accumulation_of_groups():
    """RLOO compares the responses to a prompt, so that a piece of a step is whole groups."""
    logprob, mask, old = batch(2)

    def gradient(rows, **options):
        value = losses.rloo_loss(
            logprob[rows], mask[rows], REWARDS[rows], old[rows], group_size=3, **options
        )
        return torch.autograd.grad(value, logprob)[0]

    parts = gradient([0, 1, 2], num_rows=6) + gradient([3, 4, 5], num_rows=6)
    torch.testing.assert_close(parts, gradient([0, 1, 2, 3, 4, 5]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_what_sorts_a_step_refuses_parts_of_it(kind):
    logprob, _, _ = batch(2)
    mask, reference = torch.ones(6, LENGTH), logprob.detach()[[1, 2, 0, 5, 3, 4]]
    whole = losses.dpo_loss(logprob, mask, reference, kind=kind)
    parts = [losses.dpo_loss(logprob[r], mask[r], reference[r], kind=kind) / PAIRS
             for r in ([i, i + PAIRS] for i in range(PAIRS))]  # fmt: skip
    assert abs(sum(parts) - whole) > 1e-4  # why it does
    with pytest.raises(ValueError, match=f"num_pairs: expected None with kind '{kind}'"):
        losses.dpo_loss(logprob, mask, reference, kind=kind, num_pairs=PAIRS)


@pytest.mark.parametrize("desirable", [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
def test_kto_of_unequal_numbers_of_rows(desirable):
    """One desirable row to four others, and a reference point of more rows than the batch."""
    logprob, mask, reference = (x[:5] for x in batch(5))
    others, their_mask, their_reference = batch(6)
    kl = losses.kto_kl(others, their_mask, their_reference)
    ratio = ((others - their_reference) * their_mask).sum(1)
    torch.testing.assert_close(kl, ratio.mean().clamp(min=0))
    assert not kl.requires_grad
    # A row without a response does not count, whatever the reference's sum of it.
    padded = torch.cat([their_mask, torch.zeros(1, LENGTH, dtype=torch.bool)])
    sums = torch.cat([(their_reference * their_mask).sum(1), torch.tensor([-50.0])])
    same = losses.kto_kl(torch.cat([others, others[:1]]), padded, sums)
    torch.testing.assert_close(same, kl)
    metrics, wanted = {}, torch.tensor(desirable)
    value = losses.kto_loss(
        logprob, mask, wanted, reference, beta=0.3, kl=kl, undesirable_weight=0.5, metrics=metrics
    )
    u = ((logprob - reference) * mask).sum(1)
    each = [1 - torch.sigmoid(0.3 * (x - kl)) if d else 0.5 * (1 - torch.sigmoid(0.3 * (kl - x)))
            for x, d in zip(u, desirable, strict=True)]  # fmt: skip
    torch.testing.assert_close(value, sum(each) / 5)
    for name, kept in (("chosen", wanted == 1), ("rejected", wanted == 0)):
        mean = 0.3 * u[kept].mean() if kept.any() else u.new_zeros(())
        torch.testing.assert_close(metrics[f"reward_{name}"], mean.detach())
    with pytest.raises(ValueError, match=r"reference: expected .*\(6,\), got \(5,\)"):
        losses.kto_kl(others, their_mask, u.detach())
    with pytest.raises(ValueError, match=r"desirable: expected shape \(5,\), got \(6,\)"):
        losses.kto_loss(logprob, mask, DESIRABLE, reference)


# --- parts ----------------------------------------------------------------------------------------


def test_from_hidden_is_the_loss_of_the_log_probabilities():
    hidden = torch.randn(6, 5, 8, dtype=torch.float64).requires_grad_()
    weight = torch.randn(30, 8, dtype=torch.float64).requires_grad_()
    bias = torch.randn(30, dtype=torch.float64).requires_grad_()
    target = torch.randint(30, (6, 5)).masked_fill_(torch.rand(6, 5) < 0.3, -100)
    other = losses.Head(torch.randn(6, 5, 8).double(), torch.randn(30, 8).double(), softcap=9.0)
    transform = {"logit_scale": 0.8, "softcap": 6.0, "temperature": 1.2}

    mask, theirs = target != -100, {"softcap": 9.0, "temperature": 1.2}
    z = dense.logits(dense.Head(hidden, weight, target, bias, transform))
    stats = dense.oracle.statistics(z, target)
    logp, entropy = stats["logprob"], stats["entropy"]
    frozen = dense.stats(dense.Head(other.hidden, other.weight, target, None, theirs))["logprob"]
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
                logp, mask, label_smoothing=0.1, z_loss=0.01, lse=stats["lse"],
                mean_logit=stats["mean_logit"],
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
        torch.testing.assert_close(*pairs)
        right = (stats["argmax"] == target)[mask].double().mean()
        assert module.metrics["token_accuracy"].item() == pytest.approx(right.item())
        assert module.metrics["entropy"].item() == pytest.approx(entropy[mask].mean().item())
        assert module.metrics["perplexity"].item() == pytest.approx(
            math.exp(-logp[mask].mean().item())
        )
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


# Arguments of a single call: of the functions, not of the modules.
PER_CALL = {
    *("cu_seqlens", "metrics", "num_items", "num_pairs", "num_rows", "entropy", "lse"),
    *("mean_logit", "weights", "importance", "reference", "values", "old_values", "returns", "kl"),
    *("sum_sq", "reference_kl", "tail_logprob", "teacher_tail_logprob", "label_logprob"),
}
MODULES = [
    module
    for module in map(losses.__dict__.get, losses.__all__)
    if isinstance(module, type) and issubclass(module, losses.Loss) and module is not losses.Loss
]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_names_the_options_of_its_function(module):
    function = inspect.signature(module.function).parameters.values()
    own = list(inspect.signature(module).parameters.values())
    assert own == [p for p in function if p.kind is p.KEYWORD_ONLY and p.name not in PER_CALL]
    assert all(p.annotation is not p.empty and p.default is not p.empty for p in own)
    made = module()
    assert made.options == {p.name: p.default for p in own}
    for option in own:  # each reaches the function
        if isinstance(option.default, float) and option.default:
            changed = module(**{option.name: option.default * 0.75})
            assert changed.options == made.options | {option.name: option.default * 0.75}


def test_options_of_a_module_are_its_attributes_and_cannot_be_changed_without_effect():
    class Own(losses.Loss):  # without fields; the function's options are taken as they are
        function = staticmethod(losses.sft_loss)

    class Half(losses.DPOLoss):
        def __init__(self):
            super().__init__(beta=0.5)

    assert Own(z_loss=0.1).options == {"z_loss": 0.1}
    loss = Half()
    assert loss.beta == loss.options["beta"] == 0.5
    loss.beta = 0.25
    x = torch.tensor([[-1.0], [-2.0]])
    assert loss(x, torch.ones(2, 1)) == losses.dpo_loss(x, torch.ones(2, 1), beta=0.25)
    with pytest.raises(TypeError, match="item assignment"):
        loss.options["beta"] = 1.0


X = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: losses.DPOLoss(kind="x"), ValueError, "kind: expected one of .*got 'x'"),
        (lambda: losses.DPOLoss(beta=0.0), ValueError, "beta: expected a finite number above 0"),
        (lambda: losses.DPOLoss(gamma=1.0), TypeError, "unexpected keyword argument 'gamma'"),
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
        (
            lambda: losses.SFTLoss(scaling="deft", label_smoothing=0.1), ValueError,
            "label_smoothing: expected 0 with scaling 'deft'",
        ),
        (
            lambda: losses.sft_loss(X, torch.ones(2, 2), scaling="eaft"), ValueError,
            "entropy: expected a tensor with scaling 'eaft', got None",
        ),
        (
            lambda: losses.sft_loss(X, torch.ones(2, 2), kl_coef=0.1), ValueError,
            "reference_kl: expected a tensor with kl_coef, got None",
        ),
        (
            lambda: losses.SFTLoss(kl_coef=0.1).from_hidden(X, X, torch.zeros(2).long()),
            ValueError, "reference: expected a Head with kl_coef, got NoneType",
        ),
        (
            lambda: losses.SFTLoss().from_hidden(
                X, X, torch.zeros(2).long(), reference=losses.Head(X, X)
            ),
            ValueError, "reference: expected None without kl_coef",
        ),
        (
            lambda: losses.GRPOLoss(kind="vespo", level="token"), ValueError,
            "level: expected None with kind 'vespo', got 'token'",
        ),
        (lambda: losses.GRPOLoss(level="row"), ValueError, "level: expected one of .*got 'row'"),
        (
            lambda: losses.GRPOLoss(kind="cispo", epsilon_high=-1.0), ValueError,
            "epsilon_high: expected a finite number above -1 with kind 'cispo', got -1.0",
        ),
        (
            lambda: losses.GRPOLoss(kind="vespo", gamma_rates=(0.0, 1.0)), ValueError,
            "gamma_rates: expected a finite number above 0",
        ),
        (
            lambda: losses.dpo_loss(X, torch.ones(2, 2), num_items=3), ValueError,
            "num_items: expected None without nll_weight, got 3",
        ),
        (
            lambda: losses.cpo_loss(X, torch.ones(2, 2), nll_weight=0, num_items=3), ValueError,
            "num_items: expected None without nll_weight, got 3",
        ),
        (lambda: losses.SLiCLoss(nll="x"), ValueError, "nll: expected one of .*got 'x'"),
        (
            lambda: losses.sft_loss(X, torch.ones(2, 2), entropy=X), ValueError,
            "entropy: expected None with scaling 'none', got a tensor",
        ),
        (
            lambda: losses.sft_loss(X, torch.ones(2, 2), z_loss=0.1, lse=X, mean_logit=X),
            ValueError, "mean_logit: expected None without label_smoothing, got a tensor",
        ),
        (lambda: losses.GRPOLoss(kl_kind="x"), ValueError, "kl_kind: expected one of .*got 'x'"),
        (
            lambda: losses.GRPOLoss(kind="vespo", epsilon_high=0.3), ValueError,
            "epsilon_high: expected None with kind 'vespo', got 0.3",
        ),
        (
            lambda: losses.GRPOLoss(kind="vespo", gamma_shapes=2.0), ValueError,
            "gamma_shapes: expected two numbers, .*got 2.0",
        ),
    ],
)  # fmt: skip
def test_errors(make, error, said):
    with pytest.raises(error, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_noisy_recipe():
    noisy = ift.IFTConfig.noisy(warmup_steps=10, seed=3)
    assert noisy.lam_noise == 0.5 and noisy.lambda_schedule == "linear" and noisy.lam == 0.2
    assert len({noisy.lam_at(step) for step in range(20)}) > 10


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_sorting_leaves_empty_pairs_out(kind):
    """A pair without tokens, anywhere in the batch, changes neither loss nor other gradients."""
    logprob, mask, reference = batch()
    one = losses.dpo_loss(logprob, mask, reference, kind=kind)
    (wanted,) = torch.autograd.grad(one, logprob)
    rows = torch.tensor([0, 6, 1, 2, 3, 6, 4, 5])  # pair 1 is the empty one
    more = [torch.cat([x.detach(), x.new_zeros(1, LENGTH)])[rows] for x in (logprob, reference)]
    wider = torch.cat([mask, mask.new_zeros(1, LENGTH)])[rows]
    x = more[0].requires_grad_()
    two = losses.dpo_loss(x, wider, more[1], kind=kind)
    (found,) = torch.autograd.grad(two, x)
    torch.testing.assert_close(two, one)
    torch.testing.assert_close(found[rows != 6], wanted)
    assert not found[rows == 6].any()


def test_the_entropy_bonus_is_a_mean_over_the_step():
    logprob, mask, reference = batch()
    entropy = torch.rand_like(logprob).requires_grad_()
    items = mask.sum()

    def bonus(rows):
        return losses.ppo_loss(
            logprob[rows], mask[rows], ADVANTAGES[rows], reference[rows], entropy=entropy[rows],
            entropy_coef=0.5, num_items=items,
        )  # fmt: skip

    (whole,) = torch.autograd.grad(bonus(slice(0, 6)), entropy)
    (parts,) = torch.autograd.grad(sum(bonus(slice(i, i + 2)) for i in (0, 2, 4)), entropy)
    torch.testing.assert_close(whole, torch.where(mask, -0.5 / items, 0).to(whole))
    torch.testing.assert_close(parts, whole)


def test_sums_per_row_are_not_taken_for_values_per_token():
    logprob, mask, reference = batch()
    with pytest.raises(ValueError, match="reference: expected"):
        losses.grpo_loss(
            logprob, mask, ADVANTAGES, reference, kl_coef=0.1, reference=reference.sum(1)
        )
    with pytest.raises(ValueError, match="old_logprob: expected"):
        losses.ppo_loss(logprob, mask, ADVANTAGES, reference.sum(1))


def test_options_that_a_kind_does_not_have():
    logprob, mask, reference = batch()
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.cpo_loss(logprob, mask, kind="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="length_normalized"):
        losses.dpo_loss(logprob, mask, reference, kind="aot", length_normalized=True)
    with pytest.raises(ValueError, match="delta"):
        losses.grpo_loss(logprob, mask, ADVANTAGES, reference, kind="cispo", delta=4.0)


def test_a_module_is_no_dataclass():
    """FSDP and DDP rebuild dataclasses among the arguments of a forward: metrics would be lost."""
    loss = losses.SFTLoss()
    assert _apply_to_tensors(lambda tensor: tensor, {"loss": loss})["loss"] is loss


def test_fields_of_subclasses():
    class Own(losses.SFTLoss):
        needs: ClassVar[int] = 0

    class Below(losses.DPOLoss):
        def __init__(self, **options):
            super().__init__(**{"beta": 0.3} | options)

    class Further(Below):
        note: str = "kept as it is"

    assert Own(z_loss=0.1).options["z_loss"] == 0.1
    assert Further().options["beta"] == 0.3
    with pytest.raises(TypeError, match="beta: expected an annotation"):

        class Unannotated(losses.DPOLoss):
            beta = 0.5

    class Shadows(losses.Loss):
        function = staticmethod(lambda logprob, mask, *, forward=1.0, metrics=None: logprob.sum())
        forward: float = 1.0

    with pytest.raises(TypeError, match="forward: expected another name"):
        Shadows()
