"""Where both passes of Intuitive Fine-Tuning may share one run over the prompts, and how.

Prompt tokens are never mixed and attention looks back only, so both passes agree on the prompt. It
runs once, with gradient; the passes go over the responses on its keys and values, detached for the
first. That costs (3 + r)/3 of supervised fine-tuning for a share r of response tokens, not 4/3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ift.documents import IGNORE_INDEX
from ift.head_pass import evaluating, head_pass
from ift.input_embeddings import has_per_layer_inputs

# Arguments whose rows follow the tokens in a way not known here, or whose results would be parts.
_WHOLE_ROWS = (
    "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "output_hidden_states", "output_attentions",
    "cache_position", "token_type_ids", "use_cache",
)  # fmt: skip
# Of the work of two full passes, at most this much: else the passes would not be worth parting.
_WORTH = 0.95


class Aligned(NamedTuple):
    """A batch whose responses all start in one column; what is left of it are prompts."""

    ids: Tensor  # (B, T'), like the others
    labels: Tensor
    mask: Tensor
    positions: Tensor | None  # where they are not what the model counts by itself
    start: int  # columns of prompt that both passes share: all but the last


def aligned(ids: Tensor, labels: Tensor, mask: Tensor | None) -> Aligned | None:
    """The batch with its rows moved right until their responses start together.

    Tokens behind a row's last label are dropped, for nothing that counts looks at them. None where
    sharing would not pay, short prompts or lengths so uneven that the moved rows are much longer,
    and where a label follows padding: what a model makes of padding depends on what surrounds it.
    """
    length = ids.shape[1]
    column = torch.arange(length, device=ids.device)
    response = (labels != IGNORE_INDEX) & (column > 0)
    first = torch.where(response, column, length).amin(1)
    last = torch.where(response, column, 0).amax(1)
    some = first < length
    at = torch.where(some, first, 0).amax()
    shift = torch.where(some, at - first, 0)
    end = (torch.where(some, last + shift, 0)).amax() + 1
    moved = (shift > 0).any()
    mask = torch.ones_like(ids) if mask is None else mask
    loose = (response[:, 1:] & (mask[:, :-1] == 0)).any()
    values = torch.stack([at, end, moved.long(), loose.long()])
    at_, end_, moved_, loose_ = values.tolist()  # one synchronisation
    start = int(at_) - 1
    if 3 * start + 4 * (end_ - start) > _WORTH * 4 * length or start < 1 or loose_:
        return None
    if not moved_:
        return Aligned(ids[:, :end_], labels[:, :end_], mask[:, :end_], None, start)
    source = torch.arange(int(end_), device=ids.device)[None] - shift[:, None]
    inside = (source >= 0) & (source < length)
    source = source.clamp(0, length - 1)
    return Aligned(
        ids.gather(1, source),
        labels.gather(1, source).masked_fill(~inside, IGNORE_INDEX),
        mask.gather(1, source) * inside.to(mask.dtype),
        source,
        start,
    )


def why_not(model: Any, kwargs: dict[str, Any]) -> str:
    """Empty if prompts can be shared in this call as far as model and arguments tell, else why."""
    for name in _WHOLE_ROWS:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            return f"{name} is given"
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "the attention mask is not (B, T)"
    config = getattr(model, "config", None)
    if kwargs.get("output_router_logits") or getattr(config, "output_router_logits", False):
        return "its auxiliary loss is over whole rows"
    if config is not None and getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if has_per_layer_inputs(model):
        return "its layers look up token ids by themselves"
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


def serves(model: Any, forward: Callable[..., Any], ids: Tensor) -> bool:
    """Does the model go on from a cache as if it had seen whole rows? Tried on four tokens."""
    few = ids[:1, :4]
    if few.shape[1] < 2:
        return False
    hidden = []
    with evaluating(model), torch.no_grad():
        embeds = model.get_input_embeddings()(few)

        def run(columns: slice, **given: Any) -> Any:
            given = {"inputs_embeds": embeds[:, columns], "use_cache": True, **given}
            output, at_head = head_pass(model, forward, given, lambda hidden, *_: hidden)
            hidden.append(at_head)
            return output.get("past_key_values")

        run(slice(None))
        layers = cached_layers(run(slice(0, 1)))
        if layers is None:
            return False
        mask = torch.ones_like(few)
        run(slice(1, None), past_key_values=new_cache(layers, detached=True), attention_mask=mask)
    whole, _, rest = hidden
    limit = torch.finfo(whole.dtype).eps ** 0.5 * whole.abs().max()
    return bool((whole[:, 1:] - rest).abs().max() <= limit)


def _is_random(module: nn.Module) -> bool:
    """Dropout or noise that this module would draw anew in every pass, as far as its names tell."""
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
