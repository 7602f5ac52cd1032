"""The rows of ``ift score``: read, and tokenised answer by answer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from ift.cli.errors import CliError
from ift.cli.processes import note
from ift.cli.rows import note_unread, tokenise
from ift.data import IGNORE_INDEX, Example
from ift.data_columns import CHOICE_KEYS, REQUIRED, column_names, mapped_records
from ift.data_files import DataError, json_type
from ift.data_rows import FORMATS, Row, pair_row, training_row

CHOICES = '{"prompt", "choices", "answer"}'


@dataclass(frozen=True)
class Record:
    """A row of the file: what answers it has, and which is right."""

    where: str
    answers: list[Row]
    label: int | None = None  # of several answers
    equal_pair: bool = False  # chosen and rejected response are the same


def read_records(arguments: argparse.Namespace) -> list[Record]:
    """The rows of the file with their answers; for a teacher one answer each, as `ift train` reads.

    Raises:
        DataError: a malformed row.
    """
    formats = FORMATS if arguments.topk is not None else f"{FORMATS}, or {CHOICES}"
    names = column_names(arguments.columns, CHOICE_KEYS)
    unread = [key for key in CHOICE_KEYS if key in names and arguments.topk is not None]
    if unread:
        raise CliError("--columns", f"got {unread[0]!r} with --topk; expected keys of rows with "
                       "one answer")  # fmt: skip
    found = mapped_records(arguments.data, formats, names, arguments.system)
    if arguments.topk is None:
        records = [record_of(*each) for each in found]
        note_unread("FILE", [record.answers[0] for record in records])
        same = [record for record in records if record.equal_pair]
        if same:
            note(f"FILE: {len(same)} of {len(records)} rows have the same chosen and rejected "
                 f"response, neither of which is right (first: {same[0].where})")  # fmt: skip
        return records
    rows = [training_row(*each) for each in found]
    note_unread("FILE", rows)
    bad = [row for row in rows if row.desirable is False]
    if bad:
        note(f"FILE: {len(bad)} of {len(rows)} rows have a false label and are left out "
             f"(first: {bad[0].where})")  # fmt: skip
    kept = [Record(row.where, [row]) for row in rows if row.desirable is not False]
    if not kept:
        raise DataError("every row has a false label; expected one with true")
    return kept


def record_of(row: Any, where: str) -> Record:
    """A row with choices, a preference (the chosen response is right), or one answer."""
    if isinstance(row, dict) and row.get("choices") is not None:
        return _choices(row, where)
    if isinstance(row, dict) and row.get("chosen") is not None and row.get("rejected") is not None:
        pair = pair_row(row, where)
        chosen = replace(pair.chosen, unread=pair.unread)
        same = pair.chosen.content == pair.rejected.content
        return Record(where, [chosen, pair.rejected], None if same else 0, same)
    return Record(where, [training_row(row, where)])


def _choices(row: dict[str, Any], where: str) -> Record:
    rest = {key: value for key, value in row.items() if key not in ("choices", "answer")}
    choices, answer = row["choices"], row.get("answer")
    others = {key for keys in REQUIRED for key in keys} - {"prompt"} | {"chosen", "rejected"}
    others |= {"label"} if answer is None else set()
    for key in rest:  # the row would be read as one of another format, without its choices
        if key in others and rest[key] is not None:
            raise DataError(f"{where}: got 'choices' and {key!r}; expected {CHOICES}")
    if rest.get("prompt") is None:
        raise DataError(f"{where}: got 'choices' without 'prompt'; expected {CHOICES}")
    if not isinstance(choices, list) or len(choices) < 2:
        got = f"a {json_type(choices)}" if not isinstance(choices, list) else f"{len(choices)}"
        raise DataError(f"{where}: 'choices' is {got}; expected an array of at least 2 answers")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if answer is not None and not (whole and 0 <= answer < len(choices)):
        raise DataError(
            f"{where}: 'answer' is {answer!r}; expected the text of a choice, or its place, from 0 "
            f"to {len(choices) - 1}"
        )
    if answer is not None and choices.count(choices[answer]) > 1:
        raise DataError(f"{where}: 'answer' is a choice that is there twice; expected it once")
    rows = []
    for number, choice in enumerate(choices):
        try:
            rows.append(training_row({**rest, "completion": choice}, where))
        except DataError as error:
            problem = str(error).replace("'completion'", f"choices[{number}]")
            raise DataError(problem) from None
    return Record(where, rows, answer)


def examples_of(
    records: list[Record], rows: list[Row], tokenizer: Any, arguments: argparse.Namespace
) -> list[list[Example]]:
    """The examples of each record, none for a row that was left out."""
    encoded = tokenise(rows, tokenizer, arguments, "FILE", False)
    several = {record.where for record in records if len(record.answers) > 1}
    for where in (*encoded.truncated, *encoded.dropped):
        if where in several:
            raise CliError(
                "--max-length",
                f"got {arguments.max_length}, less than an answer of {where}, or it has no token "
                "behind the first of its row; expected whole answers where there are several",
            )
    by_row = dict(zip(encoded.indices, encoded.examples, strict=True))
    found: list[list[Example]] = []
    first = 0
    for record in records:
        places = range(first, first + len(record.answers))
        found.append([by_row[place] for place in places if place in by_row])
        unseen = any(example["labels"][0] != IGNORE_INDEX for example in found[-1])
        if unseen and len(found[-1]) > 1:  # the answers would be compared without it
            raise CliError(
                "FILE",
                f"{record.where}: the first token of an answer is predicted from nothing; expected "
                "a prompt, or a tokenizer with a start token, where there are several answers",
            )
        first = places.stop
    return found
