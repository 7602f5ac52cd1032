"""`linear_logprobs` of a head whose vocabulary is spread over processes; no process gathers it.

Each process runs the ordinary operators on its own rows of the head. Their statistics are summed
over the processes, per token, and autograd carries the gradient of those sums back into the local
operators: every schedule, exact or active, serves a shard as it serves a whole head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ift_kernels import linear
from ift_kernels.backends import contract
from ift_kernels.common import checks
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.common.active_set import options as active_options
from ift_kernels.common.transform import LogitTransform
from ift_kernels.linear import TokenStats
from ift_kernels.operators import head_call, library
from ift_kernels.operators.linear_stats import Statistics

_LITTLE = -1e30  # the log-sum-exp of a shard without probability, relative to the largest logit
_IGNORE = -100  # of the local calls, whatever the caller's is: their ids are the shard's own


def vocab_parallel_logprobs(
    hidden: Tensor,  # (..., D), the same in every process of the group
    weight: Tensor,  # (V / processes, D), or a DTensor (V, D) with Shard(0)
    target: Tensor,  # (...), ids of the whole vocabulary
    *,
    group: Any = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    column_scale: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logprob",),
    detached: tuple[str, ...] = (),
    gradient: str | ActiveSet = "exact",
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
) -> TokenStats:
    """`linear_logprobs` of a head whose rows are spread over the processes of a group.

    Equals ``linear_logprobs(hidden, torch.cat(weights of all processes), target, ...)``, with the
    same results in every process, the gradient of its own rows in each, and the whole gradient of
    `hidden` in all. Every process of the group must call it, run backward through it, and compute
    the same loss from the results, as in tensor parallelism generally. Per token the processes
    exchange a handful of sums; of `hidden`'s gradient, its size.

    A token for which a whole shard is masked out, every logit of it -inf, sends no gradient into
    that shard, not even that of its target's log-probability, which is -inf.

    Args:
        hidden: (..., D), the same everywhere; a DTensor is gathered if it is sharded (sequence
            parallelism), and then gets its gradient back sharded.
        weight: this process's rows, which follow those of the process before it in `group`; their
            number may differ. Or a DTensor sharded along dimension 0, and `group` None.
        target: (...) int64 or int32 ids in [0, V), the same everywhere.
        group: a `torch.distributed` process group; None for the default one, or the DTensor's.
        bias: this process's part of the bias, sharded as `weight`.
        low_rank, column_scale: u (..., r) the same everywhere, and with its whole gradient, as
            `hidden`; B and column_scale sharded as `weight`.
        deterministic: every result of a token is the same to the bit whatever else is in the call,
            for a given number of shards, cut at the same rows. Between numbers of shards the sums
            are rounded elsewhere: from equal logits lse differs by at most 1 ulp of float32 and
            logprob by 2, of their own magnitude, and by one more of ln V.
        The rest: as `linear_logprobs`. The workspace is that of each process.

    Returns:
        TokenStats, as `linear_logprobs`.

    Raises:
        As `linear_logprobs`; TypeError, ValueError for a DTensor that is not sharded along
            dimension 0 of one mesh dimension, or whose bias or hidden do not fit.
        RuntimeError: torch.distributed is not initialised; differentiated twice, in forward mode or
            by torch.func.

    >>> # logprob = vocab_parallel_logprobs(hidden, lm_head.weight, target).logprob
    """
    u, b = (None, None) if low_rank is None else low_rank
    library.check_transforms("vocab_parallel_logprobs", (hidden, weight, bias, u, b, column_scale))
    shard = _Shard.of(weight, bias, group, b, column_scale)
    hidden = whole(hidden, weight)
    ignore_index = checks.integer("ignore_index", ignore_index)
    track, differentiable = linear.tracks(outputs, detached)
    if track & contract.TRACK_SECOND:
        track |= contract.TRACK_ARGMAX  # says whose second it is
    active = active_options(gradient)
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    target = checks.token_ids("target", target, hidden.shape[:-1], hidden.device)
    valid = target != ignore_index
    head_call.check_targets(target.flatten(), valid.flatten(), shard.vocabulary)

    hidden = _to_shards(hidden, shard.group)
    if u is not None:
        u = _to_shards(whole(u, weight), shard.group)
    here = valid & (target >= shard.start) & (target < shard.start + shard.weight.shape[0])
    # Targets of other shards become any id: nothing is made of that log-probability.
    own = torch.where(here, target - shard.start, 0).masked_fill(~valid, _IGNORE)
    linear.check_deterministic(deterministic, active)
    linear.check_adapter(low_rank, column_scale, active, deterministic)
    numerics = workspace, logits_dtype, deterministic
    local = _local(hidden, shard, u, own, transform, numerics, track, active, differentiable)
    somewhere = (target >= 0) & (target < shard.vocabulary)
    stats = _combined(local, here, somewhere, shard, track)
    outside = valid & ~somewhere  # NaN, as of a whole head
    for name in ("logprob", "target_logit"):
        if (value := getattr(stats, name)) is not None:
            stats = stats._replace(**{name: value.masked_fill(outside, torch.nan)})
    stats = stats._replace(**{name: getattr(stats, name).detach() for name in detached})
    return TokenStats(
        *(
            torch.where(valid, value, 0) if name in outputs and value is not None else None
            for name, value in stats._asdict().items()
        )
    )


def is_sharded(weight: Tensor) -> bool:
    """Is this a DTensor, whose rows `vocab_parallel_logprobs` may find in other processes?"""
    return hasattr(weight, "device_mesh")


def whole(hidden: Tensor, weight: Tensor) -> Tensor:
    """`hidden`, if a DTensor, as a plain tensor that every process of its mesh has all of."""
    if not is_sharded(hidden):
        return hidden
    from torch.distributed.tensor import Replicate

    sharded: Any = hidden
    if sharded.device_mesh != getattr(weight, "device_mesh", None):
        raise ValueError("hidden: expected a DTensor on the mesh of weight, or a plain tensor")
    plain: Tensor = sharded.redistribute(placements=[Replicate()]).to_local()
    return plain


class _Shard(NamedTuple):
    """This process's part of the head, and its place in the vocabulary."""

    weight: Tensor
    bias: Tensor | None
    group: Any
    start: int
    vocabulary: int
    low_rank_weight: Tensor | None = None
    column_scale: Tensor | None = None

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor | None, group: Any, low_rank_weight: Tensor | None = None,
        column_scale: Tensor | None = None,
    ) -> _Shard:  # fmt: skip
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "vocab_parallel_logprobs: expected torch.distributed to be initialised"
            )
        if is_sharded(weight):
            return _Shard._of_dtensor(weight, bias, group, low_rank_weight, column_scale)
        checks.floating("weight", weight)
        for name, part in (
            ("bias", bias), ("low_rank[1]", low_rank_weight), ("column_scale", column_scale),
        ):  # fmt: skip
            if part is not None and is_sharded(part):
                raise TypeError(
                    f"{name}: expected this process's part of it, like weight, got a DTensor"
                )
        # Asked, not assumed: shards taken to be even that are not would be silently wrong.
        size = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
        rank = dist.get_rank(group)
        size[rank] = weight.shape[0]
        dist.all_reduce(size, group=group)
        sizes = size.tolist()
        return _Shard(
            weight, bias, group, sum(sizes[:rank]), sum(sizes), low_rank_weight, column_scale
        )

    @staticmethod
    def _of_dtensor(
        weight: Any, bias: Any, group: Any, low_rank_weight: Any, column_scale: Any
    ) -> _Shard:
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if group is not None:
            raise ValueError("group: expected None for a DTensor weight, which has its own mesh")
        mesh, placements = weight.device_mesh, tuple(weight.placements)
        if mesh.ndim != 1 or placements != (Shard(0),):
            raise ValueError(
                f"weight: expected a DTensor with placements (Shard(0),) on a mesh of one "
                f"dimension, got {placements} on {mesh.ndim}"
            )
        parts: list[Tensor | None] = []
        for name, part in (
            ("bias", bias), ("low_rank[1]", low_rank_weight), ("column_scale", column_scale),
        ):  # fmt: skip
            if part is not None and not (
                is_sharded(part)
                and part.device_mesh == mesh
                and tuple(part.placements) == placements
            ):
                raise ValueError(f"{name}: expected a DTensor sharded like weight")
            parts.append(None if part is None else part.to_local())
        _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
        return _Shard(
            weight.to_local(), parts[0], mesh.get_group(), offset[0], weight.shape[0], *parts[1:]
        )


