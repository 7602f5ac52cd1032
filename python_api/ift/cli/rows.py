"""The rows of ``ift train``: read, reported and tokenised."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ift import data_rows
from ift.cli.errors import CliError, refusals
from ift.cli.losses import LOSSES
from ift.cli.processes import note
from ift.data import Encoded, encode, split_rows
from ift.data_columns import REWRITES, column_names, mapped_records
from ift.data_files import files_in, is_dataset
from ift.data_rows import FORMATS, PairRow, Row, training_row, unpaired_row
from ift.preference_data import EncodedPairs, encode_pairs, encode_responses

CUT = {"end": "are cut at their end", "start": "are cut at their start", "drop": "are left out"}
SHOWN_FILES = 8  # of a folder

# What a loss of rows learns of preferences.
SIDES = {"chosen": ("chosen",), "rejected": ("rejected",), "both": ("chosen", "rejected")}


def read_rows(arguments: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Training and evaluation rows; pairs or single responses for a preference loss.

    What is in them and will not be learned is printed.
    """
    rows, held_out = _both_sets(arguments)
    sides = SIDES[arguments.responses]
    if "rejected" in sides:  # after the split: both responses of a prompt are on one side of it
        rows, held_out = (
            [getattr(pair, side) for pair in part for side in sides] for part in (rows, held_out)
        )
    return rows, held_out


def _both_sets(arguments: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    rows = _read(arguments, arguments.data, "--data")
    if arguments.eval_data is not None:
        held_out = _read(arguments, arguments.eval_data, "--eval-data")
        if LOSSES[arguments.loss].single and type(rows[0]) is not type(held_out[0]):
            kinds = {PairRow: "pairs", Row: "single responses with a label"}
            raise CliError(
                "--eval-data",
                f"got {kinds[type(held_out[0])]}; expected {kinds[type(rows[0])]}, as in --data",
            )
        return rows, held_out
    with refusals("--eval-split"):
        return split_rows(rows, arguments.eval_split, arguments.seed)


def raw_rows(arguments: argparse.Namespace, path: str) -> list[tuple[dict[str, Any], str]]:
    """The rows of a file as parsed, under the keys of `--columns`, with their places; no bad
    responses."""
    found = []
    names = column_names(arguments.columns)
    for row, where in mapped_records(path, FORMATS, names, arguments.system):
        single = LOSSES[arguments.loss].single and isinstance(row, dict)
        single = single and row.get("chosen") is None and row.get("label") is not None
        checked = (unpaired_row if single else training_row)(row, where)
        if checked.desirable is not False:
            found.append((row, where))
    return found


def _read(arguments: argparse.Namespace, path: str, flag: str) -> list[Any]:
    loss = LOSSES[arguments.loss]
    pairs = loss.pairs or "rejected" in SIDES[arguments.responses]
    read: Any = data_rows.read_preferences if pairs else data_rows.read_rows
    if loss.single:
        read = data_rows.read_responses
    with refusals(flag):
        rows = read(path, column_names(arguments.columns), arguments.system)
    folder = Path(path)
    if folder.is_dir() and not is_dataset(folder):
        files = [file.name for file in files_in(folder)]
        some = ", ".join([*files[:SHOWN_FILES], "…"] if len(files) > SHOWN_FILES else files)
        note(f"{flag}: {len(rows)} rows in {path}, of the files {some}")
    # `ift dynamics` makes its probes of the rewrites in --data, unless they are given.
    made = flag == "--data" and getattr(arguments, "probes", "") is None
    note_unread(flag, rows, {key for keys in REWRITES.values() for key in keys} if made else ())
    if not pairs:
        bad = [row for row in rows if row.desirable is False]
        if bad:
            note(f"{flag}: {_some(bad, rows)} have a false label and are not learned")
            rows = [row for row in rows if row.desirable is not False]
        if not rows:
            raise CliError(flag, "every row has a false label; expected one with true to learn")
    elif isinstance(rows[0], PairRow):
        same = [row for row in rows if row.chosen.content == row.rejected.content]
        if same:
            note(f"{flag}: {_some(same, rows, 'pairs')} have the same chosen and rejected response")
    return list(rows)


def note_unread(flag: str, rows: list[Any], read: Collection[str] = ()) -> None:
    """Print which keys of rows nothing reads; `read`: those that are read elsewhere."""
    if unread := data_rows.unread_keys(rows, read):
        shown = ", ".join(
            f"{key} ({n} row{'s' * (n > 1)}, first: {at})" for key, (n, at) in unread.items()
        )
        note(f"{flag}: keys that nothing reads: {shown}")


def _some(found: list[Any], of: list[Any], kind: str = "rows") -> str:
    return f"{len(found)} of {len(of)} {kind} (first: {found[0].where})"


def tokenise(
    rows: list[Any],
    tokenizer: Any,
    arguments: argparse.Namespace,
    flag: str,
    mismatched: bool,
) -> Encoded | EncodedPairs:
    """Encode rows or pairs and say which were cut or dropped; no rows give no examples.

    `mismatched` is that of `encode_pairs`.
    """
    if not rows:
        return Encoded([], [], [])
    max_length, truncate = arguments.max_length, arguments.truncate
    encoded: Encoded | EncodedPairs
    with refusals(flag):
        if not LOSSES[arguments.loss].pairs:
            encoded = encode(rows, tokenizer, max_length, truncate)
        elif isinstance(rows[0], PairRow):
            encoded = encode_pairs(
                rows, tokenizer, max_length, mismatched=mismatched, truncate=truncate
            )
        else:
            encoded = encode_responses(rows, tokenizer, max_length, truncate=truncate)
    if encoded.truncated:
        note(
            f"{flag}: {len(encoded.truncated)} of {len(rows)} rows are longer than --max-length "
            f"{max_length} and {CUT[truncate]} (first: {encoded.truncated[0]})"
        )
    if encoded.dropped:
        left = "whole answer" if truncate == "start" else "completion token"
        note(
            f"{flag}: dropped {len(encoded.dropped)} of {len(rows)} rows, which have no {left} "
            f"within --max-length {max_length} (first: {encoded.dropped[0]})"
        )
    return encoded
