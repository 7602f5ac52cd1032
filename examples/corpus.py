"""The docstrings of the standard library as batches of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples import docstrings
from ift import tiny
from ift.data import Collator, encode
from ift.data_rows import Row


class Corpus:
    """Both sets as token ids: what several trainings of a small model see in the same order."""

    def __init__(self, vocabulary: int, max_length: int, batch_size: int, seed: int = 0) -> None:
        train, held_out = ([Row("", row) for row in rows] for rows in docstrings.collect())
        texts = (text for row in train for text in row.texts)
        self.tokenizer = tiny.train_tokenizer(texts, vocabulary)
        self.batch_size = size = batch_size
        self.examples = encode(train, self.tokenizer, max_length).examples
        random.Random(seed).shuffle(self.examples)
        held = encode(held_out, self.tokenizer, max_length).examples
        self.collate = Collator(self.tokenizer.pad_token_id)
        self.held_out = [self.collate(held[i : i + size]) for i in range(0, len(held), size)]

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step; every training sees the same."""
        some = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.collate([self.examples[i % len(self.examples)] for i in some])

    @torch.no_grad()
    def held_out_states(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states (n, D) and ids (n,) of the targets of each held-out batch."""
        for batch in self.held_out:
            hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            target = batch["labels"][:, 1:]
            yield hidden[:, :-1][target >= 0], target[target >= 0]

    @torch.no_grad()
    def held_out_costs(self, model: Any) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every held-out target, in plain torch, and its id."""
        head, found = model.lm_head.weight.T, list(self.held_out_states(model))
        costs = [F.cross_entropy(states @ head, ids, reduction="none") for states, ids in found]
        return torch.cat(costs), torch.cat([ids for _, ids in found])
