"""What a training step does to the log-probability of other tokens, to first order.

`influence` for a step on the head alone, from hidden states and without logits; `exact_influence`
for a step on all parameters of a small model, from gradients. The derivation is in
docs/dynamics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ift_kernels.backends import contract, reference
from ift_kernels.common import checks
from ift_kernels.common.transform import LogitTransform
from ift_kernels.operators import head_call, linear_stats
from ift_kernels.operators.linear_stats import Upstream
from ift_kernels.schedule import plan
from ift_kernels.schedule.accumulate import accum_dtype
from ift_kernels.schedule.head import Head, Tile, slices

Parameters = Mapping[str, Tensor]


@torch.no_grad()
def influence(
    probe_hidden: Tensor,  # (P, D)
    probe_target: Tensor,  # (P,)
    hidden: Tensor,  # (N, D)
    target: Tensor,  # (N,)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,  # (V,)
    d_logprob: Tensor | None = None,  # (N,)
    d_entropy: Tensor | None = None,  # (N,)
    d_lse: Tensor | None = None,  # (N,)
    lr: float = 1.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace: int | None = None,
) -> Tensor:
    """Predicted change of each probe token's log-probability by each training token.

    The first-order change when the head takes one SGD step of size `lr` on a loss whose gradients
    by the training tokens' log-probability, entropy and lse are given. Entry (o, u) is the share of
    training token u; a row's sum is the change by the whole batch. Equals, without ever holding
    logits::

        x = hidden @ weight.T + bias;  z = transform(x)                    # as in linear_logprobs
        L = (d_logprob * logp.gather(target) + d_entropy * entropy + d_lse * lse).sum()
        E = grad(L, x)                                                     # (N, V)
        A = grad(probe_logp.gather(probe_target).sum(), probe_x)           # (P, V)
        K = probe_hidden @ hidden.T + (0 if bias is None else 1)           # (P, N)
        return -lr * K * (A @ E.T)

    For the default loss, the negative log-likelihood, and no transform, that is the last-layer form
    of the decomposition of *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490).

    Args:
        probe_hidden, probe_target: (P, D) and (P,): what is watched. To watch several tokens at one
            position, repeat its hidden state.
        hidden, target: (N, D) and (N,): what is trained on.
        weight: (V, D), the dtype of both hidden states.
        bias: (V,), trained along; None: there is none, or it is frozen at 0.
        d_logprob, d_entropy, d_lse: (N,) upstream gradients of any loss. With none of them given
            d_logprob is -1 (supervised fine-tuning, summed); else those not given are 0. A loss to
            be *minimised* has d_logprob < 0 where it trains a token up.
        lr: η, default 1.
        ignore_index: rows and columns of these targets are 0.
        logit_scale, softcap, temperature: as in `linear_logprobs`.
        workspace: bytes of work memory beside the result, which is held twice where there are
            ignored tokens; default 384 MiB on CPU, 768 MiB on GPU. With so many tokens that 16
            columns for each do not fit, it takes those 16.

    Returns:
        (P, N) float32, float64 for float64 inputs; 16-bit inputs are computed in float32. Never
        differentiable.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit; a target outside
            [0, V) that is not `ignore_index`.

    >>> probe, train, weight = torch.randn(3, 8), torch.randn(5, 8), torch.randn(50, 8)
    >>> y_o, y_u = torch.randint(50, (3,)), torch.randint(50, (5,))
    >>> predicted = influence(probe, y_o, train, y_u, weight, lr=1e-4)
    >>> before = (probe @ weight.T).log_softmax(-1).gather(-1, y_o[:, None])[:, 0]
    >>> e = (train @ weight.T).softmax(-1) - torch.nn.functional.one_hot(y_u, 50)
    >>> after = (probe @ (weight - 1e-4 * e.T @ train).T).log_softmax(-1)
    >>> change = after.gather(-1, y_o[:, None])[:, 0] - before
    >>> torch.allclose(predicted.sum(1), change, atol=1e-5)
    True
    """
    transform = LogitTransform.checked(logit_scale, softcap, temperature)
    ignore_index = checks.integer("ignore_index", ignore_index)
    lr = checks.number("lr", lr)
    checks.head_arguments(hidden, weight, bias)
    sides = []
    for prefix, states, ids in (("probe_", probe_hidden, probe_target), ("", hidden, target)):
        name = f"{prefix}hidden"
        checks.plain_floating(name, states)
        if states.dim() != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name}: expected shape (tokens, D) with D={weight.shape[1]} like weight, "
                f"got {tuple(states.shape)}"
            )
        if states.device != weight.device:
            raise ValueError(
                f"{name}: expected on {weight.device} like weight, got {states.device}"
            )
        if states.dtype != weight.dtype:
            raise TypeError(f"{name}: expected {weight.dtype} like weight, got {states.dtype}")
        ids = checks.token_ids(f"{prefix}target", ids, states.shape[:1], states.device)
        head_call.check_targets(ids, ids != ignore_index, weight.shape[0], f"{prefix}target")
        sides.append((states.detach(), ids.contiguous()))
    given = {"d_logprob": d_logprob, "d_entropy": d_entropy, "d_lse": d_lse}
    for name, value in given.items():
        if value is not None:
            checks.floating(name, value)
            checks.same_shape(name, value, target, "target")
    if all(value is None for value in given.values()):
        d_logprob = -torch.ones(target.shape, dtype=torch.float64, device=target.device)
    dtype = accum_dtype(weight.dtype)
    budget = checks.workspace_bytes(workspace, hidden.device, dtype)
    options = head_call.Options(
        ignore_index, transform.scale, transform.softcap, transform.temperature, budget, dtype,
        False,
    )  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        up = torch.ones(probe_target.shape, dtype=torch.float64, device=hidden.device)
        probe = _Side(*sides[0], weight, bias, options, Upstream(up))
        train = _Side(*sides[1], weight, bias, options, Upstream(d_logprob, d_lse, d_entropy))
        part = _overlap(probe, train, budget).mul_(-lr)
        _times_kernel_(part, probe.call.head, train.call.head, budget)
        return _at_all_tokens(part, probe.call, train.call, dtype)


class _Side:
    """One of the two sets of tokens: its logits' gradient, chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        target: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: head_call.Options,
        upstream: Upstream,
    ) -> None:
        upstream = Upstream(*(None if g is None else g.double() for g in upstream))
        track = 0 if upstream.entropy is None else contract.TRACK_ENTROPY
        *values, _ = torch.ops.ift_kernels.linear_stats(
            hidden,
            weight,
            bias,
            target,
            *options,
            track,
            [False] * 6,
            "",
            [],
            None,
            None,
            None,
        )
        row = linear_stats.Statistics(*values)
        valid = head_call.ValidRows.of(target != options.ignore_index)
        # Hidden states of both sides are multiplied with each other too, in float32.
        hidden = hidden.to(options.dtype)
        self.call = head_call.Call(hidden, weight, bias, valid, options, (False, False, False))
        coef = linear_stats.row_coefficients(row.norm, row.entropy, weight.shape[0], upstream)
        rows = (self.call.select(value).contiguous() for value in (target, row.norm, coef))
        self.row_gradient = contract.RowGradient(*rows)

    @property
    def rows(self) -> int:
        return self.call.head.hidden.shape[0]

    def buffer(self, columns: int) -> Tensor:
        return self.call.head.buffer(self.rows, columns)

    def gradient(self, columns: slice, weight: Tensor, buffer: Tensor) -> Tensor:
        """∂L/∂x of these columns, (rows, columns)."""
        head = self.call.head
        product = torch.mm(head.hidden, weight.T, out=buffer[:, : weight.shape[0]])
        tile = Tile(slice(0, self.rows), columns, product)
        head.backend.dlogits_(head.chunk(tile), self.row_gradient)
        return product


