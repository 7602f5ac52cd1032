"""The processes of a run: how many there are, and which of them prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from typing import Any

from ift.cli.errors import CliError

command = "train"  # the one that runs, as its notes name it


def count() -> int:
    """How many processes torchrun, accelerate or another launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that prints."""
    return rank() == 0


def note(text: str) -> None:
    """Print a line that is no error, from one process."""
    if is_first():
        print(f"ift {command}: {text}", file=sys.stderr, flush=True)


def check_launcher() -> None:
    """Refuse, before torch is imported, what ``accelerate launch`` asks for and is not here.

    Raises:
        CliError: DeepSpeed without the package.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise CliError("accelerate launch", "needs deepspeed, which is not installed")
    if _asked("ACCELERATE_USE_FSDP") and _asked("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        # The other processes would check and measure a model without weights.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        note("fsdp_cpu_ram_efficient_loading is off: each process reads the whole model")


def prepare_sharding(trainer: Any, merge: bool) -> None:
    """Refuse sharding that accelerate would leave out, and FSDP1; sum gradients in float32.

    Raises:
        CliError: a launcher that asks for either.
    """
    import torch

    if not _asked("ACCELERATE_USE_FSDP"):
        return
    if not trainer.is_fsdp_enabled:
        problem = "accelerate shards nothing on a CPU; expected accelerators, or no use_fsdp"
        raise CliError("accelerate launch", f"use_fsdp: {problem}")
    if merge:
        raise CliError("--merge", "got it with FSDP; expected one of the two")
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise CliError("accelerate launch", f"fsdp_version: got {plugin.fsdp_version}; expected 2")
    if plugin.mixed_precision_policy is not None:
        # accelerate's own also rounds what modules return, the head's logits too.
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
