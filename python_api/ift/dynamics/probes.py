"""Probe sets: prompts, each with responses of several types, made without another model."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ift.data import prompt_ids
from ift.data_columns import REWRITES
from ift.data_files import DataError, json_type, read_records
from ift.data_messages import check_encodable, check_messages
from ift.data_rows import FORMATS, pair_row, training_row
from ift.dynamics.rewrites import content_words, formatted, semantic
from ift.token_spans import tokenised
from ift_kernels.common import checks

logger = logging.getLogger(__name__)

Prompt = Any  # text, or a list of messages
Source = str | os.PathLike[str] | Sequence[Mapping[str, Any]]

# In the order of legends and tables; a file may have others.
TYPES = (
    "chosen",
    "rejected",
    "sample",
    "chosen_semantic",
    "chosen_format",
    "rejected_semantic",
    "rejected_format",
    "other_train",
    "unrelated",
    "fluent",
    "permuted",
    "random_words",
)
SIDES = ("chosen", "rejected")
TRIES = 64  # draws of an answer that differs
# Scripts without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
PROBE_FORMAT = '{"prompt": "…" or […], "responses": {"chosen": "…", …}}'


@dataclass(frozen=True)
class Probe:
    """A prompt, text or a list of messages, and the responses that are watched, by type."""

    prompt: Prompt
    responses: dict[str, str]
    by_rule: tuple[str, ...] = ()  # the types among them that rules made


def build_probe_set(
    data: Source,
    *,
    size: int = 64,
    test: Source | None = None,
    sample: Callable[[list[Prompt]], list[str]] | None = None,
    tokenizer: Any = None,
    rules: bool = False,
    fluent: Sequence[str] = (),
    seed: int = 0,
) -> list[Probe]:
    """Make probes from training rows.

    Every probe has, as far as there is material: ``chosen`` and ``rejected`` of its row;
    ``chosen_semantic`` and ``rejected_semantic``, the answer in other words, and ``chosen_format``
    and ``rejected_format``, another answer of its format, where the row has such keys (text, or a
    list of which the first is taken), or by `rules`; ``sample``, an answer of the model before
    training; ``other_train``, the answer to another training prompt; ``unrelated``, an answer from
    `test`; ``fluent``, a sentence that has nothing to do with the data; ``permuted``, the words of
    the chosen answer in random order; ``random_words``, as many words drawn from all answers. These
    are the types of the paper on learning dynamics. Words in a script without spaces (Chinese,
    Japanese, Thai and others) are tokens of `tokenizer`; without one, with one that has no offsets,
    or where a token is the whole word, they are characters.

    No answer equals, white space apart, the one that it is compared with: the chosen answer, and of
    rewrites of the rejected one that one too. Another is drawn or, where there is none, the type
    is left out; a warning counts those left out.

    Args:
        data: a file or rows as `ift.data_rows.read_rows` takes them, preferences or not; of a
            plain row the completion (the last assistant's turn) is the chosen answer. Rows with
            ``tools`` or ``chat_template_kwargs``, which a probe has not, are left out; a warning
            counts them.
        size: at most so many probes, drawn at random; default 64.
        test: rows in the same form that are not trained on.
        sample: prompts → answers, as `sampler` makes.
        tokenizer: of the model; needed for answers in a script without spaces alone.
        rules: make by `ift.dynamics.rewrites` the rewrites that no row has; they are in
            `Probe.by_rule`, and left out where no rule applies.
        fluent: sentences to draw ``fluent`` from, for rows that have none.
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
    rows = _without_template_options(_rows("data", data))
    other = [] if test is None else _rows("test", test)
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(len(rows)), min(size, len(rows))))
    words = _words([row["chosen"] for row in rows], tokenizer)
    pool = [word for text in words for word in text]
    made = [t for t in REWRITES if rules and t != "fluent" and not any(t in row for row in rows)]
    content = content_words([row["chosen"] for row in rows]) if made else []
    probes = []
    for index in chosen:
        row, answer_words = rows[index], words[index]
        responses = {k: row[k] for k in TYPES if k in row}
        answers = {"other_train": _other_answers(row, rows, draw)}
        if other:
            answers["unrelated"] = _unrelated(other, draw)
        answers["permuted"] = _permuted(answer_words, draw)
        answers["random_words"] = _random_words(len(answer_words), pool, draw)
        if fluent and "fluent" not in row:
            answers["fluent"] = iter(draw.sample(fluent, len(fluent)))
        responses |= {name: _differing(some, row["chosen"]) for name, some in answers.items()}
        found = _rewritten(row, made, content, draw)
        probes.append(Probe(row["prompt"], responses | found, tuple(found)))
    if sample is not None:
        for probe, text in zip(probes, sample([p.prompt for p in probes]), strict=True):
            probe.responses["sample"] = text
    return _compared(probes)


