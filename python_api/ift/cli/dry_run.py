"""``ift train --dry-run``: what a run would learn, and what it would take."""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import textwrap
import time
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ift.cli.losses import LOSSES, trainer_options
from ift.cli.models import build_collator
from ift.cli.options import of_head
from ift.cli.weights import optimizer_bytes
from ift.data import IGNORE_INDEX, Encoded, Example
from ift.data_rows import Row
from ift.preference_data import SIDES, PairCollator
from ift.text import duration, size
from ift_kernels import explain

WIDTH = 80
SHOWN_ROWS = 3
# Tokens of a long row that are shown: at its start, around the first target, and at its end.
AT_START, BEFORE_TARGET, FROM_TARGET, AT_END = 40, 20, 40, 20
BARS = "▁▂▃▄▅▆▇█"
BINS = 32
# A step is timed where it takes no more operations than these.
TIMED = {"cpu": 4e12}
TIMED_ELSEWHERE = 4e15


def show(
    arguments: argparse.Namespace,
    rows: Sequence[Any],
    model: Any,
    tokenizer: Any,
    loss: Any,
    sets: tuple[Encoded, Encoded],
    training_arguments: Any,
    steps: float,
) -> None:
    """Print rows in tokens, lengths, steps, memory and time.

    Args:
        rows: of the first of `sets`, before they were tokenised.
        loss: of `ift.cli.losses.build_loss`.
        sets: training and evaluation set.
        steps: optimizer steps of the run.
    """
    train, held_out = sets
    for index, example in list(zip(train.indices, train.examples, strict=True))[:SHOWN_ROWS]:
        for name, side in _named_sides(example):
            print(described(f"{rows[index].where}{name}", side, tokenizer))
    print(lengths([len(side["input_ids"]) for side in train.sides()], arguments.max_length))
    batch = train.examples[: arguments.batch_size]
    batches = -(-len(train.examples) // arguments.batch_size)
    forwards = min(arguments.accumulate, batches)  # of a step; an epoch ends in one
    step_rows = min(arguments.batch_size * arguments.accumulate, len(train.examples))
    for line in (
        f"--truncate {arguments.truncate}: {len(train.truncated)} rows of more than "
        f"{arguments.max_length} tokens, {len(train.dropped)} dropped without a token to learn",
        f"learned: {train.target_tokens} tokens of {len(train.examples)} rows in an epoch; "
        f"{len(held_out.examples)} rows for evaluation",
        f"steps: {steps:.0f} of {step_rows} rows",
        memory(model, arguments, _targets(batch), training_arguments.device),
        _time(arguments, rows, model, tokenizer, loss, batch, training_arguments, steps, forwards),
    ):
        print(textwrap.fill(line, WIDTH, subsequent_indent="  "))


def _named_sides(example: dict[str, Any]) -> list[tuple[str, Example]]:
    if "input_ids" in example:
        return [("", example)]
    sides = [name for name in SIDES if name in example and name != "kl"]
    named = [(f", {name}", example[name]) for name in sides]
    if "desirable" in example:
        named = [(f", {'good' if example['desirable'] else 'bad'} response", named[0][1])]
    return named


# ---- rows ----------------------------------------------------------------------------------------


def described(title: str, example: Example, tokenizer: Any) -> str:
    """The tokens of an example in lines of at most 80 columns; targets are in brackets."""
    ids = example["input_ids"].tolist()
    learned = (example["labels"] != IGNORE_INDEX).tolist()
    learned[0] = False  # predicted from nothing
    first = learned.index(True)
    shown = {*range(AT_START), *range(first - BEFORE_TARGET, first + FROM_TARGET)}
    shown |= set(range(len(ids) - AT_END, len(ids)))
    parts: list[str] = []
    skipped = 0
    for index, token in enumerate(ids):
        if index not in shown:
            skipped += 1
            continue
        if skipped:
            parts.append(f" … {skipped} more … ")
            skipped = 0
        text = token_text(token, tokenizer)
        if learned[index]:
            parts.append(f"[{text}]")
        else:
            parts.append(f"{text}·" if index + 1 < len(ids) and not learned[index + 1] else text)
    lines = _wrapped(parts, WIDTH - 2)
    count = f"{len(ids)} tokens, {sum(learned)} learned [in brackets]"
    return "\n".join([*_wrapped([f"{title}: ", count], WIDTH), *(f"  {line}" for line in lines)])


def token_text(token: int, tokenizer: Any) -> str:
    """A token as it can be read; what is no text is shown as the tokenizer names it."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if not text or "\ufffd" in text:
        text = name
    elif name.startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}" for c in text)


def _wrapped(parts: Sequence[str], width: int) -> list[str]:
    """Lines of whole parts; only one that is wider than a line is cut."""
    lines, line, used = [], "", 0
    for part in parts:
        if used + _columns(part) > width and used:
            lines.append(line)
            line, used = "", 0
        for character in part:
            if used + _columns(character) > width:
                lines.append(line)
                line, used = "", 0
            line, used = line + character, used + _columns(character)
    return [*lines, line] if line else lines


def _columns(text: str) -> int:
    """Columns of a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def lengths(counts: Sequence[int], limit: int) -> str:
    """Tokens per row: smallest, median, largest, and how they are distributed."""
    least, most = min(counts), max(counts)
    heights, _ = np.histogram(counts, bins=min(BINS, most - least + 1), range=(least, most + 1))
    top = heights.max()
    bars = "".join(
        " " if not height else BARS[round((len(BARS) - 1) * height / top)] for height in heights
    )
    return (
        f"tokens per row: min {least}, median {statistics.median(counts):g}, max {most} "
        f"(--max-length {limit})\n  {least} {bars} {most}"
    )


# ---- memory and time -----------------------------------------------------------------------------


def memory(model: Any, arguments: argparse.Namespace, targets: int, device: Any) -> str:
    """Bytes of weights, gradients, optimizer and output head; activations come on top."""
    weights = {p.data_ptr(): p for p in model.parameters()}.values()
    trained = [p for p in weights if p.requires_grad]
    head = model.get_output_embeddings().weight
    vocabulary, width = head.shape
    dtype = torch.bfloat16 if arguments.bf16 else head.dtype
    plan = explain(
        max(1, targets), vocabulary, width, torch.float32 if arguments.logits_dtype else dtype,
        need_weight=head.requires_grad, gradient=arguments.gradient, device=device,
    )  # fmt: skip
    kind = LOSSES[arguments.loss]
    copies = 2 if kind.reference and not kind.pairs else 1  # with the frozen model, if it is alike
    parts = {
        "weights": copies * sum(p.nbytes for p in weights),
        "gradients": sum(p.nbytes for p in trained),
        arguments.optimizer: optimizer_bytes(trained, arguments.optimizer),
        "head": plan.peak_bytes,
    }
    shown = " + ".join(f"{name} {size(count)}" for name, count in parts.items())
    return f"memory: {shown} = {size(sum(parts.values()))}, and activations"


def _targets(batch: Sequence[dict[str, Any]]) -> int:
    return sum(int((side["labels"][1:] != IGNORE_INDEX).sum()) for side in _every(batch))


def _every(batch: Sequence[dict[str, Any]]) -> list[Example]:
    return [side for example in batch for _, side in _named_sides(example)]


def _time(
    arguments: argparse.Namespace,
    rows: Sequence[Any],
    model: Any,
    tokenizer: Any,
    loss: Any,
    batch: Sequence[dict[str, Any]],
    training_arguments: Any,
    steps: float,
    forwards: int,
) -> str:
    """The time of the run by that of a batch, or its operations where that would take long."""
    sides = _every(batch)
    tokens = [len(side["input_ids"]) for side in sides]
    padded = sum(tokens) if arguments.packing else len(sides) * max(tokens)
    parameters = sum(p.numel() for p in model.parameters())
    # Per weight and token a multiplication and an addition, forward and twice backward.
    operations = 6.0 * parameters * padded
    device = training_arguments.device
    of_run = steps * forwards
    if operations > TIMED.get(device.type, TIMED_ELSEWHERE):
        return (
            f"time: not measured; about {operations:.1e} operations (6 × parameters × tokens) for "
            f"{len(batch)} rows, {operations * of_run:.1e} in the run"
        )
    seconds = _measured(arguments, rows, model, tokenizer, loss, batch, training_arguments)
    return (
        f"time: {duration(seconds)} for forward and backward of {len(batch)} rows on {device.type} "
        f"(measured); {duration(seconds * of_run)} for {steps:.0f} steps, without evaluation"
    )


def _measured(
    arguments: argparse.Namespace,
    rows: Sequence[Any],
    model: Any,
    tokenizer: Any,
    loss: Any,
    batch: Sequence[dict[str, Any]],
    training_arguments: Any,
) -> float:
    """Seconds of forward and backward of a batch, the second time; no weight changes."""
    kind = LOSSES[arguments.loss]
    collate = build_collator(arguments, tokenizer)
    options = trainer_options(loss)
    if kind.pairs:
        collate = PairCollator(collate)
        options["single"] = isinstance(rows[0], Row)
    if kind.reference and not kind.pairs:  # another one would take no other time
        options["reference"] = copy.deepcopy(model)
    elif kind.reference:
        sums = np.zeros(len(SIDES), np.float32)
        batch = [{**example, "reference": sums} for example in batch]
    settings = copy.copy(training_arguments)
    with tempfile.TemporaryDirectory() as directory:  # a trainer makes its output
        settings.output_dir = directory
        trainer = kind.trainer_class(
            model, settings, data_collator=collate, train_dataset=list(batch),
            **of_head(arguments), **options,
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1
        seconds = 0.0
        for _ in range(2):
            (inputs,), count = trainer.get_batch_samples(
                iter([collate(list(batch))]), 1, settings.device
            )
            start = time.perf_counter()
            trainer.training_step(trainer.model, inputs, count).item()
            seconds = time.perf_counter() - start
    return seconds
