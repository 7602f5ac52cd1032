"""Both passes of Intuitive Fine-Tuning inside one forward of a causal LM (docs/patching.md).

Pass 1, without gradient: what would the model have said at each response position? Pass 2, with
gradient: the same batch, whose input embeddings are a little of that. The loss is
`ift.losses.ift_loss` of pass 2. Only response positions pass through the head, in both.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ift import prefix
from ift.documents import IGNORE_INDEX, boundaries, document_starts, shifted_targets
from ift.head_pass import (
    evaluating,
    head_pass,
    plain_head,
    token_metrics,
    token_stats,
    transform_options,
)
from ift.input_embeddings import embedding_table, is_bare_table, per_layer_inputs
from ift.losses import ift_loss
from ift_kernels import (
    ActiveSet,
    TokenStats,
    further_tokens,
    linear_expected_embedding,
    linear_token,
    temporal_residual,
    vocab_parallel_logprobs,
)
from ift_kernels.transform import LogitTransform
from ift_kernels.vocab_parallel import is_sharded

if TYPE_CHECKING:
    from ift.config import IFTConfig

logger = logging.getLogger(__name__)
Forward = Callable[..., Any]


@dataclass
class Draws:
    """Rows of rule "sample" drawn so far in an optimizer step, so that none shares its noise.

    Four forwards of one row then draw what one forward of four rows draws.
    """

    step: int = 0
    rows: int = 0

    def take(self, step: int, rows: int) -> int:
        """The number of the first of `rows` new rows, in a range of this process's own."""
        if step != self.step:
            self.step, self.rows = step, 0
        first = self.rows
        self.rows += rows
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return ((torch.distributed.get_rank() if distributed else 0) << 40) + first


class State(Protocol):
    """What this module reads and writes of a patched model's state."""

    transform: LogitTransform | None
    gradient: str | ActiveSet  # of the head
    embeds_checked: bool  # once, that inputs_embeds serve this model
    share: bool | None  # may its prompts be shared? None: not found out yet
    told: set[str]  # what was said once
    draws: Draws


