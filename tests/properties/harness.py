"""Holds a call to the bounds of the numerics contract."""

from __future__ import annotations

from ift.numerics.calls import Call
from ift.numerics.operations import run


def check(call: Call) -> dict[str, float]:
    """The share of its bound that each result uses; none where `deterministic` is refused.

    Raises:
        AssertionError: some use more than all of it; it names them.
    """
    try:
        shares = {check.name: check.share() for check in run(call)}
    except RuntimeError as error:
        # Not every shape has products that do not depend on the place of a row: documented.
        if call.numerics.get("deterministic") and str(error).startswith("deterministic:"):
            return {}
        raise
    wrong = {name: f"{share:.3g}" for name, share in shares.items() if not share <= 1.0}
    assert not wrong, f"error in shares of the bound: {wrong}"
    return shares
