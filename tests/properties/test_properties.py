"""Random calls of every operation on a head are within the bounds of the numerics contract.

A sample; `make prove PART=properties` runs 10,000.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

import ift_kernels
from ift.numerics import bounds
from ift.numerics.calls import DIFFERENTIABLE, Call
from ift.numerics.operations import OPERATIONS
from ift_kernels.backends import reference
from tests.proofs import properties
from tests.properties import harness
from tests.properties.cases import (
    BACKENDS,
    NO_GRADIENT,
    PRECISIONS,
    SMALL,
    cases,
    live,
    sample,
)
from tests.properties.regressions import CERTAIN, REGRESSIONS

SAMPLE = dict.fromkeys(
    (
        "linear_cross_entropy",
        "linear_divergence",
        "linear_selected_logprobs",
        "linear_soft_cross_entropy",
    ),
    60,
) | {"linear_logprobs": 100}


def drawn(operation):
    return sample(operation, SAMPLE.get(operation, 40))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_sample(operation):
    for case in drawn(operation):
        harness.check(case)


@pytest.mark.parametrize("case", REGRESSIONS, ids=lambda case: f"{case.operation}-{case.backend}")
def test_regressions(case):
    harness.check(case)


LOGPROBS = Call(
    "linear_logprobs", BACKENDS[0], vocabulary=300, shape=(30,), width=16, bias=True,
    transform={"softcap": 20.0},
    options={"outputs": ("logprob", "lse"), "detached": (), "ignore_index": -100},
)  # fmt: skip


def wrong(change):
    """`linear_logprobs` with a mistake in it."""
    real = ift_kernels.linear_logprobs

    def replacement(hidden, weight, target, **options):
        return change(real, hidden, weight, target, o=options)

    return replacement


def changed(change):
    """With another log-probability."""

    def call(f, *tensors, o):
        stats = f(*tensors, **o)
        return stats._replace(logprob=change(stats.logprob))

    return call


def rounded(t, dtype):
    """In value alone."""
    return t + (t.to(dtype).to(t.dtype) - t).detach()


MISTAKES = {
    "value": changed(lambda x: x + 1e-5),
    "16 bits": changed(lambda x: rounded(x, torch.bfloat16)),
    "gradient": changed(lambda x: 1.0001 * x - 0.0001 * x.detach()),
    "no softcap": lambda f, h, w, y, *, o: f(h, w, y, **o | {"softcap": None}),
    "another bias": lambda f, h, w, y, *, o: f(h, w, y, **o | {"bias": o["bias"] * 1.0001}),
    "rounded hidden": lambda f, h, w, y, *, o: f(rounded(h, torch.float16), w, y, **o),
    "nothing ignored": lambda f, h, w, y, *, o: f(h, w, y.clamp(min=0), **o),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name, monkeypatch):
    harness.check(LOGPROBS)
    monkeypatch.setattr(ift_kernels, "linear_logprobs", wrong(MISTAKES[name]))
    with pytest.raises((AssertionError, RuntimeError)):
        harness.check(LOGPROBS)


def test_a_difference_of_two_ones_is_found(monkeypatch):
    """As p - 1 of a target for expm1, which the call is for."""
    (case,) = (case for case in CERTAIN if case.backend == "reference")
    monkeypatch.setattr(torch.Tensor, "expm1", lambda x: x.exp() - 1)
    with pytest.raises(AssertionError, match="d hidden"):
        harness.check(case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fp32_logits_have_bounds_of_fp32(dtype):
    """Or `logits_dtype` would be tested against those of 16 bits."""
    case = replace(LOGPROBS, dtype=dtype, transform={})
    harness.check(replace(case, numerics={"logits_dtype": torch.float32}))
    wide, narrow = (
        bounds.units(getattr(torch, dtype), logits_dtype=d) for d in (torch.float32, None)
    )
    assert wide.logit == bounds.FP32 < narrow.logit


def covers(calls):
    """Every backend, dtype, kind of input and layout, no row, one column, and several tiles."""
    assert {c.backend for c in calls} == set(BACKENDS)
    for names in ("dtype", "kind", "schedule", "workspace", "vocabulary", "shape"):
        assert len({getattr(c, names) for c in calls}) > 1, names
    assert any(0 in c.shape for c in calls) and any(c.vocabulary == 1 for c in calls)
    assert any(c.vocabulary > 1025 and c.workspace == SMALL for c in calls)


def test_what_is_drawn():
    """By a few seeds, as the proof has: one repeats itself, and draws other calls in a process that
    has imported more."""
    calls = []

    @settings(max_examples=100, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def every(case):
        calls.append(case)

    for number in range(8):
        seed(number)(every)()
    covers(calls)
    assert {c.operation for c in calls} == set(OPERATIONS)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in NO_GRADIENT])
def test_gradients_of_the_sample(operation):
    """Into each output, of the bias, of several tiles, in fp32, in 16 bits and with fp32 logits."""
    calls = [c for c in drawn(operation) if live(c)]
    covers([*drawn(operation)])
    assert len(calls) > 0.4 * len([*drawn(operation)])
    for dtypes, wide in list(PRECISIONS.values())[:3]:
        some = [
            c for c in calls if c.dtype in dtypes and bool(c.numerics.get("logits_dtype")) == wide
        ]
        outputs = DIFFERENTIABLE if operation == "linear_logprobs" else ("result",)
        assert {*outputs} <= {name for c in some for name in live(c)}
        assert any(c.bias and "bias" in c.needs for c in some)
        assert any(c.vocabulary > 1025 and c.workspace == SMALL for c in some)


def test_several_tiles_are_reached(monkeypatch):
    """By the gradients of what `cases` takes for several tiles."""
    offsets = set()
    real = reference.dlogits_

    def dlogits_(chunk, *args, **kwargs):
        offsets.add(chunk.offset)
        return real(chunk, *args, **kwargs)

    monkeypatch.setattr(reference, "dlogits_", dlogits_)
    tiled = [c for c in drawn("linear_logprobs") if c.vocabulary > 1025 and c.workspace == SMALL]
    reached = []
    for case in tiled:
        if case.backend == "reference" and live(case):
            offsets.clear()
            harness.check(case)
            reached.append(len(offsets) > 1)
    assert sum(reached) > len(reached) / 2


def test_a_refusal_is_no_result(monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("deterministic: expected products of a row that depend on it alone")

    monkeypatch.setattr(ift_kernels, "linear_logprobs", refuses)
    assert harness.check(replace(LOGPROBS, numerics={"deterministic": True})) == {}
    with pytest.raises(RuntimeError, match="deterministic"):
        harness.check(LOGPROBS)


def test_many_refusals_are_a_fault():
    line = {"failed": [], "deterministic": 40, "refused": 10}
    assert properties.fault(line) == ""
    assert "11 of 40" in properties.fault(line | {"refused": 11})


def test_a_part_of_the_rows_is_held_to_the_bit(monkeypatch):
    case = replace(LOGPROBS, numerics={"deterministic": True})
    assert "logprob of a part" in harness.check(case)
    moved = changed(lambda x: x + 2e-6 * (x.numel() == 20))
    monkeypatch.setattr(ift_kernels, "linear_logprobs", wrong(moved))
    with pytest.raises(AssertionError, match="logprob of a part"):
        harness.check(case)


def test_a_failed_call_is_logged(monkeypatch):
    monkeypatch.setattr(properties, "CHUNK", 20)
    monkeypatch.setattr(harness, "check", lambda case: {"x": 0.5})
    line = properties.run("seed 3")
    assert sum(line["calls"].values()) == 20 and line["largest_share"] == 0.5
    assert not properties.fault(line)
    assert properties.cases(41) == ["seed 0", "seed 1", "seed 2"]

    def failing(case):
        assert case.vocabulary < 60, "too many"
        return {}

    monkeypatch.setattr(harness, "check", failing)
    fault = properties.fault(properties.run("seed 3"))
    assert "Call(" in fault and "vocabulary=64" in fault and "too many" in fault
