"""Preference losses in ``ift train``: which there are, the frozen reference, and the trainer."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ift import losses
from ift.cli.trainer import RunTrainer
from ift.data import Collator
from ift.head_pass import evaluating
from ift.integrations.transformers import count_flags
from ift.losses import Loss
from ift.patching import base_model, patch
from ift.preference_data import EncodedPairs


class Kind(NamedTuple):
    """A preference loss of the command line."""

    build: Callable[..., Loss]
    options: dict[str, str]  # option of the command line → of the loss
    reference: bool = False


KINDS = {
    "dpo": Kind(
        losses.DPOLoss,
        {"beta": "beta", "label_smoothing": "label_smoothing", "dpo_kind": "kind"},
        reference=True,
    ),
    "kto": Kind(losses.KTOLoss, {"beta": "beta"}, reference=True),
    "orpo": Kind(losses.ORPOLoss, {"beta": "beta", "nll_weight": "nll_weight"}),
    "simpo": Kind(
        losses.SimPOLoss,
        {"beta": "beta", "margin": "gamma", "label_smoothing": "label_smoothing"},
    ),
    "cpo": Kind(
        # Means over rows: the trainer counts pairs of a step, not chosen tokens.
        functools.partial(losses.CPOLoss, nll="row"),
        {"beta": "beta", "nll_weight": "nll_weight", "label_smoothing": "label_smoothing"},
    ),
    "slic": Kind(losses.SLiCLoss, {"beta": "beta", "margin": "delta", "nll_weight": "nll_weight"}),
}
METRICS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy",
           "logprob_chosen", "logprob_rejected", "kl")  # fmt: skip


# ---- the reference -------------------------------------------------------------------------------


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module,
    examples: Iterable[dict[str, np.ndarray]],
    collate: Collator,
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """Summed log-probability of the targets of each example, float32 (n,); no logits are held."""
    waiting, sums = list(examples), []
    order = sorted(range(len(waiting)), key=lambda i: len(waiting[i]["input_ids"]))

    def keep(logprob: Tensor, mask: Tensor) -> Tensor:
        sums.append((logprob * mask).sum(1).float().cpu())
        return logprob.new_zeros(())

    with evaluating(model):
        for first in range(0, len(order), batch_size):
            batch = collate([waiting[i] for i in order[first : first + batch_size]])
            model(**{k: v.to(device) for k, v in batch.items()}, loss=keep)
    found = np.empty(len(order), np.float32)
    found[order] = torch.cat(sums).numpy()
    return found


def fingerprint(model: nn.Module, examples: Iterable[dict[str, np.ndarray]]) -> str:
    """Hash of everything that the log-probabilities depend on: weights, structure, data."""
    digest = hashlib.sha256(repr(base_model(model)).encode())
    config = getattr(base_model(model), "config", None)
    digest.update(b"" if config is None else config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    for example in examples:
        for part in (example["input_ids"], example["labels"]):
            digest.update(np.int64(len(part)).tobytes() + part.tobytes())
    return digest.hexdigest()


def add_reference(
    data: EncodedPairs,
    model: nn.Module,
    collate: Collator,
    batch_size: int,
    device: torch.device,
    cache: Path,
) -> bool:
    """Give every pair the reference sums of its sequences; from `cache` where they are known.

    Returns:
        Were they found there?
    """
    file = cache / f"{fingerprint(model, data.sides())}.npy"
    known = file.exists()
    if known:
        sums = np.load(file)
    else:
        patch(model)
        sums = sequence_logprobs(model, data.sides(), collate, 2 * batch_size, device)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.stem}.{os.getpid()}.npy")
        np.save(unfinished, sums)
        unfinished.replace(file)
    if data.examples:
        for example, mine in zip(data.examples, sums.reshape(len(data.examples), -1), strict=True):
            example["reference"] = mine
    return known


# ---- the trainer ---------------------------------------------------------------------------------


class PairTrainer(RunTrainer):
    """A `RunTrainer` of a preference loss over batches of `PairCollator`.

    The loss is a mean over the pairs (KTO: rows) of the whole optimizer step; evaluation measures
    the same loss, a mean over the pairs of the set. Rewards and margins join both logs.

    Args:
        loss: a module of `ift.losses`.
        The rest: as `RunTrainer`.
    """

    def __init__(self, *args: Any, loss: Loss, **kwargs: Any) -> None:
        self.pair_loss = loss
        super().__init__(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As the parent's, counting rows instead of tokens: what the losses are means over."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if count is None:
            return batches, None
        flags = [torch.zeros_like(batch["labels"][:, 0]) for batch in batches]
        return batches, count_flags(self, flags, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch of pairs, and sums for the logs."""
        batch = {k: inputs[k] for k in ("input_ids", "attention_mask", "labels")}
        rows = batch["labels"].shape[0]
        call: dict[str, Any] = {}
        paired = not isinstance(self.pair_loss, losses.KTOLoss)
        if num_items_in_batch is not None:
            name, share = ("num_pairs", 2) if paired else ("num_rows", 1)
            call[name] = torch.as_tensor(num_items_in_batch) / share
        if not paired:
            call["kl"] = self._kl(model, inputs)

        def loss(logprob: Tensor, mask: Tensor) -> Tensor:
            given = dict(call)
            if inputs.get("reference") is not None:
                given["reference"] = inputs["reference"]
            if not paired:
                given["desirable"] = torch.arange(rows, device=mask.device) < rows // 2
            value: Tensor = self.pair_loss(logprob, mask, **given)
            return value

        output = model(**batch, loss=loss)
        found = self.pair_loss.metrics
        tokens: Any = base_model(self.accelerator.unwrap_model(model)).ift_metrics
        pairs = rows / 2
        zero = torch.zeros((), device=output.loss.device)
        values = [found.get(name, zero).to(zero) * pairs for name in METRICS]
        values += [zero + pairs, *(tokens[k].to(zero) for k in ("correct", "entropy", "tokens"))]
        training = model.training
        sums, seen = torch.stack(values), self._sums[training]
        self._sums[training] = sums if seen is None else seen.to(sums) + sums
        value = output.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes  # DDP averages
        return (value, output) if return_outputs else value

    @torch.no_grad()
    def _kl(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """KTO's reference point, from prompts with other prompts' responses."""
        found: list[Tensor] = []

        def estimate(logprob: Tensor, mask: Tensor) -> Tensor:
            found.append(losses.kto_kl(logprob, mask, inputs["kl_reference"]))
            return logprob.new_zeros(())

        names = ("input_ids", "attention_mask", "labels")
        with evaluating(self.accelerator.unwrap_model(model)):
            model(**{k: inputs[f"kl_{k}"] for k in names}, loss=estimate)
        kl: Tensor = self.accelerator.gather(found[0]).mean()
        return kl

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The loss of a batch, and its share of the mean over all pairs."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
        pairs = torch.tensor(inputs["labels"].shape[0] / 2, device=loss.device).double()
        batch = torch.stack([loss.double() * pairs, pairs])
        self._evaluated = self._evaluated.to(batch) + batch
        return loss, None, None

    def _drained(self, *, training: bool) -> dict[str, float]:
        sums, self._sums[training] = self._sums[training], None
        if sums is None:
            return {}
        *metrics, pairs, correct, entropy, tokens = self.accelerator.reduce(sums, "sum").tolist()
        kept = {name: value / max(pairs, 1.0) for name, value in
                zip(METRICS, metrics, strict=True) if name in self.pair_loss.metrics}  # fmt: skip
        tokens = max(tokens, 1.0)
        return {**kept, "token_accuracy": correct / tokens, "entropy": entropy / tokens}
