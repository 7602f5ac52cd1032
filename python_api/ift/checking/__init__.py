"""Does a patched model compute what the model itself computes? `compare` answers for one batch."""

from ift.checking.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
