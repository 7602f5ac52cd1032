"""Calls of the operations on a head, as hypothesis draws them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from ift.numerics import inputs, oracle
from ift.numerics.calls import DIFFERENTIABLE, LAYOUTS, OPERATIONS, UPSTREAM, Call, available
from ift_kernels.backends.contract import KINDS
from ift_kernels.linear import OUTPUTS
from ift_kernels.schedule import plan

DTYPES = ("float32", "bfloat16", "float16", "float64")
BACKENDS = available(torch.device("cpu"))  # with Triton in its interpreter
SMALL = 1 << 20  # the smallest workspace that is allowed
FIXED = 16 << 20  # with `deterministic`, whose products have one size


def _options(
    draw: Any, operation: str, vocabulary: int, masked: bool, softcap: float | None
) -> dict[str, Any]:
    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    found: dict[str, Any] = {}
    if operation == "linear_logprobs":
        outputs = draw(st.sets(st.sampled_from(sorted(OUTPUTS))))
        found["outputs"] = tuple(sorted(outputs | {"logprob"}))
        found["detached"] = tuple(sorted(draw(st.sets(st.sampled_from(found["outputs"])))))
    if operation in ("linear_logprobs", "linear_cross_entropy"):
        found["ignore_index"] = one_of(oracle.IGNORE_INDEX, oracle.IGNORE_INDEX, -1, 2**31 - 1)
    if operation == "linear_cross_entropy":
        # Uniform smoothing over forbidden tokens is an infinite loss, as in torch.
        found["label_smoothing"] = 0.0 if masked else one_of(0.0, 0.1, 0.5)
        found["z_loss"] = one_of(0.0, 1e-4, 0.1)
        found["weight_grad_sum"] = one_of("auto", "float32")
    if operation == "linear_token":
        found["rule"] = one_of("greedy", "kth", "sample")
        found["k"] = draw(st.integers(1, min(vocabulary, 64)))
        found["seed"], found["row_offset"] = draw(st.integers(0, 2**64 - 1)), one_of(0, 5, 2**33)
    if operation == "linear_divergence":
        found["kind"], found["beta"] = one_of(*KINDS), one_of(0.5, 0.1, 0.9)
        found["teacher_logit_scale"] = one_of(1.0, 0.5)
        # A softcap makes forbidden tokens possible, which the other model then has to be as well.
        found["teacher_softcap"] = softcap if masked else one_of(None, 8.0)
    if operation in ("linear_cross_entropy", "linear_divergence"):
        found["reduction"] = one_of("mean", "sum", "none")
        found["num_items"] = one_of(None, 1, 77, 1000) if found["reduction"] == "mean" else None
    return found


# Not one column, columns under a vector, blocks of the C++ code and one more, and odd ones.
_VOCABULARIES = (1, 2, 3, 7, 31, 64, 101, 255, 300, 1024, 1025)
_LARGE = (1500, 2100)
_WIDTHS = (1, 2, 3, 7, 8, 16, 31, 64)
_ROWS = (0, 1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 40)


@st.composite
def cases(
    draw: Any,
    operations: tuple[str, ...] = tuple(OPERATIONS),
    backends: tuple[str, ...] = BACKENDS,
    largest: int = 2100,
) -> Call:
    """Any call of these operations that the contract covers, of a vocabulary up to `largest`."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    operation = one_of(*operations)
    # More than one tile of the smallest workspace.
    large = largest >= 2100 and one_of(*(False,) * 24, True)
    vocabulary = one_of(*_LARGE if large else [v for v in _VOCABULARIES if v <= largest])
    rows = one_of(180, 200) if large else one_of(*_ROWS)
    shape = one_of((rows,), (rows, 1), (2, rows // 2)) if rows else one_of((0,), (0, 3), (2, 0))
    kind, dtype = one_of("ordinary", *inputs.KINDS), one_of(*DTYPES)
    # With a scale of 0, or a negative one, no token is forbidden.
    scale = one_of(1.0, 1.0, 0.3) if kind == "masked" else one_of(1.0, 1.0, 0.3, -1.7, 0.0)
    softcap = one_of(None, None, 2.0, 30.0)
    numerics: dict[str, Any] = {}
    weight_dtype = None
    if dtype != "float64" and draw(st.booleans()):
        numerics["logits_dtype"] = torch.float32
        weight_dtype = one_of(None, "float32", "bfloat16")
    if operation in ("linear_logprobs", "linear_cross_entropy", "linear_token"):
        numerics["deterministic"] = one_of(False, False, True)
    return Call(
        operation,
        one_of(*backends),
        one_of(None, *plan.SCHEDULES),
        dtype,
        weight_dtype,
        kind,
        shape,
        one_of(*_WIDTHS),
        vocabulary,
        draw(st.integers(0, 999)),
        draw(st.booleans()),
        one_of(*(("hidden", "weight", "bias"),) * 3, ("hidden",), ("weight",), ("bias",), ()),
        tuple(draw(st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3))),
        one_of(0.0, 0.3, 1.0),
        tuple(one_of(*UPSTREAM) for _ in DIFFERENTIABLE),
        {
            "logit_scale": scale,
            "softcap": softcap,
            "temperature": one_of(1.0, 1.0, 0.6, 3.0),
        },
        numerics,
        one_of(None, FIXED if numerics.get("deterministic") else SMALL),
        _options(draw, operation, vocabulary, kind == "masked", softcap),
    )
