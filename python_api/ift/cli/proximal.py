"""Proximal SFT (arXiv 2508.17784): a ratio to the policy as it was some steps before, clipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ift.cli.trainer import RunTrainer
from ift.head_pass import evaluating
from ift.integrations.transformers import averaged_processes
from ift.losses import GRPOLoss
from ift.losses.preference import positive
from ift.one_pass import target_logprobs
from ift_kernels.common import checks

OLD = "old_logprob"  # in batches, and in the file of each process in a checkpoint


@dataclass(frozen=True)
class Proximal:
    """Options of PSFT; defaults as in the published code.

    Args:
        clip: ε: a token whose ratio is above 1 + ε has no gradient.
        old_steps: optimizer steps between two old policies; 1 is supervised fine-tuning.
    """

    clip: float = 0.28
    old_steps: int = 8

    def __post_init__(self) -> None:
        positive("clip", self.clip)
        if checks.integer("old_steps", self.old_steps) < 1:
            raise ValueError(f"old_steps: expected at least 1, got {self.old_steps}")


class ProximalTrainer(RunTrainer):
    """`RunTrainer` with the loss of PSFT, a mean over the tokens of the optimizer step.

    The batches of `old_steps` steps are fetched at once, and the log-probabilities of their targets
    computed, in evaluation mode: those of the old policy. An epoch ends such a window, and a
    checkpoint holds what is left of one. Evaluation is cross-entropy; ``clip_fraction``, the share
    of tokens without a gradient, joins the log.
    """

    token_means = ("clip_fraction",)

    def __init__(self, model: nn.Module, args: Any, *, loss: Proximal, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.proximal = loss
        self.policy_loss = GRPOLoss(kind="dapo", epsilon=loss.clip)
        self._ahead: list[tuple[list[Any], Any]] = []  # steps of this window: batches and count
        self._restored: list[list[Tensor]] = []  # of its steps, where a checkpoint was taken in it

    @property
    def _loss_metrics(self) -> dict[str, Tensor]:
        return self.policy_loss.metrics

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As the parent's, of batches with the old policy's log-probabilities."""
        if not self._ahead:
            left = self.state.max_steps - self.state.global_step
            old, self._restored = self._restored, []
            for _ in range(len(old) or min(self.proximal.old_steps, max(1, left))):
                step = super().get_batch_samples(epoch_iterator, num_batches, device)
                if not step[0]:
                    break
                self._ahead.append(step)
            for index, (batches, count) in enumerate(self._ahead):
                values = old[index] if old else [self._old_logprobs(batch) for batch in batches]
                made = [{**b, OLD: v} for b, v in zip(batches, values, strict=True)]
                self._ahead[index] = made, count
        return self._ahead.pop(0) if self._ahead else ([], None)

    @torch.no_grad()
    def _old_logprobs(self, batch: dict[str, Any]) -> Tensor:
        model = self.model_wrapped
        with evaluating(self._patched(model)):
            logprob, _ = target_logprobs(model, **self._prepare_inputs(batch))
        return logprob

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the parent's, with the ratio to the old policy."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        batch = {name: value for name, value in inputs.items() if name != OLD}

        def loss(logprob: Tensor, mask: Tensor) -> Tensor:
            value: Tensor = self.policy_loss(
                logprob, mask, torch.ones_like(logprob), inputs[OLD], num_items=num_items_in_batch
            )
            return value

        value, outputs = super().compute_loss(model, {**batch, "loss": loss}, True)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * averaged_processes(self)
        return (value, outputs) if return_outputs else value

    def _save_more(self, directory: Path) -> None:
        old = [[batch[OLD].cpu() for batch in batches] for batches, _ in self._ahead]
        torch.save(old, directory / f"{OLD}_{self.args.process_index}.pt")

    def _restore_more(self, checkpoint: Path) -> None:
        path = checkpoint / f"{OLD}_{self.args.process_index}.pt"
        self._restored = torch.load(path, map_location=self.args.device, weights_only=True)