def _compared(probes: list[Probe]) -> list[Probe]:
    """The probes without answers that are empty or equal to what they are compared with."""
    missing: Counter[str] = Counter()
    made = []
    for probe in probes:
        kept: dict[str, str] = {}
        for name in (name for name in TYPES if name in probe.responses):
            text = probe.responses[name]
            compared = ("chosen", "rejected") if name.startswith("rejected_") else ("chosen",)
            if text and not any(_same(text, kept[o]) for o in compared if o in kept):
                kept[name] = text
            else:
                missing[name] += 1
        made.append(Probe(probe.prompt, kept, tuple(t for t in probe.by_rule if t in kept)))
    if missing:
        counts = ", ".join(f"{name} {missing[name]}" for name in TYPES if missing[name])
        logger.warning(
            "probes: of %d, left out where there is none, or none that differs from the answer "
            "that it is compared with: %s", len(probes), counts,
        )  # fmt: skip
    return made


def _same(one: str, other: str) -> bool:
    """Whether the texts are equal, white space apart."""
    space = "" if UNSPACED.search(one) else " "
    return space.join(one.split()) == space.join(other.split())


def _differing(answers: Iterable[str], answer: str) -> str:
    """The first that differs from `answer`; "" where there is none."""
    return next((other for other in answers if not _same(other, answer)), "")


def _other_answers(
    row: dict[str, Any], rows: list[dict[str, Any]], draw: random.Random
) -> Iterator[str]:
    """Chosen answers to other prompts, drawn, then all."""
    for other in itertools.chain(draw.choices(rows, k=TRIES), rows):  # seldom goes beyond TRIES
        if other["prompt"] != row["prompt"]:
            yield other["chosen"]


def _unrelated(other: list[dict[str, Any]], draw: random.Random) -> Iterator[str]:
    """Answers of the other set, drawn, then all."""
    for one in itertools.chain((draw.choice(other) for _ in range(TRIES)), other):
        yield one["chosen"]


def _permuted(words: list[str], draw: random.Random) -> Iterator[str]:
    """The words in other orders."""
    mixed = list(words)
    for _ in range(TRIES if len(set(words)) > 1 else 0):
        draw.shuffle(mixed)
        yield _joined(mixed)


def _random_words(count: int, pool: list[str], draw: random.Random) -> Iterator[str]:
    """`count` words of the pool."""
    return (_joined(draw.choices(pool, k=count)) for _ in range(TRIES if count else 0))


def _rewritten(
    row: dict[str, Any], types: list[str], pool: list[str], draw: random.Random
) -> dict[str, str]:
    """The rewrites of these types that rules make of a row, where they differ from its answers."""
    found = {}
    for name in types:
        side, _, kind = name.partition("_")
        text = row.get(side, "")
        made = semantic(text) if kind == "semantic" else formatted(text, pool, draw)
        differs = (t for t in made if not any(_same(t, row[s]) for s in SIDES if s in row))
        other = next(differs, None)
        if other is not None:
            found[name] = other
    return found


def _words(texts: list[str], tokenizer: Any) -> list[list[str]]:
    """Of each text the words that `_joined` joins, most with a space in front."""
    words = [[" " + word for word in text.split()] for text in texts]
    unspaced = [index for index, text in enumerate(texts) if UNSPACED.search(text)]
    their_texts = [texts[index] for index in unspaced]
    parts = itertools.repeat(([], None)) if tokenizer is None else tokenised(their_texts, tokenizer)
    for index, text, (_, offsets) in zip(unspaced, their_texts, parts, strict=False):
        words[index] = _pieces(text, offsets or [])
    return words


