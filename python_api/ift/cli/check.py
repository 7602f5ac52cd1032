"""``ift check``: the fused loss and gradients of a model on rows of a file, beside naive ones."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from ift.cli import adapters, options, processes
from ift.cli.errors import CliError, refusals
from ift.cli.losses import LOSSES, build_loss
from ift.cli.models import (
    build_collator,
    check_model_path,
    check_positions,
    check_supported,
    load_model,
)
from ift.cli.rows import read_rows, tokenise
from ift.data_rows import Row

UNSERVED = ("asft", "psft")  # losses of a second model, frozen or old


def run(arguments: argparse.Namespace) -> int:
    """Check; exit code 0 where it is right, 1 where it is wrong or refused.

    Raises:
        CliError: bad input.
    """
    arguments = options.resolve(arguments)
    if arguments.loss in UNSERVED:
        served = ", ".join(name for name in LOSSES if name not in UNSERVED)
        raise CliError("--loss", f"got {arguments.loss}; expected one of {served}")
    check_model_path(arguments.model)
    if arguments.peft is not None and not adapters.is_adapter(arguments.peft):
        raise CliError("--peft", f"no adapter_config.json in {arguments.peft}; expected an adapter")
    rows = read_rows(arguments)[0][: arguments.rows]

    import torch  # from here on it takes seconds
    import transformers

    from ift.checking import check
    from ift.config import IFTConfig
    from ift.patching import base_model, patch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, loss = LOSSES[arguments.loss], build_loss(arguments)
    model, tokenizer = load_model(arguments, rows, None)
    if arguments.peft is not None:
        model = adapters.load_adapter(model, arguments.peft, "--peft")
    check_supported(arguments, model)
    device = _device(arguments, torch)
    model.to(device)
    batch = _batch(arguments, rows, tokenizer, model, loss)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    given: dict[str, Any] = {"tolerance": arguments.tolerance}
    if isinstance(loss, IFTConfig):
        given["ift"] = loss
    elif kind.pairs:
        given["loss"] = _of_pairs(loss, model, batch, reference=kind.reference)
    elif loss is not None:
        given["loss"] = loss
    batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
    join = processes.count() > 1 and not torch.distributed.is_initialized()
    if join:
        torch.distributed.init_process_group()
    if processes.count() > 1:
        given["shard"] = shard
    if arguments.logits_dtype or arguments.deterministic:
        with refusals("--model"):
            patch(base_model(model), **options.of_head(arguments))
    with refusals("--data"):
        report = check(model, batch, **given)
    if processes.is_first():
        print(json.dumps(report.as_json(), indent=2) if arguments.json else report)
    if join:
        torch.distributed.destroy_process_group()
    return 0 if report.ok else 1


def shard(model: Any) -> Any:
    """FSDP2 over the layers of a model, and over the rest of it."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if type(layer).__name__ in _whole_layers(model):
                    fully_shard(layer)
    return fully_shard(model)


def _whole_layers(model: Any) -> set[str]:
    """Classes of layers, as transformers names them."""
    from ift.patching import base_model

    return set(getattr(base_model(model), "_no_split_modules", None) or ())


def _device(arguments: argparse.Namespace, torch: Any) -> Any:
    """The accelerator of this process, or the CPU."""
    if arguments.cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    device = torch.device(torch.accelerator.current_accelerator().type, local)
    torch.accelerator.set_device_index(local)
    return device


def _batch(
    arguments: argparse.Namespace, rows: list[Any], tokenizer: Any, model: Any, loss: Any
) -> dict[str, Any]:
    """The rows as the trainers get them."""
    from ift.preference_data import PairCollator

    kind = LOSSES[arguments.loss]
    data = tokenise(rows, tokenizer, arguments, "--data", False)
    if not data.examples:
        raise CliError("--data", "no row has a completion token; expected one")
    check_positions(model, max(len(row["input_ids"]) for row in data.sides()), "--data")
    collator = build_collator(arguments, tokenizer)
    made: dict[str, Any] = (PairCollator(collator) if kind.pairs else collator)(data.examples)
    if kind.pairs and not loss.pairs and not isinstance(rows[0], Row):
        import torch

        made["desirable"] = torch.arange(len(made["labels"])) < len(made["labels"]) // 2
    return made


def _of_pairs(
    loss: Any, model: Any, batch: dict[str, Any], *, reference: bool
) -> Callable[..., Any]:
    """A preference loss as a function of log-probability and mask.

    Its reference is near the model itself, so that neither is right by being 0.
    """
    import torch

    from ift.checking.naive import next_tokens, of_logits
    from ift.head_pass import evaluating

    with torch.no_grad(), evaluating(model):
        given = {k: batch[k] for k in ("input_ids", "attention_mask")}
        logprob, _, _ = of_logits(model(**given).logits, next_tokens(batch["labels"]))
    sums = logprob.sum(1)
    more: dict[str, Any] = {}
    if reference:
        more["reference"] = sums + torch.linspace(-1, 1, len(sums)).to(sums)
    if not loss.pairs:
        more["desirable"] = batch["desirable"]
        if loss.options.get("kind") != "apo_zero":
            more["kl"] = sums.new_tensor(0.1)
    return lambda logprob, mask: loss(logprob, mask, **more)
