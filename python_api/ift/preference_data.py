"""Preferences → pairs of examples, of which the loss sees the last assistant turn.

For KTO also single responses with a label.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ift.data import (
    IGNORE_INDEX,
    LIMITED_BY,
    Encoded,
    Example,
    encode_whole,
    shortened,
    start_length,
    without_start,
)
from ift.data_rows import DataError, PairRow, Row

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected", "response", "kl")


@dataclass(frozen=True)
class EncodedPairs(Encoded):
    """Examples of ``chosen`` and ``rejected``, or of a ``response`` and whether it is
    ``desirable``; for KTO with ``kl``; and, once computed, with their reference sums."""

    def sides(self) -> Iterator[Example]:
        """Every sequence, example by example: the responses, and the mismatched one of KTO."""
        for example in self.examples:
            yield from (example[name] for name in SIDES if name in example)


def encode_pairs(
    rows: Sequence[PairRow],
    tokenizer: Any,
    max_length: int,
    *,
    mismatched: bool = False,
    truncate: str = "end",
) -> EncodedPairs:
    """Tokenise both responses of each row; a pair of which one has no token left is dropped.

    The tokens before the targets are the same in both responses of a pair.

    Args:
        rows, tokenizer, max_length: as `ift.data.encode`.
        mismatched: also ``kl`` for KTO, the prompt with the chosen response of the next row that
            has another prompt.
        truncate: as `ift.data.encode`, of pairs of which a side is too long. "start" cuts the same
            tokens off both prompts, and drops a pair whose responses alone are too long.

    Raises:
        DataError: as `ift.data.encode`; or the responses of a pair have different prompts.
    """
    sides = [
        encode_whole([getattr(row, key) for row in rows], tokenizer)
        for key in ("chosen", "rejected")
    ]
    pairs: dict[int, dict[str, Any]] = {}
    truncated = {}
    for index, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
        if chosen is None or rejected is None:
            continue
        _share_prompt(chosen, rejected, rows[index].where)
        both = _shortened_pair(chosen, rejected, tokenizer, max_length, truncate)
        if both is not None:
            pairs[index] = dict(zip(("chosen", "rejected"), both, strict=True))
        longest = max(len(side["input_ids"]) for side in (chosen, rejected))
        if longest > max_length and (both is not None or truncate == "drop"):
            truncated[index] = rows[index].where
    if mismatched:
        chosen_rows = {index: rows[index].chosen for index in pairs}
        _add_mismatched(pairs, chosen_rows, tokenizer, max_length, truncate)
    left = "tokens left in both responses"
    return _encoded(rows, pairs, truncated, max_length, truncate, "pair", left)


def encode_responses(
    rows: Sequence[Row], tokenizer: Any, max_length: int, *, truncate: str = "end"
) -> EncodedPairs:
    """Tokenise single responses with a label, for KTO.

    ``kl`` is the prompt with the response of the next row that has another prompt.

    Args:
        rows, tokenizer, max_length, truncate: as `ift.data.encode`; ``desirable`` of each row is
            set.

    Raises:
        DataError: as `ift.data.encode`.
    """
    examples: dict[int, dict[str, Any]] = {}
    truncated = {}
    for index, whole in enumerate(encode_whole(rows, tokenizer)):
        cut = None if whole is None else shortened(whole, tokenizer, max_length, truncate)
        if cut is not None:
            examples[index] = {"response": cut, "desirable": bool(rows[index].desirable)}
        too_long = whole is not None and len(whole["input_ids"]) > max_length
        if too_long and (cut is not None or truncate == "drop"):
            truncated[index] = rows[index].where
    kept = {index: rows[index] for index in examples}
    _add_mismatched(examples, kept, tokenizer, max_length, truncate)
    return _encoded(rows, examples, truncated, max_length, truncate, "row", "a token left")


def _encoded(
    rows: Sequence[PairRow | Row],
    examples: dict[int, dict[str, Any]],
    truncated: dict[int, str],
    max_length: int,
    truncate: str,
    kind: str,
    left: str,
) -> EncodedPairs:
    if not examples:
        raise DataError(
            f"no {kind} of {len(rows)} has {left} after cutting at "
            f"{max_length} tokens; expected a maximum length above that of the "
            f"{LIMITED_BY[truncate]}"
        )
    dropped = [
        row.where
        for index, row in enumerate(rows)
        if index not in examples and index not in truncated
    ]
    cut = list(truncated.values())
    return EncodedPairs(list(examples.values()), list(examples), dropped, cut)


def _shortened_pair(
    chosen: Example, rejected: Example, tokenizer: Any, max_length: int, truncate: str
) -> tuple[Example, Example] | None:
    """Both sides with at most `max_length` tokens and the same prompt; None for a dropped pair."""
    excess = max(len(side["input_ids"]) for side in (chosen, rejected)) - max_length
    if truncate == "start" and excess > 0:
        start = int((chosen["labels"] != IGNORE_INDEX).argmax())  # that of `rejected` too
        if excess > start - max(1, start_length(chosen, tokenizer)):
            return None
        return without_start(chosen, tokenizer, excess), without_start(rejected, tokenizer, excess)
    cut = [shortened(side, tokenizer, max_length, truncate) for side in (chosen, rejected)]
    return None if cut[0] is None or cut[1] is None else (cut[0], cut[1])


def _add_mismatched(
    examples: dict[int, dict[str, Any]],
    rows: dict[int, Row],
    tokenizer: Any,
    max_length: int,
    truncate: str,
) -> None:
    """Add ``kl``: each prompt with the next response to another prompt; drop those without."""
    following = _next_of_other_prompt(rows)
    mismatches = [_mismatch(rows[index], rows[following[index]]) for index in examples]
    encoded = encode_whole(mismatches, tokenizer)
    for index, kl in zip(list(examples), encoded, strict=True):
        # That a mismatched row is too long is no reason to leave its example out.
        excess = 0 if kl is None else len(kl["input_ids"]) - max_length
        if kl is not None and truncate == "start" and excess > 0:
            kl = without_start(kl, tokenizer, excess)
        elif kl is not None:
            kl = shortened(kl, tokenizer, max_length, "end")
        if kl is None:
            del examples[index]
        else:
            examples[index]["kl"] = kl


def _next_of_other_prompt(rows: dict[int, Row]) -> dict[int, int]:
    """Index → that of the next row, in a circle, with another prompt; of the next if none has."""
    indices = list(rows)
    prompts = [_prompt_of(row) for row in rows.values()]
    if len(set(prompts)) == 1:
        logger.warning(
            "all rows (%d) have one prompt: expected several for KTO, whose reference point is "
            "from responses to other prompts", len(rows),
        )  # fmt: skip
    count, found = len(indices), {}
    other: int | None = None
    for place in range(2 * count - 1, -1, -1):
        after = (place + 1) % count
        if prompts[after] != prompts[place % count]:
            other = after
        found[indices[place % count]] = indices[after if other is None else other]
    return found


def _prompt_of(row: Row) -> str:
    if row.messages is None:
        return str(row.content["prompt"])
    return json.dumps(row.messages[: row.context], default=str)


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


def _mismatch(row: Row, other: Row) -> Row:
    """The prompt of `row` with the response of `other`."""
    mine, theirs = row.content, other.content
    messages = theirs.get("messages")
    if "messages" in mine:
        answer = (
            messages[-1] if messages else {"role": "assistant", "content": theirs["completion"]}
        )
        before = mine["messages"][:-1]
        return Row(row.where, {**mine, "messages": [*before, answer]}, context=len(before))
    text = messages[-1]["content"] if messages else theirs["completion"]
    return Row(row.where, {"prompt": mine["prompt"], "completion": text})


@dataclass(frozen=True)
class PairCollator:
    """Chosen rows, then rejected ones, padded alike, or single responses and ``desirable``;
    reference sums (rows,) if examples have them, and the mismatched rows of KTO."""

    collate: Any  # of single examples: `ift.data.Collator`

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        single = "response" in examples[0]
        sides = ("response",) if single else ("chosen", "rejected")
        batch: dict[str, Any] = self.collate([e[side] for side in sides for e in examples])
        if single:
            batch["desirable"] = torch.tensor([e["desirable"] for e in examples])
        if "reference" in examples[0]:
            sums = [e["reference"][i] for i in range(len(sides)) for e in examples]
            batch["reference"] = torch.tensor(sums, dtype=torch.float32)
        if "kl" in examples[0]:
            batch |= {f"kl_{k}": v for k, v in self.collate([e["kl"] for e in examples]).items()}
            kl = [e["reference"][len(sides)] for e in examples]
            batch["kl_reference"] = torch.tensor(kl, dtype=torch.float32)
        return batch
