"""One pass over a probe set: no padding, every prompt run once for all its responses, no logits.

A group is a prompt followed by its responses. Under the mask each response attends to the prompt
and itself, and its positions continue from the prompt, so every hidden state equals that of a
sequence of its own. Groups are packed until a forward is full.

Not every model supports such a mask. The first evaluation of a model compares some groups with
plain sequences; a model whose results differ gets plain rows from then on.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ift.data import IGNORE_INDEX
from ift.dynamics.probes import Probe
from ift.dynamics.responses import (
    EncodedResponse,
    encoded_responses,
    groups_of,
    packed,
    size_of,
)
from ift.head_parts import select_rows
from ift.head_pass import HeadForward, evaluating, head_pass, plain_head
from ift.measure import measure_transform
from ift.patching import base_model, head_options
from ift.token_stats import token_stats
from ift_kernels import TokenStats
from ift_kernels.common import checks
from ift_kernels.common.transform import LogitTransform

logger = logging.getLogger(__name__)

OUTPUTS = ("logprob", "entropy", "argmax", "argmax_logprob", "sum_sq")
SHARED_ATTENTION = ("eager", "sdpa")  # implementations that take any mask


@dataclass(frozen=True)
class Measurement:
    """One response under one model: per token, (T,) on the CPU."""

    probe: int  # its index in the set
    type: str
    ids: Tensor  # int64
    logprob: Tensor  # float32, like the rest
    argmax: Tensor  # int64, the greedy token
    argmax_logprob: Tensor
    entropy: Tensor
    sum_sq: Tensor  # Σp²
    vocabulary: int  # V

    @property
    def distance(self) -> Tensor:
        """‖p − e_y‖ per token, the norm of the logits' gradient under supervised fine-tuning."""
        return (self.sum_sq - 2 * self.logprob.exp() + 1).clamp(min=0).sqrt()

    @property
    def off_argmax(self) -> Tensor:
        """1 − p of the greedy token."""
        return -torch.expm1(self.argmax_logprob)

    @property
    def energy(self) -> Tensor:
        """1 − p of the token: what supervised fine-tuning pulls up."""
        return -torch.expm1(self.logprob)

    @property
    def a_norm(self) -> Tensor:
        """‖A‖ in the Frobenius norm, √(V − 2 + V·Σp²), of A = I − 1·πᵀ (docs/dynamics.md)."""
        return (self.vocabulary * (1 + self.sum_sq) - 2).sqrt()

    def summary(self) -> dict[str, float]:
        """Sum of the log-probabilities, and means over the tokens."""
        means = {
            "mean_logprob": self.logprob,
            "greedy_logprob": self.argmax_logprob,
            "entropy": self.entropy,
            "off_argmax": self.off_argmax,
            "distance": self.distance,
            "sum_sq": self.sum_sq,
            "energy": self.energy,
            "a_norm": self.a_norm,
        }
        found = {name: value.double().mean().item() for name, value in means.items()}
        return {"sum_logprob": self.logprob.double().sum().item(), **found}