def ift_forward(
    model: Any, forward: Forward, kwargs: dict[str, Any], config: IFTConfig, state: State
) -> tuple[Any, dict[str, Tensor]]:
    """Output (loss set, logits a stand-in) and token metrics of one IFT forward.

    Raises:
        ValueError: `kwargs` without input_ids, or with what cannot serve here.
    """
    kwargs = _checked(kwargs, config)
    ids, labels = kwargs.pop("input_ids"), kwargs["labels"]
    transform = state.transform
    assert transform is not None
    starts = document_starts(labels, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"))
    cu_seqlens = boundaries(starts)
    target = shifted_targets(labels, starts)
    if not state.embeds_checked:
        _check_embeds_path(model, forward, ids)
        state.embeds_checked = True

    lam = config.lam_at(config.step)
    batch = (ids, labels, target)
    shared = _shared_prompt(model, forward, kwargs, batch, lam, config, state)
    if shared is not None:
        batch, kwargs = shared.batch, shared.second
        target = batch[2]
    predicted = None
    if lam > 0.0:  # else nothing would be mixed in
        answer = _prediction(model, target != IGNORE_INDEX, config, state)
        given = kwargs if shared is None else shared.first
        given = {k: v for k, v in given.items() if k not in _FIRST_PASS_DROPS}
        with torch.no_grad():
            _, predicted = head_pass(model, forward, {**given, "input_ids": batch[0]}, answer)
    kwargs["inputs_embeds"] = _mixed(model, batch, predicted, lam, config, cu_seqlens)
    kwargs |= per_layer_inputs(model, batch[0])

    def loss(stats: TokenStats) -> Tensor:
        assert stats.logprob is not None
        return ift_loss(
            stats.logprob,
            (target != IGNORE_INDEX).to(stats.logprob.device),
            gamma=config.gamma,
            objective=config.objective,
            propagation=config.propagation,
            side=config.side,
            norm=config.norm,
            detach_weights=config.detach_weights,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(stats.logprob.device),
            num_rows=config.num_rows,
        )

    ask = token_stats(target, transform, state.gradient, config.workspace)
    output, stats = head_pass(model, forward, kwargs, ask, loss=loss)
    if shared is not None:  # its cache was a means
        output = type(output)(**{k: v for k, v in output.items() if k != "past_key_values"})
    return output, token_metrics(stats, target)


class _Shared(NamedTuple):
    """What is left of both passes once the prompts have run."""

    batch: tuple[Tensor, Tensor, Tensor]  # ids, labels, target of the columns that are left
    first: dict[str, Any]  # arguments of pass 1, but for its ids
    second: dict[str, Any]  # arguments of pass 2, but for its embeddings


def _shared_prompt(
    model: Any,
    forward: Forward,
    kwargs: dict[str, Any],
    batch: tuple[Tensor, Tensor, Tensor],
    lam: float,
    config: IFTConfig,
    state: State,
) -> _Shared | None:
    """Run the prompts once for both passes; None where that cannot serve, which is said once."""
    if not config.share_prompt or lam == 0.0:
        return None
    reason = prefix.why_not(model, kwargs)
    ids, labels, _ = batch
    if not reason and state.share is None:
        state.share = prefix.serves(model, forward, ids)
    if not reason and not state.share:
        reason = "it gives other results from a cache, or its cache is not one of keys and values"
    if reason:
        if reason not in state.told:
            state.told.add(reason)
            logger.warning(
                "%s: IFT runs its prompts in both passes: %s", type(model).__name__, reason
            )
        return None
    rows = prefix.aligned(ids, labels, kwargs.get("attention_mask"))
    moved = rows is not None and rows.positions is not None
    if rows is None or (moved and "position_ids" not in inspect.signature(forward).parameters):
        return None  # this batch cannot, the next one may
    start = rows.start
    at: list[dict[str, Tensor]] = [{}, {}]
    if rows.positions is not None:
        at = [{"position_ids": p} for p in (rows.positions[:, :start], rows.positions[:, start:])]
    given = {k: v for k, v in kwargs.items() if k != "labels"} | {"use_cache": True}
    # The embeddings of prompts are as free of gradient as those that are mixed.
    with torch.set_grad_enabled(config.embedding_grad and torch.is_grad_enabled()):
        prompt = model.get_input_embeddings()(rows.ids[:, :start])
    given |= {"inputs_embeds": prompt, "attention_mask": rows.mask[:, :start], **at[0]}
    output, _ = head_pass(model, forward, given, lambda *_: None)
    layers = prefix.cached_layers(output.get("past_key_values"))
    assert layers is not None  # prefix.serves has seen one
    target = shifted_targets(rows.labels)[:, start:]
    left = {**kwargs, "labels": rows.labels[:, start:], "attention_mask": rows.mask, **at[1]}
    first, second = (
        {**left, "use_cache": True, "past_key_values": prefix.new_cache(layers, detached=detached)}
        for detached in (True, False)
    )
    return _Shared((rows.ids[:, start:], left["labels"], target), first, second)


# What pass 1 does not need of the caller's arguments.
_FIRST_PASS_DROPS = ("labels", "output_hidden_states", "output_attentions")


def _checked(kwargs: dict[str, Any], config: IFTConfig) -> dict[str, Any]:
    """The arguments of a pass: a copy of `kwargs` without cache, or a ValueError."""
    ids, labels = kwargs.get("input_ids"), kwargs["labels"]
    if ids is None or ids.dim() != 2:
        came = None if ids is None else tuple(ids.shape)
        raise ValueError(f"input_ids: expected token ids (B, T) with ift, got {came}")
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels: expected the shape of input_ids, {tuple(ids.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    for name in ("inputs_embeds", "past_key_values", "shift_labels"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with ift, which needs whole rows of input_ids")
    keep = kwargs.get("logits_to_keep")
    if keep is not None and (isinstance(keep, Tensor) or keep != 0):
        raise ValueError(f"logits_to_keep: expected 0 with ift, got {keep}")
    if kwargs.get("num_items_in_batch") is not None and config.num_rows is None:
        raise ValueError(
            "num_items_in_batch: IFT is a mean over rows, not over tokens; expected "
            "IFTConfig.num_rows, the rows with response tokens in the whole optimizer step "
            "(ift.IFTTrainer counts them)"
        )
    dropped = ("num_items_in_batch", "inputs_embeds")
    return {k: v for k, v in kwargs.items() if k not in dropped} | {"use_cache": False}


def _prediction(
    model: Any, wanted: Tensor, config: IFTConfig, state: State
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The answer of pass 1: what is predicted at the positions `wanted` (B, T) bool.

    Token ids (B, T), 0 elsewhere; for rule "soft" embeddings (positions wanted, E).
    """
    assert state.transform is not None
    options = transform_options(state.transform)

    def answer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        here = wanted.to(hidden.device)
        rows = hidden[here]
        if is_sharded(weight):
            return _greedy_of_shards(rows, weight, bias, here, config, options).to(wanted.device)
        if config.rule == "soft":
            table, scale = embedding_table(model)
            soft = linear_expected_embedding(
                rows, weight, table, bias=bias, workspace=config.workspace, **options
            )
            return soft * scale
        if config.rule == "sample":
            options["temperature"] = config.sample_temperature
            options["seed"] = (config.seed << 20 ^ config.step) % 2**64
            options["row_offset"] = state.draws.take(config.step, rows.shape[0])
        choice = linear_token(
            rows,
            weight,
            bias=bias,
            rule=config.rule,
            k=config.k,
            workspace=config.workspace,
            **options,
        )
        ids = torch.zeros(here.shape, dtype=torch.int64, device=here.device)
        return ids.masked_scatter_(here, choice.ids).to(wanted.device)

    return answer


def _greedy_of_shards(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    here: Tensor,
    config: IFTConfig,
    options: dict[str, Any],
) -> Tensor:
    """The predicted ids of a head whose vocabulary is spread over processes."""
    if config.rule != "greedy":
        raise ValueError(
            f"rule: expected 'greedy' with a vocabulary-parallel head, got {config.rule!r}"
        )
    some = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    stats = vocab_parallel_logprobs(
        rows, weight, some, bias=bias, outputs=("argmax",), workspace=config.workspace, **options
    )
    assert stats.argmax is not None
    ids = torch.zeros(here.shape, dtype=torch.int64, device=here.device)
    return ids.masked_scatter_(here, stats.argmax)


def _mixed(
    model: Any,
    batch: tuple[Tensor, Tensor, Tensor],  # ids, labels, target: each (B, T)
    predicted: Tensor | None,
    lam: float,
    config: IFTConfig,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Input embeddings (B, T, E) of pass 2.

    Through the embedding module, since models scale there (Gemma); by the fused operation where
    that module is a bare table.
    """
    ids, labels, target = batch
    embedding = model.get_input_embeddings()
    track = config.embedding_grad and torch.is_grad_enabled()
    mixed: Tensor
    with torch.set_grad_enabled(track):
        if predicted is None:
            mixed = embedding(ids)
        elif config.rule == "soft":
            own = embedding(ids)
            other = own.clone()
            other[F.pad(target != IGNORE_INDEX, (1, -1))] = predicted.to(own)
            mixed = torch.lerp(own, other, lam)
        elif is_bare_table(embedding, track):
            mixed = temporal_residual(
                embedding.weight, ids, predicted, labels, lam, cu_seqlens=cu_seqlens
            )
        else:
            further = further_tokens(ids, predicted, labels, cu_seqlens=cu_seqlens)
            mixed = torch.lerp(embedding(ids), embedding(further), lam)  # exact where they agree
    if not torch.is_grad_enabled() or mixed.requires_grad:
        return mixed
    parameters = list(embedding.parameters())
    tied = any(p is plain_head(model).weight for p in parameters)
    if not tied and any(p.requires_grad for p in parameters):
        # A gradient of zeros for the table: DDP waits for one from every parameter.
        mixed = mixed + 0.0 * embedding(ids[:1, :1])[..., :1]
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        mixed.requires_grad_()  # reentrant checkpointing drops the gradients of a layer without it
    return mixed


def _check_embeds_path(model: Any, forward: Forward, ids: Tensor) -> None:
    """Refuse a model that does to token ids what it does not do to their embeddings.

    Some models scale, or look up further tables, on the ids path only; pass 2 would then train
    another model. Compares what reaches the head on a few tokens, once per patch.
    """
    few = ids[:1, :4]
    reached = []
    with evaluating(model), torch.no_grad():
        embeds = model.get_input_embeddings()(few)
        other = {"inputs_embeds": embeds, **per_layer_inputs(model, few)}
        for given in ({"input_ids": few}, other):
            _, hidden = head_pass(
                model, forward, {**given, "use_cache": False}, lambda hidden, *_: hidden
            )
            reached.append(hidden)
    by_ids, by_embeds = reached
    limit = torch.finfo(by_ids.dtype).eps ** 0.5 * by_ids.abs().max()
    if bool((by_ids - by_embeds).abs().max() > limit):
        raise RuntimeError(
            f"{type(model).__name__}: gives other results for the embeddings of tokens than for "
            "the tokens themselves, so IFT cannot mix its embeddings"
        )
