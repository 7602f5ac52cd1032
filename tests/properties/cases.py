"""Calls of the operations on a head, drawn by hypothesis or by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from hypothesis import strategies as st

from ift.numerics import inputs, oracle
from ift.numerics.calls import DIFFERENTIABLE, LAYOUTS, Call
from ift.numerics.operations import OPERATIONS, available
from ift_kernels.backends.contract import KINDS
from ift_kernels.linear import OUTPUTS
from ift_kernels.schedule import plan

BACKENDS = available(torch.device("cpu"))  # with Triton in its interpreter
SMALL = 1 << 20  # the smallest workspace that is allowed
FIXED = 16 << 20  # with `deterministic`, whose products have one size
# dtypes and whether `logits_dtype` is fp32, by title; a turn of ten draws of a sample.
PRECISIONS = {
    "float32": (("float32",), False),
    "16 bits": (("bfloat16", "float16"), False),
    "16 bits, fp32 logits": (("bfloat16", "float16"), True),
    "float64": (("float64",), False),
    "float32, fp32 logits": (("float32",), True),
}
CROSS_ENTROPIES = ("linear_cross_entropy", "linear_soft_cross_entropy")
NO_GRADIENT = ("linear_token", "linear_topk")
DETERMINISTIC = ("linear_logprobs", "linear_cross_entropy", "linear_token",
                 "linear_selected_logprobs", "linear_topk")  # fmt: skip
ADAPTED = ("linear_logprobs", "linear_cross_entropy")
_TURN = ("float32", "16 bits", "16 bits, fp32 logits") * 3


class Choices(Protocol):
    """Where the values of a call come from."""

    def one_of(self, *values: Any) -> Any: ...

    def integer(self, least: int, most: int) -> int: ...


class _Seeded:
    """Independent choices: hypothesis repeats itself, which a short sample cannot afford."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def one_of(self, *values: Any) -> Any:
        return self.random.choice(values)

    def integer(self, least: int, most: int) -> int:
        return self.random.randint(least, most)


class _Drawn:
    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def integer(self, least: int, most: int) -> int:
        return int(self.draw(st.integers(least, most)))


def _rarely(c: Choices, times: int = 20) -> bool:
    return bool(c.one_of(*(False,) * (times - 1), True))


def _some(c: Choices, values: Sequence[str], *, out_of: int) -> set[str]:
    """Each with a probability of one in so many."""
    return {value for value in values if c.one_of(*range(out_of)) == out_of - 1}


def _options(
    c: Choices,
    operation: str,
    vocabulary: int,
    masked: bool,
    softcap: float | None,
    deterministic: bool,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if operation == "linear_logprobs":
        outputs = _some(c, sorted(OUTPUTS), out_of=2) or {"logprob"}
        if _rarely(c, 4):  # alone its gradient is the most precise
            outputs = {"logprob"}
        detached = _some(c, sorted(outputs), out_of=4)
        if not (outputs - detached) & {*DIFFERENTIABLE}:
            detached = set()
        found["outputs"], found["detached"] = tuple(sorted(outputs)), tuple(sorted(detached))
    if operation in ("linear_logprobs", "linear_cross_entropy"):
        found["ignore_index"] = c.one_of(oracle.IGNORE_INDEX, oracle.IGNORE_INDEX, -1, 2**31 - 1)
    if operation == "linear_cross_entropy":
        found["weight_grad_sum"] = c.one_of("auto", "float32")
        found["return_stats"] = _rarely(c, 3)
    if operation == "linear_soft_cross_entropy":
        found["of"], found["k"] = c.one_of("ids", "function"), min(vocabulary, c.one_of(1, 3, 20))
    if operation in CROSS_ENTROPIES:
        found["class_weight"] = c.one_of(None, None, "positive", "some 0")
        # Uniform smoothing over forbidden tokens is an infinite loss, as in torch.
        smooth = not masked and not (deterministic and found["class_weight"])
        found["label_smoothing"] = c.one_of(0.0, 0.1, 0.5) if smooth else 0.0
        found["z_loss"] = c.one_of(0.0, 1e-4, 0.1)
        found["dims"] = () if vocabulary > 1025 else c.one_of((), (), (2,), (1, 2))
    if operation == "linear_selected_logprobs":
        names = _some(c, sorted(oracle.SELECTED), out_of=2) or {"logprob"}
        in_set = _rarely(c, 4)  # alone: the head rows may be gathered
        found["outputs"] = ("in_set_logprob",) if in_set else tuple(sorted(names))
        found["k"] = c.integer(1, min(vocabulary, c.one_of(1, 3, 20)))
    if operation == "linear_topk":
        found["k"] = min(vocabulary, c.one_of(1, 3, 20))
        found["top_p"] = c.one_of(None, None, 0.2, 0.9, 1.0)
        found["min_p"] = c.one_of(None, None, 0.0, 0.02, 0.5)
    if operation == "linear_token":
        found["rule"] = c.one_of("greedy", "kth", "sample")
        found["k"] = c.integer(1, min(vocabulary, 64))
        found["seed"], found["row_offset"] = c.integer(0, 2**64 - 1), c.one_of(0, 5, 2**33)
    if operation == "linear_divergence":
        found["kind"], found["beta"] = c.one_of(*KINDS), c.one_of(0.5, 0.1, 0.9)
        found["teacher_logit_scale"] = c.one_of(1.0, 0.5)
        # A softcap makes forbidden tokens possible, which the other model then has to be as well.
        found["teacher_softcap"] = softcap if masked else c.one_of(None, 8.0)
    if operation in (*CROSS_ENTROPIES, "linear_divergence"):
        found["reduction"] = c.one_of("mean", "sum", "none")
        found["num_items"] = c.one_of(None, 1, 77, 1000) if found["reduction"] == "mean" else None
    return found


# Columns under a vector, blocks of the C++ code and one more, and odd ones.
_VOCABULARIES = (2, 3, 7, 31, 64, 101, 255, 300, 1024, 1025)
_WIDTHS = (1, 2, 3, 7, 8, 16, 31, 64)
_ROWS = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 40)
# Rows and vocabularies that take several tiles of the smallest workspace.
_TILED = ((200, 1500), (200, 2100), (90, 3000), (70, 4100))
_UPSTREAM = (*("normal",) * 4, *("sparse", "small", "large") * 2)


