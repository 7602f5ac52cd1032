"""Calls that once failed."""

from ift.numerics.calls import Call
from tests.properties.cases import SMALL

REGRESSIONS: tuple[Call, ...] = (
    # Small exponentials beside a 1: the fp32 sum of 1024 columns loses all of them.
    Call(
        "linear_token", "cpu", None, "float16", None, "peaked", (180,), 2, 1500, 3,
        transform={"softcap": 30.0}, options={"rule": "kth", "k": 1, "seed": 0, "row_offset": 0},
    ),
    # Two infinities of a forbidden token, in the mixture of "jsd" and its gradient.
    Call(
        "linear_divergence", "cpu", None, "float32", None, "masked", (5,), 2, 101, 238, True,
        workspace=SMALL,
        options={
            "kind": "jsd", "beta": 0.9, "reduction": "sum", "num_items": None,
            "teacher_logit_scale": 0.5, "teacher_softcap": None,
        },
    ),
)  # fmt: skip
