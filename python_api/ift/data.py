"""Training text: rows (`ift.data_rows`) → token ids and labels → padded batches.

Labels are the ids themselves on the completion (the assistant's turns)
and ``-100`` on the prompt, so the loss sees the completion only.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ift.data_rows import DataError, Row
from ift.token_spans import prompt_and_completion_ids, token_ids, token_spans, tokenised

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100

# For tokenizers that bring no chat template.  The assistant's turn ends with the end-of-text token,
# so a trained model knows when to stop.
SIMPLE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template's marks of what is generated


@dataclass(frozen=True)
class Encoded:
    """Examples ready for `Collator`, and the rows that truncation left without a target."""

    examples: list[dict[str, Any]]  # input_ids, labels: int32 (T,), T varies
    dropped: list[str]  # "train.jsonl line 3", …

    @property
    def target_tokens(self) -> int:
        """How many tokens the loss sees in one epoch."""
        return sum(int((e["labels"][1:] != IGNORE_INDEX).sum()) for e in self.sides())

    def sides(self) -> Iterator[dict[str, np.ndarray]]:
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


def encode(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Encoded:
    """Tokenise rows with their prompt masked, cut at `max_length` tokens.

    ``messages`` become the ids of ``tokenizer.apply_chat_template``, or of `SIMPLE_CHAT_TEMPLATE`
    for a tokenizer without a template. The targets are the tokens of what the template adds after
    each generation prompt or, where it has such marks, of its ``{% generation %}`` blocks. A token
    across the start of an answer is a target, one across its end is not; a warning counts the
    rows that have any, since at inference the prompt ends before it.

    A ``prompt``/``completion`` row is the tokenizer's start token (if it uses one), the ids of the
    prompt as at inference, those of the completion that continue it, and the end token. No token
    lies across the border.

    A row that has no completion token within `max_length` is dropped and is in
    ``Encoded.dropped``.

    Args:
        rows: from `read_jsonl`.
        tokenizer: a transformers tokenizer.
        max_length: longest example in tokens; what is beyond is cut at the end.

    Raises:
        DataError: the chat template refuses a conversation, no tokens of a completion decode to it
            after its prompt, or no row has a completion token left.
    """
    rows = list(rows)
    encoded = encode_each(rows, tokenizer, max_length)
    dropped = [row.where for row, example in zip(rows, encoded, strict=True) if example is None]
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise DataError(
            f"no completion tokens left in any of {len(rows)} rows after cutting at {max_length} "
            f"tokens (first: {dropped[0]}); expected a maximum length above that of the prompts"
            if dropped
            else "no rows to encode; expected at least one"
        )
    return Encoded(examples, dropped)


def encode_each(
    rows: Sequence[Row], tokenizer: Any, max_length: int
) -> list[dict[str, np.ndarray] | None]:
    """The example of each row as in `encode`; None for a row that is dropped."""
    encoded: list[dict[str, np.ndarray] | None] = [None] * len(rows)
    start, end = _start_ids(tokenizer), _end_ids(tokenizer)
    plain = [index for index, row in enumerate(rows) if row.messages is None]
    prompts, completions = (
        [rows[index].content[key] for index in plain] for key in ("prompt", "completion")
    )
    parts = prompt_and_completion_ids(prompts, completions, tokenizer)
    for index, part in zip(plain, parts, strict=True):
        if part is None:
            raise DataError(
                f"{rows[index].where}: no tokens of 'completion' decode to it behind the prompt; "
                f"expected a tokenizer that can continue a text, got {type(tokenizer).__name__}"
            )
        prompt, completion = part
        if completion:
            ids = [*start, *prompt, *completion, *end]
            span = len(start) + len(prompt), len(ids)
            encoded[index] = _example(ids, [span], max_length)

    chats = [index for index, row in enumerate(rows) if row.messages is not None]
    rendered = [_rendered(rows[index], tokenizer) for index in chats]
    whole = tokenised([text for text, _ in rendered], tokenizer)
    inexact = []
    for index, (text, turns), (ids, offsets) in zip(chats, rendered, whole, strict=True):
        spans, exact = token_spans(text, ids, offsets, turns, tokenizer)
        if not exact:
            inexact.append(rows[index].where)
        if not tokenizer.chat_template:
            ids = [*start, *ids]
            spans = [(first + len(start), stop + len(start)) for first, stop in spans]
        encoded[index] = _example(ids, spans, max_length)
    if inexact:
        logger.warning(
            "%d of %d conversations (first: %s): a token lies across the border of an answer, so "
            "the prompt has other tokens at inference; a chat template whose generation prompt "
            "ends where a token ends avoids it",
            len(inexact), len(chats), inexact[0],
        )  # fmt: skip
    return encoded


def prompt_ids(prompt: str | list[dict[str, str]], tokenizer: Any) -> list[int]:
    """The ids that a model gets at inference to answer `prompt`: `encode` puts them before the
    answer.

    Raises:
        DataError: the chat template refuses the messages.
    """
    text = prompt if isinstance(prompt, str) else _render(prompt, tokenizer, "prompt", prompt=True)
    (ids,) = token_ids([text], tokenizer)
    plain = isinstance(prompt, str) or not tokenizer.chat_template
    return [*_start_ids(tokenizer), *ids] if plain else ids


def _example(
    ids: list[int], spans: list[tuple[int, int]], max_length: int
) -> dict[str, np.ndarray] | None:
    """Ids and labels, int32 (T,); None without a target."""
    input_ids = np.asarray(ids[:max_length], dtype=np.int32)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for first, stop in spans:
        labels[first:stop] = input_ids[first:stop]
    # Position 0 is predicted from nothing: a label there is no target.
    if (labels[1:] == IGNORE_INDEX).all():
        return None
    return {"input_ids": input_ids, "labels": labels}


def _rendered(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the characters [start, stop) of its targets."""
    messages = row.messages or []
    text = _render(messages, tokenizer, row.where)
    if tokenizer.chat_template and GENERATION.search(tokenizer.get_chat_template()):
        turns = _marked(messages, tokenizer, row.where)
        if row.last_turn:
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            turns = turns[len(_marked(messages[:last], tokenizer, row.where)) if last else 0 :]
    else:
        turns = _added(messages, text, tokenizer, row.where)
        if row.last_turn:
            turns = turns[-1:]
    if not turns:
        raise DataError(
            f"{row.where}: no assistant turn to learn from; expected one that follows another "
            "message and that the chat template renders unchanged"
        )
    return text, turns


