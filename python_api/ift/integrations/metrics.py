"""`TargetMetrics`: a trainer's loss, accuracy and entropy as means over targets.

`transformers.Trainer` evaluates to a mean of batch means, in which a batch with one target weighs
as much as one with thousands, and in several processes counts the rows that fill the last batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import (  # type: ignore[import-untyped]  # has no annotations
    BatchSamplerShard,
    IterableDatasetShard,
)
from torch import Tensor, nn
from transformers.utils import logging

from ift.config import IFTConfig
from ift.documents import IGNORE_INDEX, document_starts
from ift.patching import base_model

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object  # so that the mixin goes before any Trainer


def forward_was_replaced(model: nn.Module) -> RuntimeError:
    """The error of a model whose patched forward did not run."""
    return RuntimeError(
        f"{type(model).__name__}: the patched forward did not run; something replaced it after "
        "ift.patch"
    )


class TargetMetrics(_Base):
    """Mixin for a Trainer of a patched model: metrics are means over targets, not over batches.

    Evaluation: ``loss = -Σ log p(y) / N``, with token accuracy and entropy over the same N targets:
    sums over every batch and process, in which no example counts twice. It is cross-entropy alone,
    without the auxiliary loss of a mixture of experts, which is a property of a batch. Where
    `compute_metrics` needs logits, a second forward makes them. NaN without any target.

    Training: sums that `_add_train_sums` collects between two logs; `_train_metrics` names them.

    Raises:
        ValueError: in several processes, an evaluation set whose repeated examples are not known.
    """

    accuracy_name = "token_accuracy"
    rows_per_example = 1  # of the labels
    _eval_loader: Any = None  # of the evaluation that runs
    # Of each of its batches: -Σ log p(y), targets, correct, entropy, and what a subclass adds.
    _eval_sums: list[Tensor]
    _train_sums: Tensor | None = None  # since the last log; its end: correct, entropy, tokens

    # ---- training ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the parent's, with the training metrics beside the training loss."""
        if "loss" in logs:
            logs = {**logs, **self._train_metrics()}
        super().log(logs, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As the parent's, with the count that the loss is a mean over, by `_counted`."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        labels = None if count is None else [self._counted(batch) for batch in batches]
        if labels is None or any(flags is None for flags in labels):
            return batches, count
        # The trainer's own count, across devices and all, of labels with these in their place.
        rows = [{"labels": flags, "shift_labels": flags} for flags in labels]
        return batches, self._get_num_items_in_batch(rows, device)

    def _counted(self, batch: dict[str, Any]) -> Tensor | None:
        """Labels, of which those that are no `IGNORE_INDEX` count; None: the parent's count."""
        return None

    def _add_train_sums(self, model: nn.Module, values: Sequence[Tensor] = ()) -> None:
        """Add `values`, and the sums over the targets of the last forward."""
        metrics = self._patched(model).__dict__.get("ift_metrics")
        if metrics is None:
            raise forward_was_replaced(self._patched(model))
        parts = (*values, *(metrics[name] for name in ("correct", "entropy", "tokens")))
        sums = torch.stack([part.detach().to(parts[-1].device).float() for part in parts])
        before = self._train_sums
        self._train_sums = sums if before is None else before.to(sums) + sums

    def _train_metrics(self) -> dict[str, float]:
        """Means over the tokens since the last call, in all processes."""
        sums, self._train_sums = self._train_sums, None
        return {} if sums is None else self._train_means(self.accelerator.reduce(sums, "sum"))

    def _train_means(self, sums: Tensor) -> dict[str, float]:
        """The means, by name, from the sums of all processes."""
        correct, entropy, tokens = sums[-3:].tolist()
        tokens = max(tokens, 1.0)
        return {"token_accuracy": correct / tokens, "entropy": entropy / tokens}

    # ---- evaluation ----

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """As the parent's, with the means over the whole set among the metrics."""
        dataset = getattr(dataloader, "dataset", None)
        if isinstance(dataset, IterableDatasetShard) and not dataset.drop_last:
            raise ValueError(
                "eval_dataset: an iterable one that each process reads by itself "
                "(dispatch_batches=False) is filled up with repeated rows that cannot be "
                "recognised; expected a dataset with a length, dispatch_batches=None, or "
                "dataloader_drop_last=True"
            )
        self._eval_loader, self._eval_sums = dataloader, []
        try:
            output = super().evaluation_loop(
                dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        finally:
            self._eval_loader = None
        if self._eval_sums:  # else no labels
            sums = torch.stack(self._eval_sums).cpu().double().sum(0)
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
            for name, value in self._eval_metrics(*sums.tolist()).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As the parent's, of rows that were not evaluated before; without logits where only the
        loss is wanted."""
        loss = None
        if inputs.get("labels") is not None:
            inputs = self._prepare_inputs(self._without_repeats(inputs))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self._score(model, inputs)
            if prediction_loss_only:
                return loss, None, None
        _, *outputs = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, *outputs

    def _score(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """The mean cross-entropy of a batch; its sums join those of the set."""
        sums: list[Tensor] = []

        def loss(logprob: Tensor, mask: Tensor) -> Tensor:
            sums.append(-logprob.masked_fill(~mask, 0).sum())
            return sums[0] / mask.sum().clamp(min=1)

        model(**inputs, loss=loss)
        if not sums:
            raise forward_was_replaced(self._patched(model))
        return sums[0] / self._add_eval(sums[0], model).clamp(min=1)

    def _add_eval(
        self,
        total: Tensor,
        model: nn.Module,
        names: tuple[str, ...] = ("tokens", "correct", "entropy"),
    ) -> Tensor:
        """Add `total` and the sums of the last forward to those of the set; its targets."""
        metrics: Any = self._patched(model).ift_metrics
        parts = (total, *(metrics[name] for name in names))
        sums = torch.stack([part.detach().to(total) for part in parts]).float()
        if self._eval_loader is not None:
            self._eval_sums.append(sums)
        return sums[1]

    def _eval_metrics(
        self, total: float, tokens: float, correct: float, entropy: float, *more: float
    ) -> dict[str, float]:
        """The metrics of the set, by name, from its sums."""
        if not tokens:
            logger.warning("no row of the evaluation set has a target: its loss is NaN")
        tokens = tokens or float("nan")
        return {
            "loss": total / tokens,
            self.accuracy_name: correct / tokens,
            "entropy": entropy / tokens,
        }

    def _patched(self, model: nn.Module) -> nn.Module:
        """The patched causal LM inside the wrappers of accelerate, torch.compile and PEFT."""
        return base_model(self.accelerator.unwrap_model(model, keep_torch_compile=False))

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without the targets of examples that only fill up the last one of the set.

        In several processes every one gets as many examples: the first ones come a second time.
        """
        state = self.accelerator.gradient_state
        if self._eval_loader is None or self.args.world_size == 1:
            return inputs
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        rank, rows = self.args.process_index, inputs["labels"].shape[0] // self.rows_per_example
        examples = rows
        sampler = getattr(self._eval_loader, "batch_sampler", None)
        if isinstance(sampler, BatchSamplerShard):
            if not sampler.even_batches:
                return inputs
            rank = sampler.process_index
            examples = sampler.batch_size
            examples //= sampler.num_processes if sampler.split_batches else 1
        first_repeat = max(0, state.remainder - rank * examples)
        masked = {}
        for name, labels in inputs.items():
            if name.endswith("labels"):
                # Of pairs the chosen rows, then the rejected ones.
                where = torch.arange(len(labels), device=labels.device)[:, None] % examples
                if rows != examples:
                    where = self._example_of_tokens(inputs, examples)
                masked[name] = labels.masked_fill(where >= first_repeat, IGNORE_INDEX)
        return {**inputs, **masked}

    def _example_of_tokens(self, inputs: dict[str, Any], examples: int) -> Tensor:
        """The number of each token's example, in a batch that a collator has flattened."""
        starts = document_starts(
            inputs["labels"], inputs.get("position_ids"), inputs.get("cu_seq_lens_q")
        )
        found = 1 if starts is None else int(starts.sum())
        if starts is None or found != examples:
            raise ValueError(
                f"data_collator: the last evaluation batch of {examples} examples has "
                f"{inputs['labels'].shape[0]} rows and {found} documents, so its repeated examples "
                "are not known; expected a row or a document for each, "
                "per_device_eval_batch_size=1 or dataloader_drop_last=True"
            )
        return (starts.flatten().cumsum(0) - 1).view_as(starts)


# Rule "sample" draws by the step; evaluations have steps that no training has.
_EVAL_STEPS = 2**62


class TwoPassMetrics(TargetMetrics):
    """`TargetMetrics` with the losses of both passes of IFT and its λ, as means over rows.

    ``loss_sft`` is the cross-entropy of the first pass, a mean over the targets of each row;
    ``loss_ift`` the loss of the second; ``lam`` what mixes between them. The evaluation runs both
    passes at the λ of the last step, without its noise; ``eval_loss``, accuracy and entropy are
    those of the first, whose inputs are the examples themselves.
    """

    ift_config: IFTConfig | None  # None: as `TargetMetrics`

    @property
    def _logs_both(self) -> bool:
        """Whether there is more than a mean over rows, which λ = γ = 0 leaves."""
        config = self.ift_config
        return config is not None and (config.lam > 0 or config.gamma > 0)

    def _last_lam(self, config: IFTConfig) -> float:
        return config.lam_at(max(0, self.state.global_step - 1))

    # ---- training ----

    def _add_both_losses(self, model: nn.Module) -> None:
        """Add the sums of the last forward."""
        metrics = self._patched(model).__dict__.get("ift_metrics", {})
        names = ("loss_sft", "loss_ift", "rows") if self._logs_both else ()
        self._add_train_sums(model, [metrics[name] for name in names if name in metrics])

    def _train_means(self, sums: Tensor) -> dict[str, float]:
        means = super()._train_means(sums)
        if self._logs_both:
            first, second, rows = sums[:3].tolist()
            means |= _means_of_rows(first, second, rows)
        return means

    def _train_metrics(self) -> dict[str, float]:
        means = super()._train_metrics()
        if self._logs_both and self.ift_config is not None:
            means["lam"] = self._last_lam(self.ift_config)
        return means

    # ---- evaluation ----

    def _score(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        config = self.ift_config
        if config is None or not self._logs_both:
            return super()._score(model, inputs)
        lam = self._last_lam(config.replace(lam_noise=0.0))
        config = config.replace(
            lam=lam, lam_noise=0.0, lambda_schedule="constant",
            step=_EVAL_STEPS + self.state.global_step,
        )  # fmt: skip
        self._patched(model).__dict__.pop("ift_metrics", None)
        model(**inputs, ift=config)
        metrics = self._patched(model).__dict__.get("ift_metrics")
        if metrics is None:
            raise forward_was_replaced(self._patched(model))
        names = ("first_tokens", "first_correct", "first_entropy", "loss_sft", "loss_ift", "rows")
        nll: Tensor = metrics["first_nll"]
        return nll / self._add_eval(nll, model, names).clamp(min=1)

    def _eval_metrics(
        self, total: float, tokens: float, correct: float, entropy: float, *more: float
    ) -> dict[str, float]:
        means = super()._eval_metrics(total, tokens, correct, entropy)
        if self._logs_both and self.ift_config is not None:
            means |= _means_of_rows(*more)
            means["lam"] = self._last_lam(self.ift_config.replace(lam_noise=0.0))
        return means


def _means_of_rows(first: float, second: float, rows: float) -> dict[str, float]:
    rows = rows or float("nan")
    return {"loss_sft": first / rows, "loss_ift": second / rows}
