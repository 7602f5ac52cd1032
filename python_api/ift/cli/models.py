"""The model and the tokenizer that ``ift train`` starts from."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ift.cli import processes
from ift.cli.errors import CliError


def check_model_path(model: str) -> None:
    """Refuse a path without a model; a hub id is `name` or `owner/name`."""
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
    """Model (fp32 weights) and tokenizer: new, from a directory or hub id, or from a checkpoint.

    Raises:
        CliError: what cannot be loaded; weights that are not in the files, without
            ``--allow-new-weights``; a model that sees the tokens that it should predict.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ift import tiny
    from ift.chat_template import SIMPLE_CHAT_TEMPLATE

    if arguments.model == "tiny" and checkpoint is None:
        tokenizer = tiny.train_tokenizer(text for row in rows for text in row.texts)
        length, seed = arguments.max_length, arguments.seed
        return tiny.tiny_llama(tokenizer, max_length=length, seed=seed), tokenizer
    name = os.fspath(checkpoint or arguments.model)
    try:
        with torch.random.fork_rng(), loading_warnings():
            torch.manual_seed(arguments.seed)  # of weights that are new
            tokenizer = AutoTokenizer.from_pretrained(name)
            model, info = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # damaged files raise whatever their reader raises
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise CliError(
            flag,
            f"cannot load {name} ({type(error).__name__}: {first}); expected the directory or hub "
            "id of a causal language model, or `tiny`",
        ) from None
    missing = sorted(info["missing_keys"])
    if missing and not arguments.allow_new_weights:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CliError(
            flag,
            f"{name} has no weights for {', '.join(missing[:3])}{more} of {type(model).__name__}, "
            "which would start from random ones; expected all, or --allow-new-weights",
        )
    have = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > have:
        tokens = f"the tokenizer has {len(tokenizer)} tokens"
        raise CliError(flag, f"{name}: {tokens}; expected at most the model's {have}")
    check_causal(model, name, flag)
    if tokenizer.chat_template is None and any(row.messages is not None for row in rows):
        tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE  # saved with the model that learns it
    return model, tokenizer


@contextlib.contextmanager
def loading_warnings() -> Iterator[None]:
    """Show the warnings of transformers while it loads, in one process."""
    import transformers

    before = transformers.logging.get_verbosity()
    if processes.is_first():
        transformers.logging.set_verbosity_warning()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def token_ids(model: Any, count: int) -> list[int]:
    """The first ids that are not padding, which some models take no position for."""
    pad = getattr(model.config, "pad_token_id", None)
    return [i for i in range(count + 1) if i != pad][:count]


def check_causal(model: Any, name: str, flag: str) -> None:
    """Refuse a model whose output at a token depends on later tokens.

    Measured on two rows of four tokens that differ in the last one.
    """
    import torch

    from ift.head_pass import evaluating

    first, second, third = token_ids(model, 3)
    ids = torch.tensor([[first, first, second, second], [first, first, second, third]])
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(input_ids=ids.to(model.device)).logits.float()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # it needs an accelerator, say
        processes.note(f"{flag}: could not check that {name} is causal ({error})")
        return
    if (logits[0, :3] - logits[1, :3]).abs().max() > 1e-4 * logits.std():
        decoder = getattr(model.config, "is_decoder", None)
        hint = "; set is_decoder to true in its config.json" if decoder is False else ""
        raise CliError(
            flag,
            f"{name} is a {type(model).__name__} whose attention is bidirectional, so it sees the "
            f"tokens that it should predict; expected a causal language model{hint}",
        )


def check_positions(model: Any, length: int, flag: str) -> None:
    """Refuse a row that is longer than the model's table of positions; rotary ones have no end.

    Args:
        length: tokens of the longest row.

    Raises:
        CliError: the model cannot compute it.
    """
    import torch
    from torch import nn

    from ift.head_pass import evaluating

    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    limit = next((getattr(config, n) for n in names if getattr(config, n, None)), 0)
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and limit <= module.num_embeddings <= limit + 2
    ]
    # Some tables keep their first entries for padding.
    reserved = max(((table.padding_idx or -1) + 1 for table in tables), default=0)
    if limit <= 0 or length <= limit - reserved:
        return
    ids = torch.full((1, length), token_ids(model, 1)[0], device=model.device)
    try:
        with torch.no_grad(), evaluating(model):
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError):
        raise CliError(
            "--max-length",
            f"the longest row of {flag} has {length} tokens; expected at most "
            f"{limit - reserved}, the positions of {type(model).__name__}",
        ) from None
    processes.note(
        f"{flag}: rows of up to {length} tokens go beyond the {limit} positions that the "
        "model was made for"
    )


def turn_off_dropout(model: Any) -> int:
    """Set every dropout of a model to 0, of its configuration as well; how many values those were.

    Models draw it in modules of torch, or in functions with a probability that a module or the
    configuration holds under a name with "drop" in it (layer drop among them).
    """
    from torch.nn.modules.dropout import _DropoutNd

    owners = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    owners += [c.get_text_config() for c in owners if hasattr(c, "get_text_config")]
    changed = 0
    for owner in owners:
        names = ["p"] if isinstance(owner, _DropoutNd) else [n for n in vars(owner) if "drop" in n]
        for name in names:
            value = getattr(owner, name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
                setattr(owner, name, type(value)(0))
                changed += 1
    return changed


def padding_id(tokenizer: Any) -> int:
    """The pad token, or any other: padding is masked out."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None)
