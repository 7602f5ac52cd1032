"""Distillation: a student's next-token distributions drawn to a teacher's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ift.documents import IGNORE_INDEX
from ift.losses._module import Head
from ift.losses._tokens import Metrics, record
from ift_kernels import linear_divergence


def distillation_loss(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    teacher: Head,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    num_items: float | Tensor | None = None,
    metrics: Metrics | None = None,
    **options: Any,
) -> Tensor:
    """Divergence from a teacher at the response tokens, a mean over them; no logits of either.

    Args:
        hidden, weight: of the student; the other arguments of `ift_kernels.linear_divergence`
            (bias, logit_scale, softcap, logits_dtype, workspace) under their names.
        target: (...) token ids, shifted; only where it is `ignore_index` matters.
        teacher: its `Head`, over the same vocabulary; the width may differ.
        kind: "forward" KL(teacher ‖ student), "reverse" KL(student ‖ teacher), or "jsd" with the
            teacher's share `beta` of the mixture.
        temperature: of both. No factor of its square is applied.
        num_items: divide by this instead of by the tokens here: those of the whole optimizer step.
        metrics: a dict that gets ``divergence``, detached.

    Returns:
        Scalar; gradients for the student alone.

    Raises:
        As `ift_kernels.linear_divergence`.
        ValueError: `deterministic`, which a divergence does not offer.
    """
    if options.pop("deterministic", False):
        raise ValueError(
            "deterministic: expected False with distillation_loss, whose divergence of two heads "
            "does not offer it, got True"
        )
    loss = linear_divergence(
        hidden, weight, teacher.hidden, teacher.weight, mask=target != ignore_index, kind=kind,
        beta=beta, temperature=temperature, num_items=num_items, teacher_bias=teacher.bias,
        teacher_logit_scale=teacher.logit_scale, teacher_softcap=teacher.softcap, **options,
    )  # fmt: skip
    record(metrics, divergence=loss)
    return loss


class DistillationLoss(nn.Module):
    """`distillation_loss` with its options held by a module; call it on
    ``(hidden, weight, target, teacher)``.

    Args:
        kind, beta, temperature: as in `distillation_loss`.
    """

    def __init__(
        self, *, kind: str = "forward", beta: float = 0.5, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"kind": kind, "beta": beta, "temperature": temperature}
        self.metrics: Metrics = {}

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, teacher: Head, **call: Any
    ) -> Tensor:
        """See `distillation_loss`."""
        self.metrics = {}
        return distillation_loss(
            hidden, weight, target, teacher, metrics=self.metrics, **self.options, **call
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
