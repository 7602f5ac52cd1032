"""Measures cells: one implementation in one case each.

1. Every cell runs once in a fresh process: its memory, its errors, a first time. What is wrong is
   refused there and never timed. (What compiles does this in the process that it keeps.)
2. Then every implementation has one process, kept alive, and rounds go through all cells of a
   group in turn, so that a machine that slows down slows all of them. Its allocator is the one that
   users have, unless an option makes it keep what it frees. How many rounds a cell gets depends on
   its time and the budget; calls so long that a budget would not hold a second one keep the first.

On a GPU all of this is in one process: torch's allocator keeps the peak of a call in the place of a
fresh process, and what a cell has made is released with its group.

A group (one shape and dtype) shares its inputs and its rounds: ratios are meant within a group.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness import machine
from bench.harness.data import Wrong
from bench.harness.machine import Budget, freed_at_once, keep_freed, observe, synchronize
from bench.harness.worker import Failed, InProcess, Worker, release

# A call at least this long counts as a sample though it was made in a fresh process: what a first
# call costs on top (kernels generated, code paged in) is milliseconds.
LONG = 20.0
# Shorter calls are repeated within a sample until this has passed, against the clock's grain.
SAMPLE = 0.05
# Seconds between samples. Idle threads of OpenMP spin for some 15 ms before they sleep, and would
# take a core from the next process.
PAUSE = 0.03


class Subject(NamedTuple):
    """A cell made ready in the process that will run it."""

    call: Callable[[], Any]  # what is measured; returns the tensors that the caller would keep
    warm: Callable[[], Any]  # the same on a few rows
    check: Callable[[Any], dict[str, float]]  # errors of a result; raises Wrong
    device: torch.device
    compiled: bool = False  # the first call compiles
    host: bool = False  # on a GPU too, what counts is the time until the caller goes on


@dataclass
class Cell:
    """One implementation in one case, and what was found about it."""

    group: str
    case: str
    implementation: str
    prepare: Callable[..., Subject]  # called with `arguments`, in the process that measures
    arguments: tuple[Any, ...]
    estimate: float  # seconds of a call, a guess
    weight: float = 1.0  # its share of the time budget against other cells
    memory: bool = True  # does its memory mean anything?
    compiled: bool = False  # first called in the process that is kept, so that it compiles once
    samples: list[float] = field(default_factory=list)  # seconds
    host_samples: list[float] = field(default_factory=list)  # of a GPU: until the call returned
    extra_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    reason: str = ""  # why there are no samples

    @property
    def fresh(self) -> bool:
        """Does its first call want a process of its own?"""
        return self.memory and not self.compiled

    @property
    def seconds(self) -> float | None:
        """Median; None without samples."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def spread(self) -> float:
        """Largest deviation of a sample from the median, relative."""
        if not self.seconds:
            return 0.0
        return max(abs(sample / self.seconds - 1) for sample in self.samples)

    def record(self) -> dict[str, Any]:
        """What a report keeps of it."""
        names = ("case", "implementation", "seconds", "spread", "samples", "extra_bytes", "errors",
                 "reason")  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        if self.host_samples:
            found["host_seconds"] = statistics.median(self.host_samples)
        return found


Records = Iterator[dict[str, Any]]


class Suite(NamedTuple):
    """What ``python -m bench NAME`` measures."""

    about: str  # one line
    cases: Mapping[str, Any]  # by name; each has a title
    add_arguments: Callable[[argparse.ArgumentParser], None]
    # (arguments, settings, progress) → one record per group, as soon as the group is complete
    run: Callable[..., Records]


def by_name(*cases: Any) -> dict[str, Any]:
    """The cases of a suite, by name."""
    return {case.name: case for case in cases}


