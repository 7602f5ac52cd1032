"""`IFTConfig`: defaults, checks, λ as a function of the step; and the lazy names of `ift`."""

import dataclasses
import statistics

import pytest
import torch

from ift import IFTConfig
from refusals import assert_refused


def test_defaults_are_the_released_ones():
    config = IFTConfig()
    assert (config.lam, config.gamma, config.objective) == (0.2, 0.95, "released")
    assert (config.propagation, config.side, config.norm) == ("loss", "left", "L1")
    assert (config.rule, config.detach_weights, config.embedding_grad) == ("greedy", False, False)
    assert config.lam_at(0) == config.lam_at(10**6) == 0.2


def test_paper_preset():
    config = IFTConfig.paper()
    assert (config.lam, config.gamma, config.objective) == (0.2, 0.95, "paper")
    assert IFTConfig.paper(objective="released") == IFTConfig()


def test_frozen_and_replaced_and_checked_again():
    config = IFTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lam = 0.3
    assert config.replace(step=7).step == 7 and config.step == 0
    with pytest.raises(ValueError, match="lam: "):
        config.replace(lam=2.0)
    with pytest.raises(TypeError, match="lamda"):
        config.replace(lamda=0.1)


def test_linear_schedule():
    config = IFTConfig(lam=0.4, min_lam=0.1, lambda_schedule="linear", warmup_steps=10)
    assert config.lam_at(0) == 0.1
    assert config.lam_at(5) == pytest.approx(0.25)
    assert config.lam_at(10) == config.lam_at(999) == 0.4
    assert config.replace(warmup_steps=0).lam_at(0) == 0.4


def test_noise_is_a_function_of_seed_and_step():
    config = IFTConfig(lam_noise=0.5)
    steps = range(4000)
    values = [config.lam_at(step) for step in steps]
    assert values == [config.lam_at(step) for step in reversed(steps)][::-1]
    assert values == [config.replace(step=9, gamma=0.5).lam_at(step) for step in steps]
    assert values != [config.replace(seed=1).lam_at(step) for step in steps]
    assert len(set(values)) > 0.95 * len(values)
    assert all(0.0 <= value <= 1.0 for value in values)
    # λ(1 + n/2): median λ; a spread of λ/2 from the half that no clamp touches.
    assert statistics.median(values) == pytest.approx(0.2, abs=0.01)
    upper = statistics.mean((v - 0.2) ** 2 for v in values if v > 0.2) ** 0.5
    assert upper == pytest.approx(0.1, rel=0.05)
    assert config.replace(lam=0.0, min_lam=0.0).lam_at(3) == 0.0
    n = [value / 0.2 - 1 for value in values]  # what no clamp touches grows with the deviation
    small = [config.replace(lam_noise=0.01).lam_at(step) for step in steps]
    assert small[:9] == pytest.approx([0.2 * (1 + v / 50) for v in n[:9]])
    large = [config.replace(lam=1.0).lam_at(step) for step in range(100)]
    assert max(large) == 1.0


def test_noise_does_not_touch_torch_and_is_the_same_everywhere():
    before = torch.get_rng_state()
    value = IFTConfig(lam_noise=0.5, seed=3).lam_at(11)
    assert torch.equal(torch.get_rng_state(), before)
    # A resumed run on another machine must repeat this one.
    assert value == pytest.approx(0.25156163611897986, abs=1e-15)


@pytest.mark.parametrize("step", [-1, 1.5, True, None])
def test_lam_at_errors(step):
    with pytest.raises((TypeError, ValueError), match="step: expected an integer"):
        IFTConfig().lam_at(step)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"lam": -0.1}, ValueError, r"expected a float in \[0, 1\], got -0.1"),
        ({"lam": "0.2"}, TypeError, ".*got str"),
        ({"gamma": 1.01}, ValueError, ".*got 1.01"),
        ({"gamma": float("nan")}, ValueError, ".*got nan"),
        ({"min_lam": 3}, ValueError, ".*got 3"),
        ({"min_lam": 0.5, "lambda_schedule": "linear"}, ValueError, ".*lam = 0.2, got 0.5"),
        ({"objective": "other"}, ValueError, ".*'released'.*got 'other'"),
        ({"propagation": "other"}, ValueError, ".*got 'other'"),
        ({"side": "other"}, ValueError, ".*got 'other'"),
        ({"norm": "other"}, ValueError, ".*got 'other'"),
        ({"norm": "L2", "objective": "paper"}, ValueError, "expected 'L1' with .*'paper'"),
        ({"rule": "nucleus"}, ValueError, ".*'sample'.*got 'nucleus'"),
        ({"lambda_schedule": "cosine"}, ValueError, ".*got 'cosine'"),
        ({"k": 0}, ValueError, "expected an integer of at least 1, got 0"),
        ({"k": 2.0}, TypeError, "expected an integer, got 2.0"),
        ({"sample_temperature": 0}, ValueError, ".*got 0"),
        ({"sample_temperature": "hot"}, TypeError, ".*'hot'"),
        ({"detach_weights": 1}, TypeError, "expected a bool, got 1"),
        ({"embedding_grad": None}, TypeError, "expected a bool"),
        ({"lam_noise": "yes"}, TypeError, "expected a number, got str"),
        ({"lam_noise": True}, TypeError, "expected a number, got bool"),
        ({"lam_noise": -0.5}, ValueError, ".*at least 0, got -0.5"),
        ({"lam_noise": float("inf")}, ValueError, ".*got inf"),
        ({"warmup_steps": -1}, ValueError, ".*got -1"),
        ({"seed": -1}, ValueError, ".*got -1"),
        ({"step": -1}, ValueError, ".*got -1"),
        ({"num_rows": -1}, ValueError, ".*got -1"),
        ({"num_rows": "4"}, TypeError, ".*got '4'"),
        ({"workspace": 0}, ValueError, ".*got 0"),
    ],
)
def test_errors(options, error, said):
    assert_refused(IFTConfig, options, error, said)


def test_lazy_names():
    import ift

    assert {"patch", "unpatch", "IFTTrainer"} <= set(dir(ift))
    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        _ = ift.pach
