"""`linear_selected_logprobs` and `linear_topk` of a head that is spread over processes.

Every process takes the products of those of a token's ids that are its own, and the log-sum-exp of
its other ids. Both are combined over the processes, and autograd carries their gradients back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ift_kernels import linear_selected
from ift_kernels import vocab_parallel as parallel
from ift_kernels.backends.reference.sampling import merge_top_k
from ift_kernels.common import checks
from ift_kernels.common.transform import LogitTransform
from ift_kernels.linear_selected import SelectedLogprobs
from ift_kernels.linear_topk import TopK, check_limits, nucleus
from ift_kernels.operators import library
from ift_kernels.operators import linear_selected as operator


def vocab_parallel_selected_logprobs(
    hidden: Tensor,  # (..., D), the same in every process of the group
    weight: Tensor,  # (V / processes, D), or a DTensor (V, D) with Shard(0)
    ids: Tensor,  # (..., K), ids of the whole vocabulary
    *,
    group: Any = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logprob",),
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
) -> SelectedLogprobs:
    """`linear_selected_logprobs` of a head whose rows are spread over the processes of a group.

    Equals ``linear_selected_logprobs(hidden, torch.cat(weights of all processes), ids, ...)``, with
    the same results in every process, the gradient of its own rows in each, and the whole gradient
    of `hidden` in all. Every process of the group must call it, run backward through it, and
    compute the same loss from the results. Per token the processes exchange K + 2 numbers; of
    `hidden`'s gradient, its size.

    Args:
        hidden, weight, group, bias: as `vocab_parallel_logprobs`.
        ids: (..., K) int64 or int32, the same everywhere.
        The rest: as `linear_selected_logprobs`. The workspace is that of each process.

    Returns:
        SelectedLogprobs, as `linear_selected_logprobs`.

    Raises:
        As `linear_selected_logprobs` and `vocab_parallel_logprobs`.

    >>> # found = vocab_parallel_selected_logprobs(hidden, lm_head.weight, ids).logprob
    """
    library.check_transforms("vocab_parallel_selected_logprobs", (hidden, weight, bias))
    names = linear_selected.check_outputs(outputs)
    ignore_index = checks.integer("ignore_index", ignore_index)
    checks.boolean("deterministic", deterministic)
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    shard = parallel._Shard.of(weight, bias, group)
    hidden = parallel.whole(hidden, weight)
    ids = linear_selected.check_ids(ids, hidden)
    wrong = operator.check_ids(ids.reshape(-1, ids.shape[-1]), ignore_index, shard.vocabulary)
    there, rows = ids != ignore_index, shard.weight.shape[0]
    valid = there.any(-1)

    hidden = parallel._to_shards(hidden, shard.group)
    here = there & (ids >= shard.start) & (ids < shard.start + rows)
    own = torch.where(here, ids - shard.start, parallel._IGNORE)
    if rows:
        checks.head_arguments(hidden, shard.weight, shard.bias)
        product, rest = linear_selected.products(
            hidden, shard.weight, own, valid, shard.bias, parallel._IGNORE, transform, workspace,
            logits_dtype, deterministic,
        )  # fmt: skip
        z = linear_selected.logits(product, own, shard.bias, transform)
    else:  # an edge of the graph, or this process would be missing where gradients are summed
        edge = hidden[..., :0].sum(-1).double()
        for part in (shard.weight, shard.bias):
            edge = edge if part is None else edge + part.sum()  # of nothing
        product = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        z, rest = edge[..., None].expand(ids.shape), edge - torch.inf
    z = parallel._sum_of_shards(torch.where(here, z, 0.0), shard.group)
    z = z.masked_fill(wrong.view(valid.shape)[..., None], torch.nan)
    rest = _rest_of_shards(rest, shard.group)
    return linear_selected.combined(z, rest, there, names, product.dtype)


class _RestOfShards(torch.autograd.Function):
    """The log-sum-exp over the shards of theirs; each gets its share of the gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        most = part.detach().clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        most = most.masked_fill(most == -torch.inf, 0.0)
        total = (part - most).exp()
        dist.all_reduce(total, group=group)
        rest: Tensor = most + total.log()
        ctx.save_for_backward(part, rest)
        return rest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (d_rest,), (part, rest) = grads, ctx.saved_tensors
        # Without upstream gradient, or without any probability, none, where there may be a NaN.
        nothing = (d_rest == 0) | (part == -torch.inf)
        return (d_rest * (part - rest).exp()).masked_fill(nothing, 0.0), None


_rest_of_shards: Any = _RestOfShards.apply


@torch.no_grad()
def vocab_parallel_topk(
    hidden: Tensor,  # (..., D), the same in every process of the group
    weight: Tensor,  # (V / processes, D), or a DTensor (V, D) with Shard(0)
    k: int,
    *,
    group: Any = None,
    top_p: float | None = None,
    min_p: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
) -> TopK:
    """`linear_topk` of a head whose rows are spread over the processes of a group. No gradient.

    Equals ``linear_topk(hidden, torch.cat(weights of all processes), k, ...)``, with the same
    results in every process. Every process of the group must call it. Per token each sends its own
    k + 1 best.

    Args:
        hidden, weight, group, bias: as `vocab_parallel_logprobs`.
        The rest: as `linear_topk`. The workspace is that of each process.

    Returns:
        TopK, as `linear_topk`.

    Raises:
        As `linear_topk` and `vocab_parallel_logprobs`.

    >>> # ids, logprob, truncated = vocab_parallel_topk(hidden, lm_head.weight, 64, top_p=0.9)
    """
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    checks.boolean("deterministic", deterministic)
    shard = parallel._Shard.of(weight, bias, group)
    hidden = parallel.whole(hidden, weight)
    k, top_p, min_p = check_limits(k, top_p, min_p, shard.vocabulary)
    dtype = checks.compute_dtype(hidden, shard.weight, logits_dtype)
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), min(k + 1, shard.vocabulary)
    accum = torch.promote_types(dtype, torch.float32)
    logit = torch.full((len(flat), wanted), -torch.inf, dtype=accum, device=flat.device)
    ids = torch.full(logit.shape, -1, dtype=torch.int64, device=flat.device)
    lse = torch.full((len(flat),), -torch.inf, dtype=torch.float64, device=flat.device)
    if rows := len(shard.weight):
        checks.head_arguments(hidden, shard.weight, shard.bias)
        own = min(wanted, rows)
        logit[:, :own], ids[:, :own], lse = torch.ops.ift_kernels.linear_topk(
            flat, shard.weight, shard.bias, transform.scale, transform.softcap,
            transform.temperature, own, checks.workspace_bytes(workspace, flat.device, dtype),
            dtype, deterministic, None, None, None,
        )  # fmt: skip
        ids[:, :own] += shard.start
    number = dist.get_world_size(shard.group)
    found = []
    for value in (logit, ids, lse):
        parts = [torch.empty_like(value) for _ in range(number)]
        dist.all_gather(parts, value, group=shard.group)
        found.append(parts)
    logit, ids = (parts[0] for parts in found[:2])
    for of_logit, of_ids in zip(found[0][1:], found[1][1:], strict=True):
        merge_top_k(logit, ids, of_logit, of_ids)
    return nucleus(
        logit, ids, torch.stack(found[2]).logsumexp(0), k, top_p, min_p, hidden.shape[:-1]
    )
