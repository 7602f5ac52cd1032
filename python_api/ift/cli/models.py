"""The model and the tokenizer that ``ift train`` starts from."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ift.cli import adapters, processes
from ift.cli.errors import CliError
from ift.cli.option_tables import GPU_ATTENTION


def check_model_path(model: str) -> None:
    """Refuse a path without a model; a hub id is `name` or `owner/name`."""
    if model == "tiny":
        return
    if Path(model).exists():
        if not (Path(model) / "config.json").is_file() and not adapters.is_adapter(model):
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
    *,
    frozen: bool = False,
) -> tuple[Any, Any]:
    """Model and tokenizer: new, from a directory or hub id, or from a checkpoint.

    With an adapter, a new one or one that is loaded, the model is PEFT's, over frozen weights.

    Args:
        frozen: a reference of a policy with an adapter: as the weights under that one are loaded.

    Raises:
        CliError: what cannot be loaded; weights that are not in the files, without
            ``--allow-new-weights``; a model that sees the tokens that it should predict.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ift import tiny
    from ift.chat_template import SIMPLE_CHAT_TEMPLATE
    from ift.cli.weights import dtype_of_files, training_dtype

    gpu = gpu_for_attention(arguments) if arguments.attn in GPU_ATTENTION else None
    if arguments.model == "tiny" and checkpoint is None:
        tokenizer = tiny.train_tokenizer(text for row in rows for text in row.texts)
        length, seed = arguments.max_length, arguments.seed
        model = tiny.tiny_llama(tokenizer, max_length=length, seed=seed)
        if arguments.attn is not None:
            try:
                model.set_attn_implementation(arguments.attn)
            except (ImportError, ValueError) as error:
                raise CliError("--attn", f"got {arguments.attn}: {error}") from None
        dtype = training_dtype(arguments, torch.float32, False)
        for parameter in model.parameters():  # buffers stay float32, as in `from_pretrained`
            parameter.data = parameter.data.to(dtype)
        return model.to(gpu), tokenizer
    name = os.fspath(checkpoint or arguments.model)
    continued = adapters.is_adapter(name)
    base = adapters.base_of(name, flag) if continued else name
    if Path(base).is_dir():
        base = str(Path(base).absolute())  # an adapter names it, from wherever it is loaded
    new_adapter = checkpoint is None and (arguments.lora_rank or arguments.lora_config)
    try:
        with torch.random.fork_rng(), loading_warnings():
            torch.manual_seed(arguments.seed)  # of weights that are new
            tokenizer = _load_tokenizer(AutoTokenizer, name, base)
            files = dtype_of_files(base, AutoConfig.from_pretrained(base))
            dtype = training_dtype(arguments, files, bool(frozen or continued or new_adapter))
            attention = {} if arguments.attn is None else {"attn_implementation": arguments.attn}
            model, info = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, output_loading_info=True, **attention,
                **adapters.quantization(arguments, dtype),
            )  # fmt: skip
    except CliError:
        raise
    except Exception as error:  # damaged files raise whatever their reader raises
        first = str(error).strip().split("\n")[0].rstrip(".")
        if arguments.attn is not None and "attention" in first.lower():
            raise CliError("--attn", f"got {arguments.attn}: {first}") from None
        raise CliError(
            flag,
            f"cannot load {base} ({type(error).__name__}: {first}); expected the directory or hub "
            "id of a causal language model, or `tiny`",
        ) from None
    missing = sorted(info["missing_keys"])
    if missing and not arguments.allow_new_weights:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CliError(
            flag,
            f"{base} has no weights for {', '.join(missing[:3])}{more} of {type(model).__name__}, "
            "which would start from random ones; expected all, or --allow-new-weights",
        )
    have = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > have:
        tokens = f"the tokenizer has {len(tokenizer)} tokens"
        raise CliError(flag, f"{name}: {tokens}; expected at most the model's {have}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CliError(
            flag,
            f"{base} holds an adapter that transformers has put into the model; expected a model, "
            "or the directory of an adapter without config.json",
        )
    if gpu is not None and arguments.quantize is None:
        model.to(gpu)
    check_causal(model, base, flag)
    if tokenizer.chat_template is None and any(row.messages is not None for row in rows):
        tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE  # saved with the model that learns it
    if continued:
        model = adapters.load_adapter(model, name, flag)
    elif new_adapter:
        with torch.random.fork_rng():
            torch.manual_seed(arguments.seed)
            model = adapters.add_adapter(model, arguments)
    if arguments.merge:
        adapters.check_merge(model)
    return model, tokenizer


