"""The input embeddings of a causal LM, mixed with those of predicted tokens.

The model runs on token ids, so positions, masks, images and everything else that it derives from
ids are those of any other forward. Only its input embedding returns mixed rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift.documents import IGNORE_INDEX
from ift.head_pass import evaluating, plain_head
from ift.heads import head_weight
from ift_kernels import mixed_in_ids, temporal_residual
from ift_kernels.vocab_parallel import is_sharded


@dataclass
class Mixture:
    """Input embeddings of a forward: (1 − λ)·E(ids) + λ·E(predicted) at its targets."""

    ids: Tensor  # (B, T), like the next two
    labels: Tensor
    target: Tensor
    # Ids (B, T) of the token predicted at each position, or the embeddings (n, E) predicted at the
    # n positions with a target; None: no mixing.
    predicted: Tensor | None = None
    lam: float = 0.0
    cu_seqlens: Tensor | None = None
    embedding_grad: bool = False  # gradient reaches the embedding through the inputs


@dataclass
class _Lookup:
    module: nn.Module
    mixture: Mixture
    zero_gradient: bool  # a gradient of zeros for the table: DDP waits for one from every parameter
    keep_graph: bool  # reentrant checkpointing drops the gradients of a layer without it
    calls: int = 0


_current: ContextVar[_Lookup | None] = ContextVar("ift_mixture", default=None)


class EmbeddingForward:
    """The forward of an input embedding: mixed rows inside `mixing`, the original otherwise.

    An object, since a bound method would unpickle as the class's own forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Callable[..., Tensor] | None = module.__dict__.get("forward")

    def original(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's embeddings without mixing."""
        token = _current.set(None)  # a wrapper around this forward may call it again
        try:
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            embeddings: Tensor = type(self.module).forward(self.module, *args, **kwargs)
            return embeddings
        finally:
            _current.reset(token)

    def remove(self) -> None:
        """Undo the replacement, if this is still the module's forward."""
        del self.module.forward
        if self.previous is not None:
            self.module.forward = self.previous

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lookup = _current.get()
        if lookup is None or lookup.module is not self.module:
            return self.original(input, *args, **kwargs)
        mixture = lookup.mixture
        if input.shape != mixture.ids.shape:
            return self.original(input, *args, **kwargs)  # the model's code embeds single tokens
        lookup.calls += 1
        if input is not mixture.ids:
            # Multimodal models replace the ids of an image.
            changed = (_local(input) != mixture.ids) & (mixture.labels != IGNORE_INDEX)
            if bool(changed.any()):
                raise RuntimeError(
                    f"{type(self.module).__name__}: the model embeds other tokens than its "
                    "input_ids where labels are given, so IFT cannot mix its embeddings"
                )
        with torch.set_grad_enabled(mixture.embedding_grad and torch.is_grad_enabled()):
            mixed = self._mixed(input, mixture)
        if torch.is_grad_enabled() and not mixed.requires_grad:
            if lookup.zero_gradient:
                mixed = mixed + 0.0 * self.original(input[:1, :1])[..., :1]
            elif lookup.keep_graph:
                mixed.requires_grad_()
        return mixed

    def _mixed(self, ids: Tensor, mixture: Mixture) -> Tensor:
        predicted, lam = mixture.predicted, mixture.lam
        if predicted is None:
            return self.original(ids)
        if predicted.is_floating_point():
            embeddings = self.original(ids)
            mixed_in = embeddings.clone()
            mixed_in[F.pad(mixture.target != IGNORE_INDEX, (1, -1))] = predicted.to(embeddings)
            return torch.lerp(embeddings, mixed_in, lam)
        if self.previous is None and is_plain_embedding(self.module, mixture.embedding_grad):
            weight: Any = self.module.weight
            return temporal_residual(
                weight, ids, predicted, mixture.labels, lam, cu_seqlens=mixture.cu_seqlens
            )
        mixed_in = mixed_in_ids(
            _local(ids), predicted, mixture.labels, cu_seqlens=mixture.cu_seqlens
        )
        other = self.original(_sharded_like(mixed_in, ids))
        return torch.lerp(self.original(ids), other, lam)  # exact where they agree


def _local(ids: Any) -> Tensor:
    """A plain tensor of ids that tensor parallelism has made a DTensor."""
    local: Tensor = ids.to_local() if is_sharded(ids) else ids
    return local


def _sharded_like(ids: Tensor, given: Any) -> Tensor:
    if not is_sharded(given):
        return ids
    from torch.distributed.tensor import DTensor

    sharded: Tensor = DTensor.from_local(ids, given.device_mesh, given.placements)
    return sharded


@contextlib.contextmanager
def mixing(model: Any, mixture: Mixture) -> Iterator[None]:
    """Mix the input embeddings of one forward of `model` on the ids of `mixture`.

    Raises:
        RuntimeError: the model does not call its input embedding once on its ids, (B, T).
    """
    module = _input_embedding(model)
    if not isinstance(module.__dict__.get("forward"), EmbeddingForward):
        module.forward = EmbeddingForward(module)
    parameters = list(module.parameters())
    head, _ = head_weight(plain_head(model))  # has a gradient of its own
    lookup = _Lookup(
        module,
        mixture,
        zero_gradient=any(p.requires_grad and p is not head for p in parameters),
        keep_graph=any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
    )
    token = _current.set(lookup)
    try:
        yield
    finally:
        _current.reset(token)
    if lookup.calls != 1:
        raise RuntimeError(
            f"{type(model).__name__}: calls its input embedding {lookup.calls} times on its input "
            "ids, so IFT cannot mix its embeddings; expected one call on (B, T) ids as given"
        )


def _input_embedding(model: Any) -> Any:
    try:
        module = model.get_input_embeddings()
    except NotImplementedError:
        module = None
    if not isinstance(module, nn.Module):
        raise RuntimeError(
            f"{type(model).__name__}: expected an input embedding for IFT to mix, it has none"
        )
    return module


def is_plain_embedding(embedding: nn.Module, needs_grad: bool) -> bool:
    """Whether the module's forward equals, in value and gradient, indexing its weight."""
    return (
        type(embedding).forward is nn.Embedding.forward
        and type(embedding.weight) is nn.Parameter
        and embedding.max_norm is None
        and not (needs_grad and (embedding.sparse or embedding.scale_grad_by_freq))
        and not (needs_grad and embedding.padding_idx is not None)
    )


def embedding_table(model: Any) -> tuple[Tensor, float]:
    """The embedding table and the factor that its module applies to it, for mean embeddings.

    Raises:
        RuntimeError: the module does something else than scale rows of a table.
    """
    embedding = _input_embedding(model)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, nn.Parameter) and not hasattr(weight, "full_tensor"):
        probe = torch.arange(min(16, weight.shape[0]), device=weight.device)
        with evaluating(embedding), torch.no_grad():
            output, rows = embedding.forward(probe).double(), weight[probe].double()
        scale = float((output * rows).sum() / (rows * rows).sum())
        if torch.allclose(output, scale * rows, rtol=4 * torch.finfo(weight.dtype).eps):
            return weight, scale
    raise RuntimeError(
        f"{type(model).__name__}: rule 'soft' needs input embeddings that are scaled rows of one "
        f"table; {type(embedding).__name__} does something else"
    )