def _overlap(probe: _Side, train: _Side, budget: int) -> Tensor:
    """Σ_j A_oj E_uj, (P, N): the vocabulary outermost."""
    head = probe.call.head
    total = head.hidden.new_zeros((probe.rows, train.rows))
    if not total.numel():
        return total
    # Products of both sides, what the reference's epilogue makes of the larger, and cast weights.
    cast = 0 if head.reads_weight else head.hidden.shape[1]
    wide = max(probe.rows, train.rows) if head.backend is reference else 0
    per_column = head.hidden.element_size() * (probe.rows + train.rows + 10 * wide + cast)
    fit = min(budget, plan.TILE_BYTES * 8) // per_column
    columns = min(head.vocabulary, max(16, fit))
    buffers = probe.buffer(columns), train.buffer(columns)
    for chunk in slices(0, head.vocabulary, columns):
        weight = head.weight_chunk(chunk)
        a = probe.gradient(chunk, weight, buffers[0])
        e = train.gradient(chunk, weight, buffers[1])
        total.addmm_(a, e.T)
    return total


def _times_kernel_(part: Tensor, probe: Head, train: Head, budget: int) -> None:
    """`part` times K_ou, in place and by rows: K is as large as the result."""
    rows = max(1, min(budget, plan.TILE_BYTES) // max(1, part.shape[1] * part.element_size()))
    for block in slices(0, part.shape[0], rows):
        kernel = probe.hidden[block] @ train.hidden.T
        if train.bias is not None:
            kernel += 1
        part[block].mul_(kernel)


def _at_all_tokens(
    part: Tensor, probe: head_call.Call, train: head_call.Call, dtype: torch.dtype
) -> Tensor:
    """`part` in its place among the ignored tokens, whose entries are 0."""
    part = part.to(dtype)
    if (
        probe.valid_mask is not None and train.valid_mask is not None
    ):  # in sync-free mode every row is there
        return part.masked_fill_(~probe.valid_mask[:, None], 0).masked_fill_(~train.valid_mask, 0)
    if probe.rows is None and train.rows is None:
        return part
    out = part.new_zeros((probe.all_rows, train.all_rows))
    if probe.rows is None:
        out[:, train.rows] = part
    elif train.rows is None:
        out[probe.rows] = part
    else:
        out[probe.rows[:, None], train.rows] = part
    return out


def exact_influence(
    probe: Callable[[Parameters], Tensor],
    loss: Callable[[Parameters], Tensor],
    parameters: Parameters,
    *,
    lr: float = 1.0,
) -> Tensor:
    """First-order change of what `probe` computes, by an SGD step on all `parameters`.

    With g_u the gradient of entry u of `loss`, and J the Jacobian of `probe`::

        exact[..., u] = -lr * J @ g_u

    One backward pass per entry of `probe` and of `loss`, and memory for the gradients of whichever
    has fewer: for small models.

    Args:
        probe: parameters → a tensor, say log-probabilities of some tokens.
        loss: parameters → a scalar, or (N,), one loss per training token.
        parameters: name → tensor, those that the step trains. `torch.func.functional_call` runs a
            module on them.
        lr: η, default 1.

    Returns:
        Shaped like `probe`'s value, then like `loss`'s, in the dtype of `probe`'s value.

    Raises:
        ValueError: `loss` gives more than one dimension, or there are no parameters.

    >>> weight, x, o = torch.randn(7, 4), torch.randn(3, 4), torch.randn(2, 4)
    >>> y = torch.tensor([1, 5, 2])
    >>> change = exact_influence(
    ...     lambda p: (o @ p["w"].T).log_softmax(-1)[:, 1],
    ...     lambda p: torch.nn.functional.cross_entropy(x @ p["w"].T, y, reduction="none"),
    ...     {"w": weight},
    ... )
    >>> torch.allclose(change, influence(o, torch.tensor([1, 1]), x, y, weight), atol=1e-5)
    True
    """
    if not parameters:
        raise ValueError("parameters: expected at least one tensor, got none")
    lr = checks.number("lr", lr)
    # Reverse mode on both sides: the operators of this package have no forward mode, and those of
    # some other libraries are silently constant under it.
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad():
        watched, losses = probe(leaves), loss(leaves)
    if losses.dim() > 1:
        raise ValueError(f"loss: expected a scalar or shape (N,), got {tuple(losses.shape)}")
    change = watched.new_zeros((watched.numel(), losses.numel()))
    if change.numel():
        sides = [_gradients(side, list(leaves.values())) for side in (watched, losses)]
        if watched.numel() <= losses.numel():
            change = _products(*sides)
        else:
            change = _products(*reversed(sides)).T
    return change.mul(-lr).to(watched.dtype).reshape(*watched.shape, *losses.shape).detach()


def _gradients(value: Tensor, parameters: list[Tensor]) -> Iterator[Tensor]:
    """The gradient of each entry of `value`, as one vector, in fp32 at least."""
    for entry in value.flatten():
        gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if value.requires_grad:
            gradients = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        parts = (
            torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters, gradients, strict=True)
        )
        yield torch.cat(
            [g.flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in parts]
        )


def _products(few: Iterator[Tensor], many: Iterator[Tensor]) -> Tensor:
    """The products of all vectors of one side, which are held at once, with those of the other."""
    held = torch.stack(list(few))
    return torch.stack([held @ vector for vector in many], 1)
