"""A few random calls on the Triton backend, within the bounds of the numerics contract."""

import pytest
from hypothesis import HealthCheck, given, settings

from ift.numerics.operations import OPERATIONS
from tests.properties import harness
from tests.properties.cases import cases

# Slow in the interpreter.
FEW = {"linear_topk": 1, "linear_soft_cross_entropy": 2}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_sample(operation):
    @settings(
        max_examples=FEW.get(operation, 3),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases((operation,), backends=("triton",), largest=101))
    def every(case):
        harness.check(case)

    every()
