"""`compare`: the loss and gradients of a patched model against those of the model itself."""

from ift.checking.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
