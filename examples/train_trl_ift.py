"""Intuitive Fine-Tuning in TRL: `IFTSFTTrainer` in place of `SFTTrainer`, its options beside SFT's.

``python -m examples.train_trl_ift``
"""

from __future__ import annotations

from datasets import Dataset

from examples import toy
from ift.integrations.trl import IFTSFTConfig, IFTSFTTrainer


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the logged losses."""
    options = toy.options(__doc__, arguments, "ift-output")
    words = toy.tokenizer()
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in toy.rows()]
    trainer = IFTSFTTrainer(
        model=toy.model(words),
        args=IFTSFTConfig(
            ift={"lam": 0.2, "gamma": 0.95},
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            logging_steps=1,
            gradient_checkpointing=False,  # with it, prompts run twice
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
