"""`ift.IFTTrainer` in place of `transformers.Trainer`.

``python -m examples.train_transformers``
"""

from __future__ import annotations

from transformers import TrainingArguments

import ift
from examples import toy


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the logged losses."""
    options = toy.options(__doc__, arguments, "ift-output")
    words = toy.tokenizer()
    batch = toy.batch(words)
    data = [{key: value[row] for key, value in batch.items()} for row in range(32)]
    trainer = ift.IFTTrainer(
        model=toy.model(words),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=data,
        ift_config=ift.IFTConfig(lam=0.2, gamma=0.95),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
