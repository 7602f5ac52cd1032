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
from ift.integrations.transformers import averaged_processes, refuse_unsupported
from ift.losses import Loss
from ift.losses.dpo import SORTED
from ift.one_pass import target_logprobs
from ift.patching import patch
from ift.plotting import PAIR_KEYS

NAMES = ("input_ids", "attention_mask", "labels")


class EvalExample(NamedTuple):
    """What the loss of an evaluated pair, or of a single response, is made of."""

    sides: list[Tensor]  # log-probability of each target: chosen and rejected, or the response
    reference: list[float] | None  # sums of the sides
    kl: Tensor | None  # (3,), as `reference_point` takes them
    desirable: bool | None  # of a single response


class PairTrainer(ResumableRun, TargetMetrics, Trainer):
    """`transformers.Trainer` with a preference loss over batches of `PairCollator`.

    The loss is a mean over the pairs (KTO: rows) of the whole optimizer step. Evaluation calls it
    once, on the log-probabilities of the whole set, with one reference point (KTO) and one order
    (AOT) for all. Rewards and margins join both logs; of single responses they are means over all
    good and all bad ones since the last log.

    Args:
        loss: a module of `ift.losses`; without `pairs` it takes `desirable` and `kl`, as KTO's.
        single: the examples are single responses (`ift.preference_data.encode_responses`), for a
            loss without `pairs`; default pairs.
        gradient, logits_dtype, deterministic: of the head, as in `ift.patch`.
        The rest: as `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        loss: Loss,
        gradient: str | None = None,
        logits_dtype: torch.dtype | None = None,
        deterministic: bool | None = None,
        single: bool = False,
        **kwargs: Any,
    ) -> None:
        if single and loss.pairs:
            raise ValueError(f"single: expected a loss without pairs, got {type(loss).__name__}")
        self.pair_loss = loss
        self.takes_kl = not loss.pairs and loss.options.get("kind") != "apo_zero"
        self.rows_per_example = 1 if single else 2
        self._eval_examples: list[EvalExample] = []
        patch(model, gradient=gradient, logits_dtype=logits_dtype, deterministic=deterministic)
        super().__init__(model, args, **kwargs)
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
        if self.takes_kl:
            call["kl"] = reference_point(self.accelerator.gather(self._kl_rows(model, inputs)))

        def loss(logprob: Tensor, mask: Tensor) -> Tensor:
            return self._loss(logprob, mask, inputs.get("reference"), desirable, **call)

        desirable = inputs.get("desirable")
        output = model(**batch, loss=loss)
        found = self.pair_loss.metrics
        zero = torch.zeros((), device=output.loss.device)
        rows = batch["labels"].shape[0]
        if desirable is None:
            counts = [zero + rows / 2]
            weights = counts * len(PAIR_KEYS)
        else:  # a batch may have none of a kind
            good = desirable.sum()
            counts = [zero + good, zero + rows - good]
            of = {"reward_chosen": counts[0], "reward_rejected": counts[1]}
            weights = [of.get(name, zero + rows) for name in PAIR_KEYS]
        values = [
            found.get(name, zero).to(zero) * weight
            for name, weight in zip(PAIR_KEYS, weights, strict=True)
        ]
        self._add_train_sums(model, [*values, *counts])
        value = output.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * averaged_processes(self)
        return (value, output) if return_outputs else value

    def _loss(
        self,
        logprob: Tensor,
        mask: Tensor,
        reference: Tensor | None,
        desirable: Tensor | None,
        **call: Any,
    ) -> Tensor:
        """The loss of rows of which `desirable` or, without it, the first half are chosen ones."""
        if reference is not None:
            call["reference"] = reference
        if not self.pair_loss.pairs:
            rows = len(mask)
            half = torch.arange(rows, device=mask.device) < rows // 2
            call["desirable"] = half if desirable is None else desirable
        value: Tensor = self.pair_loss(logprob, mask, **call)
        return value

    @torch.no_grad()
    def _kl_rows(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What `reference_point` takes: prompts with other prompts' responses."""
        with evaluating(self.accelerator.unwrap_model(model)):
            logprob, mask = target_logprobs(model, **{k: inputs[f"kl_{k}"] for k in NAMES})
        count = mask.sum(1).clamp(min=1) if self.pair_loss.options.get("length_normalized") else 1
        columns = ((logprob * mask).sum(1) / count, mask.any(1), inputs["kl_reference"] / count)
        return torch.stack([part.to(logprob) for part in columns], 1)

    # ---- evaluation ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's."""
        self._eval_examples = []
        return super().evaluation_loop(*args, **kwargs)

    def _score(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Keep the log-probabilities of a batch, whose loss is part of that of the whole set."""
        logprob, mask = target_logprobs(model, **{k: inputs[k] for k in NAMES})
        logprob, mask = logprob.float().cpu(), mask.cpu()
        self._add_eval(logprob.new_zeros((), device=self.args.device), model)
        count = len(mask) // self.rows_per_example
        reference, kl = inputs.get("reference"), None
        desirable = inputs.get("desirable")
        if self.takes_kl:
            kl = self._kl_rows(model, inputs).cpu()
        for i in range(count):
            if not mask[i].any():  # an example that fills up the last batch
                continue
            rows = [i + side * count for side in range(self.rows_per_example)]
            self._eval_examples.append(
                EvalExample(
                    [logprob[row][mask[row]] for row in rows],
                    None if reference is None else [float(reference[row]) for row in rows],
                    None if kl is None else kl[i],
                    None if desirable is None else bool(desirable[i]),
                )
            )

    def _eval_metrics(
        self, total: float, tokens: float, correct: float, entropy: float, *more: float
    ) -> dict[str, float]:
        """The loss of all examples of the set in one call, and what it reports."""
        found_in_all = gather_object(self._eval_examples)
        every = range(self.rows_per_example)
        sides = [example.sides[side] for side in every for example in found_in_all]
        logprob = pad_sequence(sides, batch_first=True)
        mask = pad_sequence([torch.ones_like(side) for side in sides], batch_first=True).bool()
        reference, desirable, call = None, None, {}
        if found_in_all[0].reference is not None:
            reference = torch.tensor([e.reference[side] for side in every for e in found_in_all])
        if found_in_all[0].desirable is not None:
            desirable = torch.tensor([example.desirable for example in found_in_all])
        if self.takes_kl:
            call["kl"] = reference_point(torch.stack([example.kl for example in found_in_all]))
        value = self._loss(logprob, mask, reference, desirable, **call)
        found = self.pair_loss.metrics
        means = super()._eval_metrics(total, tokens, correct, entropy)
        means |= {name: float(found[name]) for name in PAIR_KEYS if name in found}
        return {**means, "loss": float(value)}

    def _train_means(self, sums: Tensor) -> dict[str, float]:
        count = len(PAIR_KEYS)
        values, counts = sums[:count].tolist(), sums[count:-3].tolist()
        total = sum(counts)
        of = dict(zip(("reward_chosen", "reward_rejected"), counts, strict=False))
        if len(counts) == 1:
            of = {}
        means = {
            name: value / max(of.get(name, total), 1.0)
            for name, value in zip(PAIR_KEYS, values, strict=True)
            if name in self.pair_loss.metrics
        }
        if of:
            means["reward_margin"] = means["reward_chosen"] - means["reward_rejected"]
        return means | super()._train_means(sums)


def reference_point(rows: Tensor) -> Tensor:
    """KTO's reference point of rows (N, 3): log-probability, 1 if the row has targets, reference.

    The log-probabilities are sums over a row, or means.
    """
    return losses.kto_kl(rows[:, :1], rows[:, 1:2], rows[:, 2])
