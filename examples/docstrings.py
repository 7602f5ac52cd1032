"""Real text that every Python carries: signature → docstring pairs of its standard library.

``python -m examples.docstrings out/`` writes ``out/train.jsonl`` and ``out/heldout.jsonl`` in the
``prompt``/``completion`` format of ``ift train``.  The sources are parsed with :mod:`ast`; nothing
of them is imported or run.  The result depends on the installed standard library alone: files are
visited in sorted order and the held-out rows are chosen by a hash of the prompt.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Third-party packages and test suites live below the standard library on some systems and not on
# others (Debian splits its tests off); without them two machines see nearly the same text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MIN_WORDS = 3
HELD_OUT = 0.05


def stdlib_files() -> list[Path]:
    """Return the ``.py`` files of the running interpreter's standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py"))
    return sorted(path for path in files if not SKIPPED.intersection(path.relative_to(root).parts))


def module_name(path: Path) -> str:
    """``.../json/decoder.py`` → ``json.decoder``; a package's ``__init__`` is the package."""
    relative = path.relative_to(sysconfig.get_paths()["stdlib"]).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def first_paragraph(docstring: str) -> str:
    """The text up to the first blank line, as one line."""
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def pairs_of(source: str, module: str) -> Iterator[tuple[str, str]]:
    """Yield (prompt, completion) for each documented class, function and method of ``source``."""

    def visit(node: ast.AST, owner: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{owner}{child.name}"
                docstring = ast.get_docstring(child, clean=False)
                if docstring:
                    yield f"# {module}\n{signature(child, name)}\n", first_paragraph(docstring)
                yield from visit(child, f"{name}." if isinstance(child, ast.ClassDef) else owner)
            else:  # definitions under `if` and `try` count too
                yield from visit(child, owner)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files carry invalid escapes; they are not ours to fix
        tree = ast.parse(source)
    yield from visit(tree, "")


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> str:
    """``def name(arguments):`` or ``class name(bases):`` on one line."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases}):" if bases else f"class {name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {name}({ast.unparse(node.args)}){returns}:"


def collect() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (train, held-out) rows ``{"prompt", "completion"}``.

    A docstring that appears twice is kept once, under the first signature that carries it, so that
    no held-out completion is also a training completion.
    """
    seen: set[str] = set()
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for path in stdlib_files():
        try:
            found = list(pairs_of(path.read_text(encoding="utf-8"), module_name(path)))
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            continue  # templates and Python 2 leftovers (lib2to3) do not parse
        for prompt, completion in found:
            if len(completion.split()) < MIN_WORDS or completion in seen:
                continue
            seen.add(completion)
            digest = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
            rows = held_out if digest < HELD_OUT * 2**32 else train
            rows.append({"prompt": prompt, "completion": completion})
    return train, held_out


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write the two files and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory for train.jsonl and heldout.jsonl")
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    train, held_out = collect()
    write_jsonl(output / "train.jsonl", train)
    write_jsonl(output / "heldout.jsonl", held_out)
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {version}: {len(train)} training pairs, {len(held_out)} held out → {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