def _pieces(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    """The words of a text; one in a script without spaces is cut between its tokens.

    A character that several tokens share is not cut. Where there is no border of tokens, the word
    is cut between its characters, each with its combining marks.
    """
    tokens = {stop for (_, stop), (start, _) in itertools.pairwise(offsets) if stop <= start}
    characters = {i for i, one in enumerate(text) if unicodedata.category(one)[0] != "M"}
    pieces: list[str] = []
    for match in re.finditer(r"\S+", text):
        cuts: set[int] = set()
        unspaced = UNSPACED.search(match[0]) is not None
        if unspaced:
            inside = set(range(match.start() + 1, match.end()))
            cuts = tokens & inside or characters & inside
        borders = [match.start(), *sorted(cuts), match.end()]
        first, *rest = (text[start:stop] for start, stop in itertools.pairwise(borders))
        pieces += [first if unspaced and not pieces else " " + first, *rest]
    return pieces


def _joined(words: list[str]) -> str:
    return "".join(words).removeprefix(" ")


def _rows(name: str, source: Source) -> list[dict[str, Any]]:
    """prompt, chosen, template options and where there are, rejected and rewrites, of each row."""
    if isinstance(source, (str, os.PathLike)):
        lines = read_records(source, FORMATS)
    else:
        lines = [(row, f"{name}[{i}]") for i, row in enumerate(source)]
    if not lines:
        raise DataError(f"{name}: expected at least one row, got none")
    return [_row(raw, where) for raw, where in lines]


def _without_template_options(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose prompt is in training as a probe has it, of messages alone."""
    left = [row for row in rows if not row["template_options"]]
    names = "'tools' or 'chat_template_kwargs', which probes have not"
    if not left:
        raise DataError(f"data: every row has {names}; expected a row without")
    if len(left) < len(rows):
        logger.warning("probes: %d of %d rows have %s, and are left out",
                       len(rows) - len(left), len(rows), names)  # fmt: skip
    return left


def _row(raw: Any, where: str) -> dict[str, Any]:
    if isinstance(raw, dict) and "chosen" in raw and "rejected" in raw:
        pair = pair_row(raw, where)
        side, more = pair.chosen, {"rejected": prompt_and_answer(pair.rejected.content)[1]}
    else:
        side, more = training_row(raw, where), {}
    prompt, chosen = prompt_and_answer(side.content)
    options = side.template_options
    row = {"prompt": prompt, "chosen": chosen, "template_options": options, **more}
    for name, keys in REWRITES.items():
        for key in (key for key in keys if raw.get(key)):
            value = raw[key][0] if isinstance(raw[key], list) else raw[key]
            if not isinstance(value, str):
                raise DataError(f"{where}: {key!r} is a {json_type(value)}; expected text")
            check_encodable(value, where, key)
            row[name] = value
            break
    return row


def prompt_and_answer(content: dict[str, Any]) -> tuple[Prompt, str]:
    """Prompt and answer of a checked row."""
    messages = content.get("messages")
    if messages is None:
        return content["prompt"], content["completion"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]["content"]


def in_order(types: Iterable[str]) -> list[str]:
    """The types, those of `TYPES` first, in their order."""
    found = dict.fromkeys(types)
    return [t for t in TYPES if t in found] + [t for t in found if t not in TYPES]


def write_probes(probes: Sequence[Probe], path: str | Path) -> None:
    """Write a JSONL file, one probe a line."""
    lines = [
        json.dumps(
            {"prompt": p.prompt, "responses": p.responses}
            | ({"by_rule": p.by_rule} if p.by_rule else {}),
            ensure_ascii=False,
        )
        for p in probes
    ]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_probes(path: str | Path) -> list[Probe]:
    """Read and check a JSONL file of probes.

    Raises:
        DataError: the file is missing or empty, or a line is no probe.
    """
    probes = []
    for row, where in read_records(path, PROBE_FORMAT):
        good = isinstance(row, dict) and isinstance(row.get("responses"), dict)
        if not (good and row["responses"] and isinstance(row.get("prompt"), (str, list))):
            raise DataError(f"{where}: expected {PROBE_FORMAT}")
        prompt = row["prompt"]
        if isinstance(prompt, str):
            check_encodable(prompt, where, "prompt")
        else:
            answered = check_messages([*prompt, {"role": "assistant", "content": ""}], where)
            prompt = answered[:-1]
        for name, text in row["responses"].items():
            if not isinstance(text, str) or not text:
                raise DataError(f"{where}: response {name!r} is no text; expected {PROBE_FORMAT}")
            check_encodable(text, where, name)
        by_rule = row.get("by_rule", [])
        if not (isinstance(by_rule, list) and all(n in list(row["responses"]) for n in by_rule)):
            raise DataError(f"{where}: 'by_rule' is no list of types of its responses")
        probes.append(Probe(prompt, row["responses"], tuple(by_rule)))
    return probes


def sampler(
    model: Any, tokenizer: Any, *, max_new_tokens: int = 64, temperature: float = 1.0, seed: int = 0
) -> Callable[[list[Prompt]], list[str]]:
    """Prompts → answers of `model` as it is now, for `build_probe_set`.

    Args:
        max_new_tokens: longest answer, default 64; less where the model's positions end before. A
            prompt that leaves none, or has no token, gets no answer, "".
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
                ids = torch.tensor([prompt_ids(prompt, tokenizer)], device=model.device)
                length = min(max_new_tokens, positions - ids.shape[1])
                if length < 1 or not ids.numel():
                    answers.append("")
                    continue
                made = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids),
                    max_new_tokens=length, pad_token_id=tokenizer.pad_token_id, **options,
                )  # fmt: skip
                answers.append(_answer_text(prompt, made[0].tolist(), ids.shape[1], tokenizer))
        return answers

    return answer


def _answer_text(prompt: Prompt, ids: list[int], start: int, tokenizer: Any) -> str:
    """The text of the ids from `start`, which are the answer."""

    def decoded(part: list[int]) -> str:
        text: str = tokenizer.decode(
            part, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.encode("utf-8", "replace").decode()

    if isinstance(prompt, str):
        # Alone the ids would lose their leading space with a sentencepiece-like tokenizer.
        before, whole = decoded(ids[:start]), decoded(ids)
        if whole.startswith(before):
            return whole[len(before) :]
    return decoded(ids[start:])
