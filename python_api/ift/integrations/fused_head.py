"""``model(..., fused_lm_head=True)``: log-probabilities of the labels in place of logits.

TRL's trainers call their model this way; loops and other trainers can do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ift.bound_forward import BoundForward
from ift.documents import IGNORE_INDEX, shifted_targets
from ift.head_pass import head_pass
from ift.losses import sft_loss
from ift.patching import base_model, head_options, measured_model, original_forward, patch
from ift.support import MAX_SUPPORT, Support, check_gradient, check_support
from ift.token_stats import token_stats
from ift_kernels import ActiveSet
from ift_kernels.common import checks
from ift_kernels.common.transform import LogitTransform

try:
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(
        'ift.integrations.fused_head needs transformers: pip install "ift-kernels[train]"'
    ) from error

# Trainers that take their log-probabilities from `fused_lm_head`, and those that build logits.
_FUSED = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
_PAIRS = ("ORPOTrainer", "CPOTrainer")
_SAMPLING = ("GRPOTrainer", "RLOOTrainer")


def use_ift_kernels(
    trainer: Any,
    *,
    gradient: str | ActiveSet | None = None,
    logits_dtype: torch.dtype | None = None,
    deterministic: bool | None = None,
    support: bool = False,
) -> Any:
    """Move a TRL trainer onto `ift_kernels.linear_logprobs`. In place, before ``trainer.train()``.

    Args:
        trainer: of TRL 1.16 or later: SFT, DPO, KTO, GRPO, RLOO, ORPO or CPO, or a subclass of one.
            Its model and, where it has one, its reference model are patched (`ift.patch`).
        gradient, logits_dtype, deterministic: of the heads, as in `ift.patch`. Of a trainer with
            ``cast_lm_head_to_fp32`` logits_dtype is torch.float32.
        support: of GRPO and RLOO: log-probabilities and entropies within the support of the
            trainer's own sampling arguments, ``temperature``, ``top_k``, ``top_p`` and ``min_p``,
            as vLLM's ``processed_logprobs`` are. It is an `ift.Support`, rebuilt in every forward:
            policy, old policy and reference each have their own, and the sampled token in it. Where
            the arguments truncate nothing, there is nothing to do. Default False: over the whole
            vocabulary, as TRL's.

    Returns:
        `trainer` itself. Its losses are TRL's; ``logits/chosen`` and ``logits/rejected`` of ORPO
        and CPO become means over scored tokens, where TRL takes them over padding too.

    Raises:
        TypeError: another trainer, or a model that `ift.patch` refuses (a quantized head).
        ValueError: options that `ift.patch` refuses; an encoder-decoder model; with `support` a
            trainer that samples nothing or samples otherwise (``rollout_func``, a repetition
            penalty, ``generation_kwargs``, structured outputs, suppressed tokens), truncation
            without a ``top_k`` of up to 511, `gradient` other than "exact".

    >>> # trainer = use_ift_kernels(DPOTrainer(model, args, train_dataset=dataset))
    """
    names = {cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")}
    if not names & {*_FUSED, *_PAIRS}:
        raise TypeError(
            f"trainer: expected one of TRL's {', '.join((*_FUSED, *_PAIRS))}, "
            f"got {type(trainer).__name__}"
        )
    if getattr(trainer, "is_encoder_decoder", False):
        raise ValueError("model: expected a decoder, got an encoder-decoder model")
    outputs = ["logprob", "entropy", "argmax", "mean_logit"]
    if getattr(trainer, "use_weighting", False):  # WPO
        outputs.append("sum_sq")
    within = trainer_support(trainer) if checks.boolean("support", support) else None
    if within is not None:
        outputs.remove("mean_logit")  # of the whole vocabulary; neither trainer takes it
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if isinstance(model, nn.Module):
            base = base_model(trainer.accelerator.unwrap_model(model))
            patch(base, gradient=gradient, logits_dtype=logits_dtype, deterministic=deterministic)
            temperature = getattr(trainer, "temperature", 1.0)
            add_fused_forward(base, tuple(outputs), float(temperature or 1.0), within)
    if names & set(_PAIRS):
        trainer.concatenated_forward = MethodType(pair_forward, trainer)
    return trainer


def trainer_support(trainer: Any) -> Support | None:
    """The support that TRL's GRPO or RLOO trainer samples from; None: the whole vocabulary.

    Raises:
        ValueError: another trainer, or one that samples by other rules than a `Support` has.
    """
    if not {cls.__name__ for cls in type(trainer).__mro__} & {*_SAMPLING}:
        raise ValueError(
            f"support: expected False but for {' and '.join(_SAMPLING)}, got True for "
            f"{type(trainer).__name__}"
        )
    args = trainer.args
    for name, value, usual in (
        ("rollout_func", getattr(trainer, "rollout_func", None), None),
        ("repetition_penalty", args.repetition_penalty, 1.0),
        ("generation_kwargs", args.generation_kwargs or None, None),
        ("vllm_structured_outputs_regex", args.vllm_structured_outputs_regex, None),
        (
            "suppress_tokens",
            (getattr(trainer, "generation_kwargs", None) or {}).get("suppress_tokens"),
            None,
        ),
    ):
        if value != usual:
            raise ValueError(
                f"{name}: expected {usual} with support, which is rebuilt from temperature, top_k, "
                f"top_p and min_p, got {value!r}"
            )
    top_k = trainer.top_k if trainer.top_k and trainer.top_k > 0 else None
    if top_k is None:
        if (trainer.top_p is None or trainer.top_p == 1.0) and not trainer.min_p:
            return None
        raise ValueError(
            f"top_k: expected 1 to {MAX_SUPPORT} with support, got {trainer.top_k}: top_p and "
            f"min_p alone may leave more ids; top_k={MAX_SUPPORT} rarely binds"
        )
    sampler: Literal["vllm", "transformers"] = "vllm" if trainer.use_vllm else "transformers"
    return Support(top_k=top_k, top_p=trainer.top_p, min_p=trainer.min_p, sampler=sampler)


@dataclass
class FusedHeadOutput(ModelOutput):
    """What a model returns for ``fused_lm_head=True``; the fields are those of TRL's class.

    Per-token fields are (B, T - 1), the target of position t being the label of t + 1; with
    ``shift_labels`` they have its shape. They are float32 and 0 where the label is -100.

    Args:
        loss: -Σ log_probs / num_items_in_batch (default: the number of targets), plus the model's
            auxiliary loss times its coefficient.
        log_probs: log p(label), of softmax(logits / temperature).
        entropy: -Σ_v p_v log p_v of the same distribution, with gradient.
        log_sum_sq_probs, mean_logits: log Σ_v p_v² and mean_v logit_v / temperature; no gradient.
        is_top1: bool, whether the label is the most likely token.
        label_mask: bool, whether the label is not -100.
        aux_loss: of a mixture of experts, if the model returns one.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


