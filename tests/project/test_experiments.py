"""The experiments run, and their claims that hold at any size are checked."""

import dataclasses
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
from examples.experiments.page import RESULTS


def test_squeezing_lemma_on_5000_draws():
    assert squeezing.lemma(5000) == {"p_y rose": 0, "argmax fell": 0, "sign of another token": 0}


# Moved by two orders of magnitude in the step, so that a wrong sign or factor cannot pass.
def test_first_order_error_falls_a_hundredfold():
    errors = [error for _, error in squeezing.first_order()]
    assert all(50 <= a / b <= 200 for a, b in itertools.pairwise(errors)), errors


PUBLISHED = {  # p_y, argmax, and others that rise, over one step; None where there is no figure
    "B": (None, "0.0278 → 0.0291", "48 of 48"),
    "C": (None, "0.7627 → 0.9871", "0 of 48"),
    "D": ("4.03e-10 → 5.47e-14", "0.7627 → 0.9863", "0 of 48"),
    "E": (None, "0.512 → 1.000", "0 of 998"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_squeezing_has_the_published_digits(name):
    (case,) = [case for case in squeezing.cases() if case.name[0] == name]
    p_y, argmax, rise = PUBLISHED[name]
    measured = case.measured()
    assert (measured["argmax"], measured["rise"]) == (argmax, rise)
    assert p_y in (None, measured["p_y"])
    assert case.published() == {"argmax": argmax, "p_y": p_y, "rise": rise} and case.agrees()


def test_a_figure_that_differs_in_its_last_digit_is_reported():
    first, *_, last = squeezing.cases()
    assert first.agrees()  # of A nothing is published
    assert not dataclasses.replace(last, argmax="0.513 → 1.000").agrees()
    assert not dataclasses.replace(last, eta=0.05).agrees()
    assert not dataclasses.replace(last, rise="1 of 998").agrees()


def test_the_committed_page_is_of_these_cases():
    page = RESULTS / "squeezing"
    found = json.loads((page / "result.json").read_text(encoding="utf-8"))["cases"]
    text = (page / "README.md").read_text(encoding="utf-8")
    for case in squeezing.cases():
        assert found[case.name[0]]["published"] == case.published()
        top = case.probabilities[0].argmax()
        for key, index in (("p_y", case.y), ("argmax", top)):
            expected = [p[index].item() for p in case.probabilities]
            assert found[case.name[0]][key] == pytest.approx(expected, rel=1e-9)
        assert all(value in text for value in case.measured().values())


def test_quadrants_of_clipping():
    assert clip.quadrants(clip.min_clip) == [True, True, False, False, True, True]
    assert clip.quadrants(clip.pure_clip) == [False, True, False] * 2
    assert clip.quadrants(clip.no_clip) == [True] * 6


@pytest.mark.parametrize(
    "module", [clip, instructions, probe_cost, squeezing], ids=lambda m: m.__name__.split(".")[-1]
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


def test_digits_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits, "EACH", 2)  # one backward for every pair of images
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
