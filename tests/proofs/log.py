"""A proof's log: a header with the digest of what it covers, then one JSON line for each case."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def digest(patterns: Iterable[str], root: Path = ROOT) -> str:
    """Of the sources that match, without comments, docstrings, blank lines and spacing."""
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    if not found:
        raise ValueError(f"patterns: expected some that match files under {root}, got {patterns}")
    total = hashlib.sha256()
    for path in sorted(found):
        total.update(f"{path.relative_to(root)}\n".encode())
        total.update(_code(path).encode())
    return total.hexdigest()[:16]


def _code(path: Path) -> str:
    source = path.read_text()
    if path.suffix == ".py":
        return _python_code(source)
    without = re.sub(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\])*")', r"\1", source, flags=re.DOTALL)
    return " ".join(without.split())


def _python_code(source: str) -> str:
    """The tokens of a module but for comments and for strings that are statements."""
    dropped = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)
    names = {tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>", tokenize.NEWLINE: "\n"}
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    tokens = [t for t in tokens if t.type not in dropped]
    kept: list[str] = []
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        starts = before is None or before.type in names
        ends = after is None or after.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
        if token.type == tokenize.STRING and starts and ends:
            continue
        if token.type == tokenize.NEWLINE and (not kept or kept[-1] in names.values()):
            continue  # of a docstring
        kept.append(names.get(token.type, token.string))
    return " ".join(kept)


class Log:
    """The lines of one proof; what was written for other sources is dropped.

    Args:
        path: of the JSON lines.
        header: the first line: "digest" and the versions that the figures depend on.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header

    def read(self) -> dict[str, dict[str, Any]]:
        """Lines by their "case", if they are of these sources; else none."""
        lines = read_lines(self.path)
        if not lines or lines[0] != self.header:
            return {}
        return {line["case"]: line for line in lines[1:]}

    def start(self) -> None:
        """A log without cases, in place of whatever there was."""
        self.path.write_text(json.dumps(self.header) + "\n")

    def append(self, line: dict[str, Any]) -> None:
        """One more case."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def sort(self, order: list[str]) -> None:
        """The cases of `order`, in that order, once each."""
        lines = self.read()
        self.start()
        for case in order:
            if case in lines:
                self.append(lines[case])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; one that was cut off by a kill is dropped."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines
