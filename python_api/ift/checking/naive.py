"""SFT and IFT written out in plain torch on full logits: what the fused losses are compared with.

Nothing of `ift_kernels` and nothing of `ift.patch` is used. The formulas follow the released code
of arXiv 2405.11870, relations propagated by a dense (T, T) matrix. Only these faults of the
released code are mended, each marked where it is:

1. the softmax norm overwrote what its own backward needs;
2. kind "mask" divided and summed bools;
3. a row without response tokens, or with losses of 0 only, was 0/0 and made the whole batch NaN.

The two objectives that the released code does not have, "paper" and "algorithm1", are written out
as sums over pairs of positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ift.config import IFTConfig
from ift.head_parts import head_logits
from ift.losses._module import taken_statistics

IGNORE_INDEX = -100
NEAR_TIE = 1e-6  # logits closer than this share of the largest one are nearly equal


class NaivePass(NamedTuple):
    """What a plain forward gives: a loss with its graph, and figures per token without one."""

    loss: Tensor  # scalar
    logits: Tensor | None  # (B, T, V), detached; None where they do not fit the labels
    near_tie: bool = False  # a predicted token of pass 1 was nearly another one


def float32_product(head: nn.Linear, args: tuple[Tensor], _output: Tensor) -> Tensor:
    """A forward hook of a head: its logits as a product in float32."""
    return head_logits(head, args[0], torch.float32)


def naive_sft(model: Any, batch: dict[str, Any]) -> NaivePass:
    """The loss that the model computes itself from its labels."""
    output = model(**batch)
    if getattr(output, "loss", None) is None:
        raise ValueError(f"batch: {type(model).__name__} returns no loss for it")
    return NaivePass(output.loss, _logits(output, batch["labels"]))


def naive_loss(model: Any, batch: dict[str, Any], loss: Callable[..., Tensor]) -> NaivePass:
    """A function of log-probabilities and mask, (B, T), plus the model's own auxiliary losses.

    Raises:
        ValueError: the model's logits do not fit its labels.
    """
    output = model(**batch)
    labels = batch["labels"]
    if _logits(output, labels) is None:
        raise ValueError(f"batch: the logits of {type(model).__name__} do not fit its labels")
    logprob, mask, log_p = of_logits(output.logits, next_tokens(labels))
    statistics, _, _ = taken_statistics(getattr(loss, "loss", None) or loss, {})
    logits = output.logits.to(log_p.dtype)
    found: dict[str, Callable[[], Tensor]] = {
        "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
        "lse": lambda: logits.logsumexp(-1),
        "mean_logit": lambda: logits.mean(-1),
        "sum_sq": lambda: log_p.exp().square().sum(-1),
    }
    value = loss(logprob, mask, **{name: found[name]() for name in statistics})
    return NaivePass(value + auxiliary(output, logprob, mask), _logits(output, labels))


def next_tokens(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The label that each position predicts, (B, T), as in transformers' ForCausalLMLoss."""
    last = labels.new_full((*labels.shape[:-1], 1), ignore_index)
    return torch.cat([labels[..., 1:], last], -1)


