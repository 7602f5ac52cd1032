"""Files that a reader finds whole: replaced in one step, or appended to a line at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; after an error the old file stays."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:  # an interrupt too: names with the process id would pile up
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file; a reader sees the old text or the new one, never a part."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


class JsonlLog:
    """Records with a ``step``, one JSON object a line; each call appends in one write.

    Args:
        path: the file; it is created with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *records: dict[str, Any]) -> None:
        """Add records. JSON has no NaN and no infinity: null."""
        text = "".join(json.dumps(finite(record)) + "\n" for record in records)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def read(self) -> list[dict[str, Any]]:
        """All records; an incomplete last line is left out.

        Raises:
            ValueError: a line is no record.
        """
        # By "\n" alone: `splitlines` also splits at characters that JSON strings may contain.
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        found = []
        for number, line in enumerate(text.split("\n")[:-1], 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path.name} line {number}: {error}") from None
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                raise ValueError(f"{self.path.name} line {number}: expected an object with a step")
            found.append(record)
        return found

    def rewind(self, step: int) -> None:
        """Remove the records after `step`: a resumed run makes them again."""
        if self.path.exists():
            kept = [record for record in self.read() if record["step"] <= step]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def finite(value: Any) -> Any:
    """`value` as JSON has it: null for a number that is not finite, at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
