"""A tensor whose option is off reaches nothing: every loss refuses it by name."""

import re
from functools import partial

import pytest
import torch

from ift import losses

X, ONES = torch.zeros(2, 2), torch.ones(2, 2)
UNREAD = {
    "reference: expected None without kl_coef, got a tensor": [
        partial(losses.grpo_loss, X, ONES, X, reference=X),
        lambda: losses.GRPOLoss().from_hidden(
            X, X, torch.zeros(2).long(), X[0], reference=losses.Head(X, X)
        ),
    ],
    "entropy: expected None without entropy_coef, got a tensor": [
        partial(loss, X, ONES, X, entropy=X)
        for loss in (losses.grpo_loss, losses.ppo_loss, losses.reinforce_loss)
    ],
    "returns: expected None without values": [partial(losses.ppo_loss, X, ONES, X, returns=X)],
    "old_values: expected None without values": [
        partial(losses.ppo_loss, X, ONES, X, old_values=X)
    ],
    "old_values: expected None without clip": [
        partial(losses.value_loss, X, ONES, X, X, clip=None)
    ],
    "lse: expected None without label_smoothing or z_loss": [
        partial(losses.sft_loss, X, ONES, lse=X)
    ],
    "mean_logit: expected None without label_smoothing": [
        partial(losses.sft_loss, X, ONES, z_loss=0.1, lse=X, mean_logit=X)
    ],
    "reference_kl: expected None without kl_coef": [
        partial(losses.sft_loss, X, ONES, reference_kl=X)
    ],
    "kl: expected 0 with kind 'apo_zero'": [
        partial(losses.kto_loss, X, ONES, torch.ones(2), kind="apo_zero", kl=kl)
        for kl in (torch.zeros(()), 0.5)
    ],
}


@pytest.mark.parametrize("problem", UNREAD)
def test_what_nothing_reads_is_refused(problem):
    for call in UNREAD[problem]:
        with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
            call()
