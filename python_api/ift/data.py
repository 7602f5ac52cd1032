"""Training text: rows (`ift.data_rows`) → token ids and labels → padded batches.

Labels are the ids themselves on the completion (the assistant's turns)
and ``-100`` on the prompt, so the loss sees the completion only.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ift.chat_template import render, render_row
from ift.data_rows import DataError, Row
from ift.token_spans import prompt_and_completion_ids, token_ids, token_spans, tokenised

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
TRUNCATE = ("end", "drop", "start")  # what happens to a row that is too long
# What has to be shorter than the maximum length, that a row is kept.
LIMITED_BY = {"end": "prompts", "drop": "rows", "start": "answers"}
Example = dict[str, np.ndarray]  # input_ids, labels: int32 (T,), T varies


@dataclass(frozen=True)
class Encoded:
    """Examples ready for `Collator`, and the places of rows that were dropped or cut."""

    examples: list[dict[str, Any]]
    indices: list[int]  # of the rows that the examples are of
    dropped: list[str]  # "train.jsonl line 3", …; without a target
    truncated: list[str] = field(default_factory=list)  # too long: cut, or left out (`drop`)

    @property
    def target_tokens(self) -> int:
        """How many tokens the loss sees in one epoch."""
        return sum(int((e["labels"][1:] != IGNORE_INDEX).sum()) for e in self.sides())

    def sides(self) -> Iterator[Example]:
        """Every sequence."""
        return iter(self.examples)


# ---- reading -------------------------------------------------------------------------------------


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Set a random `fraction` of the rows aside: (train, held out), each in file order.

    At least one row is held out when `fraction` > 0, and at least one is left to train on.

    Raises:
        DataError: there are fewer than two rows to split.
    """
    if fraction == 0:
        return list(rows), []
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row to split; expected at least 2")
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    held_out = [row for index, row in enumerate(rows) if index in chosen]
    return [row for index, row in enumerate(rows) if index not in chosen], held_out


# ---- tokenising ----------------------------------------------------------------------------------


def encode(rows: Iterable[Row], tokenizer: Any, max_length: int, truncate: str = "end") -> Encoded:
    """Tokenise rows with their prompt masked, cut to `max_length` tokens.

    ``messages`` become the ids of ``tokenizer.apply_chat_template``, or of `SIMPLE_CHAT_TEMPLATE`
    for a tokenizer without a template. The targets are the tokens of what the template adds after
    each generation prompt or, where it has such marks, of its ``{% generation %}`` blocks. A token
    across the start of an answer is a target, one across its end is not; a warning counts the
    rows that have any, since at inference the prompt ends before it.

    A ``prompt``/``completion`` row is the tokenizer's start token (if it uses one), the ids of the
    prompt as at inference, those of the completion that continue it, and the end token. No token
    lies across the border. Plain text is a completion of nothing; a start or end token that it
    spells itself is not doubled.

    A row that has no completion token within `max_length` is dropped and is in
    ``Encoded.dropped``.

    Args:
        rows: from `ift.data_rows.read_rows`.
        tokenizer: a transformers tokenizer.
        max_length: longest example in tokens.
        truncate: of a longer row "end" cuts off its end (default) and "start" its start, after the
            start token, so that the end of the prompt stays, and answers stay whole: one that the
            cut reaches is no target (a text without a prompt is cut); "drop" leaves it out.

    Raises:
        DataError: the chat template refuses a conversation, no tokens of a completion decode to it
            after its prompt, or no row has a completion token left.
    """
    rows = list(rows)
    examples, indices, dropped, truncated = [], [], [], []
    for index, (row, whole) in enumerate(zip(rows, encode_whole(rows, tokenizer), strict=True)):
        cut = None if whole is None else shortened(whole, tokenizer, max_length, truncate)
        too_long = whole is not None and len(whole["input_ids"]) > max_length
        if cut is not None:
            examples.append(cut)
            indices.append(index)
        if too_long and (cut is not None or truncate == "drop"):
            truncated.append(row.where)
        elif cut is None:
            dropped.append(row.where)
    if not examples:
        raise DataError(
            f"no completion tokens left in any of {len(rows)} rows after cutting at {max_length} "
            f"tokens (first: {rows[0].where}); expected a maximum length above that of the "
            f"{LIMITED_BY[truncate]}"
            if rows
            else "no rows to encode; expected at least one"
        )
    return Encoded(examples, indices, dropped, truncated)