class _Batch:
    """The tensors of one forward and where its targets are predicted."""

    def __init__(
        self,
        inputs: dict[str, Tensor],
        rows: Tensor,
        responses: list[EncodedResponse],
        parts: Tensor | None = None,
    ) -> None:
        self._inputs = inputs
        self._parts = parts  # (2, T), of shared prompts: each position's group, and its response
        self.rows = rows  # into the flattened positions, one per entry of every response's ids
        self.responses = responses
        self.target = torch.tensor([t for r in responses for t in r.target])

    @classmethod
    def shared(cls, groups: list[list[EncodedResponse]]) -> _Batch:
        """One row with the groups one after another."""
        ids: list[int] = []
        position: list[int] = []
        group: list[int] = []
        branch: list[int] = []
        rows: list[int] = []
        for number, responses in enumerate(groups):
            prefix = responses[0].prefix
            last = len(ids) + len(prefix) - 1
            for index, part in enumerate([prefix, *(r.ids[:-1] for r in responses)]):
                if index:
                    rows += [last, *range(len(ids), len(ids) + len(part))]
                start = len(prefix) if index else 0
                position += range(start, start + len(part))
                group += [number] * len(part)
                branch += [index] * len(part)
                ids += part
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([position])}
        parts = torch.tensor([group, branch])
        return cls(inputs, torch.tensor(rows), [r for rs in groups for r in rs], parts)

    @classmethod
    def plain(cls, responses: list[EncodedResponse]) -> _Batch:
        """A row for each response, padded on the right."""
        whole = [torch.tensor([*r.prefix, *r.ids[:-1]]) for r in responses]
        ids = pad_sequence(whole, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in whole], batch_first=True)
        rows: list[int] = []
        for i, response in enumerate(responses):
            first = i * ids.shape[1] + len(response.prefix) - 1
            rows += range(first, first + len(response.ids))
        inputs = {"input_ids": ids, "attention_mask": mask}
        return cls(inputs, torch.tensor(rows), responses)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Arguments of the model; the mask, T² of `dtype`, is made for each call."""
        inputs = {name: value.to(device) for name, value in self._inputs.items()}
        if self._parts is not None:
            group, branch = self._parts.to(device)
            order = torch.arange(group.numel(), device=device)
            sees = (group[:, None] == group) & (order[:, None] >= order)
            sees &= (branch == 0) | (branch[:, None] == branch)
            mask = torch.zeros(sees.shape, dtype=dtype, device=device)
            mask.masked_fill_(~sees, torch.finfo(dtype).min)
            inputs["attention_mask"] = mask[None, None]
        return inputs


class ProbeEvaluator:
    """Measures a probe set under a model.

    Args:
        probes: the set. It is tokenised here, once, as `ift train` tokenises: a prompt given as
            messages goes through the chat template.
        tokenizer: of the model.
        max_length: cut sequences at so many tokens; a response that is wholly cut off is left out.
        tokens_per_forward: pack groups up to so many tokens, default 512. The mask makes attention
            cost the square of it.

    Raises:
        DataError: no response has a token left.
        TypeError, ValueError: probes or options of the wrong type or range.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        tokenizer: Any,
        *,
        max_length: int = 1024,
        tokens_per_forward: int = 512,
    ) -> None:
        self.tokens_per_forward = checks.integer("tokens_per_forward", tokens_per_forward)
        if checks.integer("max_length", max_length) < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.responses = encoded_responses(probes, tokenizer, max_length)
        self.shares_prompts: bool | None = None  # None before the first evaluation
        self._model: weakref.ref[nn.Module] | None = None  # the model that these two belong to
        self._transform: LogitTransform | None = None
        self._batches: list[_Batch] | None = None

    @property
    def tokens(self) -> int:
        """Distinct tokens of a pass: each prompt once, each response but its last token."""
        return sum(size_of(group) for group in groups_of(self.responses))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> list[Measurement]:
        """Measure. The model's mode, gradients and the random state stay as they are.

        Args:
            model: a transformers causal LM with a plain linear head, patched or not, or a PEFT
                model around one.

        Returns:
            One `Measurement` per response, in the order of the set.

        Raises:
            TypeError, RuntimeError: as `ift.patch`.
        """
        base: Any = base_model(model)
        if self._model is None or self._model() is not base:
            self._model, self._transform, self._batches = weakref.ref(base), None, None
        with evaluating(base), head_ready(base):
            if self._transform is None:
                first = self.responses[0]
                ids = torch.tensor([[*first.prefix, *first.ids][:2]], device=_device(base))
                two_tokens = {"input_ids": ids, "use_cache": False}
                self._transform = measure_transform(base, base, two_tokens)
            if self._batches is None:
                self._batches = self._plan(base)
            found = [m for batch in self._batches for m in self._measure(base, batch)]
        order = {(r.probe, r.type): i for i, r in enumerate(self.responses)}
        return sorted(found, key=lambda m: order[m.probe, m.type])

    def _plan(self, model: Any) -> list[_Batch]:
        """The batches of every evaluation, with shared prompts if the model supports them."""
        packs = packed(groups_of(self.responses), self.tokens_per_forward)
        self.shares_prompts = self._may_share(model, packs)
        if self.shares_prompts:
            return [_Batch.shared(pack) for pack in packs]
        logger.warning(
            "%s: computes something else with shared prompts; responses run as rows of their own",
            type(model).__name__,
        )
        rows = sorted(self.responses, key=lambda r: len(r.prefix) + len(r.ids))
        batches: list[_Batch] = []
        waiting: list[EncodedResponse] = []
        for response in rows:
            width = len(response.prefix) + len(response.ids) - 1
            if waiting and (len(waiting) + 1) * width > self.tokens_per_forward:
                batches.append(_Batch.plain(waiting))
                waiting = []
            waiting.append(response)
        return [*batches, _Batch.plain(waiting)]

    def _may_share(self, model: Any, packs: list[list[list[EncodedResponse]]]) -> bool:
        config = getattr(model, "config", None)
        if getattr(config, "_attn_implementation", "eager") not in SHARED_ATTENTION:
            return False
        longest = max(len(r.prefix) + len(r.ids) for r in self.responses)
        if (getattr(config, "sliding_window", None) or longest) < longest:
            return False
        # Two short groups with several responses and tokens, which shows attention between groups;
        # and the fullest forward, since some models use a token's index in the row.
        groups = [group for pack in packs for group in pack]
        short = sorted(groups, key=lambda g: (min(len(g), 2) < 2, max(len(r.ids) for r in g) < 3,
                                                size_of(g)))[:2]  # fmt: skip
        fullest = max(packs, key=lambda pack: sum(map(size_of, pack)))
        return all(self._agrees(model, pack) for pack in (short, fullest))

    def _agrees(self, model: Any, pack: list[list[EncodedResponse]]) -> bool:
        """Whether these groups in one row have the hidden states of plain sequences."""
        try:
            shared = self._hidden(model, _Batch.shared(pack))
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            logger.warning("%s: refuses the mask: %s", type(model).__name__, error)
            return False
        plain = torch.cat([self._hidden(model, _Batch.plain([r])) for g in pack for r in g])
        tolerance = 1e-3 if shared.dtype in (torch.float32, torch.float64) else 5e-2
        scale = plain.abs().max().clamp(min=1e-6)
        return bool((shared - plain).abs().max() <= tolerance * scale)

    def _hidden(self, model: Any, batch: _Batch) -> Tensor:
        """Hidden states at the head, of the rows of the batch."""
        hidden: Tensor = self._run(model, batch, lambda hidden, *_: hidden)
        return hidden

    def _measure(self, model: Any, batch: _Batch) -> Iterator[Measurement]:
        stats, vocabulary = self._stats(model, batch, OUTPUTS)
        lengths = [len(response.ids) for response in batch.responses]
        named = {"ids": batch.target, **{name: getattr(stats, name).cpu() for name in OUTPUTS}}
        parts = zip(*(value.split(lengths) for value in named.values()), strict=True)
        for response, (ids, *values) in zip(batch.responses, parts, strict=True):
            mine = (value[ids != IGNORE_INDEX] for value in (ids, *values))
            found: dict[str, Any] = dict(zip(named, mine, strict=True))
            yield Measurement(response.probe, response.type, vocabulary=vocabulary, **found)

    def _stats(self, model: Any, batch: _Batch, outputs: tuple[str, ...]) -> tuple[TokenStats, int]:
        """The statistics of every entry of the responses, and V."""
        target = batch.target.to(_device(model))
        head = head_options(model)._replace(gradient="exact")

        def callback(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, **adapter: Any
        ) -> tuple[TokenStats, int]:
            assert self._transform is not None
            stats = token_stats(target, self._transform, head, outputs=outputs, detached=())
            return stats(hidden, weight, bias, **adapter), weight.shape[0]

        found: tuple[TokenStats, int] = self._run(model, batch, callback)
        return found

    def loss(self, model: Any, responses: list[EncodedResponse]) -> Tensor:
        """Mean -log p of the tokens of responses, differentiable; after a call, in `head_ready`."""
        batch = _Batch.plain(responses)
        stats, _ = self._stats(base_model(model), batch, ("logprob",))
        assert stats.logprob is not None
        return -stats.logprob[batch.target != IGNORE_INDEX].mean()

    def _run(self, model: Any, batch: _Batch, callback: Any) -> Any:
        """The result of `callback` in the head, for the rows of the batch, of one forward."""
        device = _device(model)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs: dict[str, Any] = {**batch.inputs(device, dtype)}
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            # The auxiliary loss of experts is not needed and takes no mask of this shape.
            inputs["output_router_logits"] = False
        rows = batch.rows.to(device)

        def select(value: Tensor) -> Tensor:
            return value.reshape(-1, value.shape[-1]).index_select(0, rows.to(value.device))

        def chosen(hidden: Tensor, weight: Tensor, bias: Tensor | None, **adapter: Any) -> Any:
            return callback(select(hidden), weight, bias, **select_rows(adapter, select))

        return head_pass(model, model, {**inputs, "use_cache": False}, chosen)[1]


@contextlib.contextmanager
def head_ready(model: Any) -> Iterator[None]:
    """Let `head_pass` use the head of a model that is not patched; undone at the end."""
    head: Any = plain_head(model)
    forward = head.__dict__.get("forward")
    if not isinstance(forward, HeadForward):
        head.forward = HeadForward(head, forward)
    try:
        yield
    finally:
        if not isinstance(forward, HeadForward):
            head.forward.remove()


def _device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device
