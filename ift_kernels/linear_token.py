"""The next token that a linear head would choose, and its log-probability, without its logits."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels import backends
from ift_kernels.backends import contract
from ift_kernels.common import checks
from ift_kernels.common.head_rows import is_dense
from ift_kernels.common.transform import LogitTransform
from ift_kernels.linear import check_adapter
from ift_kernels.operators import library
from ift_kernels.operators.adapter import SCHEMA, AdapterTensors
from ift_kernels.schedule import device as devices
from ift_kernels.schedule import plan, products
from ift_kernels.schedule.accumulate import accum_dtype, operand_dtype
from ift_kernels.schedule.adapter import Adapter
from ift_kernels.schedule.deterministic import check_workspace, padded_rows
from ift_kernels.schedule.head import Head, pad_row_stride, pad_rows

RULES = ("greedy", "kth", "sample")
MAX_K = 64


class TokenChoice(NamedTuple):
    """Chosen token ids (int64) and their log-probabilities (float32), one per position."""

    ids: Tensor
    logprob: Tensor


@torch.no_grad()
def linear_token(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., r), (V, r)
    column_scale: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    rule: str = "greedy",
    k: int = 2,
    seed: int = 0,
    row_offset: int = 0,
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
) -> TokenChoice:
    """Choose one token per position. No gradient.

    With ``z`` the logits as in `linear_logprobs` (temperature included), equals::

        ids = z.argmax(-1)                              # rule "greedy"; ties go to the lowest id
        ids = z.topk(k).indices[..., k - 1]             # rule "kth": the k-th best token alone
        ids = (z + gumbel(seed, row, id)).argmax(-1)    # rule "sample": a draw from softmax(z)
        logprob = log_softmax(z, -1).gather(-1, ids[..., None])[..., 0]

    Args:
        hidden, weight, bias, low_rank, column_scale, logit_scale, softcap, temperature,
            logits_dtype, deterministic, workspace: as `linear_logprobs`.
        rule: "greedy" (default), "kth" or "sample".
        k: which token "kth" takes, 1 (greedy) to 64 and at most V. Default 2.
        seed: of "sample", any 64-bit integer. The noise is a pure function of (seed, row, token
            id), Philox4x32-10, so that no chunking, sharding or batch order changes a draw.
        row_offset: number of this call's first row, for callers that hold a part of a larger batch.

    Raises:
        TypeError, ValueError: as `linear_logprobs`, and for `rule`, `k`, `seed` or `row_offset`.

    >>> hidden, weight = torch.randn(3, 16), torch.randn(100, 16)
    >>> bool((linear_token(hidden, weight).ids == (hidden @ weight.T).argmax(-1)).all())
    True
    """
    checks.head_arguments(hidden, weight, bias)
    checks.one_of("rule", rule, RULES)
    limit = min(MAX_K, weight.shape[0])
    k, seed = checks.integer("k", k), checks.integer("seed", seed)
    row_offset = checks.integer("row_offset", row_offset)
    if rule == "kth" and not 1 <= k <= limit:
        raise ValueError(f"k: expected in [1, {limit}], got {k}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    if not 0 <= row_offset < 2**62:
        raise ValueError(f"row_offset: expected in [0, 2**62), got {row_offset}")
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    dtype = checks.compute_dtype(hidden, weight, logits_dtype)
    adapter = adapter_tensors(hidden, weight, low_rank, column_scale, dtype, deterministic)
    ids, logprob = torch.ops.ift_kernels.linear_token(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        transform.scale,
        transform.softcap,
        transform.temperature,
        1 if rule == "greedy" else k,
        rule == "sample",
        seed - 2**64 if seed >= 2**63 else seed,
        row_offset,
        checks.workspace_bytes(workspace, hidden.device, dtype),
        dtype,
        checks.boolean("deterministic", deterministic),
        *adapter,
    )
    shape = hidden.shape[:-1]
    return TokenChoice(ids.view(shape), logprob.view(shape))


def _linear_token_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    k: int,
    sample: bool,
    seed: int,
    row_offset: int,
    workspace: int,
    dtype: torch.dtype,
    deterministic: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    return (
        hidden.new_empty(n, dtype=torch.int64),
        hidden.new_empty(n, dtype=accum_dtype(dtype)),
    )


def _linear_token(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    k: int,
    sample: bool,
    seed: int,
    row_offset: int,
    workspace: int,
    dtype: torch.dtype,
    deterministic: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    real, device, accum = hidden.shape[0], hidden.device, accum_dtype(dtype)
    transform = LogitTransform(scale, softcap, temperature)
    head, planned = head_of(
        hidden, weight, bias, transform, workspace, dtype, deterministic, AdapterTensors(*adapter)
    )
    backend, n = head.backend, len(head.hidden)
    state = contract.new_state(n, device)
    target = torch.full((n,), -1, dtype=torch.int64, device=device)
    track = 0 if sample or k > 1 else contract.TRACK_ARGMAX
    best = torch.full((n, 1 if sample else k), -torch.inf, dtype=accum, device=device)
    ids = torch.full(best.shape, 0 if sample else -1, dtype=torch.int64, device=device)
    logit = torch.full((n,), -torch.inf, dtype=accum, device=device)
    numbers = torch.arange(row_offset, row_offset + n, device=device)
    with torch.autocast(device.type, enabled=False):
        for tile in products.tiles(head, planned):
            products.update(head, tile, target, state, track)
            rows, chunk = tile.rows, head.chunk(tile)
            if sample:
                backend.gumbel_update(
                    chunk, seed, numbers[rows], best[rows, 0], logit[rows], ids[rows, 0]
                )
            elif k > 1:
                backend.top_k_update(chunk, best[rows], ids[rows])
    top, log_sum = state.values[contract.MAX], state.values[contract.SUM].log()
    if sample:
        chosen, logprob = ids[:, 0], logit - top
    elif k > 1:
        chosen, logprob = ids[:, -1], best[:, -1] - top
    else:
        chosen, logprob = state.argmax, top - top
    return chosen[:real].contiguous(), (logprob - log_sum).to(accum)[:real].contiguous()


def head_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    workspace: int,
    dtype: torch.dtype,
    deterministic: bool,
    adapter: AdapterTensors,
) -> tuple[Head, plan.Plan]:
    """The head of a call without gradients, and its plan; with rows of zeros to fill products."""
    n, device = hidden.shape[0], hidden.device
    operands = operand_dtype(hidden, weight, dtype)
    problem = plan.Problem(
        n, weight.shape[0], weight.shape[1], dtype, workspace,
        same_dtype=is_dense(weight, operands), device=devices.of(device),
        deterministic=deterministic, operand_dtype=operands,
    )  # fmt: skip
    if deterministic:
        n = padded_rows(problem, device)
        problem = replace(problem, rows=n)
        check_workspace(problem)
    head = Head(
        backends.get(hidden, dtype),
        pad_row_stride(pad_rows(hidden, n).to(operands)),
        weight,
        None if bias is None else bias.to(accum_dtype(dtype)).contiguous(),
        transform,
        dtype,
        adapter=Adapter.of(*adapter, dtype) if adapter.given else None,
    )
    return head, plan.make(problem)


def adapter_tensors(
    hidden: Tensor,
    weight: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    column_scale: Tensor | None,
    dtype: torch.dtype,
    deterministic: bool,
) -> AdapterTensors:
    """What such an operator takes of an adapter, checked."""
    check_adapter(low_rank, column_scale, None, deterministic)
    given = checks.adapter_arguments(hidden, weight, low_rank, column_scale, dtype)
    return AdapterTensors(*given)


library.register(
    "linear_token(Tensor hidden, Tensor weight, Tensor? bias, float scale, float softcap,"
    " float temperature, int k, bool sample, int seed, int row_offset, int workspace,"
    f" ScalarType dtype, bool deterministic, {SCHEMA}) -> (Tensor ids, Tensor logprob)",
    _linear_token,
    _linear_token_fake,
)
