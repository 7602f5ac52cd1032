"""TRL's `DPOTrainer` on our log-probabilities: one line more, no logits.

``python -m examples.train_trl_dpo``
"""

from __future__ import annotations

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from examples import toy
from ift.integrations.trl import use_ift_kernels


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the logged losses."""
    options = toy.options(__doc__, arguments, "ift-output")
    words = toy.tokenizer()
    rows = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["rejected"]}
        for r in toy.rows()
    ]
    trainer = DPOTrainer(
        model=toy.model(words),
        ref_model=toy.model(words),
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            logging_steps=1,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )
    use_ift_kernels(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
