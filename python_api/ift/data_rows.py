"""Rows of training text, read and checked, in the formats that people have them in.

==========================================  ====================================================
``prompt``, ``completion``                  text, or messages
``messages``                                a conversation
``conversations``                           a conversation as ShareGPT has it
``instruction``, ``input``, ``output``      Alpaca; with ``system`` and ``history``
``text``                                    plain text, learned as a whole
``prompt``, ``chosen``, ``rejected``        a preference; the prompt may be any of the above
``prompt``, ``completion``, ``label``       a response that is good (true) or bad (false)
==========================================  ====================================================

Conversations take ``system``, ``tools`` and ``chat_template_kwargs`` beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ift.data_columns import ALPACA, BESIDE, REQUIRED, Columns, mapped_records
from ift.data_files import DataError as DataError
from ift.data_files import json_type
from ift.data_messages import (
    check_encodable,
    check_messages,
    checked_tools,
    conversation,
)

FORMATS = (
    '{"prompt", "completion"}, {"messages"}, {"conversations"}, {"instruction", "output"} or '
    '{"text"}'
)
PAIR_FORMATS = (
    '{"prompt", "chosen", "rejected"}, text or messages, or {"chosen", "rejected"} as whole '
    "conversations"
)
UNPAIRED_FORMATS = '{"prompt", "completion", "label"} with true or false'
LABELS: dict[Any, bool] = {  # true and false are equal to 1 and 0
    0: False, 1: True, "0": False, "1": True, "false": False, "true": True,
}  # fmt: skip
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


@dataclass(frozen=True)
class Row:
    """One valid row, and its place."""

    where: str  # "train.jsonl line 3"
    content: dict[str, Any]  # prompt and completion; or messages, tools, chat_template_kwargs
    context: int = 0  # so many messages at the start have no target
    desirable: bool | None = None  # of a response with a label
    unread: tuple[str, ...] = ()  # keys that nothing reads

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The conversation, or None for a prompt/completion row."""
        return self.content.get("messages")

    @property
    def template_options(self) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        tools = {"tools": self.content["tools"]} if "tools" in self.content else {}
        return {**tools, **self.content.get("chat_template_kwargs", {})}

    @property
    def texts(self) -> list[str]:
        """Every piece of text of the row (what a tokenizer is trained on)."""
        if self.messages is not None:
            return [message["content"] for message in self.messages]
        return [self.content["prompt"], self.content["completion"]]


@dataclass(frozen=True)
class PairRow:
    """One preference: two rows that share their prompt."""

    where: str
    chosen: Row
    rejected: Row
    unread: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """Every piece of text (what a tokenizer is trained on)."""
        return [*self.chosen.texts, *self.rejected.texts]

    @property
    def messages(self) -> Any:
        """The chosen conversation, or None for plain text."""
        return self.chosen.messages


# ---- files ---------------------------------------------------------------------------------------


def read_rows(
    path: str | Path, columns: Columns | None = None, system: str | None = None
) -> list[Row]:
    """Read and check training rows; of a preference the chosen response.

    Args:
        path: as `ift.data_files.read_records`.
        columns: key of a row → name of the column that holds it, where they differ. If these are
            all keys of a format, the keys of the others are not read.
        system: a system message for conversations that have none.

    Raises:
        DataError: the file is missing, unreadable or empty, or a row is malformed.
    """
    return [training_row(*each) for each in mapped_records(path, FORMATS, columns, system)]


def read_preferences(
    path: str | Path, columns: Columns | None = None, system: str | None = None
) -> list[PairRow]:
    """Read and check preferences; the arguments and errors are those of `read_rows`."""
    return [pair_row(*each) for each in mapped_records(path, PAIR_FORMATS, columns, system)]


def read_responses(
    path: str | Path, columns: Columns | None = None, system: str | None = None
) -> list[PairRow] | list[Row]:
    """Preferences, or single responses with a label; the first row decides."""
    records = mapped_records(path, f"{PAIR_FORMATS}; or {UNPAIRED_FORMATS}", columns, system)
    first, _ = records[0]
    if isinstance(first, dict) and first.get("chosen") is None:
        return [unpaired_row(*each) for each in records]
    singles = f", in every row, or {UNPAIRED_FORMATS} in every row"
    return [pair_row(*each, hint=singles) for each in records]


