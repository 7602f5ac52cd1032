"""``python -m examples.policy_gradient``: a loop that samples, with any policy-gradient loss.

A tiny random Llama learns to answer a prompt with one digit over and over: the reward is the share
of that digit. Each round samples groups of responses, scores them and takes a few steps on them.
Samples are drawn and their log-probabilities taken without logits: `linear_token` draws,
``model(..., loss=...)`` trains.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from torch import Tensor

import ift
from ift import losses
from ift.head_pass import head_pass
from ift.one_pass import target_logprobs
from ift_kernels import linear_token

PROMPT, RESPONSE, VOCABULARY = 4, 12, 16
GROUPS, GROUP_SIZE, STEPS = 4, 8, 2  # prompts, responses to each, optimizer steps on them


def tiny_model(seed: int) -> Any:
    """A Llama with random weights, patched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return ift.patch(LlamaForCausalLM(config))


@torch.no_grad()
def sample(model: Any, prompts: Tensor, seed: int) -> Tensor:
    """Responses to `prompts` (rows, PROMPT), one token at a time: (rows, PROMPT + RESPONSE)."""
    ids, forward = prompts, functools.partial(type(model).forward, model)
    for position in range(RESPONSE):
        # Noise of its own for each round and position.
        draw = functools.partial(_last, seed=seed * RESPONSE + position)
        _, drawn = head_pass(model, forward, {"input_ids": ids, "use_cache": False}, draw)
        ids = torch.cat([ids, drawn[:, None]], 1)
    return ids


def _last(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, seed: int) -> Tensor:
    return linear_token(hidden[:, -1], weight, bias=bias, rule="sample", seed=seed).ids


def build(name: str) -> losses.Loss:
    """The loss of that name."""
    if name == "ppo":
        return losses.PPOLoss()
    if name == "reinforce":
        return losses.REINFORCELoss()
    if name == "rloo":
        return losses.RLOOLoss(group_size=GROUP_SIZE)
    return losses.GRPOLoss(kind=name, max_length=RESPONSE if name == "dr_grpo" else None)


def train(name: str = "grpo", rounds: int = 30, seed: int = 0, lr: float = 3e-3) -> list[float]:
    """Mean reward of each round."""
    model, loss = tiny_model(seed), build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    history = []
    for number in range(rounds):
        prompts = torch.randint(VOCABULARY, (GROUPS, PROMPT), generator=generator)
        ids = sample(model, prompts.repeat_interleave(GROUP_SIZE, 0), seed=number)
        rewards = (ids[:, PROMPT:] == 7).float().mean(1)
        history.append(rewards.mean().item())
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        with torch.no_grad():
            old, _ = target_logprobs(model, input_ids=ids, labels=labels)
        given = rewards if name == "rloo" else losses.group_advantages(rewards, GROUP_SIZE)
        for _ in range(STEPS):
            rest = (given,) if name == "reinforce" else (given, old)
            output = model(
                input_ids=ids, labels=labels,
                loss=lambda logprob, mask, rest=rest: loss(logprob, mask, *rest),
            )  # fmt: skip
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        shown = ("approx_kl", "clip_fraction")
        metrics = {k: f"{v:.3f}" for k, v in loss.metrics.items() if k in shown}
        print(f"round {number + 1:3d}  reward {history[-1]:.3f}  {metrics}", flush=True)
    return history


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("grpo", "dapo", "dr_grpo", "cispo", "sapo", "gspo", "ppo", "reinforce", "rloo")
    parser.add_argument("--loss", choices=names, default="grpo")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    train(options.loss, options.rounds)


if __name__ == "__main__":
    main()
