"""The epilogues in plain torch: the executable specification that other backends are held to.

All functions work on one chunk of raw products ``x = h @ W[chunk].T`` of shape (N, C), whose first
column is vocabulary id `offset`. Statistics are kept as float64 rows of a running `state`, so that
a row's result does not depend on how the vocabulary was cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ift_kernels.transform import LogitTransform

# Rows of the running state. With m the running maximum of the logits z and e = exp(z − m):
MAX, SUM, TARGET, E_Z, E_SQ, Z_SUM, SECOND = range(
    7
)  # m, Σe, z[target], Σe·(z−m), Σe², Σz, 2nd max
STATE_ROWS = 7

# What to track beyond m, Σe and z[target]; bits of `outputs`.
TRACK_ARGMAX, TRACK_ENTROPY, TRACK_SQ, TRACK_MEAN, TRACK_SECOND = 1, 2, 4, 8, 16


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    return "" if dtype.is_floating_point else f"dtype {dtype} is not floating point"


def describe() -> dict[str, Any]:
    return {"available": True, "reason": "", "detail": "plain torch, any device, fp64 too"}


def wants_transpose(dtype: torch.dtype) -> bool:
    """Whether the schedule should ask `dlogits_` for the transposed gradient as well."""
    return False


def scratch(like: Tensor, elements: int) -> Tensor:
    """Uninitialised work memory in the dtype and on the device of `like`."""
    return like.new_empty(elements)


def new_state(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty running statistics: float64 (STATE_ROWS, N) and the argmax, int64 (N,)."""
    state = torch.zeros((STATE_ROWS, rows), dtype=torch.float64, device=device)
    state[MAX] = -torch.inf
    state[SECOND] = -torch.inf
    return state, torch.zeros(rows, dtype=torch.int64, device=device)


