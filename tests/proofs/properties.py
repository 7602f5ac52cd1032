"""Part "properties": random calls of the operations on a head, each within its bounds.

What is drawn is in `tests.properties.cases`, the bounds in `ift.numerics.bounds`. A case is a seed,
from which hypothesis draws `CHUNK` calls; a line of the log has how many of each operation, how
many were `deterministic` and how many of these refused, the largest share of its bound that a
result used, and the smallest call that failed, if one did. That call
belongs into `tests.properties.regressions`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from ift.numerics.calls import Call
from tests.properties import harness
from tests.properties.cases import BACKENDS
from tests.properties.cases import cases as calls

SOURCES = (
    "ift_kernels/*.py",
    "ift_kernels/common/*.py",
    "ift_kernels/operators/*.py",
    "ift_kernels/schedule/*.py",
    "ift_kernels/backends/*.py",
    "ift_kernels/backends/reference/*.py",
    "ift_kernels/backends/cpu/*.py",
    "ift_kernels/backends/triton/*.py",  # in its interpreter where that is on
    "csrc/*.h",
    "csrc/cpu/**/*",
    "python_api/ift/numerics/bounds*.py",
    "python_api/ift/numerics/calls.py",
    "python_api/ift/numerics/cross_entropies.py",
    "python_api/ift/numerics/inputs.py",
    "python_api/ift/numerics/operations.py",
    "python_api/ift/numerics/oracle.py",
    "tests/properties/cases.py",
    "tests/properties/harness.py",
    "tests/proofs/properties.py",
)
PACKAGES = ("torch", "hypothesis")
NUMBER, CHUNK = 10_000, 250
REFUSED = 0.25  # of deterministic calls at most: a refused one shows nothing
LIMIT_SECONDS = 900  # for one chunk, on a machine that is busy with other things


def cases(number: int = NUMBER) -> list[str]:
    """Seeds of so many calls."""
    return [f"seed {i}" for i in range(-(-number // CHUNK))]


def run(case: str) -> dict[str, Any]:
    """What the calls of a seed give, as a line of the log."""
    drawn: Counter[str] = Counter()
    largest, refused, deterministic = 0.0, 0, 0
    failed: list[str] = []

    @seed(int(case.removeprefix("seed ")))
    @settings(
        max_examples=CHUNK,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(calls())
    def every(call: Call) -> None:
        nonlocal largest, refused, deterministic
        drawn[call.operation] += 1
        deterministic += bool(call.numerics.get("deterministic"))
        try:
            shares = harness.check(call)
            refused += bool(call.numerics.get("deterministic")) and not shares
            largest = max(largest, *shares.values(), 0.0)
        except Exception as error:  # any: an operation that raises has failed, too
            failed.append(f"{call!r}: {type(error).__name__}: {str(error).splitlines()[0]}")
            raise

    try:
        every()
    except Exception as error:  # hypothesis raises that of the smallest call again, or its own
        failed.append(failed[-1] if failed else f"{type(error).__name__}: {error}")
    return {
        "case": case,
        "calls": dict(sorted(drawn.items())),
        "backends": list(BACKENDS),
        "deterministic": deterministic,
        "refused": refused,
        "largest_share": float(f"{largest:.3g}"),
        "failed": failed[-1:],
    }


def fault(line: dict[str, Any]) -> str:
    """What is wrong with a line of the log, or an empty string."""
    if "crashed" in line:
        return str(line["crashed"])
    if line["failed"]:
        return "; ".join(line["failed"])
    if line["refused"] > REFUSED * line["deterministic"]:
        return f"{line['refused']} of {line['deterministic']} deterministic calls were refused"
    return ""
