"""How the statistics of a model's head are computed, in every pass and loss of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ift_kernels import ActiveSet
from ift_kernels.common import checks
from ift_kernels.common.active_set import options as active_options
from ift_kernels.linear import check_deterministic


class HeadOptions(NamedTuple):
    """Arguments of `ift_kernels.linear_logprobs` under their names there."""

    gradient: str | ActiveSet = "exact"
    logits_dtype: torch.dtype | None = None
    deterministic: bool = False
    workspace: int | None = None

    def changed(self, weight: Tensor | None = None, **options: Any) -> HeadOptions:
        """A copy with those of `options` that are not None.

        Args:
            weight: of the head, whose dtype is then checked, too.
            options: by name; for `logits_dtype` also "float32", which a file of options can hold.

        Raises:
            TypeError, ValueError: an option that the operations refuse, or two that exclude each
                other, by name.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if given.get("logits_dtype") == "float32":
            given["logits_dtype"] = torch.float32
        changed = self._replace(**given)
        check_deterministic(changed.deterministic, active_options(changed.gradient))
        if changed.logits_dtype is not None:
            weight = torch.empty(0, device="cpu") if weight is None else weight
            checks.compute_dtype(weight, weight, changed.logits_dtype)
        return changed

    def check_rule(self, rule: str) -> None:
        """Refuse a rule of the first pass of IFT that cannot be had with these options.

        Raises:
            ValueError: "soft", which is never deterministic.
        """
        if self.deterministic and rule == "soft":
            raise ValueError(
                "rule: expected one that picks a token with deterministic=True, got 'soft'; a mean "
                "embedding depends on the other tokens by rounding"
            )
