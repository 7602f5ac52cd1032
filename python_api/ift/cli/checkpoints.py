"""The checkpoints in the directory of a run, and what is said of damaged ones."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

from ift.cli import processes
from ift.cli.errors import CliError

UNREADABLE = (OSError, ValueError, KeyError, TypeError)
# What torch raises at a file that is not whole, or is of another model.
UNLOADABLE = (*UNREADABLE, EOFError, AttributeError, IndexError, RuntimeError, pickle.PickleError)


@contextlib.contextmanager
def damage_in(path: Path, kinds: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Turn errors in reading an earlier run into a CliError; running out of memory is none."""
    try:
        yield
    except kinds as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is a RuntimeError
            raise
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise CliError("--resume", f"{path} is damaged ({problem})") from None


def check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint without a file that transformers would do without.

    The optimizer and the schedule would start anew, and the random numbers be others.
    """
    sharded = any(checkpoint.glob("global_step*"))  # DeepSpeed's, with optimizer and schedule
    several = processes.count() > 1
    needed = [f"rng_state_{processes.rank()}.pth" if several else "rng_state.pth"]
    if not sharded:
        needed += ["optimizer*", "scheduler.pt"]  # FSDP's: optimizer.bin, optimizer_0
    for name in needed:
        if not any(checkpoint.glob(name)):
            shown = name.replace("*", ".pt")
            raise CliError("--resume", f"{checkpoint} is damaged (no {shown})")


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
