"""What every test of `ift` runs under."""

import pytest

from ift import plotting
from ift.dynamics import ProbeCallback


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Runs leave no picture but where a test is marked so: drawing takes longer than training."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(plotting, "plot_run", lambda *given: None)
        monkeypatch.setattr(ProbeCallback, "_draw", lambda callback: None)
