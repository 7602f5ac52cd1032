"""A teacher's best ids and their log-probabilities per token, on disk: what `ift score --topk`
writes, a dataset of them, and its batches for `ift.losses.TopKDistillationLoss`.

A shard is a safetensors file. Of E examples with T tokens and N targets in all it holds ``starts``
and ``target_starts``, (E + 1,) int64 offsets; ``input_ids`` and ``labels``, (T,) int32; and of the
teacher at the targets ``teacher_ids`` (N, K) int32, ``teacher_logprob`` (N, K) and
``teacher_tail_logprob`` (N,), float32. ``index.json`` names the shards and is written last.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ift.data import Collator, Example
from ift.documents import IGNORE_INDEX, shifted_targets
from ift.files import replacing, write_text

INDEX, FORMAT = "index.json", "ift-teacher-1"


class Teacher(NamedTuple):
    """Of the targets of an example: the best ids, their log-probabilities, that of all others."""

    ids: Tensor  # (N, K) int, -100 where there is none
    logprob: Tensor  # (N, K)
    tail_logprob: Tensor  # (N,)


def write_shard(path: Path, examples: Sequence[Example], teachers: Sequence[Teacher]) -> None:
    """Write a shard in one step.

    Args:
        examples: ``input_ids`` and ``labels``.
        teachers: one for each.
    """
    tokens = {
        name: torch.cat([torch.from_numpy(example[name]).int() for example in examples])
        for name in ("input_ids", "labels")
    }
    tensors = {
        **tokens,
        "starts": _offsets([len(example["input_ids"]) for example in examples]),
        "target_starts": _offsets([len(teacher.ids) for teacher in teachers]),
        "teacher_ids": torch.cat([teacher.ids for teacher in teachers]).int().cpu(),
        "teacher_logprob": torch.cat([t.logprob for t in teachers]).float().cpu(),
        "teacher_tail_logprob": torch.cat([t.tail_logprob for t in teachers]).float().cpu(),
    }
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with replacing(path) as unfinished:  # `save_file` would hide it from other users
        unfinished.write_bytes(content)


def write_index(directory: Path, shards: Sequence[str], k: int, vocabulary: int) -> None:
    """Write ``index.json``, which makes the shards a `TeacherDataset`.

    Args:
        shards: names of the files, in order.
        k: ids per token.
        vocabulary: the rows of the teacher's head.
    """
    counts = []
    for name in shards:
        with safe_open(directory / name, "pt") as file:
            counts.append(file.get_slice("starts").get_shape()[0] - 1)
    named = [{"file": name, "examples": n} for name, n in zip(shards, counts, strict=True)]
    index = {"format": FORMAT, "k": k, "vocabulary": vocabulary, "shards": named}
    write_text(directory / INDEX, json.dumps(index, indent=1) + "\n")


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


class TeacherDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The examples of `ift score --topk`, in the order of its rows; a file is read when it is used.

    An example has ``input_ids`` and ``labels``, (T,), and of its N targets ``teacher_ids`` (N, K),
    ``teacher_logprob`` (N, K) and ``teacher_tail_logprob`` (N,).

    Args:
        directory: ``--output`` of `ift score`.
        vocabulary: rows of the student's head, if they are to be checked.

    Raises:
        ValueError: no index, another format, a file that is missing, another vocabulary.
    """

    def __init__(self, directory: str | Path, vocabulary: int | None = None) -> None:
        self.directory = Path(directory)
        try:
            index = json.loads((self.directory / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"directory: no {INDEX} can be read in {directory} ({error}); expected the output "
                "of `ift score --topk` that is complete"
            ) from None
        if index.get("format") != FORMAT:
            raise ValueError(
                f"directory: {directory}/{INDEX} is {index.get('format')!r}, expected {FORMAT!r}"
            )
        self.k, self.vocabulary = int(index["k"]), int(index["vocabulary"])
        if vocabulary is not None and vocabulary != self.vocabulary:
            raise ValueError(
                f"vocabulary: got {vocabulary}, expected {self.vocabulary}, that of the teacher in "
                f"{directory}"
            )
        self.files = [shard["file"] for shard in index["shards"]]
        for name in self.files:
            if not (self.directory / name).is_file():
                raise ValueError(f"directory: {directory}/{name} is missing, which {INDEX} names")
        self.firsts = _offsets([shard["examples"] for shard in index["shards"]]).tolist()
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"index: expected one of {len(self)} examples, got {index}")
        shard = bisect.bisect_right(self.firsts, place) - 1
        inside = place - self.firsts[shard]
        read = self._shard(self.files[shard])
        found: dict[str, Tensor] = {}
        for offsets, names in (
            ("starts", ("input_ids", "labels")),
            ("target_starts", ("teacher_ids", "teacher_logprob", "teacher_tail_logprob")),
        ):
            first, stop = read.get_slice(offsets)[inside : inside + 2].tolist()
            found |= {name: read.get_slice(name)[first:stop] for name in names}
        return found

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.directory / name, "pt")
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: a worker of a DataLoader opens its own."""
        return {**self.__dict__, "_open": {}}


@dataclass(frozen=True)
class TeacherCollator:
    """Batches of a `TeacherDataset`, padded on the right: what `ift.data.Collator` makes, and

    - ``target`` (B, T) int64: the shifted labels, -100 where there is none;
    - ``teacher_ids`` (B, T, K) int64, -100 where there is none;
    - ``teacher_logprob`` (B, T, K) and ``teacher_tail_logprob`` (B, T), float32, 0 there;

    at the positions of the hidden states that predict them. `model` takes the first three of
    ``input_ids``, ``attention_mask`` and ``labels``; the rest is for
    ``TopKDistillationLoss.from_hidden(hidden, weight, target, teacher_ids, teacher_logprob,
    teacher_tail_logprob=...)``.
    """

    pad_id: int  # any valid id

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = [{n: e[n].numpy() for n in ("input_ids", "labels")} for e in examples]
        batch: dict[str, Tensor] = Collator(self.pad_id)(rows)
        batch["target"] = shifted_targets(batch["labels"])
        there = batch["target"] != IGNORE_INDEX
        for name, fill in (
            ("teacher_ids", IGNORE_INDEX), ("teacher_logprob", 0.0), ("teacher_tail_logprob", 0.0)
        ):  # fmt: skip
            values = torch.cat([example[name] for example in examples])
            values = values if values.is_floating_point() else values.long()
            made = values.new_full((*there.shape, *values.shape[1:]), fill)
            made[there] = values
            batch[name] = made
        return batch