def record(
    name: str, shape: Sequence[int], dtype: str, cells: Sequence[Cell], titles: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a report keeps of a group; `titles` by case, `more` replaces what is empty."""
    return {
        "name": name, "shape": list(shape), "dtype": dtype, "data": {}, "titles": dict(titles),
        "plans": {}, "absent": {}, "cells": [cell.record() for cell in cells], **more,
    }  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    threads: int
    rounds: int = 5  # samples per cell, at most
    limit: float = 60.0  # seconds after which a call is given up
    keep_freed: bool = False  # do the processes that are timed keep the memory that they free?
    # For everything; cells get fewer rounds, never none.
    budget: Budget = field(default_factory=lambda: Budget(minutes=8))
    in_process: bool = False  # measure in this process, as a GPU wants it
    log: Path | None = None  # gets a line after each measurement, which nothing can take back

    def keep(self, cell: Cell) -> None:
        """Append what is known of a cell to the log."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"group": cell.group} | cell.record()) + "\n")

    def worker(self) -> Worker | InProcess:
        """What makes calls."""
        return InProcess() if self.in_process else Worker(self.threads)


def measure(
    cells: Sequence[Cell], settings: Settings, progress: Any, share: float = 1.0, whole: float = 1.0
) -> None:
    """Fill in the results of one group.

    Args:
        share: of the time left, what this group may take.
        whole: its share of the progress bar.
    """
    later = (1 - share) * max(settings.budget.left(), 0.0)
    cells = [cell for cell in cells if not cell.reason]
    with Crew(settings) as crew:
        guess = [0.3 + 2 * cell.estimate for cell in cells]
        for cell, cost in zip(cells, guess, strict=True):
            progress.at(f"checking {cell.group}: {cell.case}, {cell.implementation}")
            _first(cell, settings, crew)
            settings.keep(cell)
            progress.advance(whole / 2 * cost / sum(guess))
        cells = [cell for cell in cells if not cell.reason]
        # Kept processes start with a call of each of their cells, unless it is long.
        start = sum(0.1 + c.estimate for c in cells if c.estimate < LONG)
        counts = rounds(
            [cell.estimate for cell in cells],
            [cell.weight for cell in cells],
            [0 if cell.samples else 1 for cell in cells],
            settings.rounds,
            settings.budget.left() - later - start,
        )
        most, turns = max(counts, default=0), sum(counts)
        for turn in range(most):
            shift = turn % len(cells)  # so that no cell always follows the same one
            for i in (*range(shift, len(cells)), *range(shift)):
                if not cells[i].reason and due(turn, counts[i], most):
                    progress.at(f"round {turn + 1}/{most} {cells[i].group}: {cells[i].case}, "
                                f"{cells[i].implementation}")  # fmt: skip
                    _again(cells[i], crew)
                    settings.keep(cells[i])
                    progress.advance(whole / 2 / turns)


def rounds(
    costs: Sequence[float], weights: Sequence[float], fewest: Sequence[int], limit: int,
    budget: float,
) -> list[int]:  # fmt: skip
    """How many samples each cell gets: `limit` if time allows, else as many as its share buys.

    All cells have the same share of seconds, times their weight; it is the largest that fits
    the budget. No cell gets less than its number in `fewest`.
    """

    def buy(share: float) -> list[int]:
        return [
            min(limit, max(low, int(share * weight / cost))) if cost > 0 else limit
            for cost, weight, low in zip(costs, weights, fewest, strict=True)
        ]

    def total(counts: list[int]) -> float:
        return sum(count * cost for count, cost in zip(counts, costs, strict=True))

    low, high = 0.0, limit * max((c / w for c, w in zip(costs, weights, strict=True)), default=0.0)
    if total(buy(high)) <= budget:
        return buy(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total(buy(middle)) <= budget else (low, middle)
    return buy(low)


class Crew:
    """One worker per implementation, kept alive as long as a group is measured."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._workers: dict[str, Worker | InProcess] = {}

    def call(self, cell: Cell, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(cell.prepare, cell.arguments, *arguments)`` in the worker of `cell`."""
        name = cell.implementation
        if name not in self._workers:
            self._workers[name] = self._settings.worker()
            if self._settings.keep_freed:
                self._workers[name].call(keep_freed)
        try:
            return self.call_in(self._workers[name], cell, function, *arguments)
        except Failed:
            self._workers.pop(name).close()
            raise

    def call_in(
        self, worker: Worker | InProcess, cell: Cell, function: Callable[..., Any], *rest: Any
    ) -> Any:
        """The same in any worker, with time for inputs and check, or for a compilation."""
        limit = self._settings.limit
        limit = 2 * limit + 120 if cell.compiled else limit + 20
        return worker.call(function, cell.prepare, cell.arguments, *rest, limit=limit)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()
        forget()


def _first(cell: Cell, settings: Settings, crew: Crew) -> None:
    """Memory, errors and a first time of a cell."""
    try:
        if cell.fresh:
            with settings.worker() as worker:
                found = crew.call_in(worker, cell, _observe, settings.limit)
        else:
            found = crew.call(cell, _observe, settings.limit)
    except Failed as failure:
        cell.reason = str(failure)
        return
    seconds, cell.estimate = found["seconds"], max(found["seconds"], 1e-6)
    cell.errors, cell.reason = found["errors"], found["wrong"]
    cell.extra_bytes = found["extra_bytes"] if cell.memory else None
    if seconds > settings.limit:
        cell.reason = f"took {seconds:.0f} s, longer than the limit of {settings.limit:g} s"
    if seconds >= LONG and not cell.reason:
        cell.samples.append(seconds)


def _again(cell: Cell, crew: Crew) -> None:
    """One sample."""
    time.sleep(PAUSE)
    try:
        seconds, host = crew.call(cell, _sample, cell.estimate)
        cell.samples.append(seconds)
        cell.host_samples += [] if host is None else [host]
    except Failed as failure:
        cell.reason = str(failure)


def _observe(
    prepare: Callable[..., Subject], arguments: tuple[Any, ...], limit: float
) -> dict[str, Any]:
    """In the worker: memory, errors and time of a first call."""
    subject = _subject(prepare, arguments)
    compiles = subject.compiled or subject.device.type == "cuda"
    with freed_at_once():
        (subject.call if compiles else subject.warm)()
        result, seconds, extra = observe(subject.call, subject.device)
    errors: dict[str, float] = {}
    wrong = ""
    if seconds <= limit:
        try:
            errors = subject.check(result)
        except Wrong as error:
            wrong = f"wrong result: {error}"
    return {"seconds": seconds, "extra_bytes": extra, "errors": errors, "wrong": wrong}


def peak_bytes(
    prepare: Callable[..., Subject], arguments: tuple[Any, ...], settings: Settings
) -> int:
    """Bytes that a call takes over its inputs and results, in a fresh process.

    Raises:
        Failed: the call failed, took longer than the limit, or this system reports no memory.
    """
    try:
        with settings.worker() as worker:  # a limit of 0 s: nothing is checked
            found = worker.call(_observe, prepare, arguments, 0.0, limit=settings.limit + 20)
    finally:
        forget()
    if found["extra_bytes"] is None:
        raise Failed("this system does not report the memory of a process")
    return int(found["extra_bytes"])


def due(turn: int, count: int, rounds: int) -> bool:
    """Is a cell with `count` samples sampled in this of `rounds` rounds?"""
    return math.floor((turn + 1) * count / rounds) > math.floor(turn * count / rounds)


@functools.cache
def _subject(prepare: Callable[..., Subject], arguments: tuple[Any, ...]) -> Subject:
    """In the process that measures: made once, for memory and time."""
    return prepare(*arguments)


def forget() -> None:
    """Release the subjects of this process."""
    _ready.cache_clear()
    _subject.cache_clear()
    release()


@functools.cache
def _ready(
    prepare: Callable[..., Subject], arguments: tuple[Any, ...], estimate: float
) -> tuple[Subject, int]:
    """In a kept worker: a subject after its first call, and how often a sample repeats it."""
    subject = _subject(prepare, arguments)
    (subject.call if subject.compiled or estimate < LONG else subject.warm)()
    return subject, 1 if estimate >= LONG else max(1, math.ceil(SAMPLE / _time(subject, 1)[0]))


def _sample(
    prepare: Callable[..., Subject], arguments: tuple[Any, ...], estimate: float
) -> tuple[float, float | None]:
    subject, repeats = _ready(prepare, arguments, estimate)
    if repeats > 1:
        subject.call()  # caches have seen other processes since
    return _time(subject, repeats)


def seconds(subject: Subject, samples: int) -> float:
    """Median time of a call, after one that fills caches."""
    subject.call()
    return statistics.median(_time(subject, 1)[0] for _ in range(samples))


def _time(subject: Subject, repeats: int) -> tuple[float, float | None]:
    """Mean seconds of `repeats` calls, and of a GPU those until the first of them returned.

    What the last one returns is freed after the clock stops.
    """
    if subject.device.type == "cuda" and not subject.host:
        return _device_time(subject, repeats)
    result = None
    synchronize(subject.device)
    start = machine.now()
    for done in range(1, repeats + 1):
        result = subject.call()
        if done < repeats and machine.now() - start > 4 * SAMPLE:
            break  # far slower than it was at first: the machine is busy, and enough is enough
    synchronize(subject.device)
    seconds = (machine.now() - start) / done
    del result
    return seconds, None


def _device_time(subject: Subject, repeats: int) -> tuple[float, float]:
    """The same by the GPU's own clock, each call with cold caches.

    Writing over the second-level cache also gives the host a head start: its launches are seen only
    where the GPU has to wait for them. So the host's own time is reported beside it, of the first
    call: later ones may wait for a place in the queue.
    """
    cold = _cold(subject.device)
    synchronize(subject.device)
    marks, host = [], 0.0
    for at in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        start.record()
        begun = machine.now()
        result = subject.call()
        if not at:
            host = machine.now() - begun
        end.record()
        marks.append((start, end))
    synchronize(subject.device)
    del result
    return sum(start.elapsed_time(end) for start, end in marks) / 1e3 / repeats, host


@functools.cache
def _cold(device: torch.device) -> torch.Tensor:
    """Twice the second-level cache."""
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=device)
