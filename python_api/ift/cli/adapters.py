"""LoRA and QLoRA for ``ift train``: adapters of PEFT, new or continued, over frozen weights."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

from ift.cli.arguments import flag_of
from ift.cli.errors import CliError

CONFIG = "adapter_config.json"  # PEFT's, in the directory of an adapter


def is_adapter(model: str | Path) -> bool:
    """Whether a directory holds an adapter, and no model of its own."""
    return (Path(model) / CONFIG).is_file() and not (Path(model) / "config.json").is_file()


def adapts(arguments: argparse.Namespace) -> bool:
    """Whether the run trains an adapter, a new one or that of ``--model``."""
    return bool(arguments.lora_rank or arguments.lora_config or is_adapter(arguments.model))


def check_adapter(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before torch is imported.

    Raises:
        CliError: a new adapter on an adapter; ``--quantize`` or ``--merge`` without one, or both;
            ``--freeze-head`` with one; PEFT or bitsandbytes is not installed.
    """
    sources = [name for name in ("lora_rank", "lora_config") if getattr(arguments, name)]
    if is_adapter(arguments.model):
        if sources:
            problem = f"got it with --model {arguments.model}, which is an adapter already"
            raise CliError(flag_of(sources[0]), f"{problem}; expected one of the two")
        sources = ["model"]
    if arguments.quantize and not sources:
        raise CliError(
            "--quantize",
            "got it without --lora-rank or --lora-config; expected an adapter, for quantized "
            "weights cannot be trained",
        )
    if arguments.merge and not sources:
        raise CliError(
            "--merge", "got it without an adapter; expected --lora-rank or --lora-config"
        )
    if arguments.merge and arguments.quantize:
        problem = "got it with --quantize, whose rounded weights it would write; expected either"
        raise CliError("--merge", problem)
    if arguments.freeze_head and sources:
        raise CliError(
            "--freeze-head",
            f"got it with the adapter of {flag_of(sources[0])}, which freezes the head or, by "
            "modules_to_save, trains it; expected one of the two",
        )
    if sources:
        _check_installed("peft", flag_of(sources[0]), "lora")
    if arguments.quantize:
        _check_installed("bitsandbytes", "--quantize", "qlora")


def _check_installed(package: str, flag: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        hint = f'pip install "ift-kernels[{extra}]"'
        raise CliError(flag, f"needs {package}, which is not installed: {hint}")


def quantization(arguments: argparse.Namespace, dtype: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize the weights; none without ``--quantize``.

    Args:
        dtype: of the products with the weights, and of all that is not quantized.

    Raises:
        CliError: no accelerator.
    """
    if arguments.quantize is None:
        return {}
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]  # no annotations
    from transformers import BitsAndBytesConfig

    if arguments.cpu or not torch.accelerator.is_available():
        raise CliError("--quantize", f"got {arguments.quantize} on a CPU; expected an accelerator")
    bits: dict[str, Any] = {"load_in_8bit": True}
    if arguments.quantize == "4bit":  # as in the QLoRA paper
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}  # fmt: skip
    return {
        "quantization_config": BitsAndBytesConfig(**bits),
        "device_map": {"": PartialState().local_process_index},
    }


def base_of(adapter: str | Path, flag: str) -> str:
    """The model that an adapter was trained on, as its configuration names it."""
    config = _read_config(Path(adapter) / CONFIG, flag)
    base = config.get("base_model_name_or_path")
    if not base:
        problem = "names no base_model_name_or_path; expected the model that it was trained on"
        raise CliError(flag, f"{Path(adapter) / CONFIG} {problem}")
    return str(base)


def add_adapter(model: Any, arguments: argparse.Namespace) -> Any:
    """`model`, frozen, with the new adapter of the arguments, which changes nothing at first.

    Raises:
        CliError: a configuration that PEFT refuses; a target that no layer has.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    flag = "--lora-config" if arguments.lora_config else "--lora-rank"
    targets = (arguments.lora_targets or "all-linear").split(",")
    if arguments.lora_config:
        path = Path(arguments.lora_config)
        options = _read_config(path, flag)
        kind = options.pop("peft_type", "LORA")
        if kind != "LORA":
            raise CliError(flag, f"{path} has peft_type {kind}; expected LORA")
        task = options.get("task_type") or "CAUSAL_LM"
        if task != "CAUSAL_LM":
            raise CliError(flag, f"{path} has task_type {task}; expected CAUSAL_LM")
        options = {k: v for k, v in options.items() if k not in ("auto_mapping", "peft_version")}
        options |= {"base_model_name_or_path": None, "inference_mode": False, "task_type": task}
    else:
        rank, alpha = arguments.lora_rank, arguments.lora_alpha
        options = {
            "r": rank,
            "lora_alpha": 2 * rank if alpha is None else alpha,
            "lora_dropout": arguments.lora_dropout or 0.0,
            "target_modules": targets[0] if targets == ["all-linear"] else targets,
            "task_type": "CAUSAL_LM",
        }
    named = "--lora-targets" if arguments.lora_targets else flag
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = get_peft_model(model, LoraConfig(**options))
    except Exception as error:
        if arguments.lora_config:
            # PEFT checks few values: a wrong one raises whatever its use does.
            problem = f"PEFT refuses {path} ({type(error).__name__}: {error})"
            raise CliError(flag, problem) from None
        if not isinstance(error, (TypeError, ValueError)):
            raise
        raise CliError(named, error) from None
    for warning in caught:
        if not issubclass(warning.category, FutureWarning):  # of PEFT's calls of transformers
            warnings.warn(warning.message, stacklevel=2)
    layers = [name for name, part in adapted.named_modules() if isinstance(part, BaseTunerLayer)]
    for target in targets:
        if target != "all-linear" and not any(name.endswith(f".{target}") for name in layers):
            problem = f"got {target}; {type(model).__name__} has no such layer"
            raise CliError("--lora-targets", problem)
    return adapted


def check_merge(adapted: Any) -> None:
    """Refuse to merge LoRA on an output head that shares its weight with the input embedding.

    Raises:
        CliError: merging would change the embedding, too.
    """
    from ift.heads import is_lora

    head = adapted.get_output_embeddings()
    if is_lora(head) and head.base_layer.weight is adapted.get_input_embeddings().weight:
        raise CliError(
            "--merge",
            "got it with LoRA on an output head that is tied to the input embedding, which merging "
            "would change; expected the adapter alone",
        )


def load_adapter(model: Any, adapter: str | Path, flag: str) -> Any:
    """`model`, frozen, with a saved adapter to train further.

    Raises:
        CliError: it is damaged, or of another model.
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, os.fspath(adapter), is_trainable=True)
        except Exception as error:  # whatever the readers of its files raise
            first = str(error).strip().split("\n")[0].rstrip(".")
            raise CliError(
                flag,
                f"cannot load the adapter {adapter} ({type(error).__name__}: {first}); expected "
                f"one of {type(model).__name__}",
            ) from None
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise CliError(flag, f"{adapter} lacks weights: {missing[0].split(chr(10))[0]}")
    return adapted


def _read_config(path: Path, flag: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CliError(flag, f"cannot read {path} ({error}); expected PEFT's {CONFIG}") from None
    if not isinstance(found, dict):
        raise CliError(flag, f"{path} holds a {type(found).__name__}; expected PEFT's {CONFIG}")
    return found
