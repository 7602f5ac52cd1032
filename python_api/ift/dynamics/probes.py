"""Probe sets: prompts, each with responses of several types, none of which needs a paid model."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ift.data import (
    FORMATS,
    DataError,
    check_encodable,
    check_messages,
    checked_row,
    json_type,
    parsed_lines,
)
from ift.preference_data import pair_row
from ift_kernels import checks

Prompt = Any  # text, or a list of messages
Source = str | os.PathLike[str] | Sequence[Mapping[str, Any]]

# In the order of legends and tables; a file may have others.
TYPES = (
    "chosen",
    "rejected",
    "sample",
    "chosen_paraphrase",
    "rejected_paraphrase",
    "other_train",
    "unrelated",
    "permuted",
    "random_words",
)
PROBE_FORMAT = '{"prompt": "…" or […], "responses": {"chosen": "…", …}}'


@dataclass(frozen=True)
class Probe:
    """A prompt, text or a list of messages, and the responses that are watched, by type."""

    prompt: Prompt
    responses: dict[str, str]


def build_probe_set(
    data: Source,
    *,
    size: int = 64,
    test: Source | None = None,
    sample: Callable[[list[Prompt]], list[str]] | None = None,
    seed: int = 0,
) -> list[Probe]:
    """Make probes from training rows.

    Every probe has, as far as there is material: ``chosen`` and ``rejected`` of its row;
    ``chosen_paraphrase`` and ``rejected_paraphrase`` where the row has such keys (text, or a list
    of which the first is taken); ``sample``, an answer of the model before training;
    ``other_train``, the answer to another training prompt; ``unrelated``, an answer from `test`;
    ``permuted``, the words of the chosen answer in random order; ``random_words``, as many words
    drawn from all answers.

    Args:
        data: a JSONL file or rows as `ift.data.read_jsonl` takes them, preferences or not; of a
            plain row the completion (the last assistant's turn) is the chosen answer.
        size: at most so many probes, drawn at random; default 64.
        test: rows in the same form that are not trained on.
        sample: prompts → answers, as `sampler` makes.
        seed: of every draw.

    Returns:
        The probes, in the order of the data.

    Raises:
        DataError: rows that cannot be used.
        ValueError: `size` below 1.

    >>> rows = [{"prompt": f"Q{i}?", "completion": f"the answer {i}"} for i in range(5)]
    >>> probes = build_probe_set(rows, size=2)
    >>> sorted(probes[0].responses)
    ['chosen', 'other_train', 'permuted', 'random_words']
    """
    if checks.integer("size", size) < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    rows = _rows("data", data)
    other = [] if test is None else _rows("test", test)
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(len(rows)), min(size, len(rows))))
    words = [word for row in rows for word in row["chosen"].split()]
    probes = []
    for index in chosen:
        row = rows[index]
        responses = {k: row[k] for k in TYPES if row.get(k)}
        responses["other_train"] = _other_answer(row, rows, draw)
        responses["unrelated"] = draw.choice(other)["chosen"] if other else ""
        own = row["chosen"].split()
        responses["permuted"] = _permuted(own, draw)
        responses["random_words"] = " ".join(draw.choices(words, k=len(own))) if words else ""
        probes.append(Probe(row["prompt"], responses))
    if sample is not None:
        for probe, text in zip(probes, sample([p.prompt for p in probes]), strict=True):
            probe.responses["sample"] = text
    return [
        Probe(p.prompt, {k: p.responses[k] for k in TYPES if p.responses.get(k)}) for p in probes
    ]


def _other_answer(row: dict[str, Any], rows: list[dict[str, Any]], draw: random.Random) -> str:
    """The chosen answer to another prompt, not the same one; "" where there is none."""
    for other in itertools.chain(draw.choices(rows, k=64), rows):  # seldom are all looked at
        if other["prompt"] != row["prompt"] and other["chosen"] != row["chosen"]:
            answer: str = other["chosen"]
            return answer
    return ""


def _permuted(words: list[str], draw: random.Random) -> str:
    """The words in another order; nothing where there is none."""
    if len(set(words)) < 2:
        return ""
    mixed = list(words)
    while mixed == words:
        draw.shuffle(mixed)
    return " ".join(mixed)


def _rows(name: str, source: Source) -> list[dict[str, Any]]:
    """prompt, chosen and where there are, rejected and paraphrases, of each row."""
    if isinstance(source, (str, os.PathLike)):
        lines = parsed_lines(Path(source), FORMATS)
    else:
        lines = [(row, f"{name}[{i}]") for i, row in enumerate(source)]
    if not lines:
        raise DataError(f"{name}: expected at least one row, got none")
    return [_row(raw, where) for raw, where in lines]


def _row(raw: Any, where: str) -> dict[str, Any]:
    if isinstance(raw, dict) and "chosen" in raw and "rejected" in raw:
        pair = pair_row(raw, where)
        prompt, chosen = _split(pair.chosen.content)
        row = {"prompt": prompt, "chosen": chosen, "rejected": _split(pair.rejected.content)[1]}
    else:
        prompt, chosen = _split(checked_row(raw, where))
        row = {"prompt": prompt, "chosen": chosen}
    for key in ("chosen_paraphrase", "rejected_paraphrase"):
        value = raw.get(key, raw.get(key + "s"))
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{where}: {key!r} is a {json_type(value)}; expected text")
        check_encodable(value, where, key)
        row[key] = value
    return row


def _split(content: dict[str, Any]) -> tuple[Prompt, str]:
    """Prompt and answer of a checked row."""
    messages = content.get("messages")
    if messages is None:
        return content["prompt"], content["completion"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]["content"]


def write_probes(probes: Sequence[Probe], path: str | Path) -> None:
    """Write a JSONL file, one probe a line."""
    lines = [
        json.dumps({"prompt": p.prompt, "responses": p.responses}, ensure_ascii=False)
        for p in probes
    ]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_probes(path: str | Path) -> list[Probe]:
    """Read and check a JSONL file of probes.

    Raises:
        DataError: the file is missing or empty, or a line is no probe.
    """
    probes = []
    for row, where in parsed_lines(Path(path), PROBE_FORMAT):
        good = isinstance(row, dict) and isinstance(row.get("responses"), dict)
        if not (good and row["responses"] and isinstance(row.get("prompt"), (str, list))):
            raise DataError(f"{where}: expected {PROBE_FORMAT}")
        if isinstance(row["prompt"], str):
            check_encodable(row["prompt"], where, "prompt")
        else:
            check_messages([*row["prompt"], {"role": "assistant", "content": ""}], where)
        for name, text in row["responses"].items():
            if not isinstance(text, str) or not text:
                raise DataError(f"{where}: response {name!r} is no text; expected {PROBE_FORMAT}")
            check_encodable(text, where, name)
        probes.append(Probe(row["prompt"], row["responses"]))
    return probes


def sampler(
    model: Any, tokenizer: Any, *, max_new_tokens: int = 64, temperature: float = 1.0, seed: int = 0
) -> Callable[[list[Prompt]], list[str]]:
    """Prompts → answers of `model` as it is now, for `build_probe_set`.

    Args:
        max_new_tokens: longest answer, default 64; less where the model's positions end before. A
            prompt that leaves none gets no answer, "".
        temperature: of sampling, default 1; 0 is greedy.
        seed: of sampling; the state of torch's generator is left as it was.

    Raises:
        TypeError, ValueError: `max_new_tokens` below 1, a negative temperature.
    """
    if checks.integer("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not checks.number("temperature", temperature) >= 0:
        raise ValueError(f"temperature: expected a number ≥ 0, got {temperature}")

    def answer(prompts: list[Prompt]) -> list[str]:
        import torch

        from ift.head_pass import evaluating

        options: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        answers: list[str] = []
        positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        with torch.random.fork_rng(), torch.no_grad(), evaluating(model):
            torch.manual_seed(seed)
            for prompt in prompts:
                ids = torch.tensor([_prompt_ids(prompt, tokenizer)], device=model.device)
                room = min(max_new_tokens, positions - ids.shape[1])
                if room < 1:
                    answers.append("")
                    continue
                made = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids),
                    max_new_tokens=room, pad_token_id=tokenizer.pad_token_id, **options,
                )  # fmt: skip
                text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
                answers.append(text.encode("utf-8", "replace").decode())
        return answers

    return answer


def _prompt_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The ids that training puts before an answer."""
    from ift.data import encode
    from ift.dynamics.evaluate import as_row

    (example,) = encode([as_row("prompt", prompt, "x")], tokenizer, 1 << 20).examples
    first = int((example["labels"] >= 0).argmax())
    ids: list[int] = example["input_ids"][:first].tolist()
    return ids
