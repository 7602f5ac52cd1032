"""What the experiments on language models share: data, a small model, SFT and DPO with probes."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import ift
from examples import docstrings
from ift import tiny
from ift.data import Collator, encode
from ift.data_rows import Row
from ift.dynamics import Probe, ProbeCallback, ValleyGuard
from ift.losses import dpo_loss
from ift.one_pass import target_logprobs

LENGTH = 48  # tokens of a sequence
Rows = list[dict[str, str]]


class State(NamedTuple):
    """What the callback asks a trainer for."""

    global_step: int
    max_steps: int
    epoch: float | None = None
    is_world_process_zero: bool = True


class Lab:
    """Docstrings of the standard library: a model trained on one half, probed on the other."""

    def __init__(self, *, rows: int, base_rows: int, vocabulary: int = 1024, seed: int = 0) -> None:
        train, held_out = docstrings.collect()
        random.Random(seed).shuffle(train)
        self.base_rows, self.rows = train[:base_rows], train[base_rows : base_rows + rows]
        self.test_rows = held_out[:200]
        texts = (text for row in train for text in row.values())
        self.tokenizer = tiny.train_tokenizer(texts, vocabulary)
        self.collate = Collator(self.tokenizer.pad_token_id)
        self.seed = seed

    def batch(self, rows: Sequence[dict[str, str]], key: str = "completion") -> dict[str, Tensor]:
        """Prompts with one of their answers."""
        made = [Row(str(i), {"prompt": r["prompt"], "completion": r[key]})
                for i, r in enumerate(rows)]  # fmt: skip
        return self.collate(encode(made, self.tokenizer, LENGTH).examples)

    def fits(self, row: dict[str, str], *keys: str) -> bool:
        """Do prompt and answers fit, so that no batch loses a row?"""
        prompt = len(self.tokenizer(row["prompt"])["input_ids"])
        return prompt <= LENGTH // 2 and all(row[key].strip() for key in keys)

    def base(self, epochs: int) -> Any:
        """The model that fine-tuning starts from."""
        model = tiny.tiny_llama(self.tokenizer, hidden=96, max_length=64, seed=self.seed)
        self.sft(model, [r for r in self.base_rows if self.fits(r, "completion")], epochs, lr=2e-3)
        return model

    def fit(
        self,
        model: Any,
        rows: Rows,
        steps: int,
        lr: float,
        size: int,
        loss: Callable[[Any, Rows, list[int]], Tensor],
        callback: ProbeCallback | None = None,
        name: str = "",
    ) -> None:
        """A plain loop over shuffled rows, AdamW, constant rate, clipped to norm 1."""
        ift.patch(model)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        draw, waiting = random.Random(self.seed), []
        if callback is not None:
            callback.on_train_begin(
                None, State(0, steps), None, model, processing_class=self.tokenizer
            )
        for step in tqdm(range(1, steps + 1), desc=name, disable=None):
            if len(waiting) < size:
                waiting = draw.sample(range(len(rows)), len(rows))
            chosen, waiting = waiting[:size], waiting[size:]
            value = loss(model, [rows[i] for i in chosen], chosen)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if callback is not None:
                callback.on_step_end(None, State(step, steps), None, model)
        if callback is not None:
            callback.on_train_end(None, State(steps, steps), None)

    def sft(
        self,
        model: Any,
        rows: Rows,
        epochs: int,
        *,
        lr: float = 5e-4,
        key: str = "completion",
        callback: ProbeCallback | None = None,
        name: str = "sft",
    ) -> Any:
        """Supervised fine-tuning, in place."""
        steps = max(1, epochs * (len(rows) // 16))

        def loss(model: Any, batch: Rows, _: list[int]) -> Tensor:
            value: Tensor = model(**self.batch(batch, key)).loss
            return value

        self.fit(model, rows, steps, lr, 16, loss, callback, name)
        return model

    def dpo(
        self,
        model: Any,
        rows: Rows,
        steps: int,
        *,
        lr: float,
        beta: float = 0.1,
        guard: bool = False,
        callback: ProbeCallback | None = None,
        name: str = "dpo",
    ) -> ValleyGuard:
        """DPO of a copy of `model` against itself; what its guard counted."""
        policy = ift.patch(copy.deepcopy(model)).eval()
        counter = ValleyGuard(dpo_loss, mask=guard)

        def sides(pairs: Rows) -> dict[str, Tensor]:
            return self.batch([{"prompt": r["prompt"], "completion": r[k]}
                               for k in ("chosen", "rejected") for r in pairs])  # fmt: skip

        kept: list[Tensor] = []
        with torch.no_grad():
            for at in range(0, len(rows), 8):
                logprob, mask = target_logprobs(policy, **sides(rows[at : at + 8]))
                kept.append((logprob * mask).sum(1).view(2, -1))
        reference = torch.cat(kept, 1)  # (2, pairs): of chosen and rejected, before training

        def loss(policy: Any, pairs: Rows, chosen: list[int]) -> Tensor:
            before = reference[:, chosen].flatten()
            counter.loss = functools.partial(dpo_loss, reference=before, beta=beta)
            value: Tensor = policy(**sides(pairs), loss=counter).loss
            return value

        self.fit(policy, rows, steps, lr, 8, loss, callback, name)
        return counter


def callback(probes: list[Probe], output: Path, every: int) -> ProbeCallback:
    """A callback without the log of tokens, which would be large, and without pictures."""
    return ProbeCallback(probes, output, every=every, max_length=LENGTH, token_log=False,
                         pictures=False)  # fmt: skip
