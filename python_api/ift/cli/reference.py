"""The frozen reference model of ``ift train``: its log-probabilities, computed once and cached."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ift.cli import processes
from ift.cli.adapters import adapts
from ift.cli.errors import CliError
from ift.cli.models import load_model, turn_off_dropout
from ift.cli.options import of_head
from ift.data import Collator
from ift.files import replacing, write_text
from ift.head_pass import evaluating
from ift.one_pass import target_logprobs
from ift.patching import base_model, head_options, patch
from ift.preference_data import EncodedPairs


def fingerprint(model: nn.Module, examples: Iterable[dict[str, np.ndarray]], bf16: bool) -> str:
    """Hash of everything the log-probabilities depend on: weights, structure, data, precision."""
    digest = hashlib.sha256(repr(base_model(model)).encode())
    digest.update(b"bf16" if bf16 else b"")
    head = head_options(base_model(model))
    if head.logits_dtype is not None or head.deterministic:
        digest.update(f"{head.logits_dtype} {head.deterministic}".encode())
    config = getattr(base_model(model), "config", None)
    digest.update(b"" if config is None else config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    for example in examples:
        for part in (example["input_ids"], example["labels"]):
            digest.update(np.int64(len(part)).tobytes() + part.tobytes())
    return digest.hexdigest()


@torch.no_grad()
def add_reference(
    data: EncodedPairs,
    model: nn.Module,
    collate: Collator,
    batch_size: int,
    device: torch.device,
    cache: Path,
    *,
    bf16: bool = False,
    expected_by: str | None = None,
) -> bool:
    """Add the reference sums of its sequences to every pair; from `cache` where it has them.

    Sums are of the log-probabilities of a sequence's targets; no logits are held. With `bf16` under
    autocast, and with the options of the model's patch, as the policy is computed. A damaged file
    is computed and written again.

    Args:
        expected_by: of a resumed run, the option that names the reference.

    Returns:
        Whether the cache had them.

    Raises:
        CliError: a resumed run whose cache holds others.
    """
    waiting = list(data.sides())
    file = cache / f"{fingerprint(model, waiting, bf16)}.npy"
    if expected_by is not None and cache.is_dir() and not file.exists():
        raise CliError(
            expected_by,
            "got a reference of other weights or configuration, other tokens or another precision "
            f"than when the run was started; expected the one whose log-probabilities are in "
            f"{cache}",
        )
    sums = _read_sums(file, len(waiting))
    cached = sums is not None
    if sums is None:
        patch(model)
        order, parts = sorted(range(len(waiting)), key=lambda i: len(waiting[i]["input_ids"])), []
        with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for first in range(0, len(order), 2 * batch_size):
                batch = collate([waiting[i] for i in order[first : first + 2 * batch_size]])
                logprob, mask = target_logprobs(
                    model, **{k: v.to(device) for k, v in batch.items()}
                )
                parts.append((logprob * mask).sum(1).float().cpu())
        sums = np.empty(len(order), np.float32)
        sums[order] = torch.cat(parts).numpy()
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished, unfinished.open("wb") as stream:
            np.save(stream, sums)
    if data.examples:
        for example, mine in zip(data.examples, sums.reshape(len(data.examples), -1), strict=True):
            example["reference"] = mine
    return cached


def _read_sums(file: Path, count: int) -> np.ndarray | None:
    """The reference sums in a file of the cache; None if it is not there or not whole."""
    try:
        with file.open("rb") as stream:
            sums: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    return sums if sums.dtype == np.float32 and sums.shape == (count,) else None


def add_references(
    arguments: argparse.Namespace,
    policy: tuple[Any, Any],
    rows: list[Any],
    sets: tuple[Any, ...],
    collator: Collator,
    device: torch.device,
    *,
    resumed: bool,
) -> None:
    """Add the reference's log-probabilities to the pairs: of a model loaded here, or the policy.

    Args:
        policy: the model before training, or None if it is that no more, and the tokenizer.
        resumed: the run continues from a checkpoint, so the reference has to be that of its start.

    Raises:
        CliError: another reference than that; one with other token ids.
    """
    model, tokenizer = policy
    flag = _flag_of_reference(arguments)
    if model is None:
        model = load_reference(arguments, tokenizer, rows, resumed=resumed)
    if arguments.quantize is None:  # else it was loaded there, and cannot be moved
        model.to(device)
    patch(model, **of_head(arguments))  # as the policy
    cache = Path(arguments.output) / "reference"
    for data in sets:
        if data.examples and add_reference(
            data, model, collator, arguments.batch_size, device, cache, bf16=arguments.bf16,
            expected_by=flag if resumed else None,
        ):  # fmt: skip
            processes.note(
                f"reference log-probabilities of {len(data.examples)} examples read from {cache}"
            )


def _flag_of_reference(arguments: argparse.Namespace) -> str:
    return "--model" if arguments.reference is None else "--reference"


def load_reference(
    arguments: argparse.Namespace, tokenizer: Any, rows: list[Any], *, resumed: bool
) -> Any:
    """A model of its own of ``--reference``, by default of ``--model`` before training.

    Raises:
        CliError: one with other token ids than `tokenizer` has.
    """
    flag = _flag_of_reference(arguments)
    named = argparse.Namespace(**vars(arguments))
    named.model = arguments.reference or arguments.model
    frozen = arguments.reference is not None and adapts(arguments)
    if frozen:  # as it is, without a new adapter
        named.lora_rank = named.lora_config = None
    model, its_tokenizer = load_model(named, rows, None, flag, frozen=frozen)
    if arguments.reference is None and not arguments.dropout:
        turn_off_dropout(model)  # as of the policy that was the reference of the first process
    policy_of = "--model" if not resumed else "the checkpoint"
    vocabularies = its_tokenizer.get_vocab(), tokenizer.get_vocab()
    check_same_tokens(flag, named.model, policy_of, *vocabularies)
    return model


def frozen_reference(
    arguments: argparse.Namespace, tokenizer: Any, rows: list[Any], *, resumed: bool
) -> Any:
    """`load_reference` for a loss that takes its distributions, which no file could hold.

    Its fingerprint is kept in ``DIR/reference``.

    Raises:
        CliError: another reference than that of the start of a resumed run.
    """
    model = load_reference(arguments, tokenizer, rows, resumed=resumed)
    file = Path(arguments.output) / "reference" / "fingerprint"
    found = fingerprint(model, (), arguments.bf16)
    if resumed and (not file.is_file() or file.read_text(encoding="utf-8").strip() != found):
        raise CliError(
            _flag_of_reference(arguments),
            "got a reference of other weights or configuration than when the run was started; "
            f"expected the one of {file}",
        )
    if not resumed and processes.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, found + "\n")
    return model


def check_same_tokens(
    flag: str, reference: str, policy: str, theirs: dict[str, int], ours: dict[str, int]
) -> None:
    """Refuse a reference model for which the ids of the data would be other tokens.

    Args:
        flag: the option that names `reference`.
        policy: where the policy is from.
    """
    for token in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(token), ours.get(token)
        if there != here:
            raise CliError(
                flag,
                f"{reference}: the token {token!r} is {there} in its tokenizer; expected {here} as "
                f"in that of {policy}",
            )
