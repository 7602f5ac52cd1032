"""The processes of a run: how many there are, and which of them prints."""

from __future__ import annotations

import os
import sys


def count() -> int:
    """How many processes torchrun, accelerate or another launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print a line that is no error, from one process."""
    if is_first():
        print(f"ift train: {text}", file=sys.stderr, flush=True)
