"""Per-token log-probabilities and statistics of a linear head, without its logits.

The one differentiable primitive of the package; its operators are in `operators`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ift_kernels.backends import contract
from ift_kernels.common import checks
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.common.active_set import options as active_options
from ift_kernels.common.transform import LogitTransform
from ift_kernels.operators import frozen_head, head_call, linear_stats
from ift_kernels.operators.adapter import AdapterTensors, adapter_needs, head_needs
from ift_kernels.schedule import plan


class TokenStats(NamedTuple):
    """Per-token statistics, shaped like `target`; what was not asked for is None.

    float32 (float64 for float64 inputs), argmax int64. 0 at ignored positions.
    """

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    argmax_logprob: Tensor | None = None
    second_logprob: Tensor | None = None
    sum_sq: Tensor | None = None
    mean_logit: Tensor | None = None
    target_logit: Tensor | None = None


# Names of `outputs` and what the epilogue must track for each.
OUTPUTS = {statistic.name: statistic.track for statistic in contract.STATISTICS}


def linear_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., r), (V, r)
    column_scale: Tensor | None = None,  # (V,)
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
    """Log-probability of each target token, and on request more, differentiable.

    Equals, without ever holding the (tokens, V) logits::

        x = hidden @ weight.T
        x = x + low_rank[0] @ low_rank[1].T      # if low_rank is given
        x = column_scale * x                     # if column_scale is given
        z = logit_scale * (x + bias)
        z = softcap * tanh(z / softcap)          # if softcap is given
        logp = log_softmax(z / temperature, dim=-1)
        logprob = logp.gather(-1, target[..., None])[..., 0]
        lse = logsumexp(z / temperature, -1);  entropy = -(logp.exp() * logp).sum(-1)
        argmax = z.argmax(-1)                    # ties go to the lowest id
        argmax_logprob = logp.amax(-1);  second_logprob = logp.topk(2).values[..., 1]
        sum_sq = logp.exp().square().sum(-1);  mean_logit = (z / temperature).mean(-1)
        target_logit = (z / temperature).gather(-1, target[..., None])[..., 0]

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), the dtype of `hidden`; under autocast any dtype, the products in autocast's;
            with `logits_dtype` any.
        target: (...) int64 or int32 token ids, already shifted.
        bias: (V,) or None.
        low_rank: (u, B) or None: of a head with LoRA, whose weight stays as it is, B (V, r) and
            ``u = scaling * dropout(hidden) @ A.T``, (..., r), formed by the caller under autograd,
            which gives A its gradient from that of u. Of any float dtype up to that of the
            products, to which they are cast; of several adapters, concatenated along r. Only with
            an exact `gradient` and without `deterministic`; so is column_scale.
        column_scale: (V,) or None, of any such dtype: of a head with DoRA. With products in float16
            its gradient where it is below 1e-5 is NaN.
        ignore_index: positions with this target get 0 in every output and send no gradient.
        logit_scale, softcap, temperature: the transform above; by default logits stay as they are.
        outputs: any of "logprob", "lse", "entropy", "argmax", "argmax_logprob",
            "second_logprob", "sum_sq", "mean_logit", "target_logit". Beyond the first two each
            costs a little.
        detached: those of `outputs` that come without gradient, such as an entropy that is only
            logged. With a frozen head, a gradient through entropy or mean_logit can cost a product.
        gradient: "exact", or "active" (an `ActiveSet` for its options): the gradient of hidden is
            approximated from the columns that matter to a block of tokens and the sums of the rest;
            those of weight and bias are exact. Gradients flow from logprob, lse, entropy,
            mean_logit and target_logit, for any upstream gradient; rows where it is all 0 may be
            skipped. On a GPU the call is exact where its plan takes that for faster: see `explain`.
        logits_dtype: None: logits are products rounded to the dtype of the inputs, as torch's are.
            torch.float32: they are never rounded to 16 bits, ``hidden.float() @ weight.float().T``
            without a copy of the weight; autocast is not heeded. Where both are of the same 16 bits
            a CUDA GPU multiplies them as they are (torch 2.8) and rounds the gradient of logits to
            16 bits for dh and dW; with ``hidden.float()`` that is float32 too, and products slow,
            as everywhere else. The gradient of hidden is exact there, whatever `gradient`. See
            docs/numerics.md.
        deterministic: every result of a token is, to the bit, the same whatever the other tokens of
            the call, their number and order, the workspace, the number of threads, and whether
            gradients are needed; gradients are whatever the threads and the run. Default False: a
            few percent faster with many tokens, and much with few. See docs/numerics.md.
        workspace: bytes of work memory, default 256 MiB on CPU and 512 MiB on GPU,
            half as much again where the products are float32 and so twice as large.

    Returns:
        TokenStats of float32 tensors shaped like `target`.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit; a target outside
            [0, V) that is not `ignore_index`. On a GPU, where that check would stall the queue, its
            log-probability is NaN, or of a frozen head torch's gather asserts; ``IFT_DEBUG=1`` in
            the environment checks there too.
        RuntimeError: differentiated twice, in forward mode, or by torch.func; `deterministic` on a
            machine whose products depend on more, which the first call of a shape tries out.

    >>> hidden, weight = torch.randn(2, 5, 16), torch.randn(100, 16)
    >>> target = torch.randint(100, (2, 5))
    >>> stats = linear_logprobs(hidden, weight, target, outputs=("logprob", "entropy"))
    >>> logp = (hidden @ weight.T).log_softmax(-1)
    >>> torch.allclose(stats.logprob, logp.gather(-1, target[..., None])[..., 0], atol=1e-5)
    True
    """
    active = active_options(gradient)
    ignore_index = checks.integer("ignore_index", ignore_index)
    check_deterministic(deterministic, active)
    check_adapter(low_rank, column_scale, active, deterministic)
    track, differentiable = tracks(outputs, detached)
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    call = Call(
        hidden, weight, target, bias, ignore_index, transform, workspace, logits_dtype,
        deterministic, low_rank, column_scale,
    )  # fmt: skip
    found = call.statistics(track, active, differentiable)
    if track & contract.TRACK_MEAN:
        found = found._replace(mean_logit=found.mean_logit + found.lse)
    asked = {name: getattr(found, name) for name in outputs}
    return TokenStats(**asked | {name: asked[name].detach() for name in detached})


def tracks(outputs: Collection[str], detached: Collection[str]) -> tuple[int, int]:
    """What the epilogue must track for these outputs, and for those of them with a gradient."""
    track = differentiable = 0
    for argument, names in (("outputs", outputs), ("detached", detached)):
        if isinstance(names, str) or not isinstance(names, Collection):
            raise TypeError(f"{argument}: expected a tuple of names, got {names!r}")
    for name in outputs:
        checks.one_of("outputs", name, OUTPUTS)
        track |= OUTPUTS[name]
        differentiable |= 0 if name in detached else OUTPUTS[name]
    for name in detached:
        checks.one_of("detached", name, outputs)
    return track, differentiable


def check_deterministic(deterministic: bool, active: ActiveSet | None) -> None:
    """Refuse what cannot be had together."""
    checks.boolean("deterministic", deterministic)
    if deterministic and active is not None:
        raise ValueError(
            "gradient: expected 'exact' with deterministic=True: which columns are active depends "
            "on the other tokens"
        )


def check_adapter(
    low_rank: object, column_scale: object, active: ActiveSet | None, deterministic: bool
) -> None:
    """Refuse what is not served beside an adapter."""
    for name, value in (("low_rank", low_rank), ("column_scale", column_scale)):
        if value is not None and active is not None:
            raise ValueError(f"gradient: expected 'exact' with {name}, got an active set")
        if value is not None and deterministic:
            raise ValueError(f"deterministic: expected False with {name}, got True")


class Call:
    """The checked arguments of an operation on targets."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        transform: LogitTransform,
        workspace: int | None,
        logits_dtype: torch.dtype | None = None,
        deterministic: bool = False,
        low_rank: tuple[Tensor, Tensor] | None = None,
        column_scale: Tensor | None = None,
    ) -> None:
        checks.head_arguments(hidden, weight, bias)
        dtype = checks.compute_dtype(hidden, weight, logits_dtype)
        self.adapter = AdapterTensors(
            *checks.adapter_arguments(hidden, weight, low_rank, column_scale, dtype)
        )
        self.shape = hidden.shape[:-1]
        target = checks.token_ids("target", target, self.shape, hidden.device)
        budget = checks.workspace_bytes(workspace, hidden.device, dtype)
        self.tensors = (
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            target.reshape(-1).contiguous(),
        )
        self.options = head_call.Options(
            ignore_index, transform.scale, transform.softcap, transform.temperature, budget, dtype,
            deterministic,
        )  # fmt: skip
        self.needs: list[bool] = [
            torch.is_grad_enabled() and t is not None and t.requires_grad
            for t in (hidden, weight, bias, *self.adapter)
        ]
        self.schedule = plan.forced_or_safe()

    def for_hidden(self, active: ActiveSet | None) -> list[float]:
        """What operators take: the set that dh is from, none where it is exact."""
        if active is None or not self.needs[0]:
            return []
        return [active.threshold, active.block, active.tail_bucket]

    def plan(self, active: ActiveSet | None, fp32_weight_sum: bool = False) -> plan.Plan:
        """The plan for this call if no target is ignored and gradients can be formed in forward."""
        hidden, weight, bias, _ = self.tensors
        of_hidden = head_call.active_hidden(self.for_hidden(active))
        problem = head_call.problem(
            hidden, weight, bias, self.options, head_needs(self.needs), True, of_hidden,
            fp32_weight_sum, self.adapter, adapter_needs(self.needs),
        )  # fmt: skip
        return plan.make(problem, plan.ledger.reserved, self.schedule or None)

    def statistics(
        self, track: int, active: ActiveSet | None, differentiable: int
    ) -> linear_stats.Statistics:
        """What `track` asks for, shaped like the tokens, and `norm`; the others are empty.

        `differentiable`: what of `track` may get a gradient.
        """
        # A trained B has a gradient that is no factor of a row's: products are formed again.
        grads_in_forward = self.schedule != "recompute" and not self.adapter.given
        grads_in_forward = grads_in_forward and frozen_head.serves(self.needs[:3], differentiable)
        if grads_in_forward and self.plan(active).schedule == "forward":
            values = torch.ops.ift_kernels.linear_frozen(
                *self.tensors, *self.options, track, self.for_hidden(active)
            )
        else:
            values = torch.ops.ift_kernels.linear_stats(
                *self.tensors, *self.options, track, self.needs, self.schedule,
                self.for_hidden(active), *self.adapter,
            )  # fmt: skip
        found = linear_stats.Statistics(*values[: len(linear_stats.Statistics._fields)])
        asked = zip(found, linear_stats.tracked(track), strict=True)
        shaped = (v.view(self.shape) if yes and v is not found.norm else v for v, yes in asked)
        return linear_stats.Statistics(*shaped)
