"""``ift score``: log-likelihoods of the answers in a file, and a teacher's best ids, no logits."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
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
from ift.cli.rows import tokenise
from ift.data import IGNORE_INDEX, Example
from ift.data_columns import CHOICE_KEYS, column_names, mapped_records
from ift.data_files import DataError, json_type
from ift.data_rows import FORMATS, Row, pair_row, training_row
from ift.files import finite, write_text

HEADER, SUMMARY = "score.json", "summary.json"
CHOICES = '{"prompt", "choices", "answer"}'
CHANGED = {
    "fingerprint": "other weights, rows or precision",
    "topk": "another --topk",
    "shard_rows": "another --shard-rows",
}


@dataclass(frozen=True)
class Record:
    """A row of the file: what answers it has, and which is right."""

    where: str
    answers: list[Row]
    label: int | None = None  # of several answers


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
    from ift.patching import base_model, patch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = [row for record in records for row in record.answers]
    model, tokenizer = load_model(arguments, rows, None, frozen=True)
    examples = _examples(records, rows, tokenizer, arguments)
    longest = max(len(e["input_ids"]) for found in examples for e in found)
    check_positions(model, longest, "FILE")
    check_supported(arguments, model)
    model.to(_device(arguments, torch))
    with refusals("--model"):
        patch(model, **options.of_head(arguments))
    base = base_model(model)
    vocabulary = plain_head(base).out_features
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
        "topk": arguments.topk, "shard_rows": step, "shards": len(shards),
        "vocabulary": vocabulary, "model": arguments.model, "data": arguments.data,
    }  # fmt: skip
    output = Path(arguments.output)
    _check_output(output, header)
    done = [(output / _name(number)).is_file() for number in range(len(shards))]
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
    if not all((output / _name(number)).is_file() for number in range(len(shards))):
        note(f"this process is done; the last one writes {output / SUMMARY}")
        return 0
    _finish(output, header, len(records) - len(scored))
    return 0


# ---- rows ----------------------------------------------------------------------------------------


def read_records(arguments: argparse.Namespace) -> list[Record]:
    """The rows of the file with their answers; for a teacher one answer each, as `ift train` reads.

    Raises:
        DataError: a malformed row.
    """
    formats = FORMATS if arguments.topk is not None else f"{FORMATS}, or {CHOICES}"
    names = column_names(arguments.columns, CHOICE_KEYS)
    unread = [key for key in CHOICE_KEYS if key in names and arguments.topk is not None]
    if unread:
        raise CliError("--columns", f"got {unread[0]!r} with --topk; expected keys of rows with "
                       "one answer")  # fmt: skip
    found = mapped_records(arguments.data, formats, names, arguments.system)
    if arguments.topk is None:
        return [record_of(*each) for each in found]
    rows = [training_row(*each) for each in found]
    bad = [row for row in rows if row.desirable is False]
    if bad:
        note(f"FILE: {len(bad)} of {len(rows)} rows have a false label and are left out "
             f"(first: {bad[0].where})")  # fmt: skip
    kept = [Record(row.where, [row]) for row in rows if row.desirable is not False]
    if not kept:
        raise DataError("every row has a false label; expected one with true")
    return kept


def record_of(row: Any, where: str) -> Record:
    """A row with choices, a preference (the chosen response is right), or one answer."""
    if isinstance(row, dict) and row.get("choices") is not None:
        return _choices(row, where)
    if isinstance(row, dict) and row.get("chosen") is not None and row.get("rejected") is not None:
        pair = pair_row(row, where)
        return Record(where, [pair.chosen, pair.rejected], 0)
    return Record(where, [training_row(row, where)])


def _choices(row: dict[str, Any], where: str) -> Record:
    rest = {key: value for key, value in row.items() if key not in ("choices", "answer")}
    choices, answer = row["choices"], row.get("answer")
    if "completion" in rest:
        raise DataError(f"{where}: got 'choices' and 'completion'; expected one of the two")
    if not isinstance(choices, list) or len(choices) < 2:
        got = f"a {json_type(choices)}" if not isinstance(choices, list) else f"{len(choices)}"
        raise DataError(f"{where}: 'choices' is {got}; expected an array of at least 2 answers")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if answer is not None and not (whole and 0 <= answer < len(choices)):
        raise DataError(
            f"{where}: 'answer' is {answer!r}; expected the text of a choice, or its place, from 0 "
            f"to {len(choices) - 1}"
        )
    rows = [training_row({**rest, "completion": choice}, where) for choice in choices]
    return Record(where, rows, answer)


def _examples(
    records: list[Record], rows: list[Row], tokenizer: Any, arguments: argparse.Namespace
) -> list[list[Example]]:
    """The examples of each record, none for a row that was left out."""
    encoded = tokenise(rows, tokenizer, arguments, "FILE", False)
    several = {record.where for record in records if len(record.answers) > 1}
    for where in (*encoded.truncated, *encoded.dropped):
        if where in several:
            raise CliError(
                "--max-length",
                f"got {arguments.max_length}, less than an answer of {where}; expected whole "
                "answers where there are several",
            )
    by_row = dict(zip(encoded.indices, encoded.examples, strict=True))
    found, first = [], 0
    for record in records:
        places = range(first, first + len(record.answers))
        found.append([by_row[place] for place in places if place in by_row])
        first = places.stop
    return found


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


def _check_output(output: Path, header: dict[str, Any]) -> None:
    """Refuse a directory with other scores; leave the header in a new one."""
    path = output / HEADER
    try:
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            for key, what in CHANGED.items():
                if saved.get(key) != header[key]:
                    raise CliError(
                        "--output", f"{output} has scores of {what}; expected a new directory"
                    )
            return
        if next(output.glob("scores-*.jsonl"), None) is not None:
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


def _best(answers: list[dict[str, Any]], *, per_token: bool = False) -> int:
    """The answer with the largest log-probability, or the largest per token; of two the first."""
    values = [a["logprob"] / (a["tokens"] if per_token else 1) for a in answers]
    return values.index(max(values))


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

    def callback(hidden: Any, weight: Any, bias: Any) -> tuple[Any, Teacher | None]:
        rows, labels = hidden[valid.to(hidden.device)], target[valid].to(hidden.device)
        given = {"bias": bias, **head, **transform_options(transform)}
        if topk is None:
            return linear_logprobs(rows, weight, labels, **given).logprob, None
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


def _finish(output: Path, header: dict[str, Any], left_out: int) -> None:
    """Write the summary, and with a teacher the index of the shards, and print the former."""
    from ift.teacher_shards import write_index

    numbers = range(header["shards"])
    lines: list[dict[str, Any]] = []
    for number in numbers:
        text = (output / _name(number)).read_text(encoding="utf-8")
        lines += [json.loads(line) for line in text.splitlines()]
    found = summary(lines) | {"left_out": left_out}
    if header["topk"] is not None:
        names = [_name(number, "topk") for number in numbers]
        write_index(output, names, header["topk"], header["vocabulary"])
    write_text(output / SUMMARY, json.dumps(finite(found), indent=1) + "\n")
    shown = ", ".join(
        f"{name.replace('_', ' ')} {value:.6g}"
        for name, value in found.items()
        if value is not None
    )
    print(f"{output / SUMMARY}: {shown}")


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, perplexity of the answers (of several the right one), and accuracy of the choices."""
    single = [line["answers"][line.get("label") or 0] for line in lines
              if len(line["answers"]) == 1 or line["label"] is not None]  # fmt: skip
    tokens = sum(answer["tokens"] for answer in single)
    total = math.fsum(
        math.nan if answer["logprob"] is None else answer["logprob"] for answer in single
    )
    chosen = [line for line in lines if line.get("label") is not None]

    def accuracy(name: str) -> float | None:
        right = sum(line[name] == line["label"] for line in chosen)
        return right / len(chosen) if chosen else None

    return {
        "rows": len(lines),
        "tokens": tokens,
        "logprob": total,
        "perplexity": math.exp(min(-total / tokens, 700.0)) if tokens else None,
        "choices": len(chosen),
        "accuracy": accuracy("best"),
        "accuracy_per_token": accuracy("best_per_token"),
    }
