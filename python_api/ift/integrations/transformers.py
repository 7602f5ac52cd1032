"""transformers: `IFTTrainer`, and `patch` / `unpatch` for any training loop.

What of `transformers.Trainer` is overridden, and why, is in docs/patching.md.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ift.anchored import AnchoredLoss
from ift.config import IFTConfig
from ift.documents import IGNORE_INDEX, boundaries, document_starts, rows_with_targets
from ift.frozen_head import frozen_head
from ift.head_pass import plain_head
from ift.heads import head_weight
from ift.integrations.metrics import TwoPassMetrics
from ift.losses import SFTLoss
from ift.patching import base_model, patch, unpatch
from ift_kernels import ActiveSet

__all__ = ["IFTTrainer", "patch", "unpatch"]

logger = logging.get_logger(__name__)


def freeze_unreached_embedding(model: Any, config: IFTConfig) -> None:
    """Freeze the input embedding of a causal LM where IFT sends it no gradient (DDP would wait)."""
    embedding = model.get_input_embeddings()
    head, _ = head_weight(plain_head(model))
    tied = any(p is head for p in embedding.parameters())
    if not config.embedding_grad and not tied:
        embedding.requires_grad_(False)
        logger.info("embedding_grad=False: the input embedding is frozen")


def row_flags(batch: dict[str, Any]) -> Tensor:
    """One label per row that has response tokens: what the IFT loss is a mean over."""
    return torch.where(rows_with_targets(batch), 0, IGNORE_INDEX)


def averaged_processes(trainer: Any) -> int:
    """How many processes DDP averages over, as `Trainer.compute_loss` multiplies by: those that
    share a batch under tensor parallelism are one."""
    of_a_batch = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
    processes: int = trainer.accelerator.num_processes // of_a_batch
    return processes


def refuse_unsupported(trainer: Any) -> None:
    """Refuse what makes the loss of a patched model another one than that of the whole step.

    Raises:
        ValueError: torch's DataParallel, context or sequence parallelism, a model without loss
            arguments.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"args: expected one device per process (torchrun), got {trainer.args.n_gpu} under "
            "torch.nn.DataParallel"
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("cp_enabled", "sp_enabled"):
        if getattr(parallelism, name, False):
            raise ValueError(f"parallelism_config: expected {name} false, got true")
    if not trainer.model_accepts_loss_kwargs:
        raise ValueError(
            f"model: {type(base_model(trainer.model)).__name__} takes no loss arguments, so its "
            "loss could not be normalised over the whole optimizer step"
        )


