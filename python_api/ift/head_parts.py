"""What the fused operations take of an output head: plain, quantized, with LoRA or DoRA of PEFT.

``base + scaling * B(A(dropout(hidden)))`` of an adapter becomes the base's weight and
``low_rank = (u, B)`` with ``u = scaling * A(dropout(hidden))``, formed by PEFT's own modules, so
that dropout and the gradients of A and of the hidden states are theirs. DoRA adds `column_scale`,
magnitude over the norm of each row. The base is neither merged nor copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ift.heads import head_weight, is_lora
from ift_kernels.schedule.head import slices
from ift_kernels.vocab_parallel import is_sharded, whole

CHUNK = 4096  # rows of a head at once
# A quantized module's own logits may be of activations that it quantizes, or of 16-bit products:
# 8 bits are within 2 %. A wrong layout or scale is beyond this share.
MAX_ERROR = 0.1
NORM_ELEMENTS = 1 << 22  # of rows of the weight whose norms are formed at once


class HeadParts(NamedTuple):
    """Operands of a linear head, under their names in `ift_kernels.linear_logprobs`."""

    hidden: Tensor  # whole
    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None = None
    column_scale: Tensor | None = None

    @property
    def adapter(self) -> dict[str, Any]:
        """Arguments of an operation beside weight and bias: none of a plain head."""
        found = {"low_rank": self.low_rank, "column_scale": self.column_scale}
        return {name: value for name, value in found.items() if value is not None}


def select_rows(adapter: dict[str, Any], select: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """`HeadParts.adapter` of the hidden states that `select` takes of all."""
    if "low_rank" not in adapter:
        return adapter
    u, b = adapter["low_rank"]
    return {**adapter, "low_rank": (select(u), b)}


def refuse_adapter(argument: str, adapter: dict[str, Any]) -> None:
    """Refuse an option that is not computed with LoRA on the head.

    Raises:
        ValueError: the head has one.
    """
    if adapter:
        raise ValueError(f"{argument}: not supported with LoRA on the output head")


def check_lora(head: Any, model: str) -> None:
    """Refuse a head whose active adapters do something else than LoRA, or DoRA, to its output.

    Raises:
        TypeError: names the model, the adapter and what it does.
    """
    names = _adapters(head)
    for name in names:
        reason = _unsupported_reason(head, name)
        if reason:
            raise TypeError(
                f"model: expected LoRA or DoRA on the output head of {model}, adapter {name!r} "
                f"{reason}"
            )
    if len(names) > 1 and any(_is_dora(head, name) for name in names[:-1]):
        raise TypeError(
            f"model: expected DoRA on the output head of {model} as the last active adapter, got "
            f"{names}"
        )


def _adapters(head: Any) -> list[str]:
    """Those that the head's forward applies, in order."""
    if head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _is_dora(head: Any, name: str) -> bool:
    return type(head.lora_variant.get(name)).__name__ == "DoraLinearVariant"


def _unsupported_reason(head: Any, name: str) -> str:
    variant, lora_b = head.lora_variant.get(name), head.lora_B[name]
    if variant is not None and not _is_dora(head, name):
        return f"is a {type(variant).__name__}"
    if getattr(head, "fan_in_fan_out", False):
        return "has fan_in_fan_out=True"
    if type(lora_b) is not nn.Linear or "forward" in vars(lora_b) or has_hooks(lora_b):
        return f"has a lora_B of {type(lora_b).__module__}.{type(lora_b).__name__} or with hooks"
    if not _is_dora(head, name):
        return ""
    if any(head.lora_B[each].bias is not None for each in _adapters(head)):
        return "is DoRA beside lora_bias=True"
    if head.training and not isinstance(head.lora_dropout[name], nn.Identity):
        return (
            "is DoRA with lora_dropout, which in training multiplies other hidden states with the "
            "head's weight; expected lora_dropout=0"
        )
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Whether a module whose weight is read has hooks of its forward, which do not run then.

    Those of FSDP would gather the weight. Those of tensor parallelism only convert what the forward
    takes and returns.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    names = (getattr(hook, "__module__", None) or "" for hook in hooks)
    return any(not name.startswith("torch.distributed.tensor") for name in names)


