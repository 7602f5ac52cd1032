"""Intuitive Fine-Tuning in a plain training loop: patch the model, pass ``ift=``.

``python -m examples.train_loop``
"""

from __future__ import annotations

import torch

import ift
from examples import toy


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, and return the losses."""
    steps = toy.options(__doc__, arguments).steps

    words = toy.tokenizer()
    model = ift.patch(toy.model(words)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    config = ift.IFTConfig(lam=0.2, gamma=0.95, lambda_schedule="linear", warmup_steps=10)
    batch, losses = toy.batch(words), []
    for step in range(steps):
        loss = model(**batch, ift=config.replace(step=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accuracy = model.ift_metrics["correct"] / model.ift_metrics["tokens"]
        print(f"step {step}  loss {losses[-1]:.3f}  token accuracy {accuracy:.2f}")
    ift.unpatch(model)
    return losses


if __name__ == "__main__":
    main()
