"""The parts of ``make prove``.

Each is a module with `SOURCES` that its proof covers, `cases`, `run` of one case, which returns a
line of the log, `fault` of such a line, and `LIMIT_SECONDS` of one case. Where it has `PACKAGES`,
its figures depend on those. With `CHUNK`, a case is of so many drawn calls, and `cases` takes their
number.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from types import ModuleType

from tests.proofs.log import Log, digest

PARTS = ("models", "properties")  # modules of this package
_PACKAGES = ("torch", "transformers")


def part(name: str) -> ModuleType:
    """The module of a part."""
    if name not in PARTS:
        raise ValueError(f"PART: expected one of {list(PARTS)}, got {name!r}")
    return importlib.import_module(f"tests.proofs.{name}")


def log_of(name: str) -> Log:
    """Its log, for the sources and packages as they are."""
    header = {"part": name, "digest": digest(part(name).SOURCES)}
    packages = getattr(part(name), "PACKAGES", _PACKAGES)
    header |= {package: importlib.metadata.version(package) for package in packages}
    return Log(Path(__file__).parent / f"{name}.jsonl", header)
