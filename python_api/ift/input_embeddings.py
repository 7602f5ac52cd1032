"""What a model makes of token ids: a table, scaled perhaps, and the tables of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ift.head_pass import evaluating


def is_bare_table(embedding: nn.Module, track: bool) -> bool:
    """Is calling the module the same, in value and gradient, as indexing its weight?"""
    hooks = (embedding._forward_hooks, embedding._forward_pre_hooks, embedding._backward_hooks)
    return (
        type(embedding).forward is nn.Embedding.forward
        and "forward" not in embedding.__dict__
        and type(embedding.weight) is nn.Parameter
        and not any(hooks)
        and embedding.max_norm is None
        and not (track and (embedding.sparse or embedding.scale_grad_by_freq))
        and not (track and embedding.padding_idx is not None)
    )


def embedding_table(model: Any) -> tuple[Tensor, float]:
    """The embedding table and the factor that its module applies to it, for mean embeddings.

    Raises:
        RuntimeError: the module does something else than scale rows of a table.
    """
    embedding = model.get_input_embeddings()
    if is_bare_table(embedding, track=False):
        return embedding.weight, 1.0
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, nn.Parameter) and not hasattr(weight, "full_tensor"):
        probe = torch.arange(min(16, weight.shape[0]), device=weight.device)
        with evaluating(embedding):
            made, rows = embedding(probe).double(), weight[probe].double()
        scale = float((made * rows).sum() / (rows * rows).sum())
        if torch.allclose(made, scale * rows, rtol=4 * torch.finfo(weight.dtype).eps):
            return weight, scale
    raise RuntimeError(
        f"{type(model).__name__}: rule 'soft' needs input embeddings that are scaled rows of one "
        f"table; {type(embedding).__name__} does something else"
    )


def has_per_layer_inputs(model: Any) -> bool:
    """Do its layers look up token ids in tables of their own (Gemma 3n, Gemma 4)?"""
    wide = getattr(getattr(model, "config", None), "hidden_size_per_layer_input", 0)
    return bool(wide) and hasattr(model.base_model, "get_per_layer_inputs")


def per_layer_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the layers of Gemma 3n and 4 look up by token ids, an argument beside embeddings.

    Of the given ids: there is one for a token, none for a mixture of two.
    """
    if not has_per_layer_inputs(model):
        return {}
    return {"per_layer_inputs": model.base_model.get_per_layer_inputs(ids)}