def _load_tokenizer(auto: Any, name: str, base: str) -> Any:
    """That of an adapter, or of its base where it has none of its own."""
    has_own = name == base or (Path(name) / "tokenizer_config.json").is_file()
    return auto.from_pretrained(name if has_own else base)


def gpu_for_attention(arguments: argparse.Namespace) -> Any:
    """The device of this process, which has to be an accelerator.

    Raises:
        CliError: it is a CPU.
    """
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]  # no annotations

    if arguments.cpu or not torch.accelerator.is_available():
        problem = f"got {arguments.attn} on a CPU; expected eager or sdpa"
        raise CliError("--attn", problem)
    return PartialState().device


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
    """Set every dropout of a model to 0, of its configurations as well; how many values those were.

    Models draw it in modules of torch, or in functions with a probability that a module or the
    configuration holds under a name with "drop" in it (layer drop among them).
    """
    from torch.nn.modules.dropout import _DropoutNd

    owners = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    owners += [c.get_text_config() for c in owners if hasattr(c, "get_text_config")]
    owners += getattr(model, "peft_config", {}).values()
    changed = 0
    for owner in owners:
        names = ["p"] if isinstance(owner, _DropoutNd) else [n for n in vars(owner) if "drop" in n]
        for name in names:
            value = getattr(owner, name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
                setattr(owner, name, type(value)(0))
                changed += 1
    return changed


def check_reporters(arguments: argparse.Namespace) -> None:
    """Refuse a reporter that is not installed.

    Raises:
        CliError: it is not.
    """
    import transformers

    installed = transformers.integrations.get_available_reporting_integrations()
    for name in filter(None, (arguments.report_to or "").split(",")):
        if name not in installed:
            found = ", ".join(installed) or "none"
            problem = f"{name} is not installed; expected some of those that are ({found})"
            raise CliError("--report-to", problem)


def check_supported(arguments: argparse.Namespace, model: Any) -> None:
    """Refuse checkpointing or packing that the model does not have, and an option without effect.

    Raises:
        CliError: it does not have it; logits in float32 anyway.
    """
    from ift.patching import base_model

    weights = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if arguments.logits_dtype and not arguments.bf16 and all(d.itemsize > 2 for d in weights):
        raise CliError(
            "--logits-dtype",
            "got float32 without --bf16 and with weights in float32, whose logits are so anyway; "
            "expected one of the two in 16 bits",
        )
    if arguments.gradient_checkpointing and not model.supports_gradient_checkpointing:
        kind = type(base_model(model)).__name__
        raise CliError("--gradient-checkpointing", f"{kind} does not support it")
    if arguments.packing:
        check_packing(model)


def check_packing(model: Any) -> None:
    """Refuse a model that does not keep the rows of one sequence apart.

    Measured on two rows of three tokens in a sequence: the second one's logits do not depend on the
    first one, and are those that it has alone.

    Raises:
        CliError: they do, or are not.
    """
    import torch

    from ift.head_pass import evaluating
    from ift.patching import base_model

    name = type(base_model(model)).__name__
    first, second, third = token_ids(model, 3)
    rows = torch.tensor([[first, second, third, second, first, third],
                         [third, third, second, second, first, third]])  # fmt: skip
    rows = rows.to(model.device)
    positions = torch.arange(3, device=model.device).repeat(2)[None].expand(2, -1)
    with torch.no_grad(), evaluating(model):
        try:
            both = model(input_ids=rows, position_ids=positions, use_cache=False).logits[:, 3:]
            alone = model(input_ids=rows[:1, 3:], use_cache=False).logits[0]
        except (TypeError, RuntimeError, ValueError) as error:
            raise CliError("--packing", f"{name}: {error}") from None
    spread = alone.float().std()
    tolerance = 1e-3 if alone.dtype is torch.float32 else 0.1  # rounding of another shape
    apart = (both[0] - both[1]).float().abs().max() <= 1e-4 * spread
    if not apart or (both[0] - alone).float().abs().max() > tolerance * spread:
        raise CliError(
            "--packing",
            f"{name} does not keep the rows of a sequence apart (it needs more "
            "than position_ids that start anew); expected no --packing",
        )


def build_collator(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    """What makes batches of the run's rows."""
    from transformers import DataCollatorWithFlattening

    from ift.data import Collator

    return DataCollatorWithFlattening() if arguments.packing else Collator(padding_id(tokenizer))


def padding_id(tokenizer: Any) -> int:
    """The pad token, or any other: padding is masked out."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None)