def _marked(messages: list[dict[str, str]], tokenizer: Any, where: str) -> list[tuple[int, int]]:
    """The ``{% generation %}`` blocks of a conversation as the template renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with _template_errors(where):
        _, (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return [(start, stop) for start, stop in spans if start < stop]


def _added(
    messages: list[dict[str, str]], text: str, tokenizer: Any, where: str
) -> list[tuple[int, int]]:
    """What the template adds for each assistant turn after the generation prompt.

    A turn that the template rewrites later (Qwen3 drops the thoughts of earlier turns) is context
    only, for the model never sees it in that form when it answers.
    """
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index > 0:
            before = _render(messages[:index], tokenizer, where, prompt=True)
            turn = _render(messages[: index + 1], tokenizer, where)
            if turn.startswith(before) and text.startswith(turn):
                turns.append((len(before), len(turn)))
    return turns


def _render(
    messages: list[dict[str, str]], tokenizer: Any, where: str, *, prompt: bool = False
) -> str:
    template = None if tokenizer.chat_template else SIMPLE_CHAT_TEMPLATE
    with _template_errors(where):
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    return text


@contextlib.contextmanager
def _template_errors(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # templates raise whatever they like through jinja
        raise DataError(f"{where}: the chat template refuses 'messages': {error}") from None


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
