"""Where documents start in a batch, and the shifted targets of its labels.

A row of a batch is one document, unless it is packed as in transformers: with `position_ids` that
do not continue by one, or `cu_seq_lens_q` over the flattened tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100  # transformers' label of a token without loss


def document_starts(
    labels: Tensor,  # (B, T)
    position_ids: Tensor | None = None,  # (B, T) or (1, T)
    cu_seq_lens: Tensor | None = None,  # (documents + 1,)
) -> Tensor | None:
    """(B, T) bool, true at the first token of each document; None when every row is one document.

    Raises:
        ValueError: `position_ids` that are not (B, T) or (1, T).
    """
    if cu_seq_lens is not None:
        starts = torch.zeros(labels.numel() + 1, dtype=torch.bool, device=labels.device)
        starts[cu_seq_lens.long()] = True  # a last entry beyond the end lands in the extra slot
        starts = starts[:-1].view_as(labels)
    elif position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[1] != labels.shape[1]:
            raise ValueError(
                f"position_ids: expected shape {tuple(labels.shape)}, "
                f"got {tuple(position_ids.shape)}"
            )
        starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0)).expand_as(labels).clone()
    else:
        return None
    if not starts[:, 1:].any():
        return None
    starts[:, 0] = True
    return starts


def boundaries(starts: Tensor | None) -> Tensor | None:
    """`cu_seqlens` (documents + 1,) int64 over the flattened tokens of `document_starts`."""
    if starts is None:
        return None
    end = torch.full((1,), starts.numel(), device=starts.device)
    return torch.cat([starts.flatten().nonzero().flatten(), end])


def shifted_targets(
    labels: Tensor, starts: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """(..., T): the token that position t predicts, ``labels[t + 1]``; `ignore_index` where there
    is none: at the end of a row and, given `starts`, before the first token of a document."""
    if starts is not None:
        labels = labels.masked_fill(starts, ignore_index)
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def rows_with_targets(batch: dict[str, Tensor]) -> Tensor:
    """Whether each document of `batch` has a target: one bool each (some more, false, if packed).

    The rows over which the IFT loss is a mean; their sum over a whole optimizer step is its
    `num_rows`. No host synchronisation beyond that of `document_starts`.
    """
    labels = batch["labels"]
    starts = document_starts(labels, batch.get("position_ids"), batch.get("cu_seq_lens_q"))
    return documents_with_targets(shifted_targets(labels, starts), starts)


def documents_with_targets(target: Tensor, starts: Tensor | None) -> Tensor:
    """The same of shifted targets (B, T); no host synchronisation."""
    has_target = target != IGNORE_INDEX
    if starts is None:
        return has_target.any(1)
    document = starts.flatten().cumsum(0) - 1
    return torch.zeros_like(document).index_add_(0, document, has_target.flatten().long()) > 0
