"""Our losses against TRL's own code, which runs here on log-probabilities that we hand it."""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from ift import losses

# Its experimental trainers warn that they are; the log of the tests is for other things.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL is not installed: no comparison with its formulas")
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

ROWS, LENGTH = 6, 9


def batch(seed=0, rows=ROWS, length=LENGTH):
    """Log-probabilities with a gradient, others near them, and a mask of mixed lengths."""
    g = torch.Generator().manual_seed(seed)
    logprob = -3 * torch.rand(rows, length, generator=g) - 0.02
    other = logprob + 0.3 * torch.randn(rows, length, generator=g)
    lengths = torch.randint(1, length, (rows,), generator=g)
    mask = torch.arange(length) < lengths[:, None]
    return logprob.requires_grad_(), other.clamp(max=-1e-3), mask


def same(ours, theirs, logprob):
    """Value and gradient to 1e-5."""
    got, wanted = (torch.autograd.grad(x, logprob, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.abs().max() > 1e-4  # of zeros it would tell nothing


def stub(**attributes):
    """What TRL's methods read of `self`, in one process, without a model."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x,
        reduce=lambda x, reduction: x, num_processes=1, sync_gradients=False,
    )  # fmt: skip
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return SimpleNamespace(
        accelerator=accelerator, _metrics=metrics, aux_loss_enabled=False, _tp_size=1,
        _total_train_tokens=0, model=SimpleNamespace(training=True), **attributes,
    )  # fmt: skip


def outputs(logprob, mask):
    zero = torch.zeros_like(mask)
    values = SimpleNamespace(
        log_probs=logprob * mask, entropy=zero.float(), mean_logits=zero.float(), is_top1=zero
    )

    class Model:
        training = True

        def __call__(self, **kwargs):
            return values

    return Model()


def unshifted(mask):
    """TRL's masks have one position more: the first token, which is never predicted."""
    return torch.nn.functional.pad(mask, (1, 0)).long()


def inputs_of(mask, **more):
    """A batch of TRL's paired trainers."""
    names = ("completion_mask", "input_ids", "attention_mask")
    return {**dict.fromkeys(names, unshifted(mask)), **more}


def generated(mask, **more):
    """A batch of TRL's trainers that sample."""
    prompt = torch.ones(len(mask), 2, dtype=torch.long)
    return {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask.long(),
        "completion_mask": mask.long(), **more,
    }  # fmt: skip


def trl_dpo(logprob, reference, mask, kind, **options):
    given = {
        "beta": 0.3, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "alpha": 0.5,
        **options,
    }  # fmt: skip
    trainer = stub(
        ld_alpha=None, precompute_ref_logps=True, use_weighting=False, loss_types=[kind, "sft"],
        loss_weights=[1.0, given.get("sft", 0.0)], args=SimpleNamespace(discopop_tau=0.05),
        beta=given["beta"], label_smoothing=given["label_smoothing"],
        f_divergence_type=given["f_divergence_type"],
        f_alpha_divergence_coef=given["alpha"],
    )  # fmt: skip
    sums = (reference * mask).sum(1).chunk(2)
    inputs = inputs_of(mask, ref_chosen_logps=sums[0], ref_rejected_logps=sums[1])
    loss = DPOTrainer._compute_loss(trainer, outputs(logprob, mask), inputs, False)
    return loss, trainer._metrics["train"]


DPO = [
    ("sigmoid", "sigmoid", {}),
    ("hinge", "hinge", {}),
    ("ipo", "ipo", {"length_normalized": True}),
    ("exo", "exo_pair", {"label_smoothing": 0.1}),
    ("nca", "nca_pair", {}),
    ("robust", "robust", {"label_smoothing": 0.1}),
    ("bco", "bco_pair", {}),
    ("sppo", "sppo_hard", {}),
    ("aot", "aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", "aot_unpaired", {"label_smoothing": 0.1}),
    ("apo_zero", "apo_zero", {}),
    ("apo_down", "apo_down", {}),
    ("discopop", "discopop", {}),
    ("sigmoid", "sigmoid_norm", {"length_normalized": True}),
    ("sigmoid", "sigmoid", {"nll_weight": 0.7, "nll": "token"}),
    ("sigmoid", "sigmoid", {"divergence": "forward_kl"}),
    ("hinge", "hinge", {"divergence": "js_divergence"}),
    ("sigmoid", "sigmoid", {"divergence": "alpha_divergence", "alpha": 0.7}),
]


@pytest.mark.parametrize(("kind", "theirs", "options"), DPO, ids=lambda x: str(x))
def test_dpo(kind, theirs, options):
    logprob, reference, mask = batch()
    metrics = {}
    ours = losses.dpo_loss(
        logprob, mask, reference, kind=kind, beta=0.3, metrics=metrics, **options
    )
    given = {k: v for k, v in options.items() if k in ("label_smoothing", "alpha")}
    given["f_divergence_type"] = options.get("divergence", "reverse_kl")
    given["sft"] = options.get("nll_weight", 0.0)
    wanted, told = trl_dpo(logprob, reference, mask, theirs, **given)
    same(ours, wanted, logprob)
    if not options.get("length_normalized"):
        for name, key in (("chosen", "chosen"), ("rejected", "rejected"), ("margin", "margins"),
                          ("accuracy", "accuracies")):  # fmt: skip
            value = metrics[f"reward_{name}"].item()
            assert value == pytest.approx(told[f"rewards/{key}"][0], abs=1e-5)
        assert metrics["logprob_chosen"].item() == pytest.approx(told["logps/chosen"][0], rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo(kind):
    logprob, _, mask = batch(1)
    sums, counts = (logprob * mask).sum(1), mask.sum(1)
    scores = (sums / counts if kind == "simpo" else sums).chunk(2)
    trainer = stub(alpha=0.0, loss_type=kind, simpo_gamma=0.4, beta=0.3, label_smoothing=0.0)
    theirs = CPOTrainer.cpo_loss(trainer, *scores)[0].mean()
    half = ROWS // 2
    nll = -(logprob[:half] * mask[:half]).sum() / mask[:half].sum()
    ours = losses.cpo_loss(logprob, mask, kind=kind, beta=0.3, gamma=0.4, nll_weight=0.7)
    same(ours, theirs + 0.7 * nll, logprob)
    if kind == "simpo":
        same(losses.simpo_loss(logprob, mask, beta=0.3, gamma=0.4), theirs, logprob)


def test_orpo():
    logprob, _, mask = batch(2)
    means = ((logprob * mask).sum(1) / mask.sum(1)).chunk(2)
    trainer = stub(beta=0.2)
    ratio = ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    half = ROWS // 2
    nll = -(logprob[:half] * mask[:half]).sum() / mask[:half].sum()
    ours = losses.orpo_loss(logprob, mask, beta=0.2, nll="token")
    same(ours, nll - ratio.mean(), logprob)
    same(losses.orpo_loss(logprob, mask, beta=0.2), -means[0].mean() - ratio.mean(), logprob)


@pytest.mark.parametrize("kind", ["kto", "apo_zero"])
def test_kto(kind):
    logprob, reference, mask = batch(3)
    kl_logprob, kl_reference, kl_mask = batch(8)
    desirable = torch.tensor([True, False, True, True, False, False])
    reference_kl = (kl_reference * kl_mask).sum(1) - 1.5  # so that the estimate is positive
    trainer = stub(
        beta=0.2, precompute_ref_logps=True, calculate_KL=kind == "kto", desirable_weight=1.2,
        undesirable_weight=0.7, loss_type="kto" if kind == "kto" else "apo_zero_unpaired",
        _compute_kl_logps=lambda model, inputs: (kl_logprob * kl_mask).sum(1),
    )  # fmt: skip
    sums = {"ref_logps": (reference * mask).sum(1), "ref_KL_logps": reference_kl}
    inputs = inputs_of(mask, label=desirable, **sums)
    theirs = KTOTrainer._compute_loss(trainer, outputs(logprob, mask), inputs, False)
    kl, metrics = losses.kto_kl(kl_logprob, kl_mask, reference_kl), {}
    assert kl > 0
    ours = losses.kto_loss(
        logprob, mask, desirable, reference, beta=0.2, kind=kind, kl=kl if kind == "kto" else 0.0,
        desirable_weight=1.2, undesirable_weight=0.7, metrics=metrics,
    )  # fmt: skip
    same(ours, theirs, logprob)
    told = trainer._metrics["train"]
    assert metrics["reward_margin"].item() == pytest.approx(told["rewards/margins"][0], abs=1e-5)


GRPO = [
    ("grpo", "grpo", {}),
    ("grpo", "grpo", {"delta": 1.5, "beta": 0.1}),
    ("grpo", "grpo", {"beta": 0.1, "use_bias_correction_kl": True}),
    ("bnpo", "bnpo", {"entropy": 0.1}),
    ("dapo", "dapo", {"importance": True}),
    ("dr_grpo", "dr_grpo", {}),
    ("cispo", "cispo", {}),
    ("cispo", "cispo", {"level": "sequence", "high": -0.3}),  # a bound of 0.7
    ("vespo", "vespo", {"beta": 0.1}),
    ("bnpo", "bnpo", {"level": "sequence"}),
    ("dapo", "dapo", {"level": "sequence", "beta": 0.1, "use_bias_correction_kl": True}),
    ("dr_grpo", "dr_grpo", {"level": "sequence", "delta": 1.5}),
    ("sapo", "sapo", {"level": "sequence"}),
    ("luspo", "luspo", {"level": "token"}),
    ("sapo", "sapo", {}),
    ("gspo", "grpo", {"level": "sequence"}),
    ("luspo", "luspo", {"level": "sequence"}),
    ("luspo", "luspo", {"level": "sequence", "beta": 0.1}),
    ("luspo", "luspo", {"level": "sequence", "beta": 0.3, "use_bias_correction_kl": True}),
    ("luspo", "luspo", {"level": "sequence", "beta": 0.1, "delta": 1.5}),
]


@pytest.mark.parametrize(("kind", "theirs", "options"), GRPO, ids=lambda x: str(x))
def test_grpo(kind, theirs, options):
    logprob, old, mask = batch(4)
    _, reference, _ = batch(5)
    advantages = torch.tensor([1.0, -1.2, 0.4, -0.3, 2.0, -1.9])
    entropy = logprob.square()
    weights = torch.where(mask, torch.rand(ROWS, LENGTH) + 0.5, 1)  # TRL's of padding
    beta, delta = options.get("beta", 0.0), options.get("delta")
    correction = options.get("use_bias_correction_kl", False)
    high = options.get("high", 0.25)  # cispo's bound in TRL is the ratio itself
    trainer = stub(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, loss_type=theirs,
        importance_sampling_level=options.get("level", "token"), epsilon_low=0.15,
        epsilon_high=1 + high if kind == "cispo" else high, max_completion_length=20,
        use_vllm=bool(options.get("importance")), vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled="entropy" in options,
        use_adaptive_entropy=False, entropy_coef=options.get("entropy", 0.0),
        args=SimpleNamespace(
            delta=delta, use_bias_correction_kl=correction, sapo_temperature_pos=1.1,
            sapo_temperature_neg=1.3, steps_per_generation=1, vespo_k_pos=2.0, vespo_k_neg=3.0,
            vespo_lambda_pos=3.0, vespo_lambda_neg=2.0,
        ),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprob, entropy, None),
    )  # fmt: skip
    inputs = generated(
        mask, advantages=advantages, old_per_token_logps=old, ref_per_token_logps=reference,
        num_items_in_batch=mask.sum(), importance_sampling_ratio=weights,
    )  # fmt: skip
    trainer.get_gamma_weights = GRPOTrainer.get_gamma_weights
    wanted = GRPOTrainer._compute_loss(trainer, SimpleNamespace(training=True), inputs)
    metrics = {}
    ours = losses.grpo_loss(
        logprob, mask, advantages, old, kind=kind, level=None if kind == "gspo" else
        options.get("level"), epsilon=0.15, delta=delta,
        epsilon_high=None if kind in ("sapo", "vespo") else high,
        temperatures=(1.1, 1.3), kl_coef=beta, kl_correction=correction,
        reference=reference if beta else None,
        entropy=entropy if "entropy" in options else None,
        entropy_coef=options.get("entropy", 0.0), max_length=20 if kind == "dr_grpo" else None,
        importance=weights if "importance" in options or kind == "vespo" else None,
        metrics=metrics,
    )  # fmt: skip
    same(ours, wanted, logprob)
    told = trainer._metrics["train"]
    if beta and not correction:  # with it TRL tells of the corrected one
        assert metrics["kl"].item() == pytest.approx(told["kl"][0], rel=1e-5)
    level = options.get("level")
    if kind in ("grpo", "bnpo", "dapo", "dr_grpo") and not delta and level is None:
        share = told["clip_ratio/region_mean"][0]
        assert share > 0 and metrics["clip_fraction"].item() == pytest.approx(share)


def test_rloo():
    logprob, old, mask = batch(6)
    rewards = torch.tensor([1.0, 0.2, -0.5, 0.3, 0.4, 2.0])
    advantages = losses.rloo_advantages(rewards, 3)
    expected = [r - (rewards.view(2, 3)[i // 3].sum() - r) / 2 for i, r in enumerate(rewards)]
    torch.testing.assert_close(advantages, torch.stack(expected))
    trainer = stub(
        epsilon_low=0.2, epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprob, logprob.detach(), None),
    )  # fmt: skip
    inputs = generated(mask, advantages=advantages, old_logps=(old * mask).sum(1))
    wanted = RLOOTrainer._compute_loss(trainer, SimpleNamespace(training=True), inputs)
    same(losses.rloo_loss(logprob, mask, rewards, old, group_size=3), wanted, logprob)


def test_dft():
    # trl.trainer.sft_trainer: per_token_loss * outputs.log_probs.exp().detach(), over the tokens.
    logprob, _, mask = batch(7)
    theirs = -(logprob * mask * (logprob * mask).exp().detach()).sum() / mask.sum()
    same(losses.sft_loss(logprob, mask, scaling="dft"), theirs, logprob)
