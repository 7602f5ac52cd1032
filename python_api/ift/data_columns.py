"""Keys of rows, and columns of a file under other names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ift.data_files import DataError, read_records

# The keys that make a row of a format.
REQUIRED = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("text",),
)
BESIDE = ("system", "tools", "chat_template_kwargs")  # of conversations
ALPACA = ("instruction", "input", "history")
KEYS = (
    *(key for keys in REQUIRED for key in keys),
    *("chosen", "rejected", "label", "input", "history", *BESIDE),
)
# What `ift score` reads beside: several answers, of which `answer` is the right one.
CHOICES = ("prompt", "choices")
CHOICE_KEYS = ("choices", "answer")
# What `ift.dynamics` reads beside: rewrites, and the keys of a row that have them, those of the
# paper's released sets among them.
REWRITES = {
    "chosen_semantic": ("chosen_semantic", "chosen_gptsemantic", "chosen_paraphrase",
                        "chosen_paraphrases"),
    "chosen_format": ("chosen_format", "chosen_gptformat"),
    "rejected_semantic": ("rejected_semantic", "rejected_gptsemantic", "reject_gptsemantic",
                          "rejected_paraphrase", "rejected_paraphrases"),
    "rejected_format": ("rejected_format", "rejected_gptformat", "reject_gptformat"),
    "fluent": ("fluent", "irr_hum"),
}  # fmt: skip
Columns = Mapping[str, str]  # key of a row → name of the column that holds it


def column_names(text: str | None, more: tuple[str, ...] = ()) -> dict[str, str]:
    """``key=column,…`` as a mapping; a name alone is both.

    Args:
        more: keys beside those of rows to train on.

    Raises:
        ValueError: no key of rows, or one twice.

    >>> column_names("prompt=question,completion=answer")
    {'prompt': 'question', 'completion': 'answer'}
    """
    found: dict[str, str] = {}
    for part in text.split(",") if text is not None else ():
        key, _, name = (piece.strip() for piece in part.partition("="))
        if key not in (*KEYS, *more):
            known = ", ".join((*KEYS, *more))
            raise ValueError(f"got {part!r}; expected KEY=COLUMN,…, KEY one of {known}")
        if key in found:
            raise ValueError(f"got {key!r} twice; expected one column for each key")
        found[key] = name or key
    return found


def mapped_records(
    path: str | Path, formats: str, columns: Columns | None = None, system: str | None = None
) -> list[tuple[Any, str]]:
    """The rows of a file as parsed, under the keys that `columns` gives them."""
    records = read_records(path, formats)
    objects = [row for row, _ in records if isinstance(row, dict)]
    for key, column in (columns or {}).items():
        if not any(column in row for row in objects):
            names = ", ".join(map(repr, objects[0])) if objects else "no keys"
            raise DataError(f"{path}: no row has {column!r} for {key!r}; the first has {names}")
    return [
        (_mapped(row, columns or {}, system) if isinstance(row, dict) else row, where)
        for row, where in records
    ]


def _mapped(row: dict[str, Any], columns: Columns, system: str | None) -> dict[str, Any]:
    named = {key: row[column] for key, column in columns.items() if column in row}
    left: set[str] = set()
    formats = (*REQUIRED, CHOICES)
    if any(set(keys) <= set(columns) for keys in formats):
        left = {key for keys in formats for key in keys} - set(columns)
    rest = {k: v for k, v in row.items() if k not in columns.values() and k not in left}
    made = {**rest, **named}
    if system is not None and made.get("system") is None and not _has_system(made):
        made["system"] = system
    return made


def _has_system(row: dict[str, Any]) -> bool:
    """Whether a conversation of the row starts with a system message."""
    for key in ("messages", "conversations", "prompt", "chosen"):
        first = row[key][0] if isinstance(row.get(key), list) and row[key] else None
        if isinstance(first, dict) and "system" in (first.get("role"), first.get("from")):
            return True
    return False
