"""Runs that can be killed at any moment and then continued unchanged; `RunTrainer` for SFT and IFT.

A checkpoint is written beside its final place and renamed when it is whole. It also holds the sums
since the last record of the log, so that a record across an interruption is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback

from ift.cli.checkpoints import UNLOADABLE, checkpoints, damage_in
from ift.cli.weights import FINAL_DTYPE, converted, record_dtype
from ift.integrations.metrics import TargetMetrics
from ift.integrations.transformers import IFTTrainer

if TYPE_CHECKING:

    class _Base(TargetMetrics, Trainer):
        """What the mixin is used with."""

        model: Any
else:
    _Base = object

UNFINISHED = ".unfinished"  # subdirectory of the output in which things are written
WINDOW = "log_window_{}.json"  # of each process


@dataclasses.dataclass
class Window:
    """Sums since the last record of the log."""

    losses: list[float] = dataclasses.field(default_factory=list)  # one per forward
    steps: int = 0
    tokens: int = 0  # not counting padding
    seconds: float = 0.0  # of training; not of evaluation or saving
    metrics: list[float] | None = None  # the sums of `TargetMetrics`


class ResumableRun(_Base):
    """Mixin for a Trainer with `TargetMetrics`: atomic checkpoints and seamless resumption."""

    final_dtype = torch.float32  # of the weights that `save_final` writes
    merge = False  # an adapter into them

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = Window()
        self._pending: list[tuple[Tensor, Tensor]] = []  # (loss, tokens), still on the device
        self._staging: Path | None = None
        self._saved_dtype: torch.dtype | None = None
        # First: at the end of a step other callbacks measure the model.
        self.callback_handler.callbacks.insert(0, _Clock(self))

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the parent's, into a directory of its own that is renamed at the end."""
        name = f"checkpoint-{self.state.global_step}"
        with self._staged(Path(self.args.output_dir) / name) as unfinished:
            self._staging = unfinished.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._settle()
            sums = self._train_sums
            self.window.metrics = None if sums is None else sums.tolist()
            text = json.dumps(dataclasses.asdict(self.window))
            self._window_in(unfinished).write_text(text, encoding="utf-8")
            self._save_more(unfinished)
            if self.args.should_save:
                name = str(self.final_dtype).removeprefix("torch.")
                (unfinished / FINAL_DTYPE).write_text(name + "\n", encoding="utf-8")
        if self.args.should_save:
            self._delete_old_checkpoints()

    def _delete_old_checkpoints(self) -> None:
        """Keep the last ``save_total_limit``; a kill leaves no part of one among them."""
        output, limit = Path(self.args.output_dir), self.args.save_total_limit
        for checkpoint in checkpoints(output)[:-limit] if limit else ():
            unfinished = output / UNFINISHED / checkpoint.name
            unfinished.parent.mkdir(exist_ok=True)
            checkpoint.rename(unfinished)
            shutil.rmtree(unfinished.parent)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the parent's, at the learning rate of this run's schedule, which is another one than
        that of the checkpoint where the run was made longer."""
        with damage_in(Path(checkpoint or ""), UNLOADABLE):
            super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return
        rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in rates]
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with damage_in(Path(checkpoint or ""), UNLOADABLE):
            super()._load_rng_state(checkpoint)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's; training draws the same random numbers with it and without."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def save_final(self, path: Path) -> None:
        """Write model and tokenizer for `from_pretrained`, in one step as well.

        A whole model in `final_dtype`, an adapter as it is, a merged one as the model under it.
        """
        with self._staged(path) as unfinished:
            adapted: Any = self.accelerator.unwrap_model(self.model)
            if not hasattr(adapted, "peft_config"):
                self._saved_dtype = self.final_dtype
            elif self.merge:
                self.model = adapted.merge_and_unload()
            try:
                self.save_model(str(unfinished), _internal_call=True)
            finally:
                self._saved_dtype = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's; of a sharded model the whole weights, however FSDP keeps its own."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        sharded = isinstance(self.model, FSDPModule)  # not before training
        self._save(output_dir, self.accelerator.get_state_dict(self.model) if sharded else None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._saved_dtype is None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, converted(state_dict, self._saved_dtype, self.model))
        record_dtype(Path(output_dir or self.args.output_dir), self._saved_dtype)

    def restore_window(self, checkpoint: Path) -> None:
        """Take up the sums that a checkpoint carries."""
        self.window = Window(**json.loads(self._window_in(checkpoint).read_text(encoding="utf-8")))
        if self.window.metrics is not None:
            self._train_sums = torch.tensor(self.window.metrics, device=self.args.device)
        self._restore_more(checkpoint)

    def _save_more(self, directory: Path) -> None:
        """Write what else a subclass continues with, of this process."""

    def _restore_more(self, checkpoint: Path) -> None:
        """Read it again."""

    @contextlib.contextmanager
    def _staged(self, path: Path) -> Iterator[Path]:
        """A directory to write to, which becomes `path` at the end; after an error it does not."""
        unfinished = path.parent / UNFINISHED / path.name
        if self.args.should_save:
            shutil.rmtree(unfinished.parent, ignore_errors=True)  # left by a kill
            unfinished.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        yield unfinished
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            unfinished.parent.rmdir()

    def _window_in(self, checkpoint: Path) -> Path:
        return checkpoint / WINDOW.format(self.args.process_index)

    # ---- the log ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """As the parent's; remembers its loss and how many tokens it took."""
        mask = inputs.get("attention_mask")  # none in a batch without padding
        tokens = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        loss: Tensor = super().training_step(model, inputs, *args)
        self._pending.append((loss.detach(), tokens))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the parent's, with the mean loss over the window and tokens/s."""
        if "loss" in logs:
            logs = {**logs, **self._drain()}
        super().log(logs, *args, **kwargs)

    def _settle(self) -> None:
        """Fetch what is pending; as late as the log allows, for it waits for the device."""
        pending, self._pending = self._pending, []
        for loss, tokens in pending:
            self.window.losses.append(loss.item())
            self.window.tokens += int(tokens)

    def _drain(self) -> dict[str, float]:
        self._settle()
        window, self.window = self.window, Window()
        loss = sum(window.losses) / max(1, window.steps)
        if self.args.world_size > 1:
            both = torch.tensor([loss, float(window.tokens)], device=self.args.device)
            loss, tokens = self.accelerator.reduce(both, "sum").tolist()
            loss /= self.args.world_size
        else:
            tokens = window.tokens
        return {"loss": loss, "tokens_per_second": tokens / max(window.seconds, 1e-9)}


class RunTrainer(ResumableRun, IFTTrainer):
    """`ift.IFTTrainer` as ``ift train`` runs it."""


class _Clock(TrainerCallback):
    """Times the steps of a `ResumableRun`."""

    def __init__(self, trainer: ResumableRun) -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop, before anything is evaluated or saved."""
        self.trainer.window.seconds += time.perf_counter() - self.started
        self.trainer.window.steps += 1


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM finish the step, write a checkpoint and stop; on a second stop at once.

    ``with StopOnSignal() as stop: …; stop.received``

    Args:
        alone: is this the only process of the run? Several could stop at different steps, and wait
            for each other for ever; they keep the system's handlers.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.alone = alone
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM) if self.alone else ():
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop with a checkpoint; a run that has just ended has its own."""
        if self.received:
            control.should_save = control.should_training_stop = True
