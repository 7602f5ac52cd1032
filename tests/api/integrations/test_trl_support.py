"""TRL's GRPO and RLOO on log-probabilities within the support of the trainer's own sampling."""

import functools
import math

import pytest
import torch

pytest.importorskip("trl")

from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from causal_lms import assert_close, gradients
from ift import Support
from ift.integrations import fused_head
from ift.integrations import trl as integration
from trl_trainers import tiny_tokenizer, trained, trainer_of

WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
LIMITS = {"top_k": 12, "top_p": 0.9, "min_p": 0.02}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def warped_logps(trainer, model, input_ids, attention_mask, logits_to_keep, **_):
    """`_get_per_token_logps_and_entropies` from logits that transformers' generation warps."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    scores = logits[:, -logits_to_keep - 1 : -1] / trainer.temperature
    target, left = input_ids[:, -logits_to_keep:, None], scores.flatten(0, 1)
    for name, warper in WARPERS.items():
        left = warper(LIMITS[name])(None, left)
    inside = (left > -torch.inf).view_as(scores).scatter(-1, target, True)
    logp = scores.masked_fill(~inside, -torch.inf).log_softmax(-1)
    finite = logp.masked_fill(~inside, 0)
    entropy = -torch.where(inside, finite.exp() * finite, 0).sum(-1)
    trainer.outside = ~(left > -torch.inf).view_as(scores).gather(-1, target)[..., 0]
    return logp.gather(-1, target)[..., 0], entropy, None


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_log_probabilities_within_what_the_trainer_samples_from(name, tokenizer, tmp_path):
    """Of policy and reference, and with them TRL's loss and its gradient."""
    found, inputs = [], None
    changes = {**LIMITS, "beta": 0.0, "num_iterations": 2}
    for ours in (True, False):
        trainer = trainer_of(name, tokenizer, tmp_path, changes=changes)
        trainer.current_gradient_accumulation_steps = 1
        trainer.beta = 0.1
        trainer.ref_model = trainer_of(name, tokenizer, tmp_path, changes=changes).model
        with torch.no_grad():
            trainer.ref_model.lm_head.weight.copy_(trainer.model.lm_head.weight.roll(1, 0))
        if ours:
            integration.use_ift_kernels(trainer, support=True)
            inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            inputs["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.7])
        else:
            trainer._get_per_token_logps_and_entropies = functools.partial(warped_logps, trainer)
        row = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        padding = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        call, mask = (row, padding, inputs["completion_ids"].shape[1]), inputs["completion_mask"]
        with torch.no_grad():
            logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, *call, compute_entropy=True
            )
            if not ours:  # what was sampled is in the support
                assert not (trainer.outside & mask.bool()).any()
            reference = trainer._get_per_token_logps_and_entropies(trainer.ref_model, *call)[0]
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        values = [x * mask for x in (logps, entropies, reference)]
        found.append(([*values, loss.detach()], gradients(trainer.model)))
        if ours and name == "rloo":
            torch.testing.assert_close(inputs["old_logps"], values[0].sum(1))
        elif ours:
            stored = [inputs[f"{which}_per_token_logps"] * mask for which in ("old", "ref")]
            torch.testing.assert_close(stored, [values[0], values[2]], rtol=1e-5, atol=1e-5)
    (mine, our_grads), (theirs, grads) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert_close(our_grads, grads, 2e-5)


def test_a_trainer_within_the_support_of_its_sampler(tokenizer, tmp_path):
    trainer = trainer_of("grpo", tokenizer, tmp_path, changes=LIMITS)
    logs, _ = trained(integration.use_ift_kernels(trainer, support=True))
    assert trainer.model.forward.support == Support(**LIMITS, sampler="transformers")
    assert all(0 < entry["entropy"] <= math.log(LIMITS["top_k"] + 1) for entry in logs)


def test_what_a_trainer_samples_otherwise_is_refused(tokenizer, tmp_path):
    for changes, problem in (
        ({"top_p": 0.9}, "top_k: expected 1 to 511 with support, got 0"),
        ({**LIMITS, "repetition_penalty": 1.2}, "repetition_penalty: expected 1.0 with support"),
        ({**LIMITS, "generation_kwargs": {"top_k": 3}}, "generation_kwargs: expected None with"),
        ({"top_k": 600}, "top_k: expected None or 1 to 511, got 600"),
    ):
        trainer = trainer_of("grpo", tokenizer, tmp_path, changes=changes)
        with pytest.raises(ValueError, match=problem):
            integration.use_ift_kernels(trainer, support=True)
    trainer.top_k, trainer.generation_kwargs = 5, {"suppress_tokens": [3]}
    with pytest.raises(ValueError, match="suppress_tokens: expected None with support"):
        integration.use_ift_kernels(trainer, support=True)
    trainer.top_k, trainer.generation_kwargs = 0, {}
    integration.use_ift_kernels(trainer, support=True)  # nothing is truncated
    assert trainer.model.forward.support is None
    trainer.use_vllm, trainer.top_k = True, 5
    assert fused_head.trainer_support(trainer).sampler == "vllm"
    with pytest.raises(ValueError, match="support: expected False but for GRPOTrainer and RLOO"):
        integration.use_ift_kernels(trainer_of("dpo", tokenizer, tmp_path), support=True)
