"""The responses of a probe set in tokens, and the groups that share a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ift.data import IGNORE_INDEX, encode
from ift.data_files import DataError
from ift.data_rows import Row
from ift.dynamics.probes import Probe, Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedResponse:
    """A response in tokens, and the tokens before it."""

    probe: int
    type: str
    prefix: tuple[int, ...]  # at least one token
    ids: tuple[int, ...]  # from the first target to the last
    target: tuple[int, ...]  # `ids`, IGNORE_INDEX at tokens of the template


def as_row(where: str, prompt: Prompt, response: str) -> Row:
    """The training row that has `response` as its one target."""
    if isinstance(prompt, str):
        return Row(where, {"prompt": prompt, "completion": response})
    messages = [*prompt, {"role": "assistant", "content": response}]
    return Row(where, {"messages": messages}, context=len(messages) - 1)


def encoded_responses(
    probes: Sequence[Probe], tokenizer: Any, max_length: int
) -> list[EncodedResponse]:
    """Every response in tokens, in the order of the set; those wholly cut off are left out.

    Raises:
        DataError: no response has a token left.
        TypeError: no probes, or a response that is no text.
    """
    for i, each in enumerate(probes):
        if not isinstance(each, Probe):
            raise TypeError(f"probes[{i}]: expected a Probe, got {type(each).__name__}")
        for name, text in each.responses.items():
            if not isinstance(text, str):
                got = type(text).__name__
                raise TypeError(f"probes[{i}]: expected text as response {name!r}, got {got}")
    named = [
        (i, t, p.prompt, text) for i, p in enumerate(probes) for t, text in p.responses.items()
    ]
    if not named:
        raise DataError("probes: expected at least one response, got none")
    rows = [as_row(f"probe {i} {t}", prompt, text) for i, t, prompt, text in named]
    encoded = encode(rows, tokenizer, max_length)
    if encoded.dropped:
        logger.warning("probes: %d of %d responses are beyond max_length %d and left out",
                       len(encoded.dropped), len(rows), max_length)  # fmt: skip
    found = []
    for index, example in zip(encoded.indices, encoded.examples, strict=True):
        probe, type_, *_ = named[index]
        ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        targets = [t for t, label in enumerate(labels) if label != IGNORE_INDEX and t > 0]
        part = slice(targets[0], targets[-1] + 1)
        found.append(EncodedResponse(probe, type_, tuple(ids[: part.start]), tuple(ids[part]),
                               tuple(labels[part])))  # fmt: skip
    return found


def groups_of(responses: list[EncodedResponse]) -> list[list[EncodedResponse]]:
    """Responses of one probe whose tokens before the response are the same."""
    groups: dict[tuple[int, tuple[int, ...]], list[EncodedResponse]] = {}
    for response in responses:
        groups.setdefault((response.probe, response.prefix), []).append(response)
    return list(groups.values())


def size_of(group: list[EncodedResponse]) -> int:
    """Distinct tokens of a group: the prompt once, each response but its last token."""
    return len(group[0].prefix) + sum(len(r.ids) - 1 for r in group)


def packed(groups: list[list[EncodedResponse]], budget: int) -> list[list[list[EncodedResponse]]]:
    """Groups in forwards of `budget` tokens, at least one each: first fit, largest first."""
    packs: list[list[list[EncodedResponse]]] = []
    sizes: list[int] = []
    for group in sorted(groups, key=size_of, reverse=True):
        size = size_of(group)
        place = next((i for i, used in enumerate(sizes) if used + size <= budget), None)
        if place is None:
            packs.append([group])
            sizes.append(size)
        else:
            packs[place].append(group)
            sizes[place] += size
    return packs
