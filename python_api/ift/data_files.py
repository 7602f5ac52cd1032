"""Files of rows: JSONL, a JSON array, Parquet, CSV, a folder of them or one of ``datasets``."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SUFFIXES = ".jsonl, .ndjson, .json, .parquet, .csv, .tsv"
# A name of a split in that of a file, with no letter beside it: my_train-0.jsonl.
SPLITS = re.compile(r"(?<![a-z])(train|test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)
LONGEST_CELL = 2**31 - 1  # of a CSV file; the module's own limit is 128 KiB
NEEDED = "which is not installed; expected `pip install 'ift-kernels[data]'`, or a JSONL file"


class DataError(ValueError):
    """A file or row that cannot be used; the message has file, row and what to expect."""


def json_type(value: Any) -> str:
    """What JSON calls the type of a parsed value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def read_records(path: str | os.PathLike[str], formats: str) -> list[tuple[Any, str]]:
    """The rows of a file or folder as parsed, each with its place ("train.jsonl line 3").

    Files are read by their suffix; one with another suffix has JSON, as ``.json`` an array or one
    object per line. A folder is one of
    ``datasets.Dataset.save_to_disk``, or its files with a known suffix are read in order of their
    names. Cells without a value are left out of rows of Parquet and ``datasets``, where every row
    has every column.

    Args:
        path: of the file or folder.
        formats: what a row may be, for the messages.

    Raises:
        DataError: what cannot be read, a folder with files of several splits or with more of them
            in its own folders, or no rows.
    """
    path = Path(path)
    records: list[tuple[Any, str]] = []
    for reader, file in _parts(path):
        try:
            records += reader(file, formats)
        except OSError as error:
            problem = error.strerror or error
            raise DataError(f"{file}: {problem}; expected a readable file") from None
    if not records:
        raise DataError(f"{path}: the file has no rows; expected one object per line: {formats}")
    return records


def is_dataset(path: Path) -> bool:
    """Whether a folder is one of ``datasets``."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def digest(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    path = Path(path)
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            found.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def _lines(path: Path, formats: str) -> list[tuple[Any, str]]:
    """The JSON value of each line that is not blank, with its file and line."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                rows.append((_parsed(line, where, number == 1, formats), where))
    return rows


Reader = Callable[[Path, str], list[tuple[Any, str]]]


def _parts(path: Path) -> Iterator[tuple[Reader, Path]]:
    """The files to read, each with its reader."""
    if not path.is_dir():
        yield READERS.get(path.suffix.lower(), _json), path
        return
    if is_dataset(path):
        yield _dataset, path
        return
    for file in files_in(path):
        yield READERS[file.suffix.lower()], file


def files_in(path: Path) -> list[Path]:
    """The files of rows in a folder that is none of ``datasets``, in the order of their names.

    Raises:
        DataError: none, files of several splits, or more of them in folders below it.
    """
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parent.parts)
    )
    below = [file for file in found if file.parent != path]
    if below:
        example = below[0].relative_to(path)
        raise DataError(
            f"{path}: holds files of rows in folders of its own ({example}); expected all in one "
            "folder, or one of them"
        )
    if not found:
        raise DataError(f"{path}: a folder without a file of rows; expected {SUFFIXES}")
    splits = {match[0].lower() for f in found if (match := SPLITS.search(f.name))}
    if len(splits) > 1:
        names = " and ".join(sorted(splits))
        raise DataError(f"{path}: holds files of {names}; expected a file, or a folder of one")
    return found


def _json(path: Path, formats: str) -> list[tuple[Any, str]]:
    """One object per line, or one array of objects."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return _lines(path, formats)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON ({error.msg} at line {error.lineno} column {error.colno}); "
            f"expected one array of rows, or one row per line: {formats}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; expected an array of rows: {formats}") from None
    return [(row, f"{path} row {number}") for number, row in enumerate(rows, start=1)]


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


def _csv(path: Path, formats: str) -> list[tuple[Any, str]]:
    """Rows under a line of column names; every value is text."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    rows: list[tuple[Any, str]] = []
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=separator, strict=True)
            names = next(lines, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns have one name; expected different ones")
            for cells in filter(None, lines):
                where = f"{path} row {len(rows) + 1}"
                if len(cells) != len(names):
                    got = f"{len(cells)} cells"
                    raise DataError(f"{where}: got {got}; expected the {len(names)} of the header")
                rows.append((dict(zip(names, cells, strict=True)), where))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
    except csv.Error as error:
        raise DataError(f"{path} row {len(rows) + 1}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet(path: Path, formats: str) -> list[tuple[Any, str]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow, {NEEDED}") from None
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except ArrowException as error:
        raise DataError(f"{path}: not Parquet ({str(error).splitlines()[0]})") from None
    return [(_filled(row), f"{path} row {number}") for number, row in enumerate(rows, start=1)]


def _dataset(path: Path, formats: str) -> list[tuple[Any, str]]:
    """Rows of ``datasets.Dataset.save_to_disk``, or of the only split of a ``DatasetDict``."""
    try:
        import datasets  # type: ignore[import-untyped]  # has no annotations
    except ImportError:
        raise DataError(f"{path}: a folder of `datasets` needs datasets, {NEEDED}") from None
    try:
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            if len(found) != 1:
                one = path / next(iter(found), "train")
                raise DataError(f"{path}: holds {', '.join(found)}; expected one of them: {one}")
            (found,) = found.values()
        found = found.with_format(None)
        return [(_filled(row), f"{path} row {i}") for i, row in enumerate(found, start=1)]
    except DataError:
        raise
    except Exception as error:  # damaged files and columns of pictures raise what their reader does
        first = str(error).strip().split("\n")[0]
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {first})") from None


def _filled(value: Any) -> Any:
    """Without the keys that have no value, which columns give to every row."""
    if isinstance(value, dict):
        return {key: _filled(part) for key, part in value.items() if part is not None}
    return [_filled(part) for part in value] if isinstance(value, list) else value


READERS: dict[str, Reader] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
}
