"""Losses on per-token log-probabilities, as functions and as modules that hold their options.

What each does to probabilities is in docs/losses.md.
"""

from ift.losses._module import Head, Loss, from_hidden
from ift.losses.advantages import gae_advantages, group_advantages, rloo_advantages
from ift.losses.cosine_distillation import CosineDistillationLoss, cosine_distillation_loss
from ift.losses.distillation import DistillationLoss, distillation_loss
from ift.losses.dpo import DPOLoss, dpo_loss
from ift.losses.ift import IFTLoss, ift_loss
from ift.losses.kto import KTOLoss, kto_kl, kto_loss
from ift.losses.multi_token import MultiTokenLoss, multi_token_loss, multi_token_targets
from ift.losses.policy import GRPOLoss, grpo_loss
from ift.losses.ppo import PPOLoss, ppo_loss, value_loss
from ift.losses.preference import (
    CPOLoss,
    ORPOLoss,
    SimPOLoss,
    SLiCLoss,
    cpo_loss,
    orpo_loss,
    simpo_loss,
    slic_loss,
)
from ift.losses.ratios import importance_weights, kl_estimate
from ift.losses.reinforce import REINFORCELoss, RLOOLoss, reinforce_loss, rloo_loss
from ift.losses.sft import SFTLoss, sft_loss
from ift.losses.topk_distillation import TopKDistillationLoss, topk_distillation_loss

__all__ = [
    "CPOLoss",
    "CosineDistillationLoss",
    "DPOLoss",
    "DistillationLoss",
    "GRPOLoss",
    "Head",
    "IFTLoss",
    "KTOLoss",
    "Loss",
    "MultiTokenLoss",
    "ORPOLoss",
    "PPOLoss",
    "REINFORCELoss",
    "RLOOLoss",
    "SFTLoss",
    "SLiCLoss",
    "SimPOLoss",
    "TopKDistillationLoss",
    "cosine_distillation_loss",
    "cpo_loss",
    "distillation_loss",
    "dpo_loss",
    "from_hidden",
    "gae_advantages",
    "group_advantages",
    "grpo_loss",
    "ift_loss",
    "importance_weights",
    "kl_estimate",
    "kto_kl",
    "kto_loss",
    "multi_token_loss",
    "multi_token_targets",
    "orpo_loss",
    "ppo_loss",
    "reinforce_loss",
    "rloo_advantages",
    "rloo_loss",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
    "topk_distillation_loss",
    "value_loss",
]