def unread_keys(
    rows: Iterable[Row | PairRow], read: Collection[str] = ()
) -> dict[str, tuple[int, str]]:
    """Keys that nothing reads: in how many rows they are, and the first of these.

    Args:
        rows: as read here.
        read: keys that are read elsewhere.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for row in rows:
        for key in (key for key in row.unread if key not in read):
            counts[key] += 1
            first.setdefault(key, row.where)
    return {key: (count, first[key]) for key, count in counts.items()}


# ---- rows ----------------------------------------------------------------------------------------


def training_row(record: Any, where: str) -> Row:
    """The row of a parsed line, checked; of a preference the chosen response."""
    record = _checked_record(record, where, FORMATS)
    if record.get("chosen") is not None:
        pair = pair_row(record, where)
        return Row(where, pair.chosen.content, unread=pair.unread)
    keys = _format_of(record, where)
    if keys == ("prompt", "completion"):
        return _completion(record, where)
    if keys == ("text",):
        if not isinstance(record["text"], str) or not record["text"]:
            got = f"a {json_type(record['text'])}" if record["text"] != "" else "empty"
            raise DataError(f"{where}: 'text' is {got}; expected some text")
        check_encodable(record["text"], where, "text")
        _refuse_system(record, where)
        return _row(record, where, {"prompt": "", "completion": record["text"]}, keys)
    if keys == ("messages",):
        messages = check_messages(record["messages"], where)
    elif keys == ("conversations",):
        messages = check_messages(
            conversation(record["conversations"], where, "conversations"), where
        )
    else:
        answer = record["output"]
        if not isinstance(answer, str) or not answer:
            got = "empty" if answer == "" else f"a {json_type(answer)}"
            raise DataError(f"{where}: 'output' is {got}; expected some text to learn")
        messages = [*_alpaca_prompt(record, where), {"role": "assistant", "content": answer}]
        messages = check_messages(messages, where)
        keys = (*keys, *ALPACA)
    return _row(record, where, {"messages": messages}, keys)


def pair_row(record: Any, where: str, hint: str = "; --loss kto takes single responses") -> PairRow:
    """The pair of a parsed line, checked; `hint` ends the message on a row with a label instead."""
    record = _checked_record(record, where, PAIR_FORMATS)
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            hint = hint if "label" in record else ""
            raise DataError(f"{where}: got {_names(record)}; expected {PAIR_FORMATS}{hint}")
    prompt, keys = _prompt(record, where)
    chosen, rejected = (_response(record, prompt, key, where) for key in ("chosen", "rejected"))
    unread = _unread(record, (*keys, "chosen", "rejected"), chosen.messages is not None)
    return PairRow(where, chosen, rejected, unread)


def unpaired_row(record: Any, where: str) -> Row:
    """The response of a parsed line and whether it is desirable, checked."""
    record = _checked_record(record, where, UNPAIRED_FORMATS)
    if any(record.get(key) is None for key in ("prompt", "completion", "label")):
        expected = f"{UNPAIRED_FORMATS}, in every row, or {PAIR_FORMATS}"
        raise DataError(f"{where}: got {_names(record)}; expected {expected}")
    desirable = _label(record)
    if desirable is None:
        raise DataError(f"{where}: 'label' is {record['label']!r}; expected true or false")
    prompt, keys = _prompt(record, where)
    row = _response(record, prompt, "completion", where)
    used = (*keys, "completion", "label")
    unread = _unread(record, used, row.messages is not None)
    return replace(row, desirable=desirable, unread=unread)


def _completion(record: dict[str, Any], where: str) -> Row:
    """A prompt and its completion, as text or as messages; a label that `_label` reads is kept."""
    values = [record[key] for key in ("prompt", "completion")]
    desirable = _label(record)
    keys = ("prompt", "completion", *(["label"] if desirable is not None else []))
    if any(isinstance(value, list | dict) for value in values):
        prompt, _ = _prompt(record, where)
        row = _response(record, prompt, "completion", where, every_turn=True)
        return replace(row, desirable=desirable, unread=_unread(record, keys, True))
    for key, value in zip(keys, values, strict=False):
        if not isinstance(value, str):
            raise DataError(f"{where}: {key!r} is a {json_type(value)}; expected a string")
        check_encodable(value, where, key)
    if not record["completion"]:
        raise DataError(f"{where}: 'completion' is empty; expected some text to learn")
    _refuse_system(record, where)
    content = {"prompt": record["prompt"], "completion": record["completion"]}
    return replace(_row(record, where, content, keys), desirable=desirable)


def _response(
    record: dict[str, Any], prompt: Any, key: str, where: str, *, every_turn: bool = False
) -> Row:
    """The row of a prompt and a response, of which the last turn is learned, or every one."""
    response = record[key]
    if isinstance(response, dict):
        response = [response]
    if response == "":
        raise DataError(f"{where}: {key!r} is empty; expected some text")
    if isinstance(prompt, str) and isinstance(response, str):
        for name, text in (("prompt", prompt), (key, response)):
            check_encodable(text, where, name)
        _refuse_system(record, where)
        return Row(where, {"prompt": prompt, "completion": response})
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
    after = conversation(response, where, key)
    # A whole conversation may come beside its prompt.
    skipped = int(after[0]["role"] == "system" and before[:1] != after[:1])
    answer = skipped + len(before)
    repeats = bool(before) and len(after) > answer and after[skipped:answer] == before
    messages = check_messages(after if repeats else [*before, *after], where)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: {key!r} ends with the role {messages[-1]['role']!r}; expected 'assistant'"
        )
    if before and not repeats and after[0]["role"] in ("user", "system"):
        raise DataError(
            f"{where}: {key!r} starts with the role {after[0]['role']!r} and not with the prompt; "
            "expected an answer to the prompt, or the whole conversation"
        )
    content = _conversation_content(record, messages, where)
    turns = content["messages"]
    learned = len(after) - (answer if repeats else 0)
    return Row(where, content, context=len(turns) - (learned if every_turn else 1))


def _prompt(record: dict[str, Any], where: str) -> tuple[Any, tuple[str, ...]]:
    """The prompt, text or messages or None, and the keys that hold it."""
    for key in ("prompt", "messages", "conversations"):
        value = record.get(key)
        if value is not None:
            value = [value] if isinstance(value, dict) else value
            if isinstance(value, list):
                value = conversation(value, where, key)
            return value, (key,)
    if record.get("instruction") is not None:
        return _alpaca_prompt(record, where), ALPACA
    return None, ()


def _alpaca_prompt(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Earlier turns, and the instruction with its input below it."""
    messages = []
    history = record.get("history")
    for index, turn in enumerate(history if history is not None else []):
        if not (isinstance(turn, list | tuple) and len(turn) == 2):
            raise DataError(f"{where}: history[{index}] is no pair; expected [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": text})
    parts = []
    for key in ("instruction", "input"):
        text = record.get(key)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: {key!r} is a {json_type(text)}; expected a string")
        parts += [text] if text else []
    if not parts:
        raise DataError(f"{where}: 'instruction' is empty; expected some text")
    return [*messages, {"role": "user", "content": "\n".join(parts)}]


