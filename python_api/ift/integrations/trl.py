"""TRL: Intuitive Fine-Tuning as an `SFTTrainer`, and TRL's own trainers on our log-probabilities.

TRL's trainers ask their model for ``model(..., labels=..., fused_lm_head=True)`` and make every
loss from the log-probabilities in the answer. `use_ift_kernels` gives that answer; the formulas of
the losses stay TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar

from torch import nn

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        f'ift.integrations.trl needs TRL 1.16 or later ({error}): pip install "ift-kernels[trl]"'
    ) from error

from ift.config import IFTConfig as Options
from ift.integrations.fused_head import add_fused_forward, pair_forward
from ift.integrations.transformers import count_rows, freeze_unreached_embedding
from ift.patching import base_model, patch
from ift_kernels import ActiveSet

__all__ = ["IFTConfig", "IFTTrainer", "use_ift_kernels"]

# Trainers that take their log-probabilities from `fused_lm_head`, and those that build logits.
_FUSED = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
_PAIRS = ("ORPOTrainer", "CPOTrainer")


def use_ift_kernels(trainer: Any, *, gradient: str | ActiveSet | None = None) -> Any:
    """Move a TRL trainer onto `ift_kernels.linear_logprobs`. In place, before ``trainer.train()``.

    Args:
        trainer: of TRL 1.16 or later: SFT, DPO, KTO, GRPO, RLOO, ORPO or CPO, or a subclass of one.
            Its model and, where it has one, its reference model are patched (`ift.patch`).
        gradient: of the head, as in `ift.patch`.

    Returns:
        `trainer` itself. Its losses are TRL's; ``logits/chosen`` and ``logits/rejected`` of ORPO
        and CPO become means over scored tokens, where TRL takes them over padding too.

    Raises:
        TypeError: another trainer, or a model that `ift.patch` refuses (LoRA on the head).
        ValueError: ``cast_lm_head_to_fp32``, which replaces the head's forward; compute_metrics
            and encoder-decoder models where logits are needed.

    >>> # trainer = use_ift_kernels(DPOTrainer(model, args, train_dataset=dataset))
    """
    names = {cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")}
    if not names & {*_FUSED, *_PAIRS}:
        raise TypeError(
            f"trainer: expected one of TRL's {', '.join((*_FUSED, *_PAIRS))}, "
            f"got {type(trainer).__name__}"
        )
    if getattr(trainer.args, "cast_lm_head_to_fp32", False):
        raise ValueError("cast_lm_head_to_fp32: expected False, it replaces the head's forward")
    if getattr(trainer, "is_encoder_decoder", False):
        raise ValueError("model: expected a decoder, got an encoder-decoder model")
    outputs = ["logprob", "entropy", "argmax", "mean_logit"]
    if getattr(trainer, "use_weighting", False):  # WPO
        outputs.append("sum_sq")
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if isinstance(model, nn.Module):
            base = base_model(trainer.accelerator.unwrap_model(model))
            patch(base, gradient=gradient)
            temperature = getattr(trainer, "temperature", 1.0)
            add_fused_forward(base, tuple(outputs), float(temperature or 1.0))
    if names & set(_PAIRS):
        trainer.concatenated_forward = MethodType(pair_forward, trainer)
    return trainer


@dataclass
class IFTConfig(SFTConfig):
    """`trl.SFTConfig` with the options of Intuitive Fine-Tuning.

    Args:
        ift: options of `ift.IFTConfig` by name, ``{"lam": 0.1}``; `step` and `num_rows` are the
            trainer's to set.
        head_gradient: as the `gradient` of `ift.patch`.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "ift"]

    ift: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "options of ift.IFTConfig, as JSON"}
    )
    head_gradient: str | None = field(
        default=None, metadata={"help": "gradient of the head: auto, exact or active"}
    )


class IFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` whose training loss is that of Intuitive Fine-Tuning.

    Data, chat templates, packing, completion masks and PEFT are those of `SFTTrainer`; evaluation
    measures its cross-entropy. λ, rows and the frozen input embedding are as in `ift.IFTTrainer`.

    Args:
        As `trl.SFTTrainer`; `args` an `IFTConfig` or None.

    Raises:
        TypeError: `args` is something else. ValueError: ``loss_type``, label smoothing or a
            ``compute_loss_func``, which would be another loss than IFT's.
    """

    def __init__(self, model: Any = None, args: IFTConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            args = IFTConfig(output_dir="ift-output")
        if not isinstance(args, IFTConfig):
            raise TypeError(f"args: expected an IFTConfig or None, got {type(args).__name__}")
        if args.loss_type != "nll" or args.label_smoothing_factor:
            raise ValueError("loss_type, label_smoothing_factor: expected 'nll' and 0 with IFT")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: expected None, the loss is that of IFT")
        self.ift_config = Options(**(args.ift or {}))  # type: ignore[arg-type]  # a dict by now
        super().__init__(model, args, **kwargs)
        use_ift_kernels(self, gradient=args.head_gradient)
        freeze_unreached_embedding(base_model(self.model), self.ift_config)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """As the parent's, counting rows with response tokens instead of tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, count if count is None else count_rows(self, batches, device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Both passes in training; in evaluation the parent's cross-entropy."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        config = self.ift_config.replace(step=self.state.global_step, num_rows=num_items_in_batch)
        # Past SFTTrainer: the model makes this loss, and Trainer scales it over processes.
        loss, outputs = super(SFTTrainer, self).compute_loss(
            model, {**inputs, "ift": config}, True, num_items_in_batch
        )
        metrics: Any = base_model(self.accelerator.unwrap_model(model)).ift_metrics
        sums = [metrics[k].double() for k in ("tokens", "entropy", "correct")]
        tokens, entropy, correct = (float(self.accelerator.reduce(s, "sum")) for s in sums)
        log = self._metrics["train"]
        log["entropy"].append(entropy / max(tokens, 1))
        log["mean_token_accuracy"].append(correct / max(tokens, 1))
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else None
        seen = inputs["input_ids"].new_tensor(inputs["input_ids"].numel()) if seen is None else seen
        self._total_train_tokens += int(self.accelerator.reduce(seen, "sum"))
        log["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss
