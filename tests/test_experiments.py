"""The experiments run, and their claims that hold at any size are checked."""

import json

import pytest

from examples import docstrings
from examples.experiments import digits, frozen_lake, preference, probe_cost, squeezing


def test_squeezing_lemma_on_5000_draws():
    assert squeezing.lemma(5000) == {"p_y rose": 0, "argmax fell": 0, "sign of another token": 0}


@pytest.mark.parametrize("module", [squeezing, probe_cost], ids=lambda m: m.__name__)
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
