"""`ProbeCallback`: a probe set measured every few updates of a transformers trainer."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ift import plotting
from ift.dynamics import report
from ift.dynamics.evaluate import Measurement, ProbeEvaluator
from ift.dynamics.monitor import SqueezeMonitor
from ift.dynamics.probes import Probe, read_probes
from ift.files import JsonlLog
from ift_kernels.common import checks

CURVES, TOKENS = "curves.jsonl", "tokens.jsonl"
REDRAW_SECONDS = 30.0  # a picture takes half a second; the last one is always drawn


class ProbeCallback(TrainerCallback):
    """Measures a probe set before training, every `every` updates, and at the end.

    It writes to `output` ``curves.jsonl`` (a line per evaluation: means over the probes by type,
    and the record of the squeezing monitor), ``tokens.jsonl`` (a line per evaluation and response,
    with every token), ``curves.png`` and ``curves.html``. A run resumed from a checkpoint continues
    the files from its step. Training is unchanged: same random state, no gradients.

    With several processes each measures (models may be sharded) and the first writes.

    Args:
        probes: the set, or its JSONL file.
        output: a directory; it is made.
        every: updates between evaluations, default 25.
        tokenizer: default: the trainer's.
        max_length: cut sequences at so many tokens, default 1024.
        tokens_per_forward: as `ProbeEvaluator`.
        monitor: default: a `SqueezeMonitor` with its defaults.
        token_log: whether to write ``tokens.jsonl``, default True.
        pictures: whether to draw ``curves.png`` and ``curves.html``, default True.

    Raises:
        TypeError, ValueError: `every` is no whole number of at least 1; neither `tokenizer` nor a
            processing class of the trainer; what `ProbeEvaluator` refuses.
    """

    def __init__(
        self,
        probes: Sequence[Probe] | str | os.PathLike[str],
        output: str | os.PathLike[str],
        *,
        every: int = 25,
        tokenizer: Any = None,
        max_length: int = 1024,
        tokens_per_forward: int = 512,
        monitor: SqueezeMonitor | None = None,
        token_log: bool = True,
        pictures: bool = True,
    ) -> None:
        if checks.integer("every", every) < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        self.probes: Sequence[Probe]
        if isinstance(probes, (str, os.PathLike)):
            self.probes = read_probes(Path(probes))
        else:
            self.probes = list(probes)
        self.output, self.every, self.tokenizer = Path(output), every, tokenizer
        self.options = {"max_length": max_length, "tokens_per_forward": tokens_per_forward}
        self.monitor = SqueezeMonitor() if monitor is None else monitor
        self.token_log, self.pictures = token_log, pictures
        self.evaluator: ProbeEvaluator | None = None
        if tokenizer is not None:  # errors in the set are raised at once
            self._prepare(tokenizer)
        self._drawn = 0.0
        self._measured: int | None = None  # the step of the last evaluation

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any
    ) -> None:
        """Prepare; continue the files of a resumed run; measure the model before training."""
        tokenizer = self.tokenizer or rest.get("processing_class")
        if tokenizer is None:
            raise ValueError("tokenizer: expected one, as the trainer has no processing_class")
        if self.evaluator is None:
            self._prepare(tokenizer)
        if state.is_world_process_zero:
            self.output.mkdir(parents=True, exist_ok=True)
            for name in (CURVES, TOKENS):
                # A new run starts at step 0 with an evaluation of its own.
                JsonlLog(self.output / name).rewind(state.global_step or -1)
        records = read_records(self.output) if state.global_step else []
        self.monitor.restore([r for r in records if r["step"] <= state.global_step])
        self._measured = None
        if state.global_step == 0:
            self.measure(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure when it is due."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.measure(model, state)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Measure the end of a run that stops before its last step."""
        if control.should_training_stop and self._measured != state.global_step:
            self.measure(model, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the last picture."""
        if state.is_world_process_zero:
            self._draw()

    def _prepare(self, tokenizer: Any) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        self.evaluator = ProbeEvaluator(self.probes, tokenizer, **self.options)

    def measure(self, model: Any, state: Any) -> dict[str, Any]:
        """Measure now and write; `state` has the step. Returns the record."""
        assert self.evaluator is not None
        inner = getattr(model, "module", model)  # what DDP wraps
        self._measured = state.global_step
        started = time.perf_counter()
        found = self.evaluator(inner)
        seconds = time.perf_counter() - started
        types = by_type(found)
        record: dict[str, Any] = {"step": state.global_step}
        if state.epoch is not None:
            record["epoch"] = state.epoch
        record |= {"seconds": seconds, "types": types}
        record["squeeze"] = self.monitor.update(state.global_step, types, found)
        if state.is_world_process_zero:
            if self.token_log:
                lines = (token_record(state.global_step, one) for one in found)
                JsonlLog(self.output / TOKENS).append(*lines)
            JsonlLog(self.output / CURVES).append(record)
            if time.monotonic() - self._drawn > REDRAW_SECONDS:
                self._draw()
        return record

    def _draw(self) -> None:
        if not self.pictures:
            return
        records = read_records(self.output)
        if records and plotting.available():
            report.plot_curves(records, self.output / "curves.png")
            report.write_html(records, self.output / "curves.html", self.output / "curves.png")
        self._drawn = time.monotonic()


def by_type(found: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    """Type → means over its probes of `Measurement.summary`, and their ``count``."""
    groups: dict[str, list[dict[str, float]]] = {}
    for one in found:
        groups.setdefault(one.type, []).append(one.summary())
    return {
        type_: {name: sum(each[name] for each in some) / len(some) for name in some[0]}
        | {"count": float(len(some))}
        for type_, some in groups.items()
    }


def token_record(step: int, one: Measurement) -> dict[str, Any]:
    """A line of ``tokens.jsonl``."""
    each = {
        "logprob": one.logprob,
        "greedy_logprob": one.argmax_logprob,
        "entropy": one.entropy,
        "distance": one.distance,
        "sum_sq": one.sum_sq,
    }
    rounded = {k: [float(f"{x:.7g}") for x in v.tolist()] for k, v in each.items()}
    ids = {"ids": one.ids.tolist(), "greedy": one.argmax.tolist()}
    return {"step": step, "probe": one.probe, "type": one.type, **one.summary(), **ids, **rounded}


def read_records(output: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The evaluations in a directory, by step; an incomplete last line is left out.

    Raises:
        ValueError: a line is no evaluation.
    """
    records = JsonlLog(Path(output) / CURVES).read()
    for number, record in enumerate(records, 1):
        if not (isinstance(record.get("types"), dict) and record["types"]):
            raise ValueError(f"{CURVES} line {number}: expected an evaluation of ProbeCallback")
    return records