def _format_of(record: dict[str, Any], where: str) -> tuple[str, ...]:
    """The keys of the row's format, the only one whose keys all have a value."""
    found = [keys for keys in REQUIRED if all(record.get(key) is not None for key in keys)]
    found = found or [keys for keys in REQUIRED if all(key in record for key in keys)]
    if len(found) > 1:
        names = " and ".join(repr(keys[0]) for keys in found)
        raise DataError(
            f"{where}: got {names}, each of a format of its own; expected one, or the keys of one "
            f"in --columns ({' '.join(found[0])})"
        )
    if not found:
        raise DataError(f"{where}: got {_names(record)}; expected {FORMATS}")
    return found[0]


def _row(record: dict[str, Any], where: str, content: dict[str, Any], keys: Sequence[str]) -> Row:
    chat = "messages" in content
    if chat:
        content = _conversation_content(record, content["messages"], where)
    return Row(where, content, unread=_unread(record, keys, chat))


def _conversation_content(
    record: dict[str, Any], messages: list[dict[str, Any]], where: str
) -> dict[str, Any]:
    """Messages, and what the row has for them beside."""
    content: dict[str, Any] = {"messages": _with_system(messages, record.get("system"), where)}
    if tools := record.get("tools"):
        content["tools"] = checked_tools(tools, where)
        if not content["tools"]:
            del content["tools"]
    options = record.get("chat_template_kwargs")
    if options:
        if not isinstance(options, dict):
            got = json_type(options)
            raise DataError(f"{where}: 'chat_template_kwargs' is a {got}; expected an object")
        content["chat_template_kwargs"] = options
    return content


def _with_system(messages: list[dict[str, Any]], system: Any, where: str) -> list[dict[str, Any]]:
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise DataError(f"{where}: 'system' is a {json_type(system)}; expected a string")
    check_encodable(system, where, "system")
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise DataError(
            f"{where}: 'system' is not the text of the conversation's system message; expected one "
            "of the two"
        )
    return messages


def _refuse_system(record: dict[str, Any], where: str) -> None:
    if record.get("system"):
        raise DataError(
            f"{where}: a system prompt ('system', --system) with a row of plain text; expected "
            "messages, which a chat template puts it before"
        )


def _checked_record(record: Any, where: str, formats: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: got a JSON {json_type(record)}; expected {formats}")
    for key in MEDIA:
        if record.get(key):
            raise DataError(f"{where}: {key!r} is not text; expected rows of text alone")
    return record


def _unread(record: dict[str, Any], keys: Sequence[str], chat: bool) -> tuple[str, ...]:
    known = {*keys, *(BESIDE if chat else ())}
    return tuple(k for k, v in record.items() if k not in known and v not in (None, "", []))


def _label(record: dict[str, Any]) -> bool | None:
    """Whether the row's response is desirable; None without a label that is in `LABELS`."""
    label = record.get("label")
    label = label.lower() if isinstance(label, str) else label
    return LABELS.get(label) if isinstance(label, int | float | str) else None


def _names(record: dict[str, Any]) -> str:
    shown = [f"{key!r}{' (null)' if value is None else ''}" for key, value in record.items()]
    return ", ".join(shown) or "no keys"
