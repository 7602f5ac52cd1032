"""Code lines of each package: lines with a token that is neither comment, docstring nor blank.

``python .ci/code_lines.py`` prints a total for each package; with ``-v`` also every file.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ift_kernels", "python_api", "bench", "examples", "tests", "csrc")
C_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
# A string or character literal is kept, so that "//" inside one starts no comment.
C_STRING = r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
C_COMMENT = re.compile(rf"//[^\n]*|/\*.*?\*/|{C_STRING}", re.DOTALL)


def python_lines(source: str) -> int:
    """Lines of Python code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines.difference_update(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(lines)


def c_lines(source: str) -> int:
    """Lines of C++ or CUDA code."""

    def blank(match: re.Match[str]) -> str:
        return match[1] or "\n" * match[0].count("\n")

    return sum(bool(line.strip()) for line in C_COMMENT.sub(blank, source).splitlines())


def code_lines(path: Path) -> int:
    """Code lines of a file; 0 for other kinds of files."""
    if path.suffix == ".py":
        return python_lines(path.read_text(encoding="utf-8"))
    return c_lines(path.read_text(encoding="utf-8")) if path.suffix in C_SUFFIXES else 0


def main() -> None:
    """Print the table."""
    total = 0
    for package in PACKAGES:
        counts = {path: code_lines(path) for path in sorted((ROOT / package).rglob("*"))}
        if "-v" in sys.argv[1:]:
            for path, count in counts.items():
                if count:
                    print(f"{count:7} {path.relative_to(ROOT)}")
        total += sum(counts.values())
        print(f"{sum(counts.values()):7} {package}")
    print(f"{total:7} total")


if __name__ == "__main__":
    main()
