"""Training text: JSONL rows → token ids and labels → padded batches.

A row is ``{"prompt": str, "completion": str}`` or ``{"messages": [{"role": str, "content": str},
…]}``; a file may mix them.  Labels are the ids themselves on the completion (the assistant's turns)
and ``-100`` on the prompt, so the loss sees the completion only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IGNORE_INDEX = -100
FORMATS = '{"prompt": "…", "completion": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}'

# For tokenizers that bring no chat template.  The assistant's turn ends with the end-of-text token,
# so a trained model knows when to stop.
SIMPLE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class DataError(ValueError):
    """A file or row that cannot be used; the message has file, line and what to expect."""


@dataclass(frozen=True)
class Row:
    """One valid JSONL row and where it stands."""

    where: str  # "train.jsonl line 3"
    content: dict[str, Any]
    last_turn: bool = False  # of a conversation only the last assistant turn is a target

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The conversation, or None for a prompt/completion row."""
        return self.content.get("messages")

    @property
    def texts(self) -> list[str]:
        """Every piece of text of the row (what a tokenizer is trained on)."""
        if self.messages is not None:
            return [message["content"] for message in self.messages]
        return [self.content["prompt"], self.content["completion"]]


@dataclass(frozen=True)
class Encoded:
    """Examples ready for `Collator`, and the rows that truncation left without a target."""

    examples: list[dict[str, np.ndarray]]  # input_ids, labels: int32 (T,), T varies
    dropped: list[str]  # "train.jsonl line 3", …

    @property
    def target_tokens(self) -> int:
        """How many tokens the loss sees in one epoch."""
        return sum(int((e["labels"][1:] != IGNORE_INDEX).sum()) for e in self.examples)


# ---- reading -------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[Row]:
    """Read and check a JSONL file.  Blank lines are skipped.

    Raises:
        DataError: the file is missing, unreadable or empty, or a row is malformed.
    """
    return [Row(where, checked_row(row, where)) for row, where in parsed_lines(Path(path), FORMATS)]


def parsed_lines(path: Path, formats: str) -> list[tuple[Any, str]]:
    """The JSON value of each line that is not blank, and where it stands."""
    rows = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    rows.append((_parsed(line, where, number == 1, formats), where))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a readable JSONL file") from None
    if not rows:
        raise DataError(f"{path}: the file has no rows; expected one object per line: {formats}")
    return rows


def _parsed(line: bytes, where: str, first: bool, formats: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); expected {formats}"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply; expected {formats}") from None


def checked_row(row: Any, where: str) -> dict[str, Any]:
    """`row`, a valid one; of a preference the chosen response as a row."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: got a JSON {json_type(row)}; expected {FORMATS}")
    if "chosen" in row:  # of a preference, what is learned is the chosen response
        from ift.preference_data import pair_row

        return pair_row(row, where).chosen.content
    if "messages" in row:
        check_messages(row["messages"], where)
    elif "prompt" in row and "completion" in row:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str):
                raise DataError(f"{where}: {key!r} is a {json_type(row[key])}; expected a string")
            check_encodable(row[key], where, key)
        if not row["completion"]:
            raise DataError(f"{where}: 'completion' is empty; expected some text to learn")
    else:
        keys = ", ".join(map(repr, row)) or "no keys"
        raise DataError(f"{where}: got {keys}; expected {FORMATS}")
    return row


def check_messages(messages: Any, where: str) -> None:
    """Raise unless it is a conversation with an assistant's turn."""
    if not isinstance(messages, list) or not messages:
        got = "an empty array" if messages == [] else f"a {json_type(messages)}"
        raise DataError(f"{where}: 'messages' is {got}; expected a non-empty array of messages")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise DataError(
                    f"{where}: messages[{index}] has no string {key!r}; "
                    'expected {"role": "…", "content": "…"}'
                )
            check_encodable(message[key], where, f"messages[{index}].{key}")
    if not any(m["role"] == "assistant" for m in messages):
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        raise DataError(f"{where}: roles are {roles}; expected at least one 'assistant' message")


def check_encodable(text: str, where: str, key: str) -> None:
    """JSON may spell half of a surrogate pair, which no tokenizer can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key} has a lone surrogate at character {error.start}; expected Unicode text"
        ) from None


def json_type(value: Any) -> str:
    """What JSON calls the type of a parsed value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


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


def encode(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Encoded:
    """Tokenise rows with their prompt masked, cut at `max_length` tokens.

    Prompt and completion are tokenised apart, as they are at inference, so no token straddles the
    boundary.  ``prompt``/``completion`` rows get the tokenizer's start token (if it uses one) and
    end with its end token; ``messages`` go through its chat template, or `SIMPLE_CHAT_TEMPLATE`.
    A row whose completion is wholly cut off is dropped and reported in ``Encoded.dropped``.

    Args:
        rows: from `read_jsonl`.
        tokenizer: a transformers tokenizer.
        max_length: longest example in tokens; what is beyond is cut at the end.

    Raises:
        DataError: the chat template refuses a conversation, or no row has a completion token left.
    """
    rows = list(rows)
    segments = [_segments(row, tokenizer) for row in rows]
    for row, its in zip(rows, segments, strict=True):
        if row.last_turn:
            last = max(index for index, (_, is_target) in enumerate(its) if is_target)
            its[:] = [(text, index == last) for index, (text, _) in enumerate(its)]
    flat = [text for row_segments in segments for text, _ in row_segments]
    ids_of = iter(_batched_ids(flat, tokenizer))
    start, end = _start_ids(tokenizer), _end_ids(tokenizer)
    examples, dropped = [], []
    for row, row_segments in zip(rows, segments, strict=True):
        plain = row.messages is None
        ids = list(start) if plain or not tokenizer.chat_template else []
        labels = [IGNORE_INDEX] * len(ids)
        for _, is_target in row_segments:
            piece = next(ids_of) + (end if plain and is_target else [])
            ids += piece
            labels += piece if is_target else [IGNORE_INDEX] * len(piece)
        labels = labels[:max_length]
        # Position 0 is predicted from nothing: a label there is no target.
        if all(label == IGNORE_INDEX for label in labels[1:]):
            dropped.append(row.where)
            continue
        examples.append(
            {
                "input_ids": np.asarray(ids[:max_length], dtype=np.int32),
                "labels": np.asarray(labels, dtype=np.int32),
            }
        )
    if not examples:
        raise DataError(
            f"no completion tokens left in any of {len(rows)} rows after cutting at {max_length} "
            f"tokens (first: {dropped[0]}); expected a maximum length above that of the prompts"
            if dropped
            else "no rows to encode; expected at least one"
        )
    return Encoded(examples, dropped)


def _segments(row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text in order, as (text, is it a target?)."""
    if row.messages is None:
        return [(row.content["prompt"], False), (row.content["completion"], True)]
    return _chat_segments(row, row.messages, tokenizer)


def _chat_segments(
    row: Row, messages: list[dict[str, str]], tokenizer: Any
) -> list[tuple[str, bool]]:
    """Render a conversation and find the assistant's turns in it.

    A turn is what the template adds to the conversation before it plus the generation prompt.  A
    turn that the template rewrites later (Qwen3 drops the thoughts of earlier turns) is context
    only, for the model never sees it in that form when it answers.
    """
    template = tokenizer.chat_template or SIMPLE_CHAT_TEMPLATE

    def render(upto: int, *, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            messages[:upto], chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return text

    segments, position = [], 0
    try:
        full = render(len(messages))
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index > 0:
                before, turn = render(index, prompt=True), render(index + 1)
                if turn.startswith(before) and full.startswith(turn):
                    segments += [(full[position : len(before)], False), (turn[len(before) :], True)]
                    position = len(turn)
    except Exception as error:  # templates raise whatever they like through jinja
        raise DataError(f"{row.where}: the chat template refuses 'messages': {error}") from None
    if not segments:
        raise DataError(
            f"{row.where}: no assistant turn to learn from; expected one that follows another "
            "message and that the chat template renders unchanged"
        )
    return [*segments, (full[position:], False)]


def _batched_ids(texts: list[str], tokenizer: Any, size: int = 4096) -> Iterator[list[int]]:
    """Token ids of each text, without special tokens; batches, for the tokenizer's own threads."""
    for first in range(0, len(texts), size):
        batch = texts[first : first + size]
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


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
