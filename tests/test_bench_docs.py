"""Figures in README and docs are those of the committed JSON that the text links to."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ACTIVE = ROOT / "docs/active_set.md"
MEASURED = re.compile(r"\d\s?(×|%|times|tokens/s|[KMG]i?B\b|m?s\b)")


def rows(heading):
    """Cells of the table with this header line, as people read them."""
    lines = iter(ACTIVE.read_text(encoding="utf-8").splitlines())
    assert any(line == heading for line in lines), heading
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip().strip("*") for cell in line.strip("|").split("|")]


def linked(name=""):
    """What the reports say that the page links to, in its order."""
    found = re.findall(rf"\]\(\.\./(bench/results/\S*{name}\S*\.json)\)", ACTIVE.read_text())
    assert found
    return [json.loads((ROOT / file).read_text(encoding="utf-8")) for file in dict.fromkeys(found)]


def agree(shown, value):
    """Is the figure this value, as precise as it is written?"""
    number = shown.removesuffix(" %")
    value *= 100 if shown.endswith("%") else 1
    digits = len(number.partition(".")[2])
    assert abs(float(number) - value) <= 0.501 * 10**-digits, (shown, value)


def test_readme_has_no_figure_that_was_measured():
    """What it would claim stands in docs/benchmarks.md, which is written from the JSON."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert MEASURED.findall("1.3× faster, 4 GiB, 300 tokens/s, 2 ms") == ["×", "GiB", "tokens/s",
                                                                          "ms"]  # fmt: skip
    assert not MEASURED.findall(text)


def test_times_of_the_active_set():
    reports = [r for r in linked() if "groups" in r]
    table = list(rows("| N × D × V, dtype | k | exact | active | head frozen: exact | active "
                      "| best peer | frozen |"))  # fmt: skip
    assert len(table) == 4
    for name, share, *shown in table:
        size, _, dtype = name.partition(", ")
        shape = [int(n) for n in size.split(" × ")]
        groups = [g for r in reports for g in r["groups"]
                  if g["shape"] == shape and g["dtype"] == dtype]  # fmt: skip
        cells = {(c["case"], c["implementation"]): c for c in groups[0]["cells"] if c["samples"]}
        floor = min(c["seconds"] for (case, name), c in cells.items()
                    if case == "per-token" and name.startswith("floor"))  # fmt: skip
        agree(share, cells["per-token", "active"]["errors"]["share"])
        found = {}
        for kind in ("per-token", "per-token-frozen"):
            times = {n: c["seconds"] / floor for (case, n), c in cells.items() if case == kind}
            peers = [t for n, t in times.items() if n in ("cce", "compile", "naive")]
            found[kind] = times["ours"], times["active"], min(peers)
        (exact, active, peer), (frozen, frozen_active, frozen_peer) = found.values()
        for figure, value in zip(
            shown, (exact, active, frozen, frozen_active, peer, frozen_peer), strict=True
        ):
            agree(figure, value)


def test_losses_of_training():
    (report,) = linked("training")
    runs = {(s["loss"], s["frozen"], s["of"]): s for s in report["summary"]}
    of = "held_out"
    table = list(rows("| | exact | spread | active | active dW |"))
    assert len(table) == 8
    for name, exact, spread, active, weight in table:
        of = "held_out_rare" if name.startswith("rarest") else of
        words = name.rpartition(": ")[2]
        found = runs[words[:3].lower(), "frozen" in words, of]
        agree(exact, found["mean"]["exact"])
        agree(spread, found["spread"])
        agree(active, found["mean"]["active"])
        assert bool(weight) == ("active dW" in found["mean"])
        if weight:
            agree(weight, found["mean"]["active dW"])


def test_tails_under_adam():
    (report,) = linked("adam-tails")
    first, last = report["updates"].values()
    table = list(rows("| tail | products beyond the active ones | error of dW | first update "
                      "| update 100 | its rarest tenth of ids |"))  # fmt: skip
    assert len(table) == len(report["gradient"])
    for (_, _, gradient, one, many, rare), name in zip(table, report["gradient"], strict=True):
        agree(gradient, report["gradient"][name])
        agree(one, first[name]["all"])
        agree(many, last[name]["all"])
        agree(rare, last[name]["tenths"][-1])


@pytest.mark.parametrize(
    ("shown", "value"), [(".62", 0.6187), ("1.7 %", 0.01729), ("10.47", 10.47)]
)
def test_figures_as_precise_as_they_are_written(shown, value):
    agree(shown, value)
    with pytest.raises(AssertionError):
        agree(shown, value * 1.05)
