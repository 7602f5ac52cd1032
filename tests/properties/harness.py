"""Holds a call to the bounds of the numerics contract."""

from __future__ import annotations

from ift.numerics.calls import Call, run


def check(call: Call) -> dict[str, float]:
    """The share of its bound that each result uses.

    Raises:
        AssertionError: some use more than all of it; it names them.
    """
    shares = {check.name: check.share() for check in run(call)}
    wrong = {name: f"{share:.3g}" for name, share in shares.items() if not share <= 1.0}
    assert not wrong, f"error in shares of the bound: {wrong}"
    return shares
