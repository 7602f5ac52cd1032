"""The head of a frozen model over the tokens of a batch, for a loss that compares with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ift.head_parts import refuse_adapter
from ift.head_pass import evaluating, head_pass
from ift.losses import Head
from ift.patching import base_model, measured_model, original_forward
from ift.token_stats import transform_options
from ift_kernels.vocab_parallel import is_sharded


def _parts(*parts: Any, **adapter: Any) -> tuple[Any, ...]:
    refuse_adapter("reference", adapter)
    return parts


@torch.no_grad()
def frozen_head(model: nn.Module, **inputs: Any) -> Head:
    """Hidden states and head of one forward of a patched model, in evaluation mode.

    Args:
        inputs: of its forward; labels are left out.

    Raises:
        TypeError: a head that is sharded along its vocabulary.
        ValueError: a head with active LoRA.
    """
    base: Any = base_model(model)
    inputs = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
    inputs["use_cache"] = False
    with evaluating(base):
        transform = measured_model(base, inputs).transform
        _, (hidden, weight, bias) = head_pass(base, original_forward(base), inputs, _parts)
    if is_sharded(weight):
        raise TypeError(f"reference: expected a whole head, {type(base).__name__} has a DTensor")
    return Head(hidden, weight, bias, **transform_options(transform))
