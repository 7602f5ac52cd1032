"""`ift.check` finds every planted fault, and names what differs first."""

import faults
import pytest
import unseen_faults

import ift


@pytest.mark.parametrize("name", faults.FAULTS)
def test_fault(name):
    with faults.planted(name) as (model, batch, stage):
        found = ift.check(model, batch)
    assert not found.ok and found.stage == stage, str(found)
    assert found.cause.startswith(f"{stage}: ") and "; " in found.cause


@pytest.mark.parametrize("name", unseen_faults.FAULTS)
def test_fault_of_others(name):
    """Written without sight of the check; those of one parameter's gradient among them."""
    fault = unseen_faults.FAULTS[name]
    model, batch, options = fault.make()
    with fault.inject(model):
        found = ift.check(model, batch, **options)
    assert not found.ok and found.stage not in ("refused", "exception"), str(found)
    assert ift.check(model, batch, **options).ok
