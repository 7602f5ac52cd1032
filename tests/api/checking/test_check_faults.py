"""`ift.check` finds every planted fault, and names what differs first."""

import faults
import pytest

import ift


@pytest.mark.parametrize("name", faults.FAULTS)
def test_fault(name):
    with faults.planted(name) as (model, batch, stage):
        found = ift.check(model, batch)
    assert not found.ok and found.stage == stage, str(found)
    assert found.cause.startswith(f"{stage}: ") and "; " in found.cause