# Outputs of `ift_kernels.linear_logprobs` and the field that each fills.
_FIELDS = {
    "logprob": "log_probs",
    "entropy": "entropy",
    "argmax": "is_top1",
    "mean_logit": "mean_logits",
    "sum_sq": "log_sum_sq_probs",
}


def add_fused_forward(
    model: nn.Module,
    outputs: tuple[str, ...] = ("logprob",),
    temperature: float = 1.0,
    support: Support | None = None,
) -> None:
    """Let a patched causal LM return a `FusedHeadOutput` for ``fused_lm_head=True``. In place.

    ``model(..., labels=labels, fused_lm_head=True)`` then computes the statistics of
    softmax(logits / temperature) without logits; ``shift_labels`` in place of ``labels`` are
    targets that are shifted already, and ``temperature`` and ``support`` in the call replace those
    given here.
    Every other call runs the forward that the model had. Called again, it replaces the options;
    `ift.unpatch` undoes it.

    Args:
        model: patched (`ift.patch`), or a PEFT model around one.
        outputs: "logprob" and any of "entropy", "argmax", "mean_logit", "sum_sq", as of
            `ift_kernels.linear_logprobs`. Fields of others are None.
        temperature: > 0, that logits are divided by. Default 1.
        support: an `ift.Support` with ``top_k``, in each call rebuilt from the model's own hidden
            states: "logprob", "entropy" and "argmax" are then within it. In a call with
            ``shift_labels`` it may also be ids (B, T, K) of a sampler, padded with -100, each
            target among its own. None: the whole vocabulary.

    Raises:
        TypeError: a model that is not patched.
        ValueError: other outputs, outputs without "logprob", a temperature that is not positive; a
            `support` without ``top_k``, or beside other outputs than those.
    """
    base: Any = base_model(model)
    if "_ift_patch" not in vars(base):
        raise TypeError(
            f"model: expected one patched by ift.patch, got an unpatched {type(base).__name__}"
        )
    if "logprob" not in outputs:
        raise ValueError(f'outputs: expected "logprob" among them, got {outputs!r}')
    for name in outputs:
        checks.one_of("outputs", name, _FIELDS)
    LogitTransform.checked(1.0, None, temperature)
    _check_support(support, outputs)
    if support is not None:
        check_gradient(head_options(base).gradient)
    before = base.forward
    if isinstance(before, _FusedForward):
        before = before.previous
    base.forward = _FusedForward(base, before, tuple(outputs), temperature, support)


def _check_support(support: Support | None, outputs: tuple[str, ...]) -> None:
    """Refuse one that may leave tokens out: the caller would not know which."""
    if support is None:
        return
    if not isinstance(support, Support):
        raise TypeError(f"support: expected an ift.Support or None, got {type(support).__name__}")
    check_support(support, torch.empty(0), outputs)
    if support.top_k is None:
        raise ValueError(f"support: expected one with top_k, got {support}")


