"""Output of a run: ``log.jsonl``, the progress bar and ``curves.png``."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ift import plotting
from ift.files import JsonlLog
from ift.text import duration, number

# Keys of a record, in order; a key without a value (no evaluation at this step) is absent.
KEYS = (
    *("step", "epoch", "loss", "token_accuracy", "entropy", "eval_loss", "eval_token_accuracy"),
    *("clip_fraction", "loss_sft", "loss_ift", "eval_loss_sft", "eval_loss_ift", "eval_lam"),
    *(f"{of}{name}" for of in ("", "eval_") for name in plotting.PAIR_KEYS),
    *("lr", "lam", "grad_norm", "tokens_per_second"),
)
BAR = "{n_fmt}/{total_fmt} |{bar}| {desc}ETA {remaining}"


class RunLog(TrainerCallback):
    """Request records and evaluations when they are due, write them, and show progress.

    Both are due at the same steps, so that one step is one record.

    Args:
        log: where records go.
        eval_steps: evaluate every so many steps and at the end; None: no evaluation
            set.
        title: of the picture.
    """

    def __init__(self, log: JsonlLog, eval_steps: int | None, title: str) -> None:
        self.log = log
        self.eval_steps = eval_steps
        self.title = title
        self.record: dict[str, Any] = {}  # logged, waiting for its evaluation
        self.bar: Any = None
        self.first, self.started = 0, 0.0  # step and time at which this process began

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar where the run starts; on a terminal only, elsewhere records are lines."""
        state.compute_steps(args, state.max_steps)  # a resumed state has those of its checkpoint
        shown = state.is_world_process_zero and sys.stderr.isatty()
        self.first, self.started = state.global_step, time.monotonic()
        self.bar = tqdm(
            total=state.max_steps, initial=self.first, bar_format=BAR, dynamic_ncols=True,
            disable=not shown,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar; request a record and an evaluation when they are due."""
        self.bar.update()
        last = state.global_step >= state.max_steps
        if self.eval_steps and (last or state.global_step % self.eval_steps == 0):
            control.should_evaluate = True
        control.should_log |= last or control.should_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Write the record of a step, unless its evaluation comes first."""
        if "loss" in logs:  # else the evaluation, or the summary of the run
            named = {**logs, "step": state.global_step, "lr": logs["learning_rate"]}
            self.record = {key: named[key] for key in KEYS if named.get(key) is not None}
            if not control.should_evaluate:
                self._write(state)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any
    ) -> None:
        """Add the evaluation to the record of its step, and write that."""
        found = {**self.record, **metrics}
        self.record = {key: found[key] for key in KEYS if key in found}
        self._write(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the records at each checkpoint; the last one is at the end."""
        records = self.log.read() if state.is_world_process_zero and plotting.available() else []
        if records:
            plotting.plot_run(records, self.log.path.with_name("curves.png"), self.title)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()

    def _write(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.log.append(self.record)
        at = f"step {state.global_step}/{state.max_steps}"
        if not self.bar.disable:
            self.bar.set_description_str(words(self.record, gap=" ") + " ")
        elif "loss" in self.record:
            print(f"{at}  {words(self.record)}{self._eta(state)}", file=sys.stderr)
        if "eval_loss" in self.record:
            tqdm.write(f"{at}  held out: {words(self.record, 'eval_')}", file=sys.stderr)

    def _eta(self, state: Any) -> str:
        """The time that the other steps will take; evaluations are in it."""
        left, done = state.max_steps - state.global_step, state.global_step - self.first
        if not left or not done:
            return ""
        return f"  ETA {duration((time.monotonic() - self.started) * left / done)}"


def words(record: Mapping[str, Any], of: str = "", gap: str = "  ") -> str:
    """Loss, margin of a preference, accuracy and speed of a record, as far as it has them.

    >>> words({"loss": 2.3, "token_accuracy": 0.47, "tokens_per_second": 12345.6})
    'loss 2.30  accuracy 0.470  12.3k tokens/s'
    >>> words({"eval_loss": 0.6, "eval_reward_margin": 0.2, "eval_reward_accuracy": 0.75}, "eval_")
    'loss 0.600  margin 0.200  accuracy 0.750'
    """
    pairs = f"{of}reward_margin" in record
    keys = {"loss": "loss", "margin": "reward_margin",
            "accuracy": "reward_accuracy" if pairs else "token_accuracy"}  # fmt: skip
    parts = [f"{name} {number(record[of + key])}" for name, key in keys.items()
             if of + key in record]  # fmt: skip
    if not of and "tokens_per_second" in record:
        parts.append(f"{number(record['tokens_per_second'])} tokens/s")
    return gap.join(parts)
