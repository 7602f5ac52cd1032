"""The checkpoints in the directory of a run."""

from __future__ import annotations

import re
from pathlib import Path


def last_checkpoint(output: Path) -> Path | None:
    """The whole checkpoint with the highest step in a run's directory."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """``…/checkpoint-500`` → 500."""
    return int(checkpoint.name.rpartition("-")[2])
