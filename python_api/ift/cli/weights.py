"""The dtype of the weights, in training and in ``model/``, and the disk that they take."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ift.cli.adapters import adapts
from ift.cli.arguments import flag_of
from ift.cli.errors import CliError
from ift.cli.processes import note
from ift.text import size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FINAL_DTYPE = "final_dtype.txt"  # in a checkpoint: that of model/


def dtype_of_files(model: str, config: Any) -> torch.dtype:
    """The dtype of a model's files, by its configuration or, without one there, its weights."""
    from transformers import AutoModelForCausalLM

    found = getattr(config, "dtype", None)
    if found is None:
        found = AutoModelForCausalLM.from_pretrained(model, dtype="auto").dtype
    dtype: torch.dtype = getattr(torch, found) if isinstance(found, str) else found
    return dtype


def training_dtype(arguments: argparse.Namespace, files: torch.dtype, frozen: bool) -> torch.dtype:
    """The dtype of the weights in training.

    Args:
        files: that of the model's files.
        frozen: only an adapter is trained, which is float32 in any case.

    Raises:
        CliError: float16, whose gradients vanish without loss scaling.
    """
    auto = files if frozen else torch.float32
    dtype = DTYPES.get(arguments.dtype, auto)
    if dtype is torch.float16 and not (frozen and arguments.bf16):
        got = "got float16" if arguments.dtype != "auto" else "the files of --model hold float16"
        expected = "expected --bf16 beside it, or float32 or bfloat16"
        if not frozen:
            expected = "expected float32 or bfloat16 for weights that are trained"
        raise CliError("--dtype", f"{got}, in which small gradients are zero; {expected}")
    return dtype


def final_dtype(arguments: argparse.Namespace, checkpoint: Path | None) -> torch.dtype:
    """The dtype of the weights in ``model/``: that of ``--dtype`` or, with auto, of the files.

    Args:
        checkpoint: the one that the run continues from, which names it; those of earlier versions
            do not, and meant float32.
    """
    if arguments.dtype != "auto":
        return DTYPES[arguments.dtype]
    if checkpoint is not None:
        path = checkpoint / FINAL_DTYPE
        name = path.read_text(encoding="utf-8").strip() if path.exists() else "float32"
        found: Any = getattr(torch, name)
        return found  # type: ignore[no-any-return]
    if arguments.model == "tiny" or adapts(arguments):
        return torch.float32
    from transformers import AutoConfig

    return dtype_of_files(arguments.model, AutoConfig.from_pretrained(arguments.model))


def warn_of_lost_updates(arguments: argparse.Namespace, model: nn.Module) -> None:
    """Say when steps of ``--lr`` are too small to change most weights in bfloat16.

    Adam and RMSprop change a weight by about the learning rate. What is below half of the distance
    to the next bfloat16 number, ``|w| / 256``, is lost in rounding.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype is torch.bfloat16]
    if arguments.optimizer not in ("adamw", "rmsprop") or not trained:
        return
    sample = torch.cat([p.detach().flatten()[:4096].float().abs() for p in trained])
    needed = sample.median().item() / 512
    if arguments.lr < needed:
        note(
            f"--dtype bfloat16: steps of --lr {arguments.lr:g} are lost in rounding for most "
            f"weights; they need {needed:.1e}, or --dtype float32 with --bf16"
        )


# ---- saving --------------------------------------------------------------------------------------


def converted(state: dict[str, Tensor], dtype: torch.dtype, model: Any) -> dict[str, Tensor]:
    """A state dict on the CPU with its floating-point tensors in `dtype`.

    Those that the model keeps in float32 always (`_keep_in_fp32_modules_strict`) stay; tensors that
    share memory share it afterwards.
    """
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    done: dict[tuple[Any, ...], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        keep = not tensor.is_floating_point() or any(part in name for part in strict)
        wanted = tensor.dtype if keep else dtype
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), wanted)
        if key not in done:
            done[key] = tensor.detach().to("cpu", wanted)
        result[name] = done[key]
    return result


def record_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Name the dtype in a saved model's ``config.json``, where transformers reads it."""
    path = directory / "config.json"
    name = str(dtype).removeprefix("torch.")

    def replaced(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            k: name if k in ("dtype", "torch_dtype") and isinstance(v, str) else replaced(v)
            for k, v in value.items()
        }

    text = json.dumps(replaced(json.loads(path.read_text(encoding="utf-8"))), indent=2)
    path.write_text(text + "\n", encoding="utf-8")


# ---- the disk ------------------------------------------------------------------------------------

_STATES = {"adamw": 2, "rmsprop": 1, "sgd": 0}  # of a weight, in its dtype


def checkpoint_bytes(model: nn.Module, optimizer: str) -> int:
    """What the tensors of a checkpoint take: weights (of an adapter, its own) and optimizer states.

    A weight that is tied to another counts once.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    return sum(p.nbytes for p in saved) + optimizer_bytes(trained, optimizer)


def optimizer_bytes(trained: Iterable[Tensor], optimizer: str) -> int:
    """What the states of an optimizer take: Adafactor's are float32 sums of rows and columns."""
    if optimizer in _STATES:
        return _STATES[optimizer] * sum(p.nbytes for p in trained)
    total = 0
    for p in trained:
        rows_and_columns = p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else 0
        total += 4 * (rows_and_columns or p.numel())
    return total


def check_disk(
    arguments: argparse.Namespace,
    model: nn.Module,
    steps: float,
    final_dtype: torch.dtype,
    *,
    sharded: bool = False,
) -> None:
    """Say what the run will write, and refuse it where the disk has less.

    Args:
        steps: optimizer steps of the run.
        final_dtype: of ``model/``.
        sharded: FSDP writes the weights of a checkpoint twice, for itself and for transformers.

    Raises:
        CliError: not enough free.
    """
    output = Path(arguments.output)
    adapter = hasattr(model, "peft_config")
    saved = [p for p in model.parameters() if p.requires_grad or not adapter]
    one = checkpoint_bytes(model, arguments.optimizer) + sharded * sum(p.nbytes for p in saved)
    final = sum(p.nbytes if adapter else p.numel() * final_dtype.itemsize for p in saved)
    if arguments.merge:
        final = sum(p.nbytes for p in model.parameters())
    count = math.ceil(steps / arguments.save_steps)
    limit = arguments.save_total_limit or count
    kept = min(count, limit)
    # The oldest one goes when the new one is whole.
    peak = max(min(count, limit + 1) * one, kept * one + final)
    free = shutil.disk_usage(output).free
    there = sum(
        entry.stat().st_size
        for pattern in ("checkpoint-*", "model")
        for directory in output.glob(pattern)
        for entry in directory.rglob("*")
        if entry.is_file()
    )
    needs = (
        f"{kept} checkpoint{'s' * (kept > 1)} of {size(one)} and model/ of {size(final)}, "
        f"at most {size(peak)} at once"
    )
    if peak > free + there:
        raise CliError(
            "--output",
            f"{output} has {size(free)} free, and the run writes {needs}; expected more room, "
            f"fewer checkpoints ({flag_of('save_steps')}, {flag_of('save_total_limit')})",
        )
    note(f"disk: {needs}; {size(free)} free")