class _FusedForward(BoundForward):
    """The forward of a model with `add_fused_forward`, around that of `ift.patch`."""

    keywords: ClassVar[dict[str, Any]] = {"fused_lm_head": False}

    def __init__(
        self, model: nn.Module, previous: Any, outputs: tuple[str, ...], temperature: float,
        support: Support | None,
    ) -> None:  # fmt: skip
        super().__init__(model, previous)
        self.outputs, self.temperature, self.support = outputs, temperature, support

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With ``fused_lm_head``."""
        if not kwargs.pop("fused_lm_head", False):
            before: Any = self.original  # accelerate's wrapper of a copy passes the copy
            before = before if model is self.model else MethodType(before.__func__, model)
            return before(*args, **kwargs)
        if args:
            raise TypeError("fused_lm_head: expected keyword arguments only")
        temperature = kwargs.pop("temperature", self.temperature)
        support = kwargs.pop("support", self.support)
        return _fused(model, kwargs, self.outputs, temperature, support)


def _fused(
    model: Any, kwargs: dict[str, Any], outputs: tuple[str, ...], temperature: float,
    support: Tensor | Support | None,
) -> FusedHeadOutput:  # fmt: skip
    for name in ("ift", "loss", "skip_logits"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"{name}: expected None with fused_lm_head")
    if kwargs.get("use_cache"):
        raise ValueError("use_cache: expected False or None with fused_lm_head, got True")
    kwargs = {**kwargs, "use_cache": False}
    labels, target = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    shifted = target is not None
    if target is None:
        if labels is None:
            raise ValueError("labels: expected (B, T) token ids with fused_lm_head, got None")
        target = shifted_targets(labels)
    if not isinstance(support, Tensor):
        _check_support(support, outputs)
    elif not shifted:
        raise ValueError("support: expected an ift.Support beside labels; ids go with shift_labels")
    transform = measured_model(model, kwargs).transform
    callback = token_stats(
        target,
        transform,
        head_options(model),
        outputs=outputs,
        detached=tuple(name for name in ("mean_logit", "sum_sq") if name in outputs),
        temperature=temperature,
        support=support,
    )
    output, stats = head_pass(model, original_forward(model), kwargs, callback)

    def columns(name: str) -> Tensor | None:
        value: Tensor | None = getattr(stats, name)
        return value if value is None or shifted else value[:, :-1]

    logprob = columns("logprob")
    assert logprob is not None
    target = target.to(logprob.device) if shifted else target[:, :-1].to(logprob.device)
    mask = target != IGNORE_INDEX
    loss = sft_loss(logprob, mask, num_items=num_items)
    aux_loss = output.get("aux_loss")
    if aux_loss is not None:
        config = model.config.get_text_config()
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    argmax, sum_sq = columns("argmax"), columns("sum_sq")
    return FusedHeadOutput(
        loss=loss,
        log_probs=logprob,
        entropy=columns("entropy"),
        log_sum_sq_probs=None if sum_sq is None else torch.where(mask, sum_sq, 1).log(),
        mean_logits=columns("mean_logit"),
        is_top1=None if argmax is None else (argmax == target) & mask,
        label_mask=mask,
        aux_loss=aux_loss,
    )


def pair_forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """`concatenated_forward` of TRL's ORPO and CPO trainers, without logits.

    As theirs: sums (ORPO, IPO, SimPO: means) of the completions' log-probabilities, and the
    cross-entropy of the chosen rows, for ORPO over their prompts too. In place of logits, of which
    the trainer takes the mean, it returns the mean logit of the scored tokens.
    """
    pad = self.pad_token_id if hasattr(self, "pad_token_id") else self.padding_value
    rows = self.concatenated_inputs(
        batch, is_encoder_decoder=False, padding_value=pad, device=self.accelerator.device
    )
    ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
    completion = rows["concatenated_labels"]
    orpo = not hasattr(self, "cpo_alpha")
    labels = torch.where(mask == 1, ids, IGNORE_INDEX) if orpo else completion
    # Scored: every label of either kind.
    scored = torch.where(completion == IGNORE_INDEX, labels, completion)
    options = {"output_router_logits": True} if self.aux_loss_enabled else {}
    out = model(input_ids=ids, attention_mask=mask, labels=scored, fused_lm_head=True, **options)
    chosen = batch["chosen_labels"].shape[0]
    count = completion[:, 1:] != IGNORE_INDEX
    logps = (out.log_probs * count).sum(-1)
    if orpo or self.loss_type in ("ipo", "simpo"):
        logps = logps / count.sum(-1)
    nll_mask = labels[:chosen, 1:] != IGNORE_INDEX
    nll = logps.new_zeros(())
    if orpo or self.cpo_alpha != 0:
        nll = -(out.log_probs[:chosen] * nll_mask).sum() / nll_mask.sum()
    sides = (slice(None, chosen), slice(chosen, None))
    logits = out.mean_logits * count
    means = [logits[side].sum() / count[side].sum().clamp(min=1) for side in sides]
    result = (logps[:chosen], logps[chosen:], *means, nll)
    return (*result, out.aux_loss) if self.aux_loss_enabled else result
