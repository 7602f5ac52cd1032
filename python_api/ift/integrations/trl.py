"""TRL: Intuitive Fine-Tuning as an `SFTTrainer`, and TRL's own trainers on our log-probabilities.

TRL's trainers call ``model(..., labels=..., fused_lm_head=True)`` and compute every loss from the
log-probabilities in its output. `use_ift_kernels` computes that output; the losses stay TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        f'ift.integrations.trl needs TRL 1.16 or later ({error}): pip install "ift-kernels[trl]"'
    ) from error

from ift.config import IFTConfig
from ift.integrations.fused_head import use_ift_kernels
from ift.integrations.metrics import TwoPassMetrics
from ift.integrations.transformers import (
    freeze_unreached_embedding,
    refuse_unsupported,
    row_flags,
)
from ift.patching import base_model

__all__ = ["IFTSFTConfig", "IFTSFTTrainer", "use_ift_kernels"]


@dataclass
class IFTSFTConfig(SFTConfig):
    """`trl.SFTConfig` with the options of `ift.IFTConfig`, and those of `ift.patch`.

    Args:
        ift: options of `ift.IFTConfig` by name, ``{"lam": 0.1}``, or as JSON; the trainer sets
            `step` and `num_rows`.
        gradient, logits_dtype, deterministic: of the head, as in `ift.patch`; "float32" is the
            text of torch.float32.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "ift"]

    ift: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "options of ift.IFTConfig, as JSON"}
    )
    gradient: str | None = field(
        default=None, metadata={"help": "gradient of the head: exact (the default) or active"}
    )
    logits_dtype: str | None = field(
        default=None, metadata={"help": "float32: logits are not rounded to 16 bits"}
    )
    deterministic: bool | None = field(
        default=None, metadata={"help": "true: log-probabilities do not depend on the batch"}
    )


class IFTSFTTrainer(TwoPassMetrics, SFTTrainer):
    """`trl.SFTTrainer` whose training loss is that of Intuitive Fine-Tuning.

    It is to `trl.SFTTrainer` what `ift.IFTTrainer` is to `transformers.Trainer`; its ``args.ift``
    holds the options of the `ift.IFTConfig` that `ift.IFTTrainer` takes as `ift_config`.

    Data, chat templates, packing, completion masks and PEFT are those of `SFTTrainer`; evaluation
    measures cross-entropy per target of the whole set. Logs, λ, rows and the frozen input embedding
    are as in `ift.IFTTrainer`.

    Args:
        As `trl.SFTTrainer`; `args` an `IFTSFTConfig` or None.

    Raises:
        TypeError: `args` is something else. ValueError: ``loss_type``, label smoothing or a
            ``compute_loss_func``, which would be another loss than IFT's; several devices in one
            process, context or sequence parallelism.
    """

    accuracy_name = "mean_token_accuracy"
    ift_config: IFTConfig

    def __init__(self, model: Any = None, args: IFTSFTConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            args = IFTSFTConfig(output_dir="ift-output")
        if not isinstance(args, IFTSFTConfig):
            raise TypeError(f"args: expected an IFTSFTConfig or None, got {type(args).__name__}")
        if args.loss_type != "nll" or args.label_smoothing_factor:
            raise ValueError("loss_type, label_smoothing_factor: expected 'nll' and 0 with IFT")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: expected None, the loss is that of IFT")
        self.ift_config = IFTConfig(**(args.ift or {}))  # type: ignore[arg-type]  # a dict by now
        super().__init__(model, args, **kwargs)
        refuse_unsupported(self)
        use_ift_kernels(
            self, gradient=args.gradient, logits_dtype=args.logits_dtype,  # type: ignore[arg-type]
            deterministic=args.deterministic,
        )  # fmt: skip
        freeze_unreached_embedding(base_model(self.model), self.ift_config)

    def _counted(self, batch: dict[str, Any]) -> torch.Tensor:
        return row_flags(batch)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Both passes in training; in evaluation the model's own loss, with its logits."""
        # Past SFTTrainer: the model makes this loss, and Trainer scales it over processes.
        if not model.training:
            return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs)
        config = self.ift_config.replace(step=self.state.global_step, num_rows=num_items_in_batch)
        loss, outputs = super(SFTTrainer, self).compute_loss(
            model, {**inputs, "ift": config}, True, num_items_in_batch
        )
        metrics: Any = self._patched(model).ift_metrics
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        names = ("tokens", "entropy", "correct", "loss_sft", "loss_ift", "rows")
        sums = [*(metrics[name] for name in names), mask.sum()]
        reduced = self.accelerator.reduce(torch.stack([s.double() for s in sums]), "sum")
        tokens, entropy, correct, first, second, rows, seen = reduced.tolist()
        log = self._metrics["train"]
        log["loss_sft"].append(first / max(rows, 1))
        log["loss_ift"].append(second / max(rows, 1))
        log["entropy"].append(entropy / max(tokens, 1))
        log["mean_token_accuracy"].append(correct / max(tokens, 1))
        self._total_train_tokens += int(seen)
        log["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def _eval_metrics(self, *sums: float) -> dict[str, float]:
        """As everywhere, beside the number of tokens trained on, which `SFTTrainer` logs."""
        return {**super()._eval_metrics(*sums), "num_tokens": float(self._total_train_tokens)}
