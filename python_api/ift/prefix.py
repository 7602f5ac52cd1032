"""Shared prompts: both passes of Intuitive Fine-Tuning continue one forward over the prompts.

Prompt tokens are never mixed and attention is causal, so both passes agree on the prompt. It runs
once, with gradient; each pass runs over the responses with its keys and values, detached for the
first. That costs (3 + r)/3 of supervised fine-tuning for a share r of response tokens, not 4/3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ift.documents import IGNORE_INDEX, shifted_targets
from ift.head_pass import evaluating, head_pass
from ift.measure import measuring, plain_ids

# The tensor arguments that rows can be shifted and split in; others would need rules of their own.
_SPLITTABLE = ("input_ids", "labels", "attention_mask", "num_items_in_batch")
# Outputs that would hold a part of each row.
_WHOLE_ROWS = ("output_hidden_states", "output_attentions")
# Prompts are shared where that takes at most this share of the work of two full passes.
_MAX_WORK = 0.95


class Aligned(NamedTuple):
    """A batch whose responses all start in one column, prompts to the left of it."""

    ids: Tensor  # (B, T'), like the others
    labels: Tensor
    mask: Tensor
    positions: Tensor | None  # the original columns of shifted rows; None: none is shifted
    start: int  # columns of prompt that both passes share: all but the last

    def before(self, value: Tensor) -> Tensor:
        """The columns that both passes share."""
        return value[:, : self.start]

    def after(self, value: Tensor) -> Tensor:
        """The columns that each pass runs over."""
        return value[:, self.start :]


class Sharing(NamedTuple):
    """How a model can continue from the cache of its prompts, as `find_sharing` has measured."""

    plain: bool = False  # rows that are not shifted
    moved: str = ""  # shifted rows: positions are their original "columns", or the model's "own"
    shorter_than: float = math.inf  # rows of this length or more change its rotary frequencies

    def supports(self, rows: Aligned, length: int) -> bool:
        """Whether these rows give the results of whole rows, of `length`."""
        if max(length, rows.ids.shape[1]) >= self.shorter_than:
            return False  # prompts would get other frequencies than the responses after them
        return bool(self.moved) if rows.positions is not None else self.plain

    def prompt(self, rows: Aligned) -> dict[str, Any]:
        """Arguments of the forward over the prompts."""
        given = {"input_ids": rows.before(rows.ids), "attention_mask": rows.before(rows.mask)}
        return {**given, **self._positions(rows, rows.before), "use_cache": True}

    def rest(self, rows: Aligned) -> dict[str, Any]:
        """Arguments of a forward over the rest, without its cache."""
        given = {"input_ids": rows.after(rows.ids), "attention_mask": rows.mask}
        return {**given, **self._positions(rows, rows.after)}

    def _positions(self, rows: Aligned, part: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        if rows.positions is None or self.moved != "columns":
            return {}
        return {"position_ids": part(rows.positions)}


def aligned(
    ids: Tensor, labels: Tensor, mask: Tensor | None, max_work: float = _MAX_WORK
) -> Aligned | None:
    """The batch with its rows shifted right until their responses start together.

    Tokens after a row's last label are dropped: no target depends on them. None where sharing does
    not pay (short prompts, or lengths so uneven that shifted rows are much longer), and where a
    label follows padding, whose hidden state depends on what surrounds it.
    """
    length = ids.shape[1]
    column = torch.arange(length, device=ids.device)
    response = (labels != IGNORE_INDEX) & (column > 0)
    first = torch.where(response, column, length).amin(1)
    last = torch.where(response, column, 0).amax(1)
    has_response = first < length
    start = torch.where(has_response, first, 0).amax()
    shift = torch.where(has_response, start - first, 0)
    end = (torch.where(has_response, last + shift, 0)).amax() + 1
    moved = (shift > 0).any()
    mask = torch.ones_like(ids) if mask is None else mask
    after_padding = (response[:, 1:] & (mask[:, :-1] == 0)).any()
    values = torch.stack([start - 1, end, moved.long(), after_padding.long()])
    shared, width, is_moved, is_after_padding = values.tolist()  # one synchronisation
    work = 3 * shared + 4 * (width - shared)
    if work > max_work * 4 * length or shared < 1 or is_after_padding:
        return None
    if not is_moved:
        return Aligned(ids[:, :width], labels[:, :width], mask[:, :width], None, shared)
    source = torch.arange(width, device=ids.device)[None] - shift[:, None]
    inside = (source >= 0) & (source < length)
    source = source.clamp(0, length - 1)
    return Aligned(
        ids.gather(1, source),
        labels.gather(1, source).masked_fill(~inside, IGNORE_INDEX),
        mask.gather(1, source) * inside.to(mask.dtype),
        source,
        shared,
    )


def unsupported_reason(model: Any, kwargs: dict[str, Any]) -> str:
    """Why prompts cannot be shared in this call; empty if model and arguments allow it."""
    config = getattr(model, "config", None)
    for name in _WHOLE_ROWS:
        value = kwargs.get(name)
        if value or (value is None and getattr(config, name, False)):
            return f"{name} is given"
    for name, value in kwargs.items():
        if name not in _SPLITTABLE and not isinstance(value, (bool, int, float, str, type(None))):
            return f"{name} is given"
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "the attention mask is not (B, T)"
    if kwargs.get("output_router_logits") or getattr(config, "output_router_logits", False):
        return "its auxiliary loss is over whole rows"
    if config is not None and config.get_text_config() is not config:
        # Positions after a cache may be those of the last batch that had images.
        return "it is a multimodal model"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3 gathers parameters around one forward"
    for module in model.modules():
        kind = {cls.__name__ for cls in type(module).__mro__}
        if kind & {"FSDPModule", "FullyShardedDataParallel"}:
            # A gradient arrives at keys and values before it does at the output of their layer,
            # where FSDP waits to gather the parameters.
            return "FSDP gathers parameters for a gradient at a layer's output"
        if module.training and getattr(module, "gradient_checkpointing", False):
            return "gradient checkpointing keeps no cache"
        if module.training and _is_random(module):
            return f"{type(module).__name__} draws random numbers in training"
    return ""


def find_sharing(model: Any, forward: Callable[..., Any], device: torch.device) -> Sharing:
    """Measure which rows the model continues from a cache with the results of whole rows.

    In evaluation mode, on rows of three lengths, padded on the left and on the right: the hidden
    states at the head, at their targets, of whole rows and of parts.
    """
    ids = plain_ids(model)
    # Different tokens: equal ones would hide an error in their positions.
    spread = [ids[i * len(ids) // 24] for i in range(24)]
    tokens = torch.tensor(spread, device=device).view(3, 8)
    whole, plain = _try_batch(tokens, padding=(0, 2, 0), responses=((5, 8), (5, 8), (5, 6)))
    uneven, moved = _try_batch(tokens, padding=(0, 3, 0), responses=((6, 8), (5, 8), (3, 6)))
    with measuring, evaluating(model), torch.no_grad():
        if not _agrees(model, forward, whole, plain, Sharing(plain=True)):
            return Sharing()
        for kind in ("columns", "own"):
            if _agrees(model, forward, uneven, moved, Sharing(True, kind)):
                return Sharing(True, kind, _dynamic_rotary_length(model))
    return Sharing(True, "", _dynamic_rotary_length(model))


def _dynamic_rotary_length(model: nn.Module) -> float:
    """The shortest row for which rotary embeddings of transformers' types "dynamic" and "longrope"
    may compute other frequencies than for shorter rows; infinite without any."""
    lengths: list[float] = [math.inf]
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        config = getattr(module, "config", None)
        parameters: Any = getattr(config, "rope_parameters", None) or {}
        if not isinstance(kinds, dict):  # else one for each type of layer
            kinds, parameters = {"": kinds}, {"": parameters}
        for layer, kind in kinds.items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                original = (parameters.get(layer) or {}).get("original_max_position_embeddings")
                found = (original, getattr(module, "original_max_seq_len", None))
                lengths.append(min((n for n in found if n), default=0))
    return min(lengths)


def _try_batch(
    ids: Tensor, padding: tuple[int, ...], responses: tuple[tuple[int, int], ...]
) -> tuple[dict[str, Tensor], Aligned]:
    """A padded batch and the same aligned: `padding` on the left, labels from column to column."""
    column = torch.arange(ids.shape[1], device=ids.device)
    first, last = (
        torch.tensor(ends, device=ids.device)[:, None] for ends in zip(*responses, strict=True)
    )
    left = torch.tensor(padding, device=ids.device)[:, None]
    mask = ((column >= left) & (column < last)).to(ids.dtype)
    labels = torch.where((column >= first) & (column < last), ids, IGNORE_INDEX)
    rows = aligned(ids, labels, mask, max_work=float("inf"))
    assert rows is not None
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, rows


def _agrees(
    model: Any,
    forward: Callable[..., Any],
    batch: dict[str, Tensor],
    rows: Aligned,
    sharing: Sharing,
) -> bool:
    def run(given: dict[str, Any], labels: Tensor) -> tuple[Any, Tensor]:
        output, hidden = head_pass(model, forward, given, lambda hidden, *_, **__: hidden)
        return output, hidden[shifted_targets(labels) != IGNORE_INDEX]

    labels = batch["labels"]
    try:
        whole_rows = {k: v for k, v in batch.items() if k != "labels"}
        _, whole = run({**whole_rows, "use_cache": False}, labels)
        output, _ = run(sharing.prompt(rows), rows.before(rows.labels))
        layers = cached_layers(output.get("past_key_values"))
        if layers is None:
            return False
        cache = new_cache(layers, detached=True)
        given = {**sharing.rest(rows), "use_cache": True, "past_key_values": cache}
        _, parts = run(given, rows.after(rows.labels))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # it takes no positions, or no cache
    # The mean over positions may be far larger than their differences, which are compared.
    limit = torch.finfo(whole.dtype).eps ** 0.5 * (whole - whole.mean(0)).abs().max()
    return whole.shape == parts.shape and bool((whole - parts).abs().max() <= limit)


def _is_random(module: nn.Module) -> bool:
    """Whether the names of its attributes show dropout or noise, drawn anew in every pass."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        for name, value in vars(module).items()
        if "drop" in name or "jitter" in name
    )


Layers = list[tuple[Tensor, Tensor]]


def cached_layers(cache: Any) -> Layers | None:
    """Keys and values of every layer, or None for a cache that holds anything else."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or not cache.layers:
        return None
    if any(type(layer) is not DynamicLayer or layer.keys is None for layer in cache.layers):
        return None  # a sliding window forgets, a state-space layer has a state
    return [(layer.keys, layer.values) for layer in cache.layers]


def new_cache(layers: Layers, *, detached: bool) -> Any:
    """A cache of its own that starts from these keys and values."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        if detached:
            keys, values = keys.detach(), values.detach()
        cache.update(keys, values, index)
    return cache
