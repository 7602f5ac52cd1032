"""`PairTrainer`: the trainer of ``ift train`` for preference losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]  # no annotations
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from ift import losses
from ift.cli.trainer import ResumableRun
from ift.head_pass import evaluating
from ift.integrations.metrics import TargetMetrics
from ift.integrations.transformers import refuse_unsupported
from ift.losses import Loss
from ift.losses.dpo import SORTED
from ift.one_pass import target_logprobs
from ift.patching import patch
from ift.plotting import PAIR_KEYS

NAMES = ("input_ids", "attention_mask", "labels")


class EvalPair(NamedTuple):
    """What the loss of an evaluated pair is made of."""

    chosen: Tensor  # log-probability of each target
    rejected: Tensor
    reference: list[float] | None  # sums of both
    kl: Tensor | None  # (3,), as `reference_point` takes them


class PairTrainer(ResumableRun, TargetMetrics, Trainer):
    """`transformers.Trainer` with a preference loss over batches of `PairCollator`.

    The loss is a mean over the pairs (KTO: rows) of the whole optimizer step. Evaluation calls it
    once, on the log-probabilities of the whole set, with one reference point (KTO) and one order
    (AOT) for all. Rewards and margins join both logs.

    Args:
        loss: a module of `ift.losses`; without `pairs` it takes `desirable` and `kl`, as KTO's.
        gradient: of the head, as in `ift.patch`.
        The rest: as `transformers.Trainer`.
    """

    rows_per_example = 2

    def __init__(
        self, model: nn.Module, args: Any, *, loss: Loss, gradient: str | None = None, **kwargs: Any
    ) -> None:
        self.pair_loss = loss
        self._eval_pairs: list[EvalPair] = []
        super().__init__(patch(model, gradient=gradient), args, **kwargs)
        refuse_unsupported(self)

    def _counted(self, batch: dict[str, Any]) -> Tensor:
        return torch.zeros_like(batch["labels"][:, 0])  # rows instead of tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch of pairs, and sums for the logs."""
        batch = {k: inputs[k] for k in NAMES}
        call: dict[str, Any] = {}
        if num_items_in_batch is not None and self.pair_loss.options.get("kind") not in SORTED:
            name, share = ("num_pairs", 2) if self.pair_loss.pairs else ("num_rows", 1)
            call[name] = torch.as_tensor(num_items_in_batch) / share
        if not self.pair_loss.pairs:
            call["kl"] = reference_point(self.accelerator.gather(self._kl_rows(model, inputs)))

        def loss(logprob: Tensor, mask: Tensor) -> Tensor:
            return self._loss(logprob, mask, inputs.get("reference"), **call)

        output = model(**batch, loss=loss)
        found = self.pair_loss.metrics
        zero = torch.zeros((), device=output.loss.device)
        pairs = batch["labels"].shape[0] / 2
        values = [found.get(name, zero).to(zero) * pairs for name in PAIR_KEYS]
        self._add_train_sums(model, [*values, zero + pairs])
        value = output.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes  # DDP averages
        return (value, output) if return_outputs else value

    def _loss(self, logprob: Tensor, mask: Tensor, reference: Tensor | None, **call: Any) -> Tensor:
        """The loss of rows of which the first half are chosen ones."""
        if reference is not None:
            call["reference"] = reference
        if not self.pair_loss.pairs:
            rows = len(mask)
            call["desirable"] = torch.arange(rows, device=mask.device) < rows // 2
        value: Tensor = self.pair_loss(logprob, mask, **call)
        return value

    @torch.no_grad()
    def _kl_rows(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What `reference_point` takes: prompts with other prompts' responses."""
        with evaluating(self.accelerator.unwrap_model(model)):
            logprob, mask = target_logprobs(model, **{k: inputs[f"kl_{k}"] for k in NAMES})
        columns = ((logprob * mask).sum(1), mask.any(1), inputs["kl_reference"])
        return torch.stack([part.to(logprob) for part in columns], 1)

    # ---- evaluation ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's."""
        self._eval_pairs = []
        return super().evaluation_loop(*args, **kwargs)

    def _score(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Keep the log-probabilities of a batch, whose loss is part of that of the whole set."""
        logprob, mask = target_logprobs(model, **{k: inputs[k] for k in NAMES})
        logprob, mask = logprob.float().cpu(), mask.cpu()
        self._add_eval(logprob.new_zeros((), device=self.args.device), model)
        count = len(mask) // 2
        reference, kl = inputs.get("reference"), None
        if not self.pair_loss.pairs:
            kl = self._kl_rows(model, inputs).cpu()
        for i in range(count):
            if not mask[i].any():  # a pair that fills up the last batch
                continue
            chosen, rejected = (logprob[j][mask[j]] for j in (i, i + count))
            sums = None if reference is None else [float(reference[j]) for j in (i, i + count)]
            self._eval_pairs.append(EvalPair(chosen, rejected, sums, None if kl is None else kl[i]))

    def _eval_metrics(
        self, total: float, tokens: float, correct: float, entropy: float, *more: float
    ) -> dict[str, float]:
        """The loss of all pairs of the set in one call, and what it reports."""
        pairs = gather_object(self._eval_pairs)
        sides = [pair[side] for side in (0, 1) for pair in pairs]
        logprob = pad_sequence(sides, batch_first=True)
        mask = pad_sequence([torch.ones_like(side) for side in sides], batch_first=True).bool()
        reference, call = None, {}
        if pairs[0].reference is not None:
            reference = torch.tensor([pair.reference[side] for side in (0, 1) for pair in pairs])
        if not self.pair_loss.pairs:
            call["kl"] = reference_point(torch.stack([pair.kl for pair in pairs]))
        value = self._loss(logprob, mask, reference, **call)
        found = self.pair_loss.metrics
        means = super()._eval_metrics(total, tokens, correct, entropy)
        means |= {name: float(found[name]) for name in PAIR_KEYS if name in found}
        return {**means, "loss": float(value)}

    def _train_means(self, sums: Tensor) -> dict[str, float]:
        *metrics, pairs = sums[:-3].tolist()
        means = {
            name: value / max(pairs, 1.0)
            for name, value in zip(PAIR_KEYS, metrics, strict=True)
            if name in self.pair_loss.metrics
        }
        return means | super()._train_means(sums)


def reference_point(rows: Tensor) -> Tensor:
    """KTO's reference point of rows (N, 3): log-probability, 1 if the row has targets, reference.

    The log-probabilities are sums over a row.
    """
    return losses.kto_kl(rows[:, :1], rows[:, 1:2], rows[:, 2])
