"""The k best tokens of a linear head with their log-probabilities, and the nucleus among them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels.backends import contract
from ift_kernels.common import checks
from ift_kernels.common.transform import LogitTransform
from ift_kernels.linear_selected import MAX_IDS
from ift_kernels.linear_token import adapter_tensors, head_of
from ift_kernels.operators import library
from ift_kernels.operators.adapter import SCHEMA, AdapterTensors
from ift_kernels.schedule import products
from ift_kernels.schedule.accumulate import accum_dtype

PADDING = -100


class TopK(NamedTuple):
    """The best tokens of every position, in descending order."""

    ids: Tensor  # (..., k) int64, -100 where there is none
    logprob: Tensor  # (..., k) float32, 0 where there is none
    truncated: Tensor  # (...) bool: the nucleus has more than k tokens


@torch.no_grad()
def linear_topk(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    k: int,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., r), (V, r)
    column_scale: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
) -> TopK:
    """The k best tokens of every position, cut to the nucleus. No gradient.

    With ``logp = z.log_softmax(-1)`` of the logits of `linear_logprobs` (temperature included) and
    all ids in descending order of logp, of equal ones the lowest first, an id is in the nucleus if
    its probability is not 0 and::

        the ids before it have together less than top_p, and
        its probability is at least min_p times the largest

    Both look at the whole vocabulary. The first k of the nucleus are returned; `linear_selected_
    logprobs` takes them as they are. Where every logit is -inf no id has a probability, so none is
    returned: -100 and 0.

    Args:
        k: 1 to 512, at most V.
        top_p: in (0, 1]; the nucleus is the smallest set whose mass reaches it. None: no limit.
        min_p: in [0, 1]. None: no limit.
        The rest: as `linear_logprobs`.

    Returns:
        TopK; `truncated` is False everywhere if neither `top_p` nor `min_p` is given.

    Raises:
        TypeError, ValueError: as `linear_logprobs`, and for `k`, `top_p` or `min_p`.

    >>> hidden, weight = torch.randn(3, 16), torch.randn(100, 16)
    >>> found = linear_topk(hidden, weight, 5)
    >>> values, ids = (hidden @ weight.T).log_softmax(-1).topk(5)
    >>> torch.equal(found.ids, ids) and torch.allclose(found.logprob, values, atol=1e-5)
    True
    """
    checks.head_arguments(hidden, weight, bias)
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    k, top_p, min_p = check_limits(k, top_p, min_p, len(weight))
    dtype = checks.compute_dtype(hidden, weight, logits_dtype)
    found = torch.ops.ift_kernels.linear_topk(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, transform.scale, transform.softcap,
        transform.temperature, min(k + 1, len(weight)),
        checks.workspace_bytes(workspace, hidden.device, dtype), dtype,
        checks.boolean("deterministic", deterministic),
        *adapter_tensors(hidden, weight, low_rank, column_scale, dtype, deterministic),
    )  # fmt: skip
    logit, ids, lse = found
    return nucleus(logit, ids, lse, k, top_p, min_p, hidden.shape[:-1])


def check_limits(
    k: int, top_p: float | None, min_p: float | None, vocabulary: int
) -> tuple[int, float | None, float | None]:
    """The three, or a TypeError or ValueError."""
    most = min(MAX_IDS, vocabulary)
    if not 1 <= checks.integer("k", k) <= most:
        raise ValueError(f"k: expected in [1, {most}], got {k}")
    if top_p is not None and not 0.0 < checks.number("top_p", top_p) <= 1.0:
        raise ValueError(f"top_p: expected None or a number in (0, 1], got {top_p}")
    if min_p is not None and not 0.0 <= checks.number("min_p", min_p) <= 1.0:
        raise ValueError(f"min_p: expected None or a number in [0, 1], got {min_p}")
    return int(k), top_p, min_p


def nucleus(
    logit: Tensor,  # (N, k + 1), or k where that is the vocabulary; descending
    ids: Tensor,
    lse: Tensor,  # (N,) float64
    k: int,
    top_p: float | None,
    min_p: float | None,
    shape: torch.Size,
) -> TopK:
    """The results from the best logits."""
    logp = logit.double() - lse[:, None]
    p = logp.exp()
    out = (logit == -torch.inf) | (ids < 0)  # so that a NaN stays
    if top_p is not None and top_p < 1.0:
        out |= p.cumsum(1) - p >= top_p
    if min_p is not None:
        out |= p < min_p * p[:, :1]
    limited = top_p is not None or min_p is not None
    more = ~out[:, k:].all(1) if limited else torch.zeros_like(out[:, 0])
    out = out[:, :k]
    logprob = logp[:, :k].masked_fill(out, 0).to(logit.dtype)
    best = ids[:, :k].masked_fill(out, PADDING)
    return TopK(best.view(*shape, k), logprob.view(*shape, k), more.view(shape))


def _topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    k: int,
    workspace: int,
    dtype: torch.dtype,
    deterministic: bool,
    *adapter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    transform = LogitTransform(scale, softcap, temperature)
    head, planned = head_of(
        hidden, weight, bias, transform, workspace, dtype, deterministic, AdapterTensors(*adapter)
    )
    n, device = len(head.hidden), hidden.device
    state = contract.new_state(n, device)
    none = torch.full((n,), -1, dtype=torch.int64, device=device)
    best = torch.full((n, k), -torch.inf, dtype=accum_dtype(dtype), device=device)
    ids = torch.full((n, k), -1, dtype=torch.int64, device=device)
    with torch.autocast(device.type, enabled=False):
        for tile in products.tiles(head, planned):
            products.update(head, tile, none, state, 0)
            head.backend.top_k_update(head.chunk(tile), best[tile.rows], ids[tile.rows])
    lse = state.values[contract.MAX] + state.values[contract.SUM].log()
    real = len(hidden)
    return best[:real].clone(), ids[:real].clone(), lse[:real].clone()


def _topk_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    *_, k, _, dtype, _ = rest[:-3]
    assert isinstance(k, int) and isinstance(dtype, torch.dtype)
    shape = hidden.shape[0], k
    return (
        hidden.new_empty(shape, dtype=accum_dtype(dtype)),
        hidden.new_empty(shape, dtype=torch.int64),
        hidden.new_empty(shape[0], dtype=torch.float64),
    )


library.register(
    "linear_topk(Tensor hidden, Tensor weight, Tensor? bias, float scale, float softcap,"
    " float temperature, int k, int workspace, ScalarType dtype, bool deterministic,"
    f" {SCHEMA}) -> (Tensor logit, Tensor ids, Tensor lse)",
    _topk,
    _topk_fake,
)
