"""Rows of a JSONL file of training text, read and checked.

A row is ``{"prompt": str, "completion": str}`` or ``{"messages": [{"role": str, "content": str},
…]}``. A preference has two responses, ``"chosen"`` and ``"rejected"``, and a prompt, ``"prompt"``
(text, or a list of messages) or ``"messages"``. Responses are text, a message, or a list of
messages. Without a prompt both are whole conversations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = '{"prompt": "…", "completion": "…"} or {"messages": [{"role": "…", "content": "…"}, …]}'
PAIR_FORMATS = (
    '{"prompt": "…", "chosen": "…", "rejected": "…"}, the same with lists of messages, or '
    '{"messages": […], "chosen": "…", "rejected": "…"}'
)


class DataError(ValueError):
    """A file or row that cannot be used; the message has file, line and what to expect."""


@dataclass(frozen=True)
class Row:
    """One valid JSONL row, and its file and line."""

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


def read_jsonl(path: str | Path) -> list[Row]:
    """Read and check a JSONL file.  Blank lines are skipped.

    Raises:
        DataError: the file is missing, unreadable or empty, or a row is malformed.
    """
    return [Row(where, checked_row(row, where)) for row, where in parsed_lines(Path(path), FORMATS)]


def parsed_lines(path: Path, formats: str) -> list[tuple[Any, str]]:
    """The JSON value of each line that is not blank, with its file and line."""
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
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise DataError(f"{where}: an integer has too many digits; expected {formats}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply; expected {formats}") from None


def checked_row(row: Any, where: str) -> dict[str, Any]:
    """`row`, a valid one; of a preference the chosen response as a row."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: got a JSON {json_type(row)}; expected {FORMATS}")
    if "chosen" in row:  # of a preference, what is learned is the chosen response
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
    return [pair_row(row, where) for row, where in parsed_lines(Path(path), PAIR_FORMATS)]


def pair_row(row: Any, where: str) -> PairRow:
    """The pair of a parsed line, checked."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: got a JSON {json_type(row)}; expected {PAIR_FORMATS}")
    for key in ("chosen", "rejected"):
        if key not in row:
            keys = ", ".join(map(repr, row)) or "no keys"
            raise DataError(f"{where}: got {keys}; expected {PAIR_FORMATS}")
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
            f"{'missing' if prompt is None else f'a {json_type(prompt)}'}; expected {PAIR_FORMATS}"
        )
    messages = [*before, *response]
    check_messages(messages, where)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: {key!r} ends with the role {messages[-1]['role']!r}; expected 'assistant'"
        )
    return {"messages": messages}
