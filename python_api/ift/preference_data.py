"""Preferences → pairs of examples, of which the loss sees the last assistant turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ift.data import IGNORE_INDEX, Encoded, encode_each
from ift.data_rows import DataError, PairRow, Row


@dataclass(frozen=True)
class EncodedPairs(Encoded):
    """Examples of pairs: ``chosen``, ``rejected`` and, once computed, their reference sums."""

    def sides(self) -> Iterator[dict[str, np.ndarray]]:
        """Every sequence, pair by pair: chosen, rejected and, for KTO, the mismatched one."""
        for example in self.examples:
            yield from (example[name] for name in ("chosen", "rejected", "kl") if name in example)


def encode_pairs(
    rows: Sequence[PairRow], tokenizer: Any, max_length: int, *, mismatched: bool = False
) -> EncodedPairs:
    """Tokenise both responses of each row; a pair of which one has no token left is dropped.

    The tokens before the targets are the same in both responses of a pair.

    Args:
        rows, tokenizer, max_length: as `ift.data.encode`.
        mismatched: also ``kl``, the prompt with the chosen response of the next row, for KTO.

    Raises:
        DataError: as `ift.data.encode`; or the responses of a pair have different prompts.
    """
    sides = [
        encode_each([getattr(row, key) for row in rows], tokenizer, max_length)
        for key in ("chosen", "rejected")
    ]
    pairs: dict[int, dict[str, Any]] = {}
    for index, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
        if chosen is not None and rejected is not None:
            _share_prompt(chosen, rejected, rows[index].where)
            pairs[index] = {"chosen": chosen, "rejected": rejected}
    if mismatched:
        kept = list(pairs)
        mismatches = [
            _mismatch(rows[index], rows[following])
            for index, following in zip(kept, [*kept[1:], *kept[:1]], strict=True)
        ]
        for index, kl in zip(kept, encode_each(mismatches, tokenizer, max_length), strict=True):
            if kl is None:
                del pairs[index]
            else:
                pairs[index]["kl"] = kl
    if not pairs:
        raise DataError(
            f"no pair of {len(rows)} has tokens left in both responses after cutting at "
            f"{max_length} tokens; expected a maximum length above that of the prompts"
        )
    dropped = [row.where for index, row in enumerate(rows) if index not in pairs]
    return EncodedPairs(list(pairs.values()), dropped)


def _share_prompt(
    chosen: dict[str, np.ndarray], rejected: dict[str, np.ndarray], where: str
) -> None:
    """Let the targets of both start at the same token.

    They start apart where a token lies across the border of one response only.
    """
    both = chosen, rejected
    start = min(int((side["labels"] != IGNORE_INDEX).argmax()) for side in both)
    if not np.array_equal(chosen["input_ids"][:start], rejected["input_ids"][:start]):
        raise DataError(
            f"{where}: 'chosen' and 'rejected' have different prompts; expected conversations "
            "that differ in the last assistant turn alone"
        )
    for side in both:
        first = int((side["labels"] != IGNORE_INDEX).argmax())
        side["labels"][start:first] = side["input_ids"][start:first]


def _mismatch(row: PairRow, other: PairRow) -> Row:
    """The prompt of `row` with the chosen response of `other`."""
    mine, theirs = row.chosen.content, other.chosen.content
    messages = theirs.get("messages")
    if "messages" in mine:
        answer = (
            messages[-1] if messages else {"role": "assistant", "content": theirs["completion"]}
        )
        return Row(row.where, {"messages": [*mine["messages"][:-1], answer]}, last_turn=True)
    text = messages[-1]["content"] if messages else theirs["completion"]
    return Row(row.where, {"prompt": mine["prompt"], "completion": text})


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
