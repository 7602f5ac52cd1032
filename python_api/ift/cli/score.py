"""``ift score``: log-likelihoods of the answers in a file, and a teacher's best ids, no logits."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ift.cli import options, processes
from ift.cli.errors import CliError, refusals
from ift.cli.models import (
    check_model_path,
    check_positions,
    check_supported,
    load_model,
    padding_id,
)
from ift.cli.processes import note
from ift.cli.score_rows import Record, examples_of, read_records
from ift.data import IGNORE_INDEX, Example
from ift.files import finite, write_text

HEADER, SUMMARY = "score.json", "summary.json"
CHANGED = {
    "fingerprint": "other weights, rows or precision",
    "answers": "other right answers or places of rows",
    "topk": "another --topk",
    "shard_rows": "another --shard-rows",
}


def run(arguments: argparse.Namespace) -> int:
    """Score, or continue; the process that finds all shards there writes the summary.

    Raises:
        CliError: bad input.
    """
    arguments = options.resolve(arguments)
    check_model_path(arguments.model)
    with refusals("FILE"):
        records = read_records(arguments)

    import torch  # from here on it takes seconds
    import transformers

    from ift.cli.reference import fingerprint
    from ift.head_pass import plain_head
    from ift.heads import head_weight
    from ift.patching import base_model, patch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = [row for record in records for row in record.answers]
    model, tokenizer = load_model(arguments, rows, None, frozen=True)
    examples = examples_of(records, rows, tokenizer, arguments)
    longest = max(len(e["input_ids"]) for found in examples for e in found)
    check_positions(model, longest, "FILE")
    check_supported(arguments, model)
    model.to(_device(arguments, torch))
    with refusals("--model"):
        patch(model, **options.of_head(arguments))
    base = base_model(model)
    vocabulary = head_weight(plain_head(base))[0].shape[0]
    if arguments.topk is not None and arguments.topk > vocabulary:
        raise CliError(
            "--topk", f"got {arguments.topk}; expected at most {vocabulary}, the head's tokens"
        )
    scored = [index for index, found in enumerate(examples) if found]
    step = arguments.shard_rows
    shards = [scored[first : first + step] for first in range(0, len(scored), step)]
    flat = [e for found in examples for e in found]
    header = {
        "fingerprint": fingerprint(base, flat, arguments.bf16),
        "answers": _digest_of_answers(records, examples),
        "topk": arguments.topk, "shard_rows": step, "shards": len(shards),
        "vocabulary": vocabulary, "model": arguments.model, "data": arguments.data,
    }  # fmt: skip
    output = Path(arguments.output)
    _check_output(output, header)
    done = [_is_done(output, number, arguments.topk) for number in range(len(shards))]
    if any(done):
        note(f"{sum(done)} of {len(shards)} shards are in {output} already")
    mine = [
        number
        for number in range(processes.rank(), len(shards), processes.count())
        if not done[number]
    ]
    total = sum(len(examples[index]) for number in mine for index in shards[number])
    with _progress(total) as progress, refusals("--model"):
        for number in mine:
            _score_shard(arguments, base, tokenizer, output, number, shards[number], records,
                         examples, progress)  # fmt: skip
    if not all(_is_done(output, number, arguments.topk) for number in range(len(shards))):
        note(f"this process is done; the last one writes {output / SUMMARY}")
        return 0
    _finish(output, header, shards, len(records) - len(scored))
    return 0


# ---- scoring -------------------------------------------------------------------------------------


def _device(arguments: argparse.Namespace, torch: Any) -> Any:
    """The accelerator of this process, or the CPU."""
    if arguments.cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    return torch.device(torch.accelerator.current_accelerator().type, local)


def _progress(total: int) -> Any:
    from tqdm import tqdm

    hidden = None if processes.is_first() else True  # None: unless it is a terminal
    return tqdm(total=total, desc="ift score", unit=" answers", disable=hidden, leave=False)


def _name(number: int, kind: str = "scores") -> str:
    return f"{kind}-{number:05d}.{'jsonl' if kind == 'scores' else 'safetensors'}"


def _is_done(output: Path, number: int, topk: int | None) -> bool:
    kinds = ("scores",) if topk is None else ("scores", "topk")
    return all((output / _name(number, kind)).is_file() for kind in kinds)


def _digest_of_answers(records: list[Record], examples: list[list[Example]]) -> str:
    """Of what the lines of scores have beside tokens: the rows' places and right answers."""
    found = [
        (index, record.label, len(answers))
        for index, (record, answers) in enumerate(zip(records, examples, strict=True))
        if answers
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _check_output(output: Path, header: dict[str, Any]) -> None:
    """Refuse a directory with other scores; leave the header in a new one."""
    path = output / HEADER
    try:
        # Before the header is looked for: another process writes that one first.
        scores = next(output.glob("scores-*.jsonl"), None)
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            for key, what in CHANGED.items():
                if saved.get(key) != header[key]:
                    raise CliError(
                        "--output", f"{output} has scores of {what}; expected a new directory"
                    )
            return
        if scores is not None:
            raise CliError("--output", f"{output} has scores without {HEADER}; expected both")
        output.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(header, indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise CliError("--output", f"cannot use {path} ({error})") from None


def _score_shard(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    output: Path,
    number: int,
    indices: list[int],
    records: list[Record],
    examples: list[list[Example]],
    progress: Any,
) -> None:
    """Score some rows; the file of their scores, written last, makes the shard complete."""
    from ift.teacher_shards import write_shard

    flat = [example for index in indices for example in examples[index]]
    order = sorted(range(len(flat)), key=lambda i: -len(flat[i]["input_ids"]))
    found: dict[int, Any] = {}
    for first in range(0, len(order), arguments.batch_size):
        batch = order[first : first + arguments.batch_size]
        scored = score(model, [flat[i] for i in batch], padding_id(tokenizer), arguments.topk,
                       bf16=arguments.bf16)  # fmt: skip
        found |= dict(zip(batch, scored, strict=True))
        progress.update(len(batch))
    if arguments.topk is not None:
        path = output / _name(number, "topk")
        write_shard(path, flat, [found[i][1] for i in range(len(flat))])
    scores = iter(found[i][0] for i in range(len(flat)))
    lines = [
        json.dumps(finite(_line(index, records[index], examples[index], scores)))
        for index in indices
    ]
    write_text(output / _name(number), "".join(f"{line}\n" for line in lines))


def _line(
    index: int, record: Record, examples: list[Example], scores: Iterator[list[float]]
) -> dict[str, Any]:
    """The scores of a row as JSON."""
    answers = []
    for example in examples:
        values, labels = next(scores), example["labels"][1:]
        answers.append({
            "logprob": math.fsum(values), "tokens": len(values),
            "token_ids": labels[labels != IGNORE_INDEX].tolist(), "token_logprobs": values,
        })  # fmt: skip
    line: dict[str, Any] = {"row": index, "where": record.where, "answers": answers}
    if len(record.answers) > 1:
        line |= {"label": record.label, "best": _best(answers)}
        line["best_per_token"] = _best(answers, per_token=True)
    return line


def _best(answers: list[dict[str, Any]], *, per_token: bool = False) -> int | None:
    """The answer with the largest log-probability, or the largest per token; of two the first.

    None where one has a NaN.
    """
    values = [a["logprob"] / (a["tokens"] if per_token else 1) for a in answers]
    return None if any(map(math.isnan, values)) else values.index(max(values))


def score(
    model: Any, examples: list[Example], pad_id: int, topk: int | None = None, *, bf16: bool = False
) -> list[tuple[list[float], Any]]:
    """Of each example the log-probabilities of its targets, and a `Teacher` with `topk`.

    Args:
        model: patched, `ift.patching.base_model` of it.
        topk: the teacher's ids per target.
    """
    import torch

    from ift.data import Collator
    from ift.documents import shifted_targets
    from ift.head_parts import refuse_adapter, select_rows
    from ift.head_pass import evaluating, head_pass
    from ift.losses.topk_distillation import selected_with_label
    from ift.patching import head_options, measured_model, original_forward
    from ift.teacher_shards import Teacher
    from ift.token_stats import transform_options
    from ift_kernels import linear_logprobs, linear_topk

    device = model.get_input_embeddings().weight.device
    batch = {name: value.to(device) for name, value in Collator(pad_id)(examples).items()}
    target = shifted_targets(batch.pop("labels"))
    valid = target != IGNORE_INDEX
    inputs = {**batch, "use_cache": False}
    head: dict[str, Any] = head_options(model)._asdict()
    del head["gradient"]

    def callback(hidden: Any, weight: Any, bias: Any, **adapter: Any) -> tuple[Any, Teacher | None]:
        mask = valid.to(hidden.device)
        rows, labels = hidden[mask], target[valid].to(hidden.device)
        given = {"bias": bias, **head, **transform_options(transform)}
        given |= select_rows(adapter, lambda value: value[mask])
        if topk is None:
            return linear_logprobs(rows, weight, labels, **given).logprob, None
        refuse_adapter("topk", adapter)
        ids = linear_topk(rows, weight, topk, **given).ids
        found, of_label = selected_with_label(rows, weight, ids, labels, **given)
        assert found.logprob is not None and found.tail_logprob is not None
        return of_label, Teacher(ids, found.logprob, found.tail_logprob)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with torch.no_grad(), evaluating(model), autocast:
        transform = measured_model(model, inputs).transform
        _, (logprob, teacher) = head_pass(model, original_forward(model), inputs, callback)
    lengths = valid.sum(1).tolist()
    parts: list[Teacher | None] = [None] * len(examples)
    if teacher is not None:
        split = [value.cpu().split(lengths) for value in teacher]
        parts = [Teacher(*values) for values in zip(*split, strict=True)]
    values = [part.tolist() for part in logprob.double().cpu().split(lengths)]
    return list(zip(values, parts, strict=True))


# ---- summary -------------------------------------------------------------------------------------


def _finish(output: Path, header: dict[str, Any], shards: list[list[int]], left_out: int) -> None:
    """Write the summary, and with a teacher the index of the shards, and print the former.

    Raises:
        CliError: a file of scores is damaged.
    """
    from ift.teacher_shards import write_index

    lines: list[dict[str, Any]] = []
    for number, rows in enumerate(shards):
        path = output / _name(number)
        try:
            read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            whole = [line["row"] for line in read] == rows
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise CliError("--output", f"{path} is damaged; expected whole files: delete it and "
                           "run again")  # fmt: skip
        lines += read
    found = summary(lines) | {"left_out": left_out}
    if header["topk"] is not None:
        names = [_name(number, "topk") for number in range(len(shards))]
        write_index(output, names, header["topk"], header["vocabulary"])
    write_text(output / SUMMARY, json.dumps(finite(found), indent=1) + "\n")
    shown = ", ".join(
        f"{name.replace('_', ' ')} {value:.6g}"
        for name, value in found.items()
        if value is not None
    )
    print(f"{output / SUMMARY}: {shown}")


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, perplexity of the answers (of several the right one), and accuracy of the choices.

    None where a log-probability is not finite, which `not_finite` rows have.
    """
    single = [line["answers"][line.get("label") or 0] for line in lines
              if len(line["answers"]) == 1 or line["label"] is not None]  # fmt: skip
    tokens = sum(answer["tokens"] for answer in single)
    total = math.fsum(
        math.nan if answer["logprob"] is None else answer["logprob"] for answer in single
    )
    chosen = [line for line in lines if line.get("label") is not None]

    def accuracy(name: str) -> float | None:
        if not chosen or any(line[name] is None for line in chosen):
            return None
        right = sum(bool(line[name] == line["label"]) for line in chosen)
        return right / len(chosen)

    return {
        "rows": len(lines),
        "tokens": tokens,
        "logprob": total,
        "perplexity": math.exp(min(-total / tokens, 700.0)) if tokens else None,
        "choices": len(chosen),
        "accuracy": accuracy("best"),
        "accuracy_per_token": accuracy("best_per_token"),
        "not_finite": sum(any(a["logprob"] is None for a in line["answers"]) for line in lines),
    }
