"""Losses on per-token log-probabilities, as functions and as modules that hold their options."""

from ift.losses.ift import IFTLoss, ift_loss
from ift.losses.sft import SFTLoss, sft_loss

__all__ = ["IFTLoss", "SFTLoss", "ift_loss", "sft_loss"]