def _call(
    c: Choices, operation: str, backends: Sequence[str], largest: int, precision: str, tiled: bool
) -> Call:
    tiles = [(n, v) for n, v in _TILED if v <= largest] if tiled else []
    vocabulary = 1 if _rarely(c) else c.one_of(*(v for v in _VOCABULARIES if v <= largest))
    rows = 0 if _rarely(c) else c.one_of(*_ROWS)
    if tiles:
        rows, vocabulary = c.one_of(*tiles)
    shapes = ((rows,), (rows, 1), (2, rows // 2)) if rows > 1 else ((rows,), (rows, 3), (2, rows))
    kind = c.one_of("ordinary", "peaked", *inputs.KINDS)
    # With a scale of 0, or a negative one, no token is forbidden.
    scale = c.one_of(1.0, 1.0, 1.0, 0.3)
    if kind != "masked" and _rarely(c, 6):
        scale = 0.0 if _rarely(c, 4) else -1.7
    softcap = c.one_of(None, None, None, 2.0, 30.0)
    dtypes, wide = PRECISIONS[precision]
    numerics: dict[str, Any] = {"logits_dtype": torch.float32} if wide else {}
    weight_dtype = c.one_of(None, None, "float32", "bfloat16") if wide else None
    if operation in DETERMINISTIC:
        numerics["deterministic"] = c.one_of(False, False, True)
    deterministic = bool(numerics.get("deterministic"))
    workspace = FIXED if deterministic else SMALL
    call = Call(
        operation,
        c.one_of(*backends),
        c.one_of(None, *plan.SCHEDULES),
        c.one_of(*dtypes),
        weight_dtype,
        kind,
        c.one_of(*shapes),
        c.one_of(*(w for w in _WIDTHS if not tiles or w <= 8)),
        vocabulary,
        c.integer(0, 999),
        c.one_of(False, True, True),
        c.one_of(*(("hidden", "weight", "bias"),) * 7, ("hidden",), ("weight",), ("bias",), ()),
        (c.one_of(*LAYOUTS), c.one_of(*LAYOUTS), c.one_of(*LAYOUTS)),
        1.0 if _rarely(c) else c.one_of(0.0, 0.3),
        tuple(
            c.one_of("zero", "absent") if _rarely(c, 10) else c.one_of(*_UPSTREAM)
            for _ in DIFFERENTIABLE
        ),
        {"logit_scale": scale, "softcap": softcap, "temperature": c.one_of(1.0, 1.0, 0.6, 3.0)},
        numerics,
        workspace if tiles else c.one_of(None, workspace),
        _options(c, operation, vocabulary, kind == "masked", softcap, deterministic),
    )
    smoothed = call.options.get("class_weight") and call.options["label_smoothing"]
    if deterministic or operation not in ADAPTED or call.options.get("dims") or smoothed:
        return call
    return replace(call, adapter=c.one_of(None, None, None, "low_rank", "column_scale", "both"))


@st.composite
def cases(
    draw: Any,
    operations: tuple[str, ...] = tuple(OPERATIONS),
    backends: tuple[str, ...] = BACKENDS,
    largest: int = 4100,
) -> Call:
    """Any call of these operations that the contract covers, of a vocabulary up to `largest`."""
    c = _Drawn(draw)
    operation, precision = c.one_of(*operations), c.one_of(*_TURN, *PRECISIONS)
    return _call(c, operation, backends, largest, precision, _rarely(c, 5))


def sample(operation: str, number: int) -> Iterator[Call]:
    """Calls with a fixed share for every precision, and every fifth with several tiles."""
    precisions = list(PRECISIONS)
    for i in range(number):
        turn, at = divmod(i, len(_TURN) + 1)
        precision = _TURN[at] if at < len(_TURN) else precisions[3 + turn % 2]
        tiled = (at + turn) % 5 == 0
        yield _call(_Seeded(f"{operation} {i}"), operation, BACKENDS, 4100, precision, tiled)


def live(call: Call) -> set[str]:
    """Outputs that a gradient flows from that is neither 0 nor of a trivial head."""
    trivial = 0 in call.shape or call.masked == 1.0 or call.vocabulary == 1
    if trivial or call.transform["logit_scale"] == 0 or not call.needs:
        return set()
    sent = dict(zip(DIFFERENTIABLE, call.upstream, strict=True))
    if call.operation != "linear_logprobs":
        sent = {"result": sent["logprob"]} if call.operation not in NO_GRADIENT else {}
        attached = {*sent}
    else:
        attached = {*call.options["outputs"]} - {*call.options["detached"]}
    return {name for name in attached & {*sent} if sent[name] not in ("absent", "zero")}
