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
    Chunk,
    RowState,
)
from ift_kernels.backends.reference.chunk import logits, target_columns


def stats_update(chunk: Chunk, target: Tensor, state: RowState, track: int) -> None:
    """Update the running statistics with one chunk, in place.

    Σe, Σe·(z−m) and Σe² leave out the target's column, whose logit is in the state.
    """
    z, (values, argmax) = logits(chunk), state
    top, column = z.max(dim=1)  # a NaN wins, as it does in torch.argmax; ties go to the lowest id
    old = values[MAX].clone()
    top64 = top.double()
    is_new_max = (top64 > old) | (top64.isnan() & ~old.isnan())
    if track & TRACK_SECOND:
        rest = z.scatter(1, column[:, None], -torch.inf).amax(dim=1).double()
        contenders = torch.stack([torch.minimum(old, top64), rest, values[SECOND]])
        values[SECOND] = contenders.amax(dim=0)
    if track & TRACK_ARGMAX:
        argmax.copy_(torch.where(is_new_max, column + chunk.offset, argmax))
    new = torch.where(is_new_max, top64, old)
    # A row of −inf only has no finite reference point; 0 keeps exp(−inf − m) = 0.
    m = torch.where(new == -torch.inf, 0.0, new)
    # Rounded to float32, a difference of −28 would give e an error of 8 units in the last place.
    centred = z.double() - m[:, None]
    e = centred.exp()
    inside, local = target_columns(chunk, target)
    of_target = e.gather(1, local[:, None])
    # Times 0 rather than 0: a NaN there is still one of the row.
    e.scatter_(1, local[:, None], torch.where(inside[:, None], 0.0 * of_target, of_target))
    rescale = torch.where(old == -torch.inf, 0.0, (old - m).exp())
    if track & TRACK_ENTROPY:
        delta_max = torch.where(old == -torch.inf, 0.0, old - m)
        # Without this, 0 · (−inf) of a masked-out token would be NaN.
        e_z = torch.where(e == 0, 0.0, e * centred)
        values[E_Z] = rescale * (values[E_Z] + delta_max * values[SUM]) + e_z.sum(1)
    if track & TRACK_SQ:
        values[E_SQ] = rescale.square() * values[E_SQ] + e.square().sum(1)
    if track & TRACK_MEAN:
        values[Z_SUM] += z.sum(1, dtype=torch.float64)
    values[SUM] = rescale * values[SUM] + e.sum(1)
    values[MAX] = new
    picked = z.gather(1, local[:, None])[:, 0].double()
    values[TARGET] = torch.where(inside, picked, values[TARGET])
