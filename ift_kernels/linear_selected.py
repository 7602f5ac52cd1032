"""Log-probabilities of a set of ids for every token, inside the set and over the whole vocabulary.

The head gives two things per token, both differentiable: the products of the ids, and the
log-sum-exp of all other ids. The rest is torch on (N, K), in float64: docs/mathematics.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ift_kernels import linear
from ift_kernels.common import checks, sync_free
from ift_kernels.common.transform import LogitTransform
from ift_kernels.operators import head_call, linear_in_set, linear_selected  # noqa: F401  registers
from ift_kernels.schedule import gathered, plan

MAX_IDS = 512


class SelectedLogprobs(NamedTuple):
    """Of a set of ids for every token; what was not asked for is None.

    (..., K) like `ids` or (...) like the tokens; float32, float64 for float64 inputs. 0 where an id
    is `ignore_index`, and everywhere at a token all of whose ids are.
    """

    logprob: Tensor | None = None  # (..., K)
    lse: Tensor | None = None  # (...)
    in_set_logprob: Tensor | None = None  # (..., K)
    in_set_lse: Tensor | None = None  # (...)
    tail_logprob: Tensor | None = None  # (...)


def linear_selected_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logprob",),
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
) -> SelectedLogprobs:
    """Log-probabilities of K ids for every token, and what the others have, differentiable.

    Equals, without ever holding the (tokens, V) logits z of `linear_logprobs` (temperature
    included), for ids without `ignore_index`::

        logp = z.log_softmax(-1)
        logprob = logp.gather(-1, ids);  lse = z.logsumexp(-1)
        in_set = z.gather(-1, ids)                            # (..., K)
        in_set_logprob = in_set.log_softmax(-1);  in_set_lse = in_set.logsumexp(-1)
        tail_logprob = logp.scatter(-1, ids, -inf).logsumexp(-1)   # log(1 - logprob.exp().sum(-1))

    The tail is summed over the ids that are not in the set, so it keeps its digits however little
    it is; of a set that is the whole vocabulary it is -inf and has no gradient.

    Args:
        ids: (..., K) int64 or int32, K from 1 to 512, in any order, no id twice for a token.
        ignore_index: ids with this value pad a smaller set: they get 0 and send no gradient. A
            token all of whose ids are gets 0 in every output.
        outputs: any of "logprob", "lse", "in_set_logprob", "in_set_lse", "tail_logprob".
        The rest: as `linear_logprobs`. Beside the workspace a call holds some numbers per id.
            Where only "in_set_logprob" and "in_set_lse" are asked for, and it is the cheaper way,
            the head rows of the ids are gathered: K·N·D multiply-adds, not V·N·D.

    With K = 1, and without "tail_logprob", logprob, lse and all gradients are to the bit those of
    `linear_logprobs`.

    Returns:
        SelectedLogprobs of float32 tensors (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `linear_logprobs`; K outside [1, 512]; an id that a token has
            twice. On a GPU, where a check of values would stall the queue, a token with such an id,
            or with one outside [0, V), is NaN; ``IFT_DEBUG=1`` checks there too.
        RuntimeError: as `linear_logprobs`.

    >>> hidden, weight = torch.randn(2, 5, 16), torch.randn(100, 16)
    >>> ids = torch.rand(2, 5, 100).topk(8).indices
    >>> found = linear_selected_logprobs(hidden, weight, ids, outputs=("logprob", "tail_logprob"))
    >>> logp = (hidden @ weight.T).log_softmax(-1)
    >>> torch.allclose(found.logprob, logp.gather(-1, ids), atol=1e-5)
    True
    >>> total = found.logprob.exp().sum(-1) + found.tail_logprob.exp()
    >>> torch.allclose(total, torch.ones(2, 5))
    True
    """
    names = check_outputs(outputs)
    ignore_index = checks.integer("ignore_index", ignore_index)
    checks.boolean("deterministic", deterministic)
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    checks.head_arguments(hidden, weight, bias)
    ids = check_ids(ids, hidden)
    if ids.shape[-1] == 1 and names & {"logprob", "lse"} and "tail_logprob" not in names:
        return _of_one(
            hidden, weight, ids[..., 0], names, bias=bias, ignore_index=ignore_index,
            logit_scale=logit_scale, softcap=softcap, temperature=temperature,
            logits_dtype=logits_dtype, deterministic=deterministic, workspace=workspace,
        )  # fmt: skip
    valid = (ids != ignore_index).any(-1)
    product, rest = products(
        hidden, weight, ids, valid, bias, ignore_index, transform, workspace, logits_dtype,
        deterministic, names <= {"in_set_logprob", "in_set_lse"},
    )  # fmt: skip
    there = ids != ignore_index
    z = logits(product, ids, bias, transform)
    return combined(z, rest, there, names, product.dtype)


def check_outputs(outputs: Collection[str]) -> set[str]:
    """The names as a set, or a TypeError or ValueError."""
    if isinstance(outputs, str) or not isinstance(outputs, Collection):
        raise TypeError(f"outputs: expected a tuple of names, got {outputs!r}")
    for name in outputs:
        checks.one_of("outputs", name, SelectedLogprobs._fields)
    return {*outputs}


def check_ids(ids: Tensor, hidden: Tensor) -> Tensor:
    """`ids` as int64 (..., K)."""
    tokens = hidden.shape[:-1]
    if not isinstance(ids, Tensor) or ids.dim() != len(tokens) + 1:
        came = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise (ValueError if isinstance(ids, Tensor) else TypeError)(
            f"ids: expected a tensor (..., K) with tokens {tuple(tokens)}, got {came}"
        )
    if not 1 <= ids.shape[-1] <= MAX_IDS:
        raise ValueError(f"ids: expected 1 to {MAX_IDS} ids for each token, got {ids.shape[-1]}")
    return checks.token_ids("ids", ids, torch.Size((*tokens, ids.shape[-1])), hidden.device)


def products(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,  # (..., K)
    valid: Tensor,  # (...) tokens that are computed
    bias: Tensor | None,
    ignore_index: int,
    transform: LogitTransform,
    workspace: int | None,
    logits_dtype: torch.dtype | None,
    deterministic: bool,
    in_set: bool = False,
) -> tuple[Tensor, Tensor]:
    """Products (..., K) of the ids, and the log-sum-exp (...) of all others, float64.

    `in_set`: the latter may be 0, where the products alone are cheaper.
    """
    dtype = checks.compute_dtype(hidden, weight, logits_dtype)
    options = head_call.Options(
        ignore_index, transform.scale, transform.softcap, transform.temperature,
        checks.workspace_bytes(workspace, hidden.device, dtype), dtype, deterministic,
    )  # fmt: skip
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]), weight, bias,
        ids.reshape(-1, ids.shape[-1]).contiguous(), valid.reshape(-1),
    )  # fmt: skip
    # Sums of gathered rows depend on their order, and on how many go at once.
    if in_set and not deterministic and not sync_free.on():
        problem = head_call.problem(*tensors[:3], options, (needs[0], needs[1], needs[2]), False)
        if gathered.is_cheaper(problem, ids.shape[-1]):
            product = torch.ops.ift_kernels.linear_in_set(*tensors, *options)
            return product.view(ids.shape), product.new_zeros(valid.shape, dtype=torch.float64)
    product, rest, _, _ = torch.ops.ift_kernels.linear_selected(
        *tensors, *options, needs, plan.forced_or_safe()
    )
    return product.view(ids.shape), rest.view(valid.shape)


def logits(product: Tensor, ids: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Logits (..., K) of products, float64; the operator gives the bias its gradient."""
    of_ids = None
    if bias is not None:  # out of range on a GPU: its product is NaN
        inside = ids.clamp(0, len(bias) - 1)
        of_ids = bias.detach().to(product.dtype)[inside].double()
    z: Tensor = _logits(product, of_ids, transform)
    return z


class _Logits(torch.autograd.Function):
    """Logits of products, in float64; 0 times the slope of a NaN is 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(product: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
        return transform.apply(product.double(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        product, _, ctx.transform = inputs
        ctx.save_for_backward(output)
        ctx.dtype = product.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dz,), (z,) = grads, ctx.saved_tensors
        d_product = dz * ctx.transform.derivative(z)
        return d_product.masked_fill(dz == 0, 0).to(ctx.dtype), None, None


_logits: Any = _Logits.apply


def combined(
    z: Tensor,  # (..., K) float64
    rest: Tensor,  # (...) float64
    there: Tensor,  # (..., K) bool: not padding
    names: set[str],
    dtype: torch.dtype,
) -> SelectedLogprobs:
    """The outputs from the logits of the ids and the log-sum-exp of all others."""
    valid = there.any(-1)
    found: dict[str, Tensor] = {}
    if names & {"logprob", "lse", "tail_logprob"}:
        whole = torch.cat([z, rest[..., None]], -1)
        logp, found["lse"] = _normalised(whole, torch.cat([there, valid[..., None]], -1))
        found["logprob"], tail = logp[..., :-1], logp[..., -1]
        found["tail_logprob"] = torch.where(rest == -torch.inf, tail.detach(), tail)
    if names & {"in_set_logprob", "in_set_lse"}:
        found["in_set_logprob"], found["in_set_lse"] = _normalised(z, there)
    return SelectedLogprobs(**{name: found[name].to(dtype) for name in names})


class _Normalised(torch.autograd.Function):
    """``z.log_softmax(-1)`` and ``z.logsumexp(-1)`` of what is `there`, float64; 0 elsewhere.

    The largest is apart: beside its 1 the sum of the others would lose what a nearly certain id
    leaves them. So in backward 1 - p is -expm1(log p). Rows without upstream gradient send none,
    even where they have a NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        valid = there.any(-1, keepdim=True)
        z = z.masked_fill(~there, -torch.inf)
        top, at = z.masked_fill(~valid, 0.0).max(-1, keepdim=True)
        zero = top - top  # NaN, of an infinity, and so is all of that row
        gap = (z - top).scatter(-1, at, zero)
        log_sum = gap.exp().scatter(-1, at, zero).sum(-1, keepdim=True).log1p()
        logp, lse = gap - log_sum, torch.where(top.isinf(), top, top + log_sum)[..., 0]
        return torch.where(there, logp, 0.0), torch.where(valid[..., 0], lse, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logp, there = ctx.saved_tensors
        a, c = grads[0].masked_fill(~there, 0.0), grads[1][..., None]
        no_upstream = (a == 0).all(-1, keepdim=True) & (c == 0)
        total = a.sum(-1, keepdim=True)
        dz = logp.exp() * (c - (total - a)) - a * logp.expm1()
        return dz.masked_fill(no_upstream | ~there, 0.0), None


_normalised: Any = _Normalised.apply


def _of_one(
    hidden: Tensor, weight: Tensor, target: Tensor, names: set[str], **options: Any
) -> SelectedLogprobs:
    """Of sets of one id."""
    wanted = {"logprob": "logprob", "lse": "lse", "in_set_lse": "target_logit"}
    asked = {wanted.get(name, "target_logit") for name in names}
    try:
        stats = linear.linear_logprobs(
            hidden, weight, target, outputs=tuple(sorted(asked)), **options
        )
    except ValueError as error:
        raise ValueError(str(error).replace("target: ", "ids: ", 1)) from None
    found = {name: getattr(stats, of) for name, of in wanted.items() if name in names}
    if "logprob" in names:
        found["logprob"] = found["logprob"][..., None]
    if "in_set_logprob" in names:  # of an infinity NaN, as of any set
        assert stats.target_logit is not None
        found["in_set_logprob"] = (stats.target_logit * 0.0)[..., None]
    return SelectedLogprobs(**found)
