"""The model and the tokenizer that ``ift train`` starts from."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ift.cli.errors import CliError


def check_model_path(model: str) -> None:
    """Refuse what is meant as a path and is none; a hub id is `name` or `owner/name`."""
    if model == "tiny":
        return
    if Path(model).exists():
        if not (Path(model) / "config.json").is_file():
            raise CliError("--model", f"no config.json in {model}; expected a model's directory")
        return
    if model.startswith((".", "/", "~", "\\")) or model.count("/") > 1 or model.endswith("/"):
        raise CliError(
            "--model", f"no directory {model}; expected a model's directory, a hub id or `tiny`"
        )


def load_model(
    arguments: argparse.Namespace,
    rows: list[Any],
    checkpoint: Path | None,
    flag: str = "--model",
) -> tuple[Any, Any]:
    """Model (fp32 weights) and tokenizer: new, from a directory or hub id, or from a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ift import tiny
    from ift.data import SIMPLE_CHAT_TEMPLATE

    if arguments.model == "tiny" and checkpoint is None:
        tokenizer = tiny.train_tokenizer(text for row in rows for text in row.texts)
        length, seed = arguments.max_length, arguments.seed
        return tiny.tiny_llama(tokenizer, max_length=length, seed=seed), tokenizer
    name = os.fspath(checkpoint or arguments.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # damaged files raise whatever their reader raises
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise CliError(
            flag,
            f"cannot load {name} ({type(error).__name__}: {first}); expected the directory or hub "
            "id of a causal language model, or `tiny`",
        ) from None
    have = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > have:
        tokens = f"the tokenizer has {len(tokenizer)} tokens"
        raise CliError(flag, f"{name}: {tokens}; expected at most the model's {have}")
    if tokenizer.chat_template is None and any(row.messages is not None for row in rows):
        tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE  # saved with the model that learns it
    return model, tokenizer


def padding_id(tokenizer: Any) -> int:
    """The pad token, or any other: padding is masked out."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None)
