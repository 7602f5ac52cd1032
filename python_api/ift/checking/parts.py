"""A batch in parts, as a Trainer accumulates it: losses and gradients that add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ift.checking.as_found import Gradients, backward, take_gradients
from ift.checking.naive import IGNORE_INDEX, naive_ift, naive_sft
from ift.config import IFTConfig


class Parts:
    """The batch in parts, as a Trainer accumulates it; or one part for each process."""

    def __init__(
        self, batch: dict[str, Any], config: IFTConfig | None, loss: Any, *, alone: bool
    ) -> None:
        self.config, self.other_loss = config, loss is not None
        self.rank, self.world = (0, 1) if alone else group()
        self.parts = micro_batches(batch, max(2, self.world))
        self.options: dict[str, Any] = {}

    def naive(self, model: nn.Module) -> tuple[float, Gradients] | None:
        """Loss and gradients; None for a loss that no part of a batch has, or a model without
        ``num_items_in_batch``."""
        if self.other_loss:
            return None
        counts = [int((part["labels"][:, 1:] != IGNORE_INDEX).sum()) for part in self.parts]
        rows = [int((p["labels"][:, 1:] != IGNORE_INDEX).any(1).sum()) for p in self.parts]
        if self.config is None:
            self.options = {"num_items_in_batch": torch.tensor(sum(counts))}
        else:
            self.options = {"ift": self.config.replace(num_rows=float(sum(rows)))}
        total = 0.0
        torch.manual_seed(0)
        try:
            for part in self.parts:
                if self.config is None:
                    value = naive_sft(model, {**part, **self.options}).loss
                else:
                    value = naive_ift(model, part, self.options["ift"]).loss
                total += value.item()
                backward(value)
        except TypeError:
            model.zero_grad(set_to_none=True)
            return None
        return total, take_gradients(model)

    def fused(self, model: nn.Module) -> tuple[float, Gradients]:
        """The same of a patched model."""
        total = torch.zeros((), dtype=torch.float64)
        torch.manual_seed(0)
        for part in self.parts[self.rank :: self.world]:
            value = model(**{**part, **self.options}).loss * self.world
            total += value.item() / self.world
            backward(value)
        if self.world > 1:
            everywhere = total.to(next(model.parameters()).device)
            torch.distributed.all_reduce(everywhere)
            total = everywhere
        return float(total), take_gradients(model)


def micro_batches(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The rows of a batch in so many parts; the whole batch as often where rows are not apart.

    That is where a tensor has another number of rows, as those of pictures and of packed rows.
    """
    rows = batch["labels"].shape[0]
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > 0}
    if rows < count or any(v.shape[0] not in (1, rows) for v in tensors.values()):
        return [dict(batch)] * count
    return [
        {k: v[i::count] if k in tensors and v.shape[0] == rows else v for k, v in batch.items()}
        for i in range(count)
    ]


def group() -> tuple[int, int]:
    """Rank and number of the processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
