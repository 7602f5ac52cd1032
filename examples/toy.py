"""What the examples train on: rows of counting, a tokenizer of them, a model small enough."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ift.tiny import tiny_llama, train_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def options(about: str, arguments: list[str] | None, output: str = "") -> argparse.Namespace:
    """Of an example's command line; with `output`, a default directory, also of ``--output``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=20)
    if output:
        parser.add_argument("--output", default=output)
    return parser.parse_args(arguments)


def rows(number: int = 32) -> list[dict[str, str]]:
    """Prompts that count, a completion that counts on, and one (rejected) that does not."""
    made = []
    for start in range(number):
        words = [WORDS[(start + i) % 10] for i in range(8)]
        made.append(
            {
                "prompt": " ".join(words[:5]),
                "completion": " " + " ".join(words[5:]),
                "rejected": " " + " ".join(words[:3]),
            }
        )
    return made


def tokenizer() -> Any:
    """A byte-level tokenizer of those rows."""
    return train_tokenizer([row["prompt"] + row["completion"] for row in rows()], 300)


def model(words: Any) -> Any:
    """A random Llama; in earnest, ``AutoModelForCausalLM.from_pretrained(...)``."""
    return tiny_llama(words, hidden=64)


def batch(words: Any, part: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Some rows as tensors, padded on the right; -100 where there is no loss."""
    some = rows()[part]
    prompts = [words(row["prompt"]).input_ids for row in some]
    full = [p + words(r["completion"]).input_ids for p, r in zip(prompts, some, strict=True)]
    width = max(map(len, full))
    ids = torch.tensor([row + [words.pad_token_id] * (width - len(row)) for row in full])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in full])
    labels = ids.masked_fill(mask == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
