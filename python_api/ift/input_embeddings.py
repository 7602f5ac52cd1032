"""The input embeddings of a causal LM, mixed with those of predicted tokens as they are looked up.

The model runs on token ids, so that it finds positions, images, masks and whatever else it takes
from ids as in any other forward; only the module that looks up their embeddings returns mixed ones.
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
from ift_kernels import further_tokens, temporal_residual
from ift_kernels.vocab_parallel import is_sharded


@dataclass
class Mixture:
    """What a forward's input embeddings are: (1 − λ)·E(ids) + λ·E(predicted) at its targets."""

    ids: Tensor  # (B, T), like the next two
    labels: Tensor
    target: Tensor
    # Ids (B, T) of the token predicted at each position, or the embeddings (n, E) of what is
    # predicted for the n positions with a target; None: nothing is mixed in.
    predicted: Tensor | None = None
    lam: float = 0.0
    cu_seqlens: Tensor | None = None
    track: bool = False  # gradient reaches the embedding through the inputs


@dataclass
class _Lookup:
    module: nn.Module
    mixture: Mixture
    zero_gradient: bool  # a gradient of zeros for the table: DDP waits for one from every parameter
    keep_graph: bool  # reentrant checkpointing drops the gradients of a layer without it
    calls: int = 0


_current: ContextVar[_Lookup | None] = ContextVar("ift_mixture", default=None)


class EmbeddingForward:
    """The forward of an input embedding that can mix: the original one outside `mixing`.

    An object and not a bound method, which would unpickle as the class's own forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Callable[..., Tensor] | None = module.__dict__.get("forward")

    def original(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module computes without mixing."""
        token = _current.set(None)  # what was wrapped around this forward may end in it again
        try:
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            made: Tensor = type(self.module).forward(self.module, *args, **kwargs)
            return made
        finally:
            _current.reset(token)

    def take_off(self) -> None:
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
            return self.original(input, *args, **kwargs)  # of single tokens, by the model's code
        lookup.calls += 1
        if input is not mixture.ids:
            # Multimodal models look up another id in the place of an image.
            changed = (_local(input) != mixture.ids) & (mixture.labels != IGNORE_INDEX)
            if bool(changed.any()):
                raise RuntimeError(
                    f"{type(self.module).__name__}: the model looks up other tokens than its "
                    "input_ids where labels are given, so IFT cannot mix its embeddings"
                )
        with torch.set_grad_enabled(mixture.track and torch.is_grad_enabled()):
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
            own = self.original(ids)
            other = own.clone()
            other[F.pad(mixture.target != IGNORE_INDEX, (1, -1))] = predicted.to(own)
            return torch.lerp(own, other, lam)
        if self.previous is None and is_bare_table(self.module, mixture.track):
            weight: Any = self.module.weight
            return temporal_residual(
                weight, ids, predicted, mixture.labels, lam, cu_seqlens=mixture.cu_seqlens
            )
        further = further_tokens(
            _local(ids), predicted, mixture.labels, cu_seqlens=mixture.cu_seqlens
        )
        other = self.original(_as_given(further, ids))
        return torch.lerp(self.original(ids), other, lam)  # exact where they agree


def _local(ids: Any) -> Tensor:
    """Ids that tensor parallelism has made a DTensor, as a tensor again."""
    made: Tensor = ids.to_local() if is_sharded(ids) else ids
    return made


def _as_given(ids: Tensor, given: Any) -> Tensor:
    if not is_sharded(given):
        return ids
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(ids, given.device_mesh, given.placements)
    return made


@contextlib.contextmanager
def mixing(model: Any, mixture: Mixture) -> Iterator[None]:
    """Let one forward of `model` on the ids of `mixture` see its input embeddings mixed.

    Raises:
        RuntimeError: the model does not look its input ids up once, as whole rows, in its input
            embedding.
    """
    module = _input_embedding(model)
    if not isinstance(module.__dict__.get("forward"), EmbeddingForward):
        module.forward = EmbeddingForward(module)
    parameters = list(module.parameters())
    head = plain_head(model).weight  # has a gradient of its own
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
            f"{type(model).__name__}: looks up its input ids {lookup.calls} times in its input "
            "embedding, so IFT cannot mix its embeddings; expected once, (B, T) ids as given"
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


def is_bare_table(embedding: nn.Module, track: bool) -> bool:
    """Is the module's own forward the same, in value and gradient, as indexing its weight?"""
    return (
        type(embedding).forward is nn.Embedding.forward
        and type(embedding.weight) is nn.Parameter
        and embedding.max_norm is None
        and not (track and (embedding.sparse or embedding.scale_grad_by_freq))
        and not (track and embedding.padding_idx is not None)
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
            made, rows = embedding.forward(probe).double(), weight[probe].double()
        scale = float((made * rows).sum() / (rows * rows).sum())
        if torch.allclose(made, scale * rows, rtol=4 * torch.finfo(weight.dtype).eps):
            return weight, scale
    raise RuntimeError(
        f"{type(model).__name__}: rule 'soft' needs input embeddings that are scaled rows of one "
        f"table; {type(embedding).__name__} does something else"
    )
