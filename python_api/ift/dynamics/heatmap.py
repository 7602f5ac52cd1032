"""Trained type × observed type: what learning one type of answer does to every other.

`heat_map` trains and measures. `kernel_norms` gives the size of the similarity K that the paper's
decomposition has between the two, by random projection. Both are for small models or small sets:
the first trains once for each type, the second needs a backward pass per response and projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ift.dynamics.callback import by_type
from ift.dynamics.evaluate import ProbeEvaluator, head_ready
from ift.dynamics.probes import Probe, in_order
from ift.dynamics.responses import EncodedResponse, encoded_responses
from ift.head_pass import evaluating
from ift.patching import base_model
from ift_kernels.common import checks

SKETCH = 1 << 18  # dimensions of a projected gradient


@dataclass(frozen=True)
class HeatMap:
    """A value for each pair of types."""

    types: list[str]
    values: Tensor  # float64 (trained types, observed types)


def heat_map(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    *,
    lr: float,
    passes: int = 1,
    batch_size: int = 8,
    max_length: int = 1024,
) -> HeatMap:
    """Change of log π per token of each type of answer, after SFT on each type.

    For each type alone: AdamW at a constant `lr` over the type's answers in the order of the set,
    `passes` times; then the whole set is measured, and the weights are put back. No dropout. Entry
    (u, o) is the mean over the probes of the mean log-probability of type o after training on type
    u, less that before.

    Args:
        model: a transformers causal LM with a plain linear head, patched or not; its weights are
            what they were at the end. A copy of the trained ones and AdamW's moments are in memory.
        tokenizer: of the model.
        probes: the set.
        lr: learning rate.
        passes: over a type's answers, default 1.
        batch_size: answers per step, default 8.
        max_length: cut sequences at so many tokens, default 1024.

    Raises:
        TypeError, ValueError: options of the wrong type or range; what `ProbeEvaluator` refuses.
    """
    for name, value in (("passes", passes), ("batch_size", batch_size)):
        if checks.integer(name, value) < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not checks.number("lr", lr) > 0:
        raise ValueError(f"lr: expected a number above 0, got {lr}")
    evaluator = ProbeEvaluator(probes, tokenizer, max_length=max_length)
    before = _means(evaluator, model)
    types = list(before)
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = [p.detach().clone() for p in trained]
    rows = []
    try:
        for type_ in types:
            mine = [r for r in evaluator.responses if r.type == type_]
            _train(evaluator, model, mine, trained, lr, passes, batch_size)
            after = _means(evaluator, model)
            rows.append([after[name] - before[name] for name in types])
            _put_back(trained, saved)
    finally:
        _put_back(trained, saved)
    return HeatMap(types, torch.tensor(rows, dtype=torch.float64))


def _means(evaluator: ProbeEvaluator, model: nn.Module) -> dict[str, float]:
    """Type → mean log-probability of a token, in the order of `TYPES`."""
    found = {name: means["mean_logprob"] for name, means in by_type(evaluator(model)).items()}
    return {name: found[name] for name in in_order(found)}


def _train(
    evaluator: ProbeEvaluator,
    model: nn.Module,
    responses: list[EncodedResponse],
    trained: list[nn.Parameter],
    lr: float,
    passes: int,
    batch_size: int,
) -> None:
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    with evaluating(model), head_ready(base_model(model)), torch.enable_grad():
        for _ in range(passes):
            for first in range(0, len(responses), batch_size):
                loss = evaluator.loss(model, responses[first : first + batch_size])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _put_back(trained: list[nn.Parameter], saved: list[Tensor]) -> None:
    for parameter, value in zip(trained, saved, strict=True):
        parameter.copy_(value)


def kernel_norms(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    *,
    projections: int = 4,
    max_length: int = 1024,
    seed: int = 0,
) -> HeatMap:
    """‖K‖ between the answers of each pair of types to one prompt, per pair of tokens.

    With z_o the logits of the answer o, (T_o, V), K_ou = ∇_θ z_o · ∇_θ z_uᵀ over all trainable
    parameters. For independent random signs r, E[(⟨r_o, K_ou r_u⟩)²] = ‖K_ou‖² (Frobenius), and
    ⟨r_o, K_ou r_u⟩ = ⟨∇_θ⟨r_o, z_o⟩, ∇_θ⟨r_u, z_u⟩⟩. Entry (u, o) is the root of the mean, over
    probes and pairs of different projections, of the square over T_o·T_u.

    In models of more than 2**18 parameters the gradients are projected once more, to so many
    dimensions, by random signs. NaN where no prompt has both types.

    Args:
        model, tokenizer, probes, max_length: as `heat_map`.
        projections: backward passes per answer, at least 2; default 4.
        seed: of the signs.

    Raises:
        TypeError, ValueError: fewer than 2 projections; what `ProbeEvaluator` refuses.
        DataError: no response has a token left.
    """
    if checks.integer("projections", projections) < 2:
        raise ValueError(f"projections: expected at least 2, got {projections}")
    responses = encoded_responses(probes, tokenizer, max_length)
    types = in_order(r.type for r in responses)
    trained = [p for p in model.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(types), len(types), dtype=torch.float64)
    count = torch.zeros_like(total)
    different = ~torch.eye(projections, dtype=torch.bool)
    with evaluating(model), torch.enable_grad():
        for probe in range(len(probes)):
            mine = [r for r in responses if r.probe == probe]
            if not mine:
                continue
            vectors = torch.stack(
                [torch.stack(list(_projected(model, r, trained, projections, draw, seed)))
                 for r in mine]
            )  # fmt: skip  # (answers, projections, dimensions)
            flat = vectors.flatten(0, 1)
            products = (flat @ flat.T).double().cpu()
            squares = products.square().view(len(mine), projections, len(mine), projections)
            means = squares.movedim(1, 2)[:, :, different].mean(-1)
            lengths = torch.tensor([len(r.ids) for r in mine], dtype=torch.float64)
            index = torch.tensor([types.index(r.type) for r in mine])
            total[index[:, None], index] += means / (lengths[:, None] * lengths)
            count[index[:, None], index] += 1
    return HeatMap(types, (total / count).sqrt())


def _projected(
    model: nn.Module,
    response: EncodedResponse,
    trained: list[nn.Parameter],
    projections: int,
    draw: torch.Generator,
    seed: int,
) -> Iterator[Tensor]:
    """∇_θ⟨r, z⟩ of an answer's logits, for each projection."""
    device = trained[0].device
    ids = torch.tensor([[*response.prefix, *response.ids[:-1]]], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(response.prefix) - 1 :]
    for index in range(projections):
        signs = torch.randint(0, 2, logits.shape, generator=draw).mul_(2).sub_(1).to(logits)
        gradients = torch.autograd.grad(
            (logits * signs).sum(), trained, retain_graph=index + 1 < projections,
            allow_unused=True,
        )  # fmt: skip
        pairs = zip(trained, gradients, strict=True)
        yield _sketch([torch.zeros_like(p) if g is None else g for p, g in pairs], seed)


def _sketch(gradients: Sequence[Tensor], seed: int) -> Tensor:
    """One vector of at most `SKETCH` dimensions: products of two are those of the gradients,
    exactly where these have no more, on average elsewhere."""
    parts = [g.detach().flatten().float() for g in gradients]
    if sum(part.numel() for part in parts) <= SKETCH:
        return torch.cat(parts)
    out = torch.zeros(SKETCH, device=parts[0].device)
    signs = torch.Generator(parts[0].device).manual_seed(seed)  # the same for every gradient
    for part in parts:
        for first in range(0, part.numel(), SKETCH):
            block = part[first : first + SKETCH]
            sign = torch.randint(0, 2, block.shape, generator=signs, device=block.device)
            out[: block.numel()].addcmul_(block, sign.mul_(2).sub_(1).to(block))
    return out
