"""Preference data: JSONL rows with a chosen and a rejected response → pairs of examples.

A row has a prompt, ``"prompt"`` (text, or a list of messages) or ``"messages"``, and its responses
``"chosen"`` and ``"rejected"``: text, a message, or a list of messages. Without a prompt both are
whole conversations. The loss sees the last assistant turn of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ift.data import (
    DataError,
    Encoded,
    Row,
    check_encodable,
    check_messages,
    encode,
    json_type,
    parsed_lines,
)

FORMATS = (
    '{"prompt": "…", "chosen": "…", "rejected": "…"}, the same with lists of messages, or '
    '{"messages": […], "chosen": "…", "rejected": "…"}'
)


@dataclass(frozen=True)
class PairRow:
    """One preference: two rows that share their prompt."""

    where: str
    chosen: Row
    rejected: Row

    @property
    def texts(self) -> list[str]:
        """Every piece of text (what a tokenizer is trained on)."""
        return [*self.chosen.texts, *self.rejected.texts]

    @property
    def messages(self) -> Any:
        """The chosen conversation, or None for plain text."""
        return self.chosen.messages


def read_preferences(path: str | Path) -> list[PairRow]:
    """Read and check a JSONL file of preferences.

    Raises:
        DataError: the file is missing or empty, or a row is malformed.
    """
    return [pair_row(row, where) for row, where in parsed_lines(Path(path), FORMATS)]


def pair_row(row: Any, where: str) -> PairRow:
    """The pair of a parsed line, checked."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: got a JSON {json_type(row)}; expected {FORMATS}")
    for key in ("chosen", "rejected"):
        if key not in row:
            keys = ", ".join(map(repr, row)) or "no keys"
            raise DataError(f"{where}: got {keys}; expected {FORMATS}")
    prompt = row.get("prompt", row.get("messages"))
    sides = [_side(prompt, row[key], key, where) for key in ("chosen", "rejected")]
    return PairRow(where, *(Row(where, side, last_turn=True) for side in sides))


def _side(prompt: Any, response: Any, key: str, where: str) -> dict[str, Any]:
    if isinstance(response, dict):
        response = [response]
    if isinstance(prompt, str) and isinstance(response, str):
        for name, text in (("prompt", prompt), (key, response)):
            check_encodable(text, where, name)
        if not response:
            raise DataError(f"{where}: {key!r} is empty; expected some text")
        return {"prompt": prompt, "completion": response}
    before: Any = [] if prompt is None else prompt
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    if isinstance(response, str) and before:
        response = [{"role": "assistant", "content": response}]
    if not isinstance(response, list) or not isinstance(before, list):
        raise DataError(
            f"{where}: {key!r} is a {json_type(response)} and the prompt "
            f"{'missing' if prompt is None else f'a {json_type(prompt)}'}; expected {FORMATS}"
        )
    messages = [*before, *response]
    check_messages(messages, where)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: {key!r} ends with the role {messages[-1]['role']!r}; expected 'assistant'"
        )
    return {"messages": messages}


@dataclass(frozen=True)
class EncodedPairs:
    """Examples of pairs: ``chosen``, ``rejected`` and, once known, their reference sums."""

    examples: list[dict[str, Any]]
    dropped: list[str]

    @property
    def target_tokens(self) -> int:
        """Tokens of both responses that the loss sees in one epoch."""
        return Encoded(list(self.sides()), []).target_tokens

    def sides(self) -> Iterator[dict[str, np.ndarray]]:
        """Every sequence: chosen, rejected, chosen, …, and KTO's mismatched ones behind them."""
        for example in self.examples:
            yield from (example[name] for name in ("chosen", "rejected", "kl") if name in example)


def encode_pairs(
    rows: Sequence[PairRow], tokenizer: Any, max_length: int, *, mismatched: bool = False
) -> EncodedPairs:
    """Tokenise both responses of each row; a pair of which one has no token left is dropped.

    Args:
        rows, tokenizer, max_length: as `ift.data.encode`.
        mismatched: also ``kl``, the prompt with the chosen response of the next row, for KTO.

    Raises:
        DataError: as `ift.data.encode`.
    """
    both: list[list[dict[str, np.ndarray] | None]] = []
    for key in ("chosen", "rejected"):
        named = [
            Row(f"{i}", getattr(row, key).content, last_turn=True) for i, row in enumerate(rows)
        ]
        encoded = encode(named, tokenizer, max_length)
        missing, kept = set(encoded.dropped), iter(encoded.examples)
        both.append([None if row.where in missing else next(kept) for row in named])
    pairs, dropped = [], []
    for row, chosen, rejected in zip(rows, *both, strict=True):
        if chosen is None or rejected is None:
            dropped.append(row.where)
        else:
            pairs.append({"chosen": chosen, "rejected": rejected})
    if not pairs:
        raise DataError(
            f"no pair of {len(rows)} has tokens left in both responses after cutting at "
            f"{max_length} tokens; expected a maximum length above that of the prompts"
        )
    if mismatched:
        for example, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
            example["kl"] = _mismatch(example["chosen"], other["chosen"], max_length)
    return EncodedPairs(pairs, dropped)


def _mismatch(
    example: dict[str, np.ndarray], other: dict[str, np.ndarray], max_length: int
) -> dict[str, np.ndarray]:
    """The prompt of `example` with the response of `other`."""
    start, from_ = (int((e["labels"] != -100).argmax()) for e in (example, other))
    ids = np.concatenate([example["input_ids"][:start], other["input_ids"][from_:]])
    labels = np.concatenate([example["labels"][:start], other["labels"][from_:]])
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


@dataclass(frozen=True)
class PairCollator:
    """Chosen rows, then rejected ones, padded alike; reference sums (2 · pairs,) if examples have
    them, and the mismatched rows of KTO."""

    collate: Any  # of single examples: `ift.data.Collator`

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        sides = ("chosen", "rejected")
        batch: dict[str, Any] = self.collate([e[side] for side in sides for e in examples])
        if "reference" in examples[0]:
            sums = [e["reference"][i] for i in range(2) for e in examples]
            batch["reference"] = torch.tensor(sums, dtype=torch.float32)
        if "kl" in examples[0]:
            batch |= {f"kl_{k}": v for k, v in self.collate([e["kl"] for e in examples]).items()}
            kl = [e["reference"][2] for e in examples]
            batch["kl_reference"] = torch.tensor(kl, dtype=torch.float32)
        return batch
