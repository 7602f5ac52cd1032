"""The docstrings of the standard library as batches of token ids."""

from __future__ import annotations

import random
from typing import Any

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