class IFTTrainer(TwoPassMetrics, Trainer):
    """`transformers.Trainer` with SFT or IFT losses that never hold logits.

    The model is patched (`ift.patch`). λ follows the optimizer step. The IFT loss is a mean over
    the rows with response tokens of the whole optimizer step, across gradient accumulation and,
    unless ``args.average_tokens_across_devices`` is off, processes. ``token_accuracy`` and
    ``entropy`` join the logs of training and evaluation, under IFT the losses of both passes,
    ``loss_sft`` and ``loss_ift``, and λ, ``lam`` (`TwoPassMetrics`). ``eval_loss`` is plain
    cross-entropy per target of the whole set, also under IFT; with `compute_metrics` one more
    forward makes the logits that this needs.

    With the default ``embedding_grad=False`` no gradient reaches an untied input embedding, so it
    is frozen here: it leaves the optimizer, and DDP does not wait for it.

    Args:
        model, args, and the rest: as `transformers.Trainer`.
        ift_config: options of the loss; None for supervised fine-tuning. `step` and `num_rows` are
            the trainer's to set.
        loss: an `ift.losses.SFTLoss` in place of cross-entropy, such as ``SFTLoss(scaling="dft")``;
            a mean over the tokens, or the rows (packed: documents), of the whole optimizer step.
        reference: for a `loss` with `kl_coef`, such as ASFT's: the frozen model that the KL is
            from, a causal LM over the same vocabulary. It is patched, frozen and moved to the
            device here, and each process has all of it; ``kl`` joins the logs.
        gradient, logits_dtype, deterministic: of the head, as in `ift.patch`.

    Raises:
        ValueError: options of `args` that the losses do not have: label smoothing, sequence or
            context parallelism, torch's DataParallel, Liger; a `compute_loss_func`; a `loss`
            beside `ift_config`, that is no mean, or that needs a frozen model (`kl_coef`) without
            `reference`, with `deterministic`, or under FSDP or DeepSpeed; a `reference` without it.
        TypeError: a model that `ift.patch` refuses; a `loss` that is no `SFTLoss`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        ift_config: IFTConfig | None = None,
        loss: SFTLoss | None = None,
        reference: nn.Module | None = None,
        gradient: str | ActiveSet | None = None,
        logits_dtype: torch.dtype | None = None,
        deterministic: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if ift_config is not None and not isinstance(ift_config, IFTConfig):
            raise TypeError(
                f"ift_config: expected an ift.IFTConfig or None, got {type(ift_config).__name__}"
            )
        self.ift_config = ift_config
        self.sft_loss = _checked(loss, ift_config, reference)
        self.reference = reference
        if reference is not None:
            self.token_means = ("kl",)
            if deterministic:
                raise ValueError(
                    "deterministic: expected False with kl_coef, whose divergence of two heads "
                    "does not offer it, got True"
                )
        self._head: dict[str, Any] = {
            "gradient": gradient, "logits_dtype": logits_dtype, "deterministic": deterministic
        }  # fmt: skip
        super().__init__(self._prepared(model), args, *rest, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.args.label_smoothing_factor}"
            )
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: expected None, the loss is that of ift_config")
        if self.args.use_liger_kernel:
            raise ValueError("use_liger_kernel: expected False, it replaces the patched forward")
        refuse_unsupported(self)
        if reference is not None:
            self._freeze_reference(reference)

    def _freeze_reference(self, reference: nn.Module) -> None:
        """Patch the frozen model like the one that trains, and move it to the device."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "reference: expected None under FSDP and DeepSpeed, which would not shard it"
            )
        patch(reference, logits_dtype=self._head["logits_dtype"])
        reference.requires_grad_(False)
        if not getattr(reference, "is_quantized", False):  # else it was loaded where it is
            reference.to(self.args.device)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the parent's, patched."""
        model: nn.Module = self._prepared(super().call_model_init(trial))
        return model

    def _prepared(self, model: Any) -> Any:
        if not isinstance(model, nn.Module):
            return model  # None with model_init, or what the parent will complain about
        patch(model, **self._head)
        if self.ift_config is not None:
            freeze_unreached_embedding(base_model(model), self.ift_config)
        return model

    def _counted(self, batch: dict[str, Any]) -> Tensor | None:
        of_rows = self.sft_loss is not None and self.sft_loss.reduction == "row_mean"
        return None if self.ift_config is None and not of_rows else row_flags(batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the parent's, with the options of this step; adds to the sums for the logs."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        self._patched(model).__dict__.pop("ift_metrics", None)  # of the forward before
        if self.ift_config is not None:
            config = self.ift_config.replace(
                step=self.state.global_step, num_rows=num_items_in_batch
            )
            inputs = {**inputs, "ift": config}
        if self.sft_loss is None:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            result = self._compute_sft_loss(
                self.sft_loss, model, inputs, return_outputs, num_items_in_batch
            )
        self._add_both_losses(model)
        return result

    # Metrics of the loss, means over the tokens of a batch, that join the logs.
    token_means: tuple[str, ...] = ()

    @property
    def _loss_metrics(self) -> dict[str, Tensor]:
        return {} if self.sft_loss is None else self.sft_loss.metrics

    def _add_both_losses(self, model: nn.Module) -> None:
        metrics = self._patched(model).__dict__.get("ift_metrics")
        if not self.token_means or metrics is None:
            super()._add_both_losses(model)
            return
        found = self._loss_metrics
        self._add_train_sums(model, [found[name] * metrics["tokens"] for name in self.token_means])

    def _train_means(self, sums: Tensor) -> dict[str, float]:
        values = sums[: len(self.token_means)] / sums[-1].clamp(min=1)
        means = dict(zip(self.token_means, values.tolist(), strict=True))
        return means | super()._train_means(sums)

    def _compute_sft_loss(
        self, loss: SFTLoss, model: nn.Module, inputs: dict[str, Any], return_outputs: bool,
        count: Any,
    ) -> Any:  # fmt: skip
        """The parent's `compute_loss` with `loss`, which divides by the count of the step."""
        bound: Any
        if loss.reduction == "row_mean":  # packed rows are documents, as `row_flags` counts them
            labels = inputs["labels"]
            packed = inputs.get("position_ids"), inputs.get("cu_seq_lens_q")
            starts = document_starts(labels, *packed)
            if starts is not None:  # the document before does not predict a first token
                inputs = {**inputs, "labels": labels.masked_fill(starts, IGNORE_INDEX)}
            bound = functools.partial(loss, num_rows=count, cu_seqlens=boundaries(starts))
        else:
            bound = functools.partial(loss, num_items=count)
        if self.reference is not None:
            with self.accelerator.autocast():  # as the model that accelerate has wrapped
                bound = AnchoredLoss(bound, frozen_head(self.reference, **inputs))
        value, outputs = super().compute_loss(model, {**inputs, "loss": bound}, True)
        if count is not None and self.args.average_tokens_across_devices:
            value = value * averaged_processes(self)
        return (value, outputs) if return_outputs else value


def _checked(
    loss: Any, ift_config: IFTConfig | None, reference: nn.Module | None
) -> SFTLoss | None:
    """A `loss` that `IFTTrainer` can serve, or None."""
    if reference is not None and not getattr(loss, "kl_coef", 0):
        raise ValueError("reference: expected None without a loss with kl_coef, got a model")
    if loss is None:
        return None
    if not isinstance(loss, SFTLoss):
        raise TypeError(f"loss: expected an ift.losses.SFTLoss or None, got {type(loss).__name__}")
    if ift_config is not None:
        raise ValueError("loss: expected None with ift_config, got both")
    if loss.reduction not in ("mean", "row_mean"):
        raise ValueError(f"loss: expected a reduction 'mean' or 'row_mean', got {loss.reduction!r}")
    if loss.kl_coef and reference is None:
        raise ValueError(
            f"reference: expected a frozen model with kl_coef {loss.kl_coef}, got None"
        )
    return loss
