"""The loop that samples learns, whichever loss it takes."""

import pytest

from examples import policy_gradient


@pytest.mark.parametrize("name", ["grpo", "ppo", "rloo", "reinforce", "cispo"])
def test_reward_rises(name):
    history = policy_gradient.train(name, rounds=12)
    assert sum(history[:2]) / 2 < 0.2  # one of sixteen tokens, at random
    assert sum(history[-3:]) / 3 > sum(history[:2]) / 2 + 0.2, history
