"""Which tokens of a text belong to a part of it.

Some tokenizers put a space in front of every text, or join pieces across a border, so the tokens of
the parts need not be the tokens of the whole. The whole is tokenised, and its tokens are assigned
to the parts.
"""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Offsets = list[tuple[int, int]]  # per token its characters [start, stop) in the text

# Text put in front of a completion, so that it is tokenised as the middle of a text. The empty one
# serves byte-level BPE, letters serve word pieces: of several one does not join with what follows.
ANCHORS = ("", "\n", ":", "a", "e", "x", "z", "0")


def tokenised(
    texts: Sequence[str], tokenizer: Any, batch: int = 1024
) -> Iterator[tuple[list[int], Offsets | None]]:
    """Ids of each text without special tokens, and their offsets if the tokenizer has such.

    Batches use the tokenizer's own threads.
    """
    for first in range(0, len(texts), batch):
        encoded = tokenizer(
            list(texts[first : first + batch]), add_special_tokens=False, verbose=False
        )
        encodings = getattr(encoded, "encodings", None)  # a slow tokenizer has none
        for index, ids in enumerate(encoded["input_ids"]):
            yield list(ids), encodings[index].offsets if encodings else None


def token_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each text without special tokens."""
    return [ids for ids, _ in tokenised(texts, tokenizer)]


def prompt_and_completion_ids(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: Any
) -> list[tuple[list[int], list[int]] | None]:
    """Ids of each prompt as it is tokenised alone, and ids of the completion that continue it.

    Together they are the tokens of ``prompt + completion``. Where those do not start with the
    prompt's (a token across the border), the completion is tokenised on its own, such that the
    two together decode to what the whole decodes to; None where no such tokens are found.
    """
    before = token_ids(prompts, tokenizer)
    joined = [p + c for p, c in zip(prompts, completions, strict=True)]
    whole = token_ids(joined, tokenizer)
    found: list[tuple[list[int], list[int]] | None] = [
        (start, ids[len(start) :]) if ids[: len(start)] == start != ids else None
        for start, ids in zip(before, whole, strict=True)
    ]
    missing = [index for index, ids in enumerate(found) if ids is None]
    for anchor in ANCHORS:
        if not missing:
            break
        (head,) = token_ids([anchor], tokenizer)
        made = token_ids([anchor + completions[index] for index in missing], tokenizer)
        for index, ids in zip(missing, made, strict=True):
            start, rest = before[index], ids[len(head) :]
            if ids[: len(head)] == head and (
                _folded(start + rest, tokenizer) == _folded(whole[index], tokenizer)
                or (anchor and _ends_in_unknown(start, whole[index], tokenizer))
            ):
                found[index] = start, rest
        missing = [index for index in missing if found[index] is None]
    return found


def _ends_in_unknown(prompt: list[int], whole: list[int], tokenizer: Any) -> bool:
    """Whether an unknown word lies across the border: no tokens decode to its text."""
    shared = _shared_length(prompt, whole)
    return tokenizer.unk_token_id in whole[max(0, shared - 1) : shared + 1]


def token_spans(
    text: str, ids: list[int], offsets: Offsets | None, spans: Iterable[tuple[int, int]],
    tokenizer: Any,
) -> tuple[list[tuple[int, int]], bool]:  # fmt: skip
    """The tokens [first, stop) of each span of characters, and whether all borders are exact.

    A border is exact where no token has characters on both sides of it. A token across the start
    of a span is part of it, one across its end is not.
    """
    spans = list(spans)
    guesses = [_by_offsets(border, text, offsets) for span in spans for border in span]
    found: list[tuple[Any, Any]] = list(zip(guesses[::2], guesses[1::2], strict=True))
    # Offsets of some tokenizers are wrong, so the tokens have to decode to the span.
    unclear = [
        index
        for index, (first, stop) in enumerate(found)
        if first is None
        or stop is None
        or not _decodes_to(ids[first:stop], text[slice(*spans[index])], tokenizer)
    ]
    borders = [border for index in unclear for border in spans[index]]
    guesses = [guess for index in unclear for guess in found[index]]
    prefixes = token_ids([text[:border] for border in borders], tokenizer)
    exact, counts = True, []
    for border, guess, prefix in zip(borders, guesses, prefixes, strict=True):
        count = len(ids) if border == len(text) else _shared_length(prefix, ids)
        if border < len(text) and count < len(prefix):  # the tokens of prefix and whole diverge
            exact = exact and guess is not None
            count = count if guess is None else guess
        counts.append(count)
    for index, first, stop in zip(unclear, counts[::2], counts[1::2], strict=True):
        found[index] = first, stop
    return found, exact


def _shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at the start are the same."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _by_offsets(border: int, text: str, offsets: Offsets | None) -> int | None:
    """The number of tokens before a border; None where offsets do not decide it.

    Characters that no token covers leave it open: byte-level tokenizers cut leading spaces off
    their offsets.
    """
    if offsets is None:
        return None
    if border in (0, len(text)):
        return len(offsets) if border else 0
    count = bisect.bisect_right(offsets, border, key=lambda token: token[1])
    if count == 0 or not offsets[count - 1][0] < offsets[count - 1][1] == border:
        return None
    return count if count == len(offsets) or offsets[count][0] >= border else None


def _decodes_to(ids: list[int], text: str, tokenizer: Any) -> bool:
    decoded = _decoded(ids, tokenizer)
    return text in (decoded, " " + decoded)  # sentencepiece's decoders drop a leading space


def _decoded(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _folded(ids: list[int], tokenizer: Any) -> str:
    """The text of the ids in the form to which normalizers bring both sides of a border."""
    return unicodedata.normalize("NFKC", _decoded(ids, tokenizer)).casefold()
