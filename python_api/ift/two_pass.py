"""Both passes of Intuitive Fine-Tuning inside one forward of a causal LM (docs/patching.md).

Pass 1, without gradient, predicts a token at each response position. Pass 2, with gradient, runs
the same inputs with the embeddings of those tokens mixed into its input embeddings. The loss is
`ift.losses.ift_loss` of pass 2. Only response positions go through the head, in both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ift import prefix
from ift.documents import (
    IGNORE_INDEX,
    boundaries,
    document_starts,
    documents_with_targets,
    shifted_targets,
)
from ift.head_options import HeadOptions
from ift.head_parts import refuse_adapter, select_rows
from ift.head_pass import LossArguments, head_pass
from ift.input_embeddings import Mixture, embedding_table, mixing
from ift.losses import ift_loss, sft_loss
from ift.token_stats import token_metrics, token_stats, transform_options
from ift_kernels import TokenStats, linear_expected_embedding, linear_token
from ift_kernels.common.transform import LogitTransform
from ift_kernels.vocab_parallel import is_sharded

if TYPE_CHECKING:
    from ift.config import IFTConfig

logger = logging.getLogger(__name__)
Forward = Callable[..., Any]


@dataclass
class SampledRows:
    """RNG row counter of rule "sample": rows drawn so far in an optimizer step, none drawn twice.

    Four forwards of one row then draw what one forward of four rows draws.
    """

    step: int = 0
    rows: int = 0

    def next_rows(self, step: int, rows: int) -> int:
        """The number of the first of `rows` new rows, in this process's range."""
        if step != self.step:
            self.step, self.rows = step, 0
        first = self.rows
        self.rows += rows
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return ((torch.distributed.get_rank() if distributed else 0) << 40) + first


class State(Protocol):
    """The part of a patched model's state that this module uses."""

    @property
    def transform(self) -> LogitTransform | None:
        """Of the logits, measured by now."""

    head: HeadOptions
    sharing: prefix.Sharing | None  # how its prompts can be shared; None: not measured yet
    warned: set[str]  # warnings already logged
    sampled_rows: SampledRows
    last_backward: tuple[int, int, Tensor, Tensor] | None


