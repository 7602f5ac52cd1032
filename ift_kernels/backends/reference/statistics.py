"""Running statistics of a row, chunk by chunk, in float64: a result does not depend on the cuts."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_kernels.backends.contract import (
    E_SQ,
    E_Z,
    MAX,
    SECOND,
    SUM,
    TARGET,
    TRACK_ARGMAX,
    TRACK_ENTROPY,
    TRACK_MEAN,
    TRACK_SECOND,
    TRACK_SQ,
    Z_SUM,
)
from ift_kernels.backends.reference.chunk import logits, target_columns
from ift_kernels.common.transform import LogitTransform


def stats_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    state: Tensor,
    argmax: Tensor,
    track: int,
) -> None:
    """Update the running statistics with one chunk, in place."""
    z = logits(x, bias, transform)
    top, at = z.max(dim=1)  # a NaN wins, as it does in torch.argmax; ties go to the lowest id
    old = state[MAX].clone()
    top64 = top.double()
    is_new_max = (top64 > old) | (top64.isnan() & ~old.isnan())
    if track & TRACK_SECOND:
        rest = z.scatter(1, at[:, None], -torch.inf).amax(dim=1).double()
        contenders = torch.stack([torch.minimum(old, top64), rest, state[SECOND]])
        state[SECOND] = contenders.amax(dim=0)
    if track & TRACK_ARGMAX:
        argmax.copy_(torch.where(is_new_max, at + offset, argmax))
    new = torch.where(is_new_max, top64, old)
    # A row of −inf only has no finite reference point; 0 keeps exp(−inf − m) = 0.
    m = torch.where(new == -torch.inf, 0.0, new)
    centred = z - m.to(z.dtype)[:, None]
    e = centred.exp()
    rescale = torch.where(old == -torch.inf, 0.0, (old - m).exp())
    if track & TRACK_ENTROPY:
        delta_max = torch.where(old == -torch.inf, 0.0, old - m)
        # Without this, 0 · (−inf) of a masked-out token would be NaN.
        e_z = torch.where(e == 0, 0.0, e * centred)
        state[E_Z] = rescale * (state[E_Z] + delta_max * state[SUM]) + e_z.sum(
            1, dtype=torch.float64
        )
    if track & TRACK_SQ:
        state[E_SQ] = rescale.square() * state[E_SQ] + e.square().sum(1, dtype=torch.float64)
    if track & TRACK_MEAN:
        state[Z_SUM] += z.sum(1, dtype=torch.float64)
    state[SUM] = rescale * state[SUM] + e.sum(1, dtype=torch.float64)
    state[MAX] = new
    inside, local = target_columns(target, offset, x.shape[1])
    picked = z.gather(1, local[:, None])[:, 0].double()
    state[TARGET] = torch.where(inside, picked, state[TARGET])