def encode_whole(rows: Sequence[Row], tokenizer: Any) -> list[Example | None]:
    """The example of each row as in `encode`, not cut; None for one without a target."""
    encoded: list[Example | None] = [None] * len(rows)
    start, end = _start_ids(tokenizer), _end_ids(tokenizer)
    plain = [index for index, row in enumerate(rows) if row.messages is None]
    prompts, completions = (
        [rows[index].content[key] for index in plain] for key in ("prompt", "completion")
    )
    parts = prompt_and_completion_ids(prompts, completions, tokenizer)
    for index, text, part in zip(plain, prompts, parts, strict=True):
        if part is None:
            raise DataError(
                f"{rows[index].where}: no tokens of 'completion' decode to it behind the prompt; "
                f"expected a tokenizer that can continue a text, got {type(tokenizer).__name__}"
            )
        prompt, completion = part
        if completion:
            first = [] if not text and completion[: len(start)] == start else start
            last = [] if not text and completion[-len(end) :] == end else end
            ids = [*first, *prompt, *completion, *last]
            encoded[index] = _example(ids, [(len(first) + len(prompt), len(ids))])

    chats = [index for index, row in enumerate(rows) if row.messages is not None]
    rendered = [render_row(rows[index], tokenizer) for index in chats]
    whole = tokenised([each.text for each in rendered], tokenizer)
    inexact = []
    for index, each, (ids, offsets) in zip(chats, rendered, whole, strict=True):
        spans, exact = token_spans(each.text, ids, offsets, each.targets, tokenizer)
        if not exact:
            inexact.append(rows[index].where)
        if not tokenizer.chat_template:
            ids = [*start, *ids]
            spans = [(first + len(start), stop + len(start)) for first, stop in spans]
        encoded[index] = _example(ids, spans)
    if inexact:
        logger.warning(
            "%d of %d conversations (first: %s): a token lies across the border of an answer, so "
            "the prompt has other tokens at inference; a chat template whose generation prompt "
            "ends where a token ends avoids it",
            len(inexact), len(chats), inexact[0],
        )  # fmt: skip
    unseen = [rows[i].where for i, each in zip(chats, rendered, strict=True) if each.tools_missing]
    if unseen:
        logger.warning(
            "%d of %d conversations (first: %s) have tools that the chat template does not render",
            len(unseen), len(chats), unseen[0],
        )  # fmt: skip
    return encoded


def prompt_ids(prompt: str | list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """The ids that a model gets at inference to answer `prompt`: `encode` puts them before the
    answer.

    Raises:
        DataError: the chat template refuses the messages.
    """
    text = prompt if isinstance(prompt, str) else render(prompt, tokenizer, "prompt", prompt=True)
    (ids,) = token_ids([text], tokenizer)
    plain = isinstance(prompt, str) or not tokenizer.chat_template
    return [*_start_ids(tokenizer), *ids] if plain else ids


def _example(ids: list[int], spans: list[tuple[int, int]]) -> Example | None:
    """Ids and labels, int32 (T,); None without a target."""
    input_ids = np.asarray(ids, dtype=np.int32)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for first, stop in spans:
        labels[first:stop] = input_ids[first:stop]
    return _with_target({"input_ids": input_ids, "labels": labels})


def _with_target(example: Example) -> Example | None:
    # Position 0 is predicted from nothing: a label there is no target.
    return None if (example["labels"][1:] == IGNORE_INDEX).all() else example


def shortened(example: Example, tokenizer: Any, max_length: int, truncate: str) -> Example | None:
    """The example with at most `max_length` tokens; None if it is left out or has no target."""
    excess = len(example["input_ids"]) - max_length
    if excess <= 0:
        return _with_target(example)
    if truncate == "drop":
        return None
    if truncate == "start":
        return _with_target(_without_cut_answer(example, tokenizer, excess))
    return _with_target({name: part[:max_length] for name, part in example.items()})


def without_start(example: Example, tokenizer: Any, count: int) -> Example:
    """The example without `count` tokens at its start, behind the start token."""
    first = start_length(example, tokenizer)
    return {
        name: np.concatenate([part[:first], part[first + count :]])
        for name, part in example.items()
    }


def _without_cut_answer(example: Example, tokenizer: Any, count: int) -> Example:
    """`without_start`; an answer whose start is cut off has no targets any more."""
    cut = without_start(example, tokenizer, count)
    first = start_length(example, tokenizer)
    target = example["labels"] != IGNORE_INDEX
    if target[first]:  # a text without a prompt
        return cut
    labels = cut["labels"].copy()
    # The first token of a sequence is predicted from nothing: an answer that starts there is cut.
    if first == 0 or target[first + count - 1]:
        left = target[first + count :]
        labels[first : first + int(np.append(left, False).argmin())] = IGNORE_INDEX
    return {**cut, "labels": labels}


def start_length(example: Example, tokenizer: Any) -> int:
    """1 if the example starts with the start token, which the first tokens attend to, else 0."""
    return int(example["input_ids"][0] == tokenizer.bos_token_id)


def _start_ids(tokenizer: Any) -> list[int]:
    """[bos] when the tokenizer puts it in front of text by itself, else []."""
    first = tokenizer("x")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _end_ids(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


# ---- batching ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collator:
    """Pad examples on the right to the longest: input_ids, attention_mask, labels, int64 (B, T)."""

    pad_id: int  # any valid id: padding is masked out of attention and of the loss

    def __call__(self, examples: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        import torch  # reading and checking files needs none of it

        shape = len(examples), max(len(e["input_ids"]) for e in examples)
        ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = torch.from_numpy(example["input_ids"])
            labels[row, :length] = torch.from_numpy(example["labels"])
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