def ift_forward(
    model: Any, forward: Forward, kwargs: dict[str, Any], config: IFTConfig, state: State
) -> tuple[Any, dict[str, Tensor]]:
    """Output (loss set, logits a placeholder) and metrics of one IFT forward.

    Beside `token_metrics` of pass 2: ``rows``, those with targets, and sums over them of both
    losses, ``loss_sft`` of pass 1 (mean cross-entropy of the row) and ``loss_ift`` of pass 2; in
    evaluation mode `token_metrics` of pass 1 under ``first_…``, with ``first_nll``.

    Raises:
        ValueError: `kwargs` without input_ids, or with arguments that IFT does not support.
        RuntimeError: the model changes its labels, or does not embed its ids in one call.
    """
    kwargs = _pass_kwargs(kwargs, config)
    ids, labels = kwargs["input_ids"], kwargs["labels"]
    transform = state.transform
    assert transform is not None
    head = state.head.changed(
        logits_dtype=config.logits_dtype, deterministic=config.deterministic,
        workspace=config.workspace,
    )  # fmt: skip
    head.check_rule(config.rule)
    starts = document_starts(labels, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"))
    cu_seqlens = boundaries(starts)
    target = target_of_batch = shifted_targets(labels, starts)

    lam = config.lam_at(config.step)
    mixture = Mixture(ids, labels, target, None, lam, cu_seqlens, config.embedding_grad)
    first = kwargs
    shared = _shared_prompt(model, forward, kwargs, mixture, config, state)
    if shared is not None:
        mixture, first, kwargs = shared
        target = mixture.target
    if lam > 0.0:  # else there is nothing to mix
        predict = _prediction(model, target, config, state, head)
        given = {k: v for k, v in first.items() if k not in _FIRST_PASS_DROPS}
        with torch.no_grad():
            _, (mixture.predicted, first_stats) = head_pass(model, forward, given, predict)
    losses: list[Tensor] = []

    def loss(stats: TokenStats, given: LossArguments) -> Tensor:
        assert stats.logprob is not None
        expected = LossArguments(kwargs["labels"], None, IGNORE_INDEX, None)
        if not expected.same_target(given):
            raise RuntimeError(
                f"{type(model).__name__}: changes its labels before its loss, so IFT, which mixes "
                "tokens by its labels, would train something else"
            )
        value = ift_loss(
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
        losses.append(value.detach())
        return value

    callback = token_stats(target, transform, head)
    with mixing(model, mixture):
        output, stats = head_pass(model, forward, kwargs, callback, loss=loss)
    if shared is not None:  # the cache is ours, the caller asked for none
        output = type(output)(**{k: v for k, v in output.items() if k != "past_key_values"})
    rows = documents_with_targets(target_of_batch, starts).sum()
    if config.num_rows is None and output.loss.requires_grad:
        output.loss.register_hook(lambda grad: _warn_of_accumulation(model, grad, rows, state))
    metrics = token_metrics(stats, target) | {"rows": rows}
    divisor = rows if config.num_rows is None else config.num_rows
    if isinstance(divisor, Tensor):
        divisor = divisor.to(losses[0]).reshape(())
    metrics["loss_ift"] = losses[0] * divisor
    if lam == 0.0:  # both passes are one
        mask = (target != IGNORE_INDEX).to(losses[0].device)
        first_stats = TokenStats(*(None if x is None else x[mask] for x in stats))
    return output, metrics | _first_metrics(first_stats, target, cu_seqlens, model.training)


def _shared_prompt(
    model: Any,
    forward: Forward,
    kwargs: dict[str, Any],
    batch: Mixture,
    config: IFTConfig,
    state: State,
) -> tuple[Mixture, dict[str, Any], dict[str, Any]] | None:
    """Run the prompts once for both passes: the rest of the batch, and the arguments of each pass.

    None where the model or the batch does not support it; of a model that is logged once.
    """
    if not config.share_prompt or batch.lam == 0.0:
        return None
    reason = prefix.unsupported_reason(model, kwargs)
    if not reason and state.sharing is None:
        state.sharing = prefix.find_sharing(model, forward, batch.ids.device)
    sharing = state.sharing
    if not reason and (sharing is None or not sharing.plain):
        reason = "it gives other results from a cache, or its cache is not one of keys and values"
    if reason:
        if reason not in state.warned:
            state.warned.add(reason)
            logger.warning(
                "%s: IFT runs its prompts in both passes: %s", type(model).__name__, reason
            )
        return None
    assert sharing is not None
    rows = prefix.aligned(batch.ids, batch.labels, kwargs.get("attention_mask"))
    if rows is None or not sharing.supports(rows, batch.ids.shape[1]):
        return None  # another batch may
    kwargs = {k: v for k, v in kwargs.items() if k not in ("input_ids", "attention_mask")}
    prompt = {k: v for k, v in kwargs.items() if k != "labels"} | sharing.prompt(rows)
    # Prompt embeddings get a gradient under the same option as mixed ones.
    with mixing(model, Mixture(prompt["input_ids"], *(rows.before(rows.labels),) * 2,
                               embedding_grad=batch.embedding_grad)):  # fmt: skip
        output, _ = head_pass(model, forward, prompt, lambda *_, **__: None)
    layers = prefix.cached_layers(output.get("past_key_values"))
    assert layers is not None  # prefix.find_sharing has checked it
    left = kwargs | sharing.rest(rows) | {"labels": rows.after(rows.labels)}
    first, second = (
        {**left, "use_cache": True, "past_key_values": prefix.new_cache(layers, detached=detached)}
        for detached in (True, False)
    )
    target = rows.after(shifted_targets(rows.labels))
    mixture = Mixture(
        left["input_ids"], left["labels"], target, None, batch.lam, None, batch.embedding_grad
    )
    return mixture, first, second


# Arguments of the caller that pass 1 does not need.
_FIRST_PASS_DROPS = ("labels", "output_hidden_states", "output_attentions")


def _pass_kwargs(kwargs: dict[str, Any], config: IFTConfig) -> dict[str, Any]:
    """The arguments of a pass: a copy of `kwargs` without cache, or a ValueError."""
    ids, labels = kwargs.get("input_ids"), kwargs["labels"]
    if ids is None or ids.dim() != 2:
        shape = None if ids is None else tuple(ids.shape)
        raise ValueError(f"input_ids: expected token ids (B, T) with ift, got {shape}")
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels: expected the shape of input_ids, {tuple(ids.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    for name in ("inputs_embeds", "past_key_values", "shift_labels"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with ift, which needs whole rows of input_ids")
    if kwargs.get("use_cache"):
        raise ValueError("use_cache: expected False or None with ift, whose passes have their own")
    keep = kwargs.get("logits_to_keep")
    if keep is not None and (isinstance(keep, Tensor) or keep != 0):
        raise ValueError(f"logits_to_keep: expected 0 with ift, got {keep}")
    if kwargs.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        raise ValueError(
            f"ignore_index: expected {IGNORE_INDEX} with ift, got {kwargs['ignore_index']}"
        )
    if kwargs.get("num_items_in_batch") is not None and config.num_rows is None:
        raise ValueError(
            "num_items_in_batch: IFT is a mean over rows, not over tokens; expected "
            "IFTConfig.num_rows, the rows with response tokens in the whole optimizer step "
            "(ift.IFTTrainer counts them)"
        )
    dropped = ("num_items_in_batch", "inputs_embeds")
    return {k: v for k, v in kwargs.items() if k not in dropped} | {"use_cache": False}


def _warn_of_accumulation(model: nn.Module, grad: Tensor, rows: Tensor, state: State) -> None:
    """Warn once when gradients of two forwards add up to another one than that of all their rows.

    Every loss is a mean over its own `rows`. The sum of N is N times that of all rows at
    once; it is that of all rows only where every loss is weighted by its share of them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if "accumulation" in state.warned or not trained:
        return
    last = trained[-1]
    weight = grad.detach().double()
    seen, state.last_backward = state.last_backward, (id(last), last._version, rows, weight)
    if seen is None or seen[:2] != state.last_backward[:2] or last.grad is None:
        return
    rows_before, weight_before = (value.to(rows.device) for value in seen[2:])
    shares = weight * rows_before, weight_before * rows
    of_all_rows = (grad < 1).all() & torch.isclose(*shares, rtol=1e-3).all()
    if not bool(of_all_rows) and bool((last.grad != 0).any()):  # else it was set to zero
        state.warned.add("accumulation")
        logger.warning(
            "%s: gradients of several IFT forwards add up without IFTConfig.num_rows, each a mean "
            "over its own rows: pass num_rows, the rows with response tokens of the whole "
            "optimizer step (docs/patching.md)",
            type(model).__name__,
        )


def _prediction(
    model: Any, target: Tensor, config: IFTConfig, state: State, head: HeadOptions
) -> Callable[..., tuple[Tensor, TokenStats]]:
    """The head callback of pass 1: the predictions at the targets, and the targets' statistics.

    Token ids (B, T), 0 at other positions; for rule "soft" embeddings, one row per target.
    Statistics have one entry per target. They hold the greedy prediction; the other rules cost
    a product of the head beside them.
    """
    transform = state.transform
    assert transform is not None
    options = transform_options(transform)
    outputs = ("logprob", "argmax") if model.training else ("logprob", "argmax", "entropy")

    def callback(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, **adapter: Any
    ) -> tuple[Tensor, TokenStats]:
        targets = target.to(hidden.device)
        mask = targets != IGNORE_INDEX
        rows, adapter = hidden[mask], select_rows(adapter, lambda value: value[mask])
        stats = token_stats(targets[mask], transform, head, outputs=outputs, detached=())(
            rows, weight, bias, **adapter
        )
        chosen: Any = {"bias": bias, "logits_dtype": head.logits_dtype, **options}
        chosen["workspace"] = head.workspace
        if config.rule == "greedy":
            assert stats.argmax is not None
            predicted = stats.argmax
        elif is_sharded(weight):
            raise ValueError(
                f"rule: expected 'greedy' with a vocabulary-parallel head, got {config.rule!r}"
            )
        elif config.rule == "soft":
            refuse_adapter("rule 'soft'", adapter)
            table, scale = embedding_table(model)
            return linear_expected_embedding(rows, weight, table, **chosen) * scale, stats
        else:
            if config.rule == "sample":
                chosen["temperature"] = config.sample_temperature
                chosen["seed"] = (config.seed << 20 ^ config.step) % 2**64
                chosen["row_offset"] = state.sampled_rows.next_rows(config.step, rows.shape[0])
            predicted = linear_token(
                rows, weight, rule=config.rule, k=config.k, deterministic=head.deterministic,
                **chosen, **adapter,
            ).ids  # fmt: skip
        ids = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
        return ids.masked_scatter_(mask, predicted).to(target.device), stats

    return callback


def _first_metrics(
    stats: TokenStats,  # one entry per target
    target: Tensor,
    cu_seqlens: Tensor | None,
    training: bool,
) -> dict[str, Tensor]:
    """The metrics of pass 1, as `ift_forward` names them."""
    assert stats.logprob is not None
    nll = -stats.logprob.detach()
    mask = (target != IGNORE_INDEX).to(nll.device)
    logprob = nll.new_zeros(mask.shape).masked_scatter_(mask, -nll)
    sum_of_means = sft_loss(
        logprob, mask, reduction="row_mean", num_rows=1.0,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(nll.device),
    )  # fmt: skip
    metrics = {"loss_sft": sum_of_means}
    if not training:
        found = token_metrics(stats, target[target != IGNORE_INDEX]) | {"nll": nll.sum()}
        metrics |= {f"first_{name}": value for name, value in found.items()}
    return metrics