class _ToShards(torch.autograd.Function):
    """The same tensor for every shard; backward, the sum of what the shards make of it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = grads
        # At least float32: a sum of 16-bit values would be rounded once per process.
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(gradient.dtype), None


class _FromShards(torch.autograd.Function):
    """The sum over the shards. Its gradient is each shard's own: all compute the same loss."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


_to_shards: Any = _ToShards.apply
_sum_of_shards: Any = _FromShards.apply


def _local(
    hidden: Tensor,
    shard: _Shard,
    u: Tensor | None,
    target: Tensor,
    transform: LogitTransform,
    numerics: tuple[int | None, torch.dtype | None, bool],
    track: int,
    active: ActiveSet | None,
    differentiable: int,
) -> Statistics:
    """The statistics of one shard, shaped like `target`, with `norm` (2, ...)."""
    if shard.weight.shape[0]:
        b = shard.low_rank_weight
        call = linear.Call(
            hidden, shard.weight, target, shard.bias, _IGNORE, transform, *numerics,
            None if u is None or b is None else (u, b), shard.column_scale,
        )  # fmt: skip
        stats = call.statistics(track, active, differentiable)
        return stats._replace(norm=stats.norm.view(2, *target.shape))
    # No rows: as if all were masked out. An edge of the graph all the same, or this process would
    # be missing where hidden's gradient is summed.
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    zero = hidden.new_zeros(target.shape, dtype=dtype) + hidden[..., :0].sum(-1)
    if u is not None:
        zero = zero + u[..., :0].sum(-1)
    for part in (shard.weight, shard.bias, shard.low_rank_weight, shard.column_scale):
        zero = zero if part is None else zero + part.sum()  # of nothing
    ids, fixed = torch.zeros_like(target), zero.detach()
    norm = torch.stack([fixed - torch.inf, fixed])
    return Statistics(zero, zero - torch.inf, zero, ids, fixed, fixed, fixed, zero, zero, norm)


