"""Advantages, the weights of policy gradients, from rewards and values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ift_kernels import discounted_cumsum
from ift_kernels.common import checks
from ift_kernels.common.packed_rows import Rows


def group_advantages(
    rewards: Tensor,  # (rows,)
    group_size: int,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages of GRPO: a reward less the mean of its group, over a standard deviation.

    ``(r - mean) / (std + eps)`` over the `group_size` responses to one prompt, which follow one
    another; the unbiased deviation.

    Args:
        rewards: (rows,); NaN marks a response that could not be scored: it is left out of the means
            and its advantage is 0.
        group_size: responses per prompt; a divisor of the rows.
        scale: "group"; "batch": deviation of all rewards; "none": no division (Dr. GRPO).
        eps: added to the deviation, default 1e-4 as in TRL.

    Returns:
        (rows,), float32 (float64 for float64), without gradient; 0 in a group of one.

    Raises:
        ValueError: unknown scale, rows that are no multiple of `group_size`.
    """
    checks.one_of("scale", scale, ("group", "batch", "none"))
    groups = _groups(rewards, group_size)
    centred = groups - groups.nanmean(1, keepdim=True)
    if scale != "none":
        spread = _nanstd(groups if scale == "group" else groups.reshape(1, -1))
        centred = centred / (spread + eps)
    return centred.nan_to_num(nan=0.0).flatten()


def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Advantages of RLOO: a reward less the mean of the *other* rewards of its group.

    Args:
        rewards, group_size: as in `group_advantages`.

    Returns:
        As `group_advantages`.
    """
    groups = _groups(rewards, group_size)
    other_count = (~groups.isnan()).sum(1, keepdim=True) - 1
    baseline = (groups.nansum(1, keepdim=True) - groups) / other_count
    return (groups - baseline).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).flatten()


def gae_advantages(
    rewards: Tensor,  # (B, T) or (T,)
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438) over the tokens of each row.

    ``δ_t = r_t + gamma · V_{t+1} - V_t``, ``A_t = Σ_k (gamma · lam)^k δ_{t+k}``; after a row's
    last token the value is 0. t counts response tokens alone: over a gap, such as the output
    of a tool, the next response token is the next state, and nothing is discounted.

    Args:
        rewards: per token, (B, T) or packed (T,).
        values: of the state before each token, same shape.
        mask: response tokens.
        gamma, lam: in [0, 1], defaults 1 and .95.
        cu_seqlens: the rows are packed documents.

    Returns:
        Advantages and returns (advantages + values), without gradient, 0 off the mask.
    """
    mask = checks.as_bool_mask(mask, rewards, "rewards")
    checks.same_shape("values", values, rewards, "rewards")
    gamma, lam = checks.unit_interval("gamma", gamma), checks.unit_interval("lam", lam)
    counts = Rows(rewards, cu_seqlens).sum(mask.long())
    # Response tokens alone, one after another, without gaps and padding.
    reward, value = rewards.detach().float()[mask], values.detach().float()[mask]
    ends = counts.cumsum(0)
    follows = torch.cat([value[1:], value[:1]])
    follows[ends[counts > 0] - 1] = 0
    packed = F.pad(ends, (1, 0))
    delta = reward + gamma * follows - value
    found = discounted_cumsum(delta, gamma * lam, cu_seqlens=packed)
    nothing = torch.zeros_like(rewards, dtype=torch.float32)
    return nothing.masked_scatter(mask, found), nothing.masked_scatter(mask, found + value)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    checks.floating("rewards", rewards)
    size = checks.integer("group_size", group_size)
    if rewards.dim() != 1 or size < 1 or rewards.shape[0] % size:
        raise ValueError(
            f"group_size: expected a divisor of the rows of rewards (rows,), got {size} with shape "
            f"{tuple(rewards.shape)}"
        )
    # In bf16 a mean of 100.5 and 101 would be rounded to one of them.
    accum_dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return rewards.detach().to(accum_dtype).reshape(-1, size)


def _nanstd(groups: Tensor) -> Tensor:
    """Unbiased, (groups, 1), over what is not NaN; 0 of a single one."""
    count = (~groups.isnan()).sum(1, keepdim=True)
    square = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (square / (count - 1).clamp(min=1)).sqrt()