def _logits(x: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    return transform.apply(x if x.dtype == torch.float64 else x.float(), bias)


def _hit(target: Tensor, offset: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their target in this chunk, and where (0 where not)."""
    local = target - offset
    inside = (local >= 0) & (local < columns)
    return inside, torch.where(inside, local, 0)


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
    """Fold one chunk into the running statistics, in place."""
    z = _logits(x, bias, transform)
    top, at = z.max(dim=1)  # a NaN wins, as it does in torch.argmax; ties go to the lowest id
    old = state[MAX].clone()
    top64 = top.double()
    beaten = (top64 > old) | (top64.isnan() & ~old.isnan())
    if track & TRACK_SECOND:
        rest = z.scatter(1, at[:, None], -torch.inf).amax(dim=1).double()
        contenders = torch.stack([torch.minimum(old, top64), rest, state[SECOND]])
        state[SECOND] = contenders.amax(dim=0)
    if track & TRACK_ARGMAX:
        argmax.copy_(torch.where(beaten, at + offset, argmax))
    new = torch.where(beaten, top64, old)
    # A row of −inf only has no finite reference point; 0 keeps exp(−inf − m) = 0.
    m = torch.where(new == -torch.inf, 0.0, new)
    centred = z - m.to(z.dtype)[:, None]
    e = centred.exp()
    shrink = torch.where(old == -torch.inf, 0.0, (old - m).exp())
    if track & TRACK_ENTROPY:
        moved = torch.where(old == -torch.inf, 0.0, old - m)
        # Without this, 0 · (−inf) of a masked-out token would be NaN.
        e_z = torch.where(e == 0, 0.0, e * centred)
        state[E_Z] = shrink * (state[E_Z] + moved * state[SUM]) + e_z.sum(1, dtype=torch.float64)
    if track & TRACK_SQ:
        state[E_SQ] = shrink.square() * state[E_SQ] + e.square().sum(1, dtype=torch.float64)
    if track & TRACK_MEAN:
        state[Z_SUM] += z.sum(1, dtype=torch.float64)
    state[SUM] = shrink * state[SUM] + e.sum(1, dtype=torch.float64)
    state[MAX] = new
    inside, local = _hit(target, offset, x.shape[1])
    picked = z.gather(1, local[:, None])[:, 0].double()
    state[TARGET] = torch.where(inside, picked, state[TARGET])


def dlogits_(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    target: Tensor,
    offset: int,
    norm: Tensor,
    coef: Tensor,
    transposed: Tensor | None = None,
) -> None:
    """Overwrite raw products with their gradient, in place; write it to `transposed` (C, N) too.

    With log p = z − norm[0] − norm[1] and the rows (hit, one, log_p, flat) of `coef` (4, N):
    ``dx = ∂z/∂x · (hit·1[j = target] + p·(one + log_p·log p) + flat)``.
    """
    z = _logits(x, bias, transform)
    hit, one, per_log_p, flat = coef.to(z.dtype)[:, :, None]
    log_p = (z - norm[0].to(z.dtype)[:, None]) - norm[1].to(z.dtype)[:, None]
    p = log_p.exp()
    grad = p * (one + per_log_p * torch.where(p == 0, 0.0, log_p)) + flat
    inside, local = _hit(target, offset, x.shape[1])
    grad.scatter_add_(1, local[:, None], torch.where(inside[:, None], hit, 0.0))
    grad = grad * transform.derivative(z)
    x.copy_(torch.where((coef == 0).all(0)[:, None], 0.0, grad))  # also where the row has a NaN
    if transposed is not None:
        transposed.copy_(x.T)


def top_k_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    offset: int,
    values: Tensor,
    ids: Tensor,
) -> None:
    """Fold one chunk into the k best logits so far, in place.

    `values` float32 (N, k), descending, starts at −inf and `ids` at −1; chunks come in order of
    `offset`, the first at 0 and at least k wide.
    """
    z = _logits(x, bias, transform).to(values.dtype)
    columns = torch.arange(offset, offset + z.shape[1], device=z.device).expand_as(z)
    # The −inf placeholders of the first call (ids −1) must lose against tokens at −inf.
    parts = [(values, ids), (z, columns)] if offset else [(z, columns), (values, ids)]
    both, both_ids = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    # A stable sort keeps the earlier of two equal logits first, and earlier here is the lower id.
    order = both.sort(dim=1, descending=True, stable=True).indices[:, : values.shape[1]]
    values.copy_(both.gather(1, order))
    ids.copy_(both_ids.gather(1, order))


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b  # wraps modulo 2⁶⁴, which keeps all 64 bits of a 32×32-bit product
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox(seed: int, row: Tensor, ids: Tensor) -> Tensor:
    """Philox4x32-10 bits, one 32-bit word (as int64) per (row, vocabulary id).

    Counter (id // 4, row low, row high, 0), key (seed low, seed high), word id % 4.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    row, ids = torch.broadcast_tensors(row, ids)
    c0, c1, c2, c3 = ids // 4, row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, torch.zeros_like(row)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        hi0, lo0 = _mulhilo(c0, 0xD2511F53)
        hi1, lo1 = _mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack([c0, c1, c2, c3])
    return words.gather(0, (ids % 4)[None])[0]


def gumbel_update(
    x: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    offset: int,
    seed: int,
    rows: Tensor,
    best: Tensor,
    logit: Tensor,
    ids: Tensor,
) -> None:
    """Fold one chunk into a Gumbel-max draw: `best` perturbed logit, its logit and id, in place.

    `rows` (N,) are the global row numbers that key the generator.
    """
    z = _logits(x, bias, transform)
    columns = torch.arange(offset, offset + z.shape[1], device=z.device)
    bits = philox(seed, rows[:, None], columns[None, :])
    # −log1p(−u) of a small u keeps its digits: the largest perturbation is 22.9, not 16.6.
    u = (bits.to(z.dtype) + 0.5) * 2.0**-32
    score = z - torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    top, at = score.max(dim=1)
    beaten = (top > best) | (top.isnan() & ~best.isnan())
    best.copy_(torch.where(beaten, top, best))
    logit.copy_(torch.where(beaten, z.gather(1, at[:, None])[:, 0], logit))
    ids.copy_(torch.where(beaten, at + offset, ids))


def probabilities_(x: Tensor, bias: Tensor | None, transform: LogitTransform, norm: Tensor) -> None:
    """Overwrite raw products with ``exp(z − norm[0] − norm[1])``, in place."""
    z = _logits(x, bias, transform)
    x.copy_(((z - norm[0].to(z.dtype)[:, None]) - norm[1].to(z.dtype)[:, None]).exp())


from ift_kernels.backends.reference_active import *  # noqa: E402,F403  the active set
from ift_kernels.backends.reference_divergence import *  # noqa: E402,F403  divergence of two heads
from ift_kernels.backends.reference_scan import *  # noqa: E402,F403  scans, residual