def _without(masked: Tensor, stats: Statistics, rows: int, track: int) -> Statistics:
    """`stats` of a shard of so many rows with next to no probability where `masked`.

    By finite numbers where something is multiplied with them, so that 0 times them is 0; and with
    no gradient to what they replace, which would be NaN.
    """
    instead = {
        "logprob": (-torch.inf, True),
        "lse": (0.0, True),
        "entropy": (0.0, track & contract.TRACK_ENTROPY),
        "sum_sq": (0.0, track & contract.TRACK_SQ),
        "mean_logit": (-torch.inf if rows else 0.0, track & contract.TRACK_MEAN),
        "target_logit": (-torch.inf, track & contract.RETURN_TARGET),
    }
    return stats._replace(
        **{
            name: torch.where(masked, value, getattr(stats, name))
            for name, (value, asked) in instead.items()
            if asked
        }
    )


def _combined(
    stats: Statistics, here: Tensor, somewhere: Tensor, shard: _Shard, track: int
) -> TokenStats:
    """Statistics of the whole vocabulary from those of the shards.

    `here`, `somewhere`: tokens whose target is in this shard, in any.
    """
    group = shard.group
    top, rest_of_lse = stats.norm

    def extreme(value: Tensor, op: Any) -> Tensor:
        value = value.contiguous().clone()
        dist.all_reduce(value, op=op, group=group)
        return value

    # A maximum may leave out a NaN: in the second it is +inf.
    local_lse = stats.lse
    both = torch.stack([top, torch.where(local_lse.isnan(), torch.inf, top)])
    most, most_or_nan = extreme(both, dist.ReduceOp.MAX)
    nothing = most_or_nan == -torch.inf  # in any shard: NaN, as of a whole head
    masked = (local_lse == -torch.inf) & ~nothing
    stats = _without(masked, stats, shard.weight.shape[0], track)
    # Relative to the largest logit, since a common one would cost digits.
    edge = stats.lse - stats.lse.detach()  # 0, for its gradient
    relative = torch.where(masked, _LITTLE, (top.double() - most) + rest_of_lse) + edge
    # Each shard's parts depend on that shard alone: only of the sums do all make the same loss.
    # The target's shard is apart: beside its 1 a sum loses what a nearly certain token leaves them.
    parts = [
        torch.where(here, 0, relative.exp()),
        torch.where(here, relative, 0),
        torch.where(here, stats.logprob, 0).double(),
    ]
    if track & contract.TRACK_ENTROPY:
        parts.append(relative.exp() * (stats.entropy - relative))
    if track & contract.TRACK_SQ:
        parts.append((2 * relative.detach()).exp() * stats.sum_sq)
    if track & contract.TRACK_MEAN:  # comes less lse
        parts.append((stats.mean_logit + relative) * (shard.weight.shape[0] / shard.vocabulary))
    if track & contract.RETURN_TARGET:
        parts.append(torch.where(here, stats.target_logit, 0).double())
    sums = iter(_sum_of_shards(torch.stack(parts), group))
    others, of_target, in_shard = next(sums), next(sums), next(sums)
    # Where the target's shard has the largest logit, by log1p of what the others are to it.
    has_most = somewhere & (of_target >= 0)
    beyond = (others * (-of_target.clamp(min=0)).exp()).log1p()
    log_sum = (others + torch.where(somewhere, of_target.exp(), 0)).log()
    log_sum = torch.where(has_most, of_target + beyond, log_sum)
    dtype = stats.lse.dtype
    logprob = torch.where(has_most, in_shard - beyond, in_shard + of_target - log_sum)
    lse = torch.where(nothing, local_lse, (most + log_sum).to(dtype))
    out = TokenStats(logprob.to(dtype), lse)
    if track & contract.TRACK_ENTROPY:
        out = out._replace(entropy=(next(sums) * (-log_sum).exp() + log_sum).to(dtype))
    if track & contract.TRACK_SQ:
        out = out._replace(sum_sq=(next(sums) * (-2 * log_sum).exp()).detach().to(dtype))
    if track & contract.TRACK_MEAN:
        out = out._replace(mean_logit=(next(sums) + most).to(dtype))
    if track & contract.RETURN_TARGET:
        out = out._replace(target_logit=next(sums).to(dtype))
    if not track & contract.TRACK_ARGMAX:
        return out
    rest = log_sum.detach().to(dtype)
    # Ties go to the lowest id; with NaN alone, to the last.
    mine = torch.where(top == most, stats.argmax + shard.start, shard.vocabulary - 1)
    argmax = extreme(mine, dist.ReduceOp.MIN)
    out = out._replace(argmax=argmax, argmax_logprob=(most - most) - rest)
    if track & contract.TRACK_SECOND:
        inside = (argmax >= shard.start) & (argmax < shard.start + shard.weight.shape[0])
        second = torch.where(inside, stats.second_logprob + rest_of_lse, 0) + (top - most)
        out = out._replace(second_logprob=extreme(second, dist.ReduceOp.MAX) - rest)
    return out
