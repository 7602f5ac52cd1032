"""`check`: is the fused loss of a patched model that of its logits? `compare`, the loss alone."""

from ift.checking.compare import Comparison, compare
from ift.checking.model_check import check
from ift.checking.report import CheckReport, CheckRow

__all__ = ["CheckReport", "CheckRow", "Comparison", "check", "compare"]
