"""Calls that once failed."""

from ift.numerics.calls import Call
from tests.properties.cases import BACKENDS, SMALL

# Nearly certain targets, whose 1 - p is lost where it is a difference.
CERTAIN = tuple(
    Call(
        "linear_logprobs", backend, kind="peaked", shape=(30,), width=16, vocabulary=300,
        options={"outputs": ("logprob",), "detached": (), "ignore_index": -100},
    )
    for backend in BACKENDS
)  # fmt: skip

REGRESSIONS: tuple[Call, ...] = (
    *CERTAIN,
    # Small exponentials beside a 1: the fp32 sum of 1024 columns loses all of them.
    Call(
        "linear_token", BACKENDS[0], None, "float16", None, "peaked", (180,), 2, 1500, 3,
        transform={"softcap": 30.0}, options={"rule": "kth", "k": 1, "seed": 0, "row_offset": 0},
    ),
    # Two infinities of a forbidden token, in the mixture of "jsd" and its gradient.
    Call(
        "linear_divergence", BACKENDS[0], None, "float32", None, "masked", (5,), 2, 101, 238, True,
        workspace=SMALL,
        options={
            "kind": "jsd", "beta": 0.9, "reduction": "sum", "num_items": None,
            "teacher_logit_scale": 0.5, "teacher_softcap": None,
        },
    ),
    # Probabilities that are 0 in fp32, times gaps of thousands.
    Call(
        "linear_divergence", BACKENDS[0], kind="huge", shape=(8,), width=1, seed=1, masked=0.0,
        options={
            "kind": "reverse", "beta": 0.5, "reduction": "sum", "num_items": None,
            "teacher_logit_scale": 1.0, "teacher_softcap": None,
        },
    ),
    # Upstream gradients into logprob and mean_logit, whose shares of p cancel.
    Call(
        "linear_logprobs", BACKENDS[0], shape=(1,), width=1, vocabulary=64, masked=0.0,
        upstream=("small", "normal", "normal", "normal"),
        options={"outputs": ("logprob", "mean_logit"), "detached": (), "ignore_index": -100},
    ),
)  # fmt: skip
