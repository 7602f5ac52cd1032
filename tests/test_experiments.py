"""The experiments run, and their claims that hold at any size are checked."""

import itertools
import json

import pytest
import torch

from examples import docstrings
from examples.experiments import (
    clip,
    digits,
    frozen_lake,
    instructions,
    preference,
    probe_cost,
    squeezing,
)


def test_squeezing_lemma_on_5000_draws():
    assert squeezing.lemma(5000) == {"p_y rose": 0, "argmax fell": 0, "sign of another token": 0}


# Moved by two orders of magnitude in the step, so that a wrong sign or factor cannot pass.
def test_first_order_error_falls_a_hundredfold():
    errors = [error for _, error in squeezing.first_order()]
    assert all(50 <= a / b <= 200 for a, b in itertools.pairwise(errors)), errors


def test_published_directions_of_squeezing(tmp_path):
    """Valley of a peaked distribution: the argmax alone rises; flat: next to all others do."""
    squeezing.run(tmp_path, True)
    text = (tmp_path / "squeezing" / "result.json").read_text(encoding="utf-8")
    cases = {row[0]: row[1:] for row in json.loads(text)["cases"]}
    low, low_after, top, top_after, others = cases["negative, valley token, peaked"]
    assert low_after < 1e-2 * low and others == "0 of 48"
    assert f"{top:.3f}" == "0.763" and f"{top_after:.2f}" == "0.99"
    _, _, top, top_after, others = cases["negative, any token, flat"]
    assert top < top_after < 1.2 * top and others in ("47 of 48", "48 of 48")


def test_quadrants_of_clipping():
    assert clip.quadrants(clip.min_clip) == [True, True, False, False, True, True]
    assert clip.quadrants(clip.pure_clip) == [False, True, False] * 2
    assert clip.quadrants(clip.no_clip) == [True] * 6


@pytest.mark.parametrize(
    "module", [clip, instructions, probe_cost], ids=lambda m: m.__name__.split(".")[-1]
)
def test_runs(module, tmp_path):
    module.run(tmp_path, True)
    (place,) = tmp_path.iterdir()
    assert json.loads((place / "result.json").read_text(encoding="utf-8"))
    assert "## Verdict" in (place / "README.md").read_text(encoding="utf-8")


def test_preference_runs(tmp_path, monkeypatch):
    few = docstrings.stdlib_files()[:40]
    monkeypatch.setattr(docstrings, "stdlib_files", lambda: few)
    preference.run(tmp_path, True)
    assert (tmp_path / "preference" / "dpo.png").stat().st_size > 10000


# A verdict may not rest on one lucky seed.
def test_a_trend_appears_in_every_seed_and_beyond_the_spread():
    judged = {
        (1.0, 1.1, 0.9): "yes",
        (-1.0, -1.1, -0.9): "no, the opposite",
        (3.0, 3.1, -0.1): "not clear",
        (0.1, 0.1, 9.0): "not clear",
        (0.0, 0.0, 0.0): "not clear",
    }
    for each, says in judged.items():
        assert preference.judged(torch.tensor(each)) == says


def test_digits_runs(tmp_path):
    pytest.importorskip("sklearn")
    digits.run(tmp_path, True)
    found = json.loads((tmp_path / "digits" / "result.json").read_text(encoding="utf-8"))
    assert found["error"] < 0.1  # first order of a small step


def test_frozen_lake_runs(tmp_path):
    pytest.importorskip("gymnasium")
    frozen_lake.run(tmp_path, True)
    lake = frozen_lake.Lake()
    assert lake.states(frozen_lake.OPTIMAL) == [0, 4, 8, 9, 13, 14]
    assert len(frozen_lake.LONGER) > len(frozen_lake.OPTIMAL) and lake.states(frozen_lake.LONGER)
    assert lake.optimal[14, 15] == 1 and lake.asked.sum() == 11
