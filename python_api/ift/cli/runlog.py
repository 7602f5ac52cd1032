"""Output of a run: ``log.jsonl``, the progress bar and ``curves.png``."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ift import plotting
from ift.files import JsonlLog

# Keys of a record, in order; a key without a value (no evaluation at this step) is absent.
KEYS = (
    *("step", "epoch", "loss", "token_accuracy", "entropy", "eval_loss", "eval_token_accuracy"),
    *("loss_sft", "loss_ift", "eval_loss_sft", "eval_loss_ift", "eval_lam"),
    *(f"{of}{name}" for of in ("", "eval_") for name in plotting.PAIR_KEYS),
    *("lr", "lam", "grad_norm", "tokens_per_second"),
)
SHOWN = ("loss", "eval_loss", "token_accuracy", "lr", "tokens_per_second")


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar where the run starts; on a terminal only, elsewhere records are lines."""
        shown = state.is_world_process_zero and sys.stderr.isatty()
        done, total = state.global_step, state.max_steps
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not shown)

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
        values = {k: f"{self.record[k]:.4g}" for k in SHOWN if k in self.record}
        if self.bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            print(f"step {state.global_step}/{state.max_steps}  {text}", file=sys.stderr)
        else:
            self.bar.set_postfix(values)
