"""The processes of a run: how many there are, and which of them speaks."""

from __future__ import annotations

import os
import sys


def count() -> int:
    """How many processes torchrun, accelerate or another launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Is this the process that speaks?"""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Tell the user something that is no error, once and not by every process."""
    if is_first():
        print(f"ift train: {text}", file=sys.stderr, flush=True)
