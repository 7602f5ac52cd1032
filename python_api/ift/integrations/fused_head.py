"""TRL's trainers on our log-probabilities, which they ask for with ``fused_lm_head=True``."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ift.documents import IGNORE_INDEX, shifted_targets
from ift.head_pass import head_pass, token_stats
from ift.patching import base_model, logit_transform, original_forward, patch
from ift_kernels import ActiveSet

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(
        f'ift.integrations.trl needs TRL 1.16 or later ({error}): pip install "ift-kernels[trl]"'
    ) from error

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


def add_fused_forward(model: nn.Module, outputs: tuple[str, ...], temperature: float) -> None:
    """Let a patched causal LM answer ``fused_lm_head=True`` with our statistics.

    Args:
        model: patched; its forward, TRL's or ours, stays for every other call.
        outputs: as of `ift_kernels.linear_logprobs`.
        temperature: that logits are divided by.
    """
    bound: Any = model.forward
    other = bound.__func__  # called with the model at hand, which may be a copy

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return other(self, *args, **kwargs)
        return _fused(self, args, kwargs, outputs, temperature)

    forward.is_ift = True  # type: ignore[attr-defined]  # unpatch may take it off
    model.forward = MethodType(forward, model)  # the point of it


def _fused(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: tuple[str, ...],
    temperature: float,
) -> FusedCausalLMOutput:
    if args:
        raise TypeError("fused_lm_head: expected keyword arguments only")
    kwargs = {**kwargs, "use_cache": False}
    labels, target = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    shifted = target is not None
    if target is None:
        if labels is None:
            raise ValueError("labels: expected (B, T) token ids with fused_lm_head, got None")
        target = shifted_targets(labels)
    transform = logit_transform(model, kwargs)
    gradient = model._ift_patch.gradient
    ask = token_stats(
        target, transform, gradient,
        outputs=outputs, detached=("mean_logit",), temperature=temperature,
    )  # fmt: skip
    output, stats = head_pass(model, original_forward(model), kwargs, ask)

    def columns(value: Tensor | None) -> Tensor | None:
        return value if value is None or shifted else value[:, :-1]

    logprob = columns(stats.logprob)
    assert logprob is not None
    target = target.to(logprob.device) if shifted else target[:, :-1].to(logprob.device)
    mask = target != IGNORE_INDEX
    loss = -logprob.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    aux_loss = output.get("aux_loss")
    if aux_loss is not None:
        config = model.config.get_text_config()
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    argmax, mean, sum_sq = (columns(getattr(stats, n)) for n in ("argmax", "mean_logit", "sum_sq"))
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=logprob,
        entropy=columns(stats.entropy),
        log_sum_sq_probs=None if sum_sq is None else torch.where(mask, sum_sq, 1).log(),
        mean_logits=None if mean is None else mean.detach(),
        is_top1=None if argmax is None else (argmax == target) & mask,
        label_mask=mask,
        aux_loss=aux_loss,
    )


def pair_forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """`concatenated_forward` of TRL's ORPO and CPO trainers, without logits.

    As theirs: sums (ORPO, IPO, SimPO: means) of the completions' log-probabilities, and the
    cross-entropy of the chosen rows, for ORPO over their prompts too. Where theirs returns logits,
    of which the trainer takes the mean, stands the mean logit of the scored tokens.
    """
    pad = self.pad_token_id if hasattr(self, "pad_token_id") else self.padding_value
    rows = self.concatenated_inputs(
        batch, is_encoder_decoder=False, padding_value=pad, device=self.accelerator.device
    )
    ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
    completion = rows["concatenated_labels"]
    orpo = not hasattr(self, "cpo_alpha")
    labels = torch.where(mask == 1, ids, IGNORE_INDEX) if orpo else completion
    # What is scored: every label of either kind.
    scored = torch.where(completion == IGNORE_INDEX, labels, completion)
    options = {"output_router_logits": True} if self.aux_loss_enabled else {}
    out = model(input_ids=ids, attention_mask=mask, labels=scored, fused_lm_head=True, **options)
    chosen = batch["chosen_labels"].shape[0]
    count = completion[:, 1:] != IGNORE_INDEX
    logps = (out.log_probs * count).sum(-1)
    if orpo or self.loss_type in ("ipo", "simpo"):
        logps = logps / count.sum(-1)
    taught = labels[:chosen, 1:] != IGNORE_INDEX
    nll = logps.new_zeros(())
    if orpo or self.cpo_alpha != 0:
        nll = -(out.log_probs[:chosen] * taught).sum() / taught.sum()
    means = [
        (part * here).sum() / here.sum().clamp(min=1)
        for part, here in zip(
            out.mean_logits.split([chosen, len(ids) - chosen]),
            count.split([chosen, len(ids) - chosen]),
            strict=True,
        )
    ]
    result = (logps[:chosen], logps[chosen:], *means, nll)
    return (*result, out.aux_loss) if self.aux_loss_enabled else result
