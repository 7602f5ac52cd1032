"""TRL's trainers on tiny random models and a few rows."""

import copy

import torch
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.kto_trainer import KTOConfig, KTOTrainer

from causal_lms import make
from ift.tiny import train_tokenizer
from trainers import training_arguments

WORDS = [f"word{n}" for n in range(12)]


def sentence(number, length):
    return " ".join(WORDS[(number * 5 + 3 * i) % len(WORDS)] for i in range(length))


PAIRS = [
    {
        "prompt": sentence(n, 4 + n % 3),
        "chosen": " " + sentence(n + 1, 3 + n % 4),
        "rejected": " " + sentence(n + 2, 5 - n % 3),
    }
    for n in range(8)
]
KTO = [
    {"prompt": p["prompt"], "completion": p["chosen" if n % 2 else "rejected"], "label": n % 2 == 1}
    for n, p in enumerate(PAIRS)
]
COMPLETIONS = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]


def tiny_tokenizer():
    return train_tokenizer([sentence(n, 12) for n in range(12)], 300)


def arguments(kind, directory, **changes):
    options = {"bf16": False, "gradient_checkpointing": False, "seed": 1, "max_steps": 2}
    options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3}
    options |= {"lr_scheduler_type": "constant"}
    return training_arguments(directory, kind, **{**options, **changes})


def length_reward(completions, **_):
    return [float(len(text)) for text in completions]


SAMPLING = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.8}
SIMPO = {"max_length": 32, "loss_type": "simpo", "cpo_alpha": 0}
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, COMPLETIONS, {}),
    "sft dft": (SFTTrainer, SFTConfig, COMPLETIONS, {"loss_type": "dft"}),
    "sft padding free": (SFTTrainer, SFTConfig, COMPLETIONS, {"packing": True, "max_length": 32}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}),
    "dpo weighted": (DPOTrainer, DPOConfig, PAIRS, {"use_weighting": True}),
    "kto": (KTOTrainer, KTOConfig, KTO, {}),
    "grpo": (GRPOTrainer, GRPOConfig, COMPLETIONS, SAMPLING),
    "rloo": (RLOOTrainer, RLOOConfig, COMPLETIONS, SAMPLING),
    "orpo": (ORPOTrainer, ORPOConfig, PAIRS, {"max_length": 32}),
    "cpo": (CPOTrainer, CPOConfig, PAIRS, {"max_length": 32}),
    "simpo": (CPOTrainer, CPOConfig, PAIRS, SIMPO),
}


def trainer_of(
    name, tokenizer, directory, architecture="llama", changes=(), dtype=torch.float32, tied=None,
    spread=0.1, **more,
):  # fmt: skip
    kind, config, rows, options = TRAINERS[name]
    changed = {} if tied is None else {"tie_word_embeddings": tied}
    changed |= {"vocab_size": len(tokenizer), "initializer_range": spread}
    model = make(architecture, **changed).to(dtype)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    if name in ("grpo", "rloo"):
        more["reward_funcs"] = length_reward
    if name.startswith(("dpo", "kto")):
        more["ref_model"] = copy.deepcopy(model)
    args = arguments(config, directory, **{**options, **dict(changes)})
    return kind(
        model=model, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer), **more,
    )  # fmt: skip


def trained(trainer):
    torch.manual_seed(0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
