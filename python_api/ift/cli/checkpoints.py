"""The checkpoints in the directory of a run."""

from __future__ import annotations

import re
from pathlib import Path


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints in a run's directory, by their steps."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def last_checkpoint(output: Path) -> Path | None:
    """The one with the highest step."""
    return next(reversed(checkpoints(output)), None)


def step_of(checkpoint: Path) -> int:
    """``…/checkpoint-500`` → 500."""
    return int(checkpoint.name.rpartition("-")[2])