def head_parts(head: Any, hidden: Tensor) -> HeadParts:
    """The operands of a head (`ift.head_pass.plain_head`), for these hidden states."""
    if is_lora(head) and head.disable_adapters and head.merged:
        head.unmerge()  # as its forward does
    weight, bias = head_weight(head, hidden.dtype)
    hidden = whole(hidden, weight)
    _check_gathered(head, weight)
    if not is_lora(head):
        return HeadParts(hidden, weight, bias)
    us, bs, scale, x = [], [], None, hidden
    for name in _adapters(head):
        lora_a, lora_b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        x = head._cast_input_dtype(x, lora_a.weight.dtype)
        us.append(lora_a(head.lora_dropout[name](x)) * scaling)
        bs.append(lora_b.weight)
        _check_gathered(head, lora_b.weight)
        if lora_b.bias is not None:
            bias = lora_b.bias * scaling if bias is None else bias + lora_b.bias * scaling
        if _is_dora(head, name):
            if is_sharded(weight):
                raise TypeError(
                    f"model: expected a whole weight with DoRA on the output head, adapter {name!r}"
                    ", got a DTensor"
                )
            norm = weight_norm(weight, lora_a.weight, lora_b.weight, scaling)
            scale = head.lora_magnitude_vector[name].weight / norm
    if not us:
        return HeadParts(hidden, weight, bias)
    low_rank = (us[0], bs[0]) if len(us) == 1 else (torch.cat(us, -1), torch.cat(bs, -1))
    return HeadParts(hidden, weight, bias, low_rank, scale)


def _check_gathered(head: Any, weight: Tensor) -> None:
    shape = getattr(weight, "ds_shape", None)
    if shape is not None and weight.shape != shape:
        raise RuntimeError(
            f"{type(head).__name__}: its weight is partitioned by DeepSpeed "
            f"ZeRO-3; expected its ds_shape {tuple(shape)} here, got {tuple(weight.shape)}"
        )


@torch.no_grad()
def weight_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """``(weight + scaling * lora_b @ lora_a).norm(dim=1)`` (V,), some rows at a time; a constant,
    as in PEFT.
    """
    dtype = torch.promote_types(lora_a.dtype, torch.float32)
    norm = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    lora_a = lora_a.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        for rows in slices(0, weight.shape[0], max(NORM_ELEMENTS // weight.shape[1], 1)):
            adapted = torch.addmm(
                weight[rows].to(dtype), lora_b[rows].to(dtype), lora_a, alpha=scaling
            )
            norm[rows] = torch.linalg.vector_norm(adapted, dim=1)
    return norm


def head_logits(head: nn.Module, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of a head with products in `dtype`, without a copy of its whole weight."""
    parts = head_parts(head, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        operand, chunks = parts.hidden.to(dtype), slices(0, parts.weight.shape[0], CHUNK)
        tiles = [nn.functional.linear(operand, parts.weight[some].to(dtype)) for some in chunks]
        logits = torch.cat(tiles, -1)
        if parts.low_rank is not None:
            u, b = parts.low_rank
            logits += u.to(dtype) @ b.to(dtype).T
        if parts.column_scale is not None:
            logits *= parts.column_scale.to(dtype)
        return logits if parts.bias is None else logits + parts.bias.to(dtype)


@torch.no_grad()
def rows_error(head: nn.Module, hidden: Tensor, own: Tensor) -> float:
    """Relative difference of a quantized head's `own` logits from those of its rows."""
    found = head_logits(head, hidden, torch.float32)
    return float((own.float() - found).norm() / found.norm().clamp(min=1e-30))