def of_logits(
    logits: Tensor,  # (B, T, V)
    target: Tensor,  # (B, T)
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, 0 where there is none; the mask; all log-probabilities."""
    target = target.to(logits.device)
    mask = target != ignore_index
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = log_p.gather(-1, target.masked_fill(~mask, 0)[..., None])[..., 0]
    return torch.where(mask, chosen, 0), mask, log_p


def naive_ift(model: Any, batch: dict[str, Any], config: IFTConfig) -> NaivePass:
    """The IFT loss by two full forwards on token ids, plus the model's own auxiliary losses.

    The model keeps its positions, its masks and its image inputs: a forward hook on the input
    embedding replaces what that module returns at the mixed positions, and nothing else.

    Raises:
        ValueError: packed rows, rule "sample", or a forward in which the input embedding is not
            called on `input_ids`.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    _check_args(batch, config)
    lam = config.lam_at(config.step)
    # Position t is mixed with what was predicted for it, if it has a label: never the first one.
    mixed_at = labels != IGNORE_INDEX
    mixed_at[:, 0] = False
    mixed_in, near_tie = None, False
    if lam > 0:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            logits = _logits(model(**inputs), labels)
        if logits is None:
            raise ValueError(f"batch: the logits of {type(model).__name__} do not fit its labels")
        mixed_in = _predicted(model, logits, mixed_at, config)
        near_tie = _has_near_tie(logits, mixed_at, config)
    with _mixed_embeddings(model, ids, mixed_at, mixed_in, lam, config.embedding_grad):
        output = model(**batch)
    logprob, mask = naive_logprob(output.logits, labels)
    loss = naive_propagation_loss(
        logprob,
        mask,
        gamma=config.gamma,
        objective=config.objective,
        kind=config.propagation,
        side=config.side,
        norm=config.norm,
        detach=config.detach_weights,
    )
    if config.num_rows is not None:
        loss = loss * (mask.any(-1).sum() / config.num_rows)
    return NaivePass(loss + auxiliary(output, logprob, mask), _logits(output, labels), near_tie)


def _check_args(batch: dict[str, Any], config: IFTConfig) -> None:
    if config.rule == "sample":
        raise ValueError("rule: expected one that draws nothing, got 'sample'")
    positions = batch.get("position_ids")
    if positions is not None and positions.dim() == 2:
        restarts = (positions[:, 1:] == 0) & (positions[:, :-1] > 0)
        if bool(restarts.any()):
            raise ValueError("position_ids: expected one document in each row, got packed rows")
    if batch.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seq_lens_q: expected one document in each row, got packed rows")


def _logits(output: Any, labels: Tensor) -> Tensor | None:
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None or logits.shape[:-1] != labels.shape:
        return None
    return logits.detach()


def _predicted(model: Any, logits: Tensor, mixed_at: Tensor, config: IFTConfig) -> Tensor:
    """Embeddings (mixed positions, E) of the token predicted for each mixed position."""
    before = mixed_at.roll(-1, 1)  # position 0 is never mixed, so nothing wraps around
    rows = logits[before]
    embedding = model.get_input_embeddings()
    # A mean embedding is a constant: its gradient would be one of the first pass, too.
    with torch.set_grad_enabled(config.embedding_grad and config.rule != "soft"):
        if config.rule == "soft":
            every: Tensor = embedding.forward(torch.arange(rows.shape[-1], device=rows.device))
            return rows.to(every.dtype).softmax(-1) @ every
        chosen: Tensor = embedding.forward(naive_predict(rows, rule=config.rule, k=config.k))
        return chosen


def _has_near_tie(logits: Tensor, mixed_at: Tensor, config: IFTConfig) -> bool:
    if config.rule == "soft":
        return False
    rank = 1 if config.rule == "greedy" else config.k
    rows = logits[mixed_at.roll(-1, 1)]
    best = rows.topk(min(rank + 1, rows.shape[-1]), dim=-1).values
    gaps = (best[:, :-1] - best[:, 1:])[:, max(0, rank - 2) :]
    return bool((gaps <= NEAR_TIE * rows.abs().amax(-1, keepdim=True)).any())


@contextlib.contextmanager
def _mixed_embeddings(
    model: Any,
    ids: Tensor,
    mixed_at: Tensor,
    mixed_in: Tensor | None,
    lam: float,
    embedding_grad: bool,
) -> Iterator[None]:
    """Within it, the input embedding of `ids` is ``(1 - lam) * E(ids) + lam * mixed_in``."""
    calls = 0

    def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        if output.shape[:2] != ids.shape:
            return output
        calls += 1
        mixed = output.clone() if embedding_grad else output.detach().clone()
        if mixed_in is not None:
            mixed[mixed_at] = torch.lerp(mixed[mixed_at], mixed_in.to(mixed.dtype), lam)
        return mixed

    handle = model.get_input_embeddings().register_forward_hook(replace, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise ValueError(
            f"batch: expected {type(model).__name__} to embed its input_ids once, got {calls} times"
        )


def auxiliary(output: Any, logprob: Tensor, mask: Tensor) -> Tensor:
    """What the model adds to its cross-entropy (load balancing of experts), or 0."""
    zero = logprob.new_zeros(())
    if getattr(output, "aux_loss", None) is None:
        return zero
    extra: Tensor = output.loss + logprob.sum() / mask.sum()
    # The same cross-entropy twice, up to rounding, is no auxiliary loss.
    return extra if abs(extra.item()) > 1e-6 * abs(output.loss.item()) else zero


def naive_predict(logits: Tensor, *, rule: str, k: int = 2, temperature: float = 0.7) -> Tensor:
    """The token that the model predicts at each position, (B, T)."""
    if rule == "greedy":
        return logits.argmax(-1)
    if rule == "kth":
        return logits.topk(k, dim=-1).indices[..., -1]
    if rule == "sample":  # called nucleus in the released code, which draws from everything
        p = (logits.float() / temperature).softmax(-1)
        return p.flatten(0, 1).multinomial(1).view(p.shape[:2])
    raise ValueError(f"rule: expected one of ['greedy', 'kth', 'sample'], got {rule!r}")


def naive_logprob(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each next label, 0 where there is none, and the mask: (B, T − 1)."""
    labels = labels[:, 1:]
    mask = labels != -100
    logprob = logits[:, :-1].float().log_softmax(-1)
    return logprob.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask, mask


def naive_propagation_loss(
    logprob: Tensor,  # (B, T), shifted
    mask: Tensor,  # (B, T) bool
    *,
    gamma: float = 0.95,
    objective: str = "released",
    kind: str = "loss",
    side: str = "left",
    norm: str = "L1",
    detach: bool = False,
) -> Tensor:
    """The loss of the second pass, scalar: the mean over rows that have response tokens."""
    loss = -logprob * mask
    tokens = mask.sum(-1)
    if objective not in ("released", "paper", "algorithm1"):
        raise ValueError(f"objective: expected released, paper or algorithm1, got {objective!r}")
    if objective == "released":
        weights = naive_weights(logprob, mask, gamma=gamma, kind=kind, side=side, norm=norm)
        weights = weights.detach() if detach else weights
        per_row = (loss * weights).sum(-1) / tokens.clamp(min=1)  # fault 3
    else:
        pairs = _relations(mask.shape[1], gamma, loss)
        pairs = pairs * mask[:, :, None] * mask[:, None, :]  # [row, n, i]: n's loss reaches i ≥ n
        reached = loss[:, None, :]
        if objective == "algorithm1":
            reached = loss[:, :, None] * (reached.detach() if detach else reached)
        per_row = (pairs * reached).sum((-2, -1))
    return per_row.sum() / (tokens > 0).sum().clamp(min=1)  # fault 3


def naive_weights(
    logprob: Tensor, mask: Tensor, *, gamma: float, kind: str, side: str, norm: str
) -> Tensor:
    """The weights of the released code, which sum to N in every row; (B, T)."""
    if gamma == 0:
        return torch.ones_like(logprob)
    tokens = mask.sum(-1, keepdim=True)
    if kind == "mask":
        item = mask.to(logprob.dtype)  # fault 2
    elif kind == "loss":
        item = -logprob / tokens.clamp(min=1)  # fault 3
    elif kind == "logps":
        item = -logprob
    else:
        raise ValueError(f"kind: expected one of ['logps', 'loss', 'mask'], got {kind!r}")
    item = item.masked_fill(~mask, 0)
    relations = _relations(mask.shape[1], gamma, logprob)
    if side == "left":
        c = (item @ relations.T).masked_fill(~mask, 0)
        v = {"L1": c, "L2": c**2, "softmax": c.softmax(-1), "log": (c + 1).log()}[norm]
    elif side == "right":
        c = (item @ relations).masked_fill(~mask, 1e6)
        c = c + c[c != 0].min()
        v = {"L1": 1 / c, "L2": 1 / c**2, "softmax": (1 / c).softmax(-1), "log": 1 / (c + 1).log()}[
            norm
        ]
    else:
        raise ValueError(f"side: expected one of ['left', 'right'], got {side!r}")
    v = v.masked_fill(~mask, 0)  # fault 1: not in place, here and below
    total = v.sum(-1, keepdim=True)
    return v * (tokens / total.masked_fill(total == 0, 1))  # fault 3


def _relations(length: int, gamma: float, like: Tensor) -> Tensor:
    """U[t, j] = gamma ** (j − t) for j ≥ t, else 0; (T, T)."""
    position = torch.arange(length, device=like.device)
    distance = position[None, :] - position[:, None]
    return torch.where(distance >= 0, float(gamma) ** distance.clamp(min=0).to(like.dtype), 0)
