"""Figures in README and docs are those of the committed JSON that the page links to.

What was measured stands in the tables of `TABLES`, each compared with the JSON here, and nowhere
else: any other figure fails `test_no_figure_but_in_tables`. Pages that are written from the JSON
have tests of their own.
"""

import itertools
import json
import re
from pathlib import Path

import pytest

from bench import lmlike

ROOT = Path(__file__).parents[1]
WRITTEN = "docs/benchmarks.md"  # by `python -m bench report`
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
PAGES.pop(WRITTEN)
PAGES.pop("docs/models.md")  # written from a log, with which test_proofs.py compares it

ACTIVE = "docs/active_set.md"
TIMES = ("| N × D × V, dtype | k | exact | active | head frozen: exact | active | best peer "
         "| frozen |")  # fmt: skip
COSTS = ("| N × D × V, dtype | exact dW | the same, scalar | memory of naive | frozen "
         "| error of dh | exact | error of dW | exact |")  # fmt: skip
SIZES = "| N × D × V, dtype | k | exact | active | active of exact |"
FLAT = "| flat data, N × D × V, dtype | exact | active | exact dW | active of exact | exact dW |"
DROPPED = ("| head | k | tail mass | dh | tail uniform | dropped | dW | tail uniform | dropped "
           "| rows without gradient | dropped |")  # fmt: skip
LOSSES = "| | exact | spread | active | active dW |"
TAILS = ("| tail | products beyond the active ones | error of dW | first update | update 100 "
         "| its rarest tenth of ids |")  # fmt: skip
HOW = "docs/benchmarking.md"
LOOKS = "| | published | 1024 × 896 |"
TABLES = {ACTIVE: (TIMES, COSTS, SIZES, FLAT, DROPPED, LOSSES, TAILS), HOW: (LOOKS,)}

# What may have been measured: a decimal fraction, a number with a unit, a share in words.
FIGURE = re.compile(
    r"(?<![\w.-])\d*\.\d+"
    r"|\d\s?(?:%|times\b|points|tokens/s|[KMGT]i?B\b|bytes|T?G?FLOP|[mµn]?s\b|seconds|x\b)"
    r"|\d\s?×(?!\s?(?:\d|[A-Z]\b))"
    r"|\b\d+ of \d+\b"
    r"|\b(?:minute|hour|percent)s?\b"
    r"|\b(?:half|third|quarter|fifth|tenth|twice|times)\b[^|.:;]{0,20}"
    r"\b(?:time|memory|faster|slower)\b"
    r"|\b(?:by|about|nearly|up to) an? (?:half|third|quarter|fifth|tenth)\b"
)
# Figures that were not measured: versions, limits, options, constants of a formula.
DESIGN = {
    "README.md": ("Python ≥ 3.10", "arXiv 2405.11870"),
    "docs/active_set.md": ("k above 0.8",),
    "docs/architecture.md": (
        "256 MiB on a CPU, 512 MiB on a GPU", "multiple of 64 bytes", "rows padded to 64 bytes",
    ),
    "docs/benchmarking.md": (
        "has nine minutes", "A suite has 8 minutes", "more than 5 %",
        "70 % of the targets ignored", "fill 50 ms", "calls of 20 s and more",
        "More than 20 % in 16 bits, 0.1 % in float32",
    ),
    "docs/dynamics.md": (
        "arXiv 2407.10490", "0.01 nats per token", "p ≤ 0.001 under an argmax of p ≥ 0.5",
    ),
    "docs/install.md": (
        "Python of 3.10", "CUDA 12.6 or newer", "Python 3.10 and later, torch 2.8 and later",
        "8.x and 9.0, from CUDA 12.8 on also for 10.0 and 12.x, and PTX of 9.0",
        "CUDA 12.6, 12.8 and 12.9",
    ),
    "docs/integrations/README.md": (
        "| 5.23 |", "| 1.16 |", "| 0.21 |", "torch 2.13", "ZeRO-3 of 0.19.8",
    ),
    "docs/integrations/deepspeed.md": ("DeepSpeed 0.19.8",),
    "docs/integrations/trl.md": ("TRL 1.16",),
    "docs/mathematics.md": (
        "noise ends at\n22.9", "arXiv 2405.11870", "λ = 0.2", "γ = 0.95", "1.69 → 0.21", "1 → 8.03",
    ),
    "docs/training.md": ("λ 0.2, γ 0.95",),
    "docs/triton.md": (
        "compute capability 8.0", "3.4 or newer", "| 3.4.0 | pass, with numpy 2.3 |",
        "| 3.6.0 | pass, with numpy 2.3 |", "| 3.7.1 |", "| 3.9.0 |",
        "interpreters of 3.4 and 3.6", "numpy 2.4",
    ),
}  # fmt: skip


def table(page, heading):
    """Lines of the table with this header line, without it."""
    lines = PAGES[page].splitlines()
    assert lines.count(heading) == 1, f"{page} has no table {heading}, or two"
    return list(
        itertools.takewhile(
            lambda line: line.startswith("|"), lines[lines.index(heading) + 2 :]
        )
    )  # fmt: skip


def cells(line):
    """As people read them."""
    return [cell.strip().strip("*") for cell in line.strip("|").split("|")]


def linked(page, name):
    """The reports of this name that the page links to, in its order."""
    found = re.findall(rf"\]\(\.\./(bench/results/\S*{name}\S*\.json)\)", PAGES[page])
    assert found, f"{page} has no link to the JSON of {name}"
    return [json.loads((ROOT / file).read_text(encoding="utf-8")) for file in dict.fromkeys(found)]


def agrees(shown, value):
    """Is what is shown this value, as precise as it is written?"""
    if value is ...:  # words
        return not FIGURE.search(shown)
    if value is None:  # not measured
        return shown in ("", "–")
    number = re.fullmatch(r"(\d*)\.?(\d*)( %)?", shown)
    if not number or not re.search(r"\d", shown):
        return False
    value = 100 * value if number[3] else value
    return abs(float(shown.removesuffix(" %")) - value) <= 0.501 * 10 ** -len(number[2])


def written(value, shown):
    """The value in the way that is shown."""
    if value is None:
        return "–"
    percent = shown.endswith("%")
    digits = len(shown.removesuffix(" %").partition(".")[2]) if re.search(r"\d", shown) else 2
    text = f"{100 * value if percent else value:.{digits}f}" + " %" * percent
    return text.removeprefix("0") if text.startswith("0.") else text


def compare(page, heading, measured):
    """All of a table with what was measured; names every cell that is to be changed, and into what.

    Args:
        measured: values by the first cell of their row: None if there is none, ... for words.
    """
    rows = [cells(line) for line in table(page, heading)]
    assert [row[0] for row in rows] == list(measured), f"{page}: rows of {heading}"
    columns = [f"{name} (column {at})" for at, name in enumerate(cells(heading), 1)]
    wrong = [
        f"{row[0]} | {column}: the page shows {shown!r}, the JSON says "
        f"{'words' if value is ... else written(value, shown)} ({value})"
        for row in rows
        for column, shown, value in zip(columns[1:], row[1:], measured[row[0]], strict=True)
        if not agrees(shown, value)
    ]
    assert not wrong, "\n".join([f"{page}, table {heading}", *wrong])


def outside_tables(page, text):
    """What people read on a page, but for tables that are compared and what `DESIGN` excuses."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in TABLES.get(page, ()):
        before, _, after = text.partition(heading)
        text = before + re.sub(r"\A\n(\|.*\n)*", "\n", after)
    for phrase in DESIGN.get(page, ()):
        text = text.replace(phrase, "", 1)
    text = VERSION.sub("", text)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", text)


# Of a library, behind its name or in the table of what was tested with which.
VERSION = re.compile(
    r"(?:transformers|axolotl|LLaMA-Factory|Lightning|OpenRLHF|torchtitan|verl|the calls of"
    r"|pins|at most|recipe \|) (\d+\.)+\d+"
)


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_but_in_tables(page):
    """A figure goes into a table of `TABLES`; if nothing measured it, into `DESIGN`."""
    text = outside_tables(page, PAGES[page])
    found = []
    for match in FIGURE.finditer(text):
        around = text[max(match.start() - 60, 0) : match.end() + 40]
        found.append(f"{match[0]!r} in: …{' '.join(around.split())}…")
    assert not found, "\n".join([f"{page}: a figure that no test compares", *found])


def test_excuses_are_needed():
    """Each is on its page, and is a figure."""
    for page, phrases in DESIGN.items():
        for phrase in phrases:
            assert phrase in PAGES[page], f"{page} no longer says {phrase!r}"
            assert FIGURE.search(phrase), f"{phrase!r} needs no excuse"


@pytest.mark.parametrize(
    "text",
    ["took .87 of it", "1.02 and more", "1.3× faster", "3 × as fast", "2x faster", "16 %", "4 GiB",
     "300 tokens/s", "2 ms", "1 s", "spills 8 bytes", "fastest in 41 of 47", "within a minute",
     "a tenth of the time of its products", "half the memory", "three times faster",
     "differ by up to a tenth",
     "| a | .5 |", f"{TIMES}\n|---|\n| a | .5 |\n\n.6"],
)  # fmt: skip
def test_a_figure_is_seen(text):
    assert FIGURE.search(outside_tables(ACTIVE, text))


@pytest.mark.parametrize(
    "text",
    ["128 × 128 tiles", "2 × N", "tail tile of 2048 ids", "`0.5`", "[a](b-1.5.md)", "sm_90", "2⁻¹²",
     "Qwen2.5-0.5B", "7 products", f"{TIMES}\n|---|\n| a | .5 |\n\nwords"],
)  # fmt: skip
def test_what_is_none_is_not(text):
    assert not FIGURE.search(outside_tables(ACTIVE, text))


def active_runs(heading=TIMES, of="active-"):
    """Cells of each run in a table by row name, as {(case, implementation): cell}."""
    names = [cells(line)[0] for line in table(ACTIVE, heading)]
    runs = {}
    for report in linked(ACTIVE, of):
        for group in report["groups"]:
            name = " × ".join(map(str, group["shape"])) + ", " + group["dtype"]
            assert name not in runs, f"{ACTIVE} links to two runs of {name}"
            runs[name] = {(c["case"], c["implementation"]): c for c in group["cells"]
                          if c["samples"]}  # fmt: skip
    assert sorted(names) == sorted(runs), f"{ACTIVE}: rows of {heading}"
    return {name: runs[name] for name in names}


def floor(run, case):
    """Seconds of the bare products."""
    return min(cell["seconds"] for (kind, name), cell in run.items()
               if kind == case and name.startswith("floor"))  # fmt: skip


def test_times_of_the_active_set():
    """Of the head frozen, too, over the three products."""
    measured = {}
    for name, run in active_runs().items():
        found = {}
        for case in ("per-token", "per-token-frozen"):
            times = {who: cell["seconds"] / floor(run, "per-token")
                     for (kind, who), cell in run.items() if kind == case}  # fmt: skip
            peers = [t for who, t in times.items() if who in ("cce", "compile", "naive")]
            found[case] = times["ours"], times["active"], min(peers, default=None)
        (exact, active, peer), (frozen, frozen_active, frozen_peer) = found.values()
        share = run["per-token", "active"]["errors"]["share"]
        measured[name] = share, exact, active, frozen, frozen_active, peer, frozen_peer
    compare(ACTIVE, TIMES, measured)


def test_exact_dw_memory_and_errors_of_the_active_set():
    measured = {}
    for name, run in active_runs().items():
        dense = [run[case, "active-dense"]["seconds"] / floor(run, case)
                 if (case, "active-dense") in run else None
                 for case in ("per-token", "scalar")]  # fmt: skip
        memory = [run[case, "active"]["extra_bytes"] / run[case, "naive"]["extra_bytes"]
                  if (case, "naive") in run else None
                  for case in ("per-token", "per-token-frozen")]  # fmt: skip
        errors = [run["per-token", who]["errors"][of]
                  for of in ("d hidden", "d weight") for who in ("active", "ours")]  # fmt: skip
        measured[name] = *dense, *memory, *errors
    compare(ACTIVE, COSTS, measured)


def test_other_sizes():
    measured = {}
    for name, run in active_runs(SIZES, "sizes").items():
        exact, active = (run["per-token", who]["seconds"] for who in ("ours", "active"))
        bare, share = floor(run, "per-token"), run["per-token", "active"]["errors"]["share"]
        measured[name] = share, exact / bare, active / bare, active / exact
    compare(ACTIVE, SIZES, measured)


def test_flat_data():
    measured = {}
    for name, run in active_runs(FLAT, "flat").items():
        exact, *ours = (run["per-token", who]["seconds"]
                        for who in ("ours", "active", "active-dense"))  # fmt: skip
        over = [seconds / floor(run, "per-token") for seconds in (exact, *ours)]
        measured[name] = *over, *(seconds / exact for seconds in ours)
    compare(ACTIVE, FLAT, measured)


def test_dropping_the_tail():
    (report,) = linked(ACTIVE, "sweeps")
    (group,) = report["groups"]
    active, dropped = (
        next(c["errors"] for c in group["cells"]
             if (c["case"], c["implementation"]) == ("threshold-12", name))
        for name in ("active", "dropped")
    )  # fmt: skip
    (training,) = linked(ACTIVE, "training")
    real = training["real_head"]
    errors, rows = real["errors"], real["head rows without gradient"]
    compare(ACTIVE, DROPPED, {
        f"generated, {group['dtype']}, V = {group['shape'][2]}": (
            active["share"], active["tail"], active["d hidden"], None, dropped["d hidden"],
            active["d weight"], None, dropped["d weight"], None, None,
        ),
        f"trained, V = {real['vocabulary']}": (
            real["share"], real["tail_mean"],
            *(errors[f"{tail} {of}"] for of in ("d hidden", "d weight")
              for tail in ("active", "uniform", "dropped")),
            rows["active"], rows["dropped"],
        ),
    })  # fmt: skip


def test_losses_of_training():
    (report,) = linked(ACTIVE, "training")
    runs = {(s["loss"], s["frozen"], s["of"]): s for s in report["summary"]}
    names = [cells(line)[0] for line in table(ACTIVE, LOSSES)]
    assert len(names) == len(runs)
    measured, of = {}, "held_out"
    for name in names:
        of = "held_out_rare" if name.startswith("rarest") else of
        words = name.rpartition(": ")[2]
        found = runs[words[:3].lower(), "frozen" in words, of]
        mean = found["mean"]
        measured[name] = mean["exact"], found["spread"], mean["active"], mean.get("active dW")
    compare(ACTIVE, LOSSES, measured)


def test_what_is_said_of_training():
    """Every mean is within the spread of the seeds, for all tokens and for the rarest."""
    (report,) = linked(ACTIVE, "training")
    assert {found["of"] for found in report["summary"]} == {"held_out", "held_out_rare"}
    for found in report["summary"]:
        means = dict(found["mean"])
        exact = means.pop("exact")
        assert all(abs(mean - exact) < found["spread"] for mean in means.values())


def test_tails_under_adam():
    (report,) = linked(ACTIVE, "adam-tails")
    first, last = report["updates"].values()
    names = [cells(line)[0] for line in table(ACTIVE, TAILS)]
    compare(ACTIVE, TAILS, {
        shown: (..., report["gradient"][name], first[name]["all"], last[name]["all"],
                last[name]["tenths"][-1])
        for shown, name in zip(names, report["gradient"], strict=True)
    })  # fmt: skip


def test_looks_of_the_data():
    (report,) = linked(HOW, "head")
    (data,) = (g["data"] for g in report["groups"] if g["shape"] == [1024, 896, 151936])
    names = [cells(line)[0] for line in table(HOW, LOOKS)]
    compare(HOW, LOOKS, {
        shown: (published, data[name])
        for shown, (name, published) in zip(names, lmlike.PUBLISHED.items(), strict=True)
    })  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "value"), [(".62", 0.6187), ("1.7 %", 0.01729), ("10.47", 10.47), ("16 %", 0.1617)]
)
def test_figures_as_precise_as_they_are_written(shown, value):
    assert agrees(shown, value) and written(value, shown) == shown
    assert not agrees(shown, value * 1.05)
    assert not agrees(shown, None) and not agrees("–", value) and not agrees("", value)


def test_a_wrong_table_says_what_to_write(monkeypatch):
    monkeypatch.setitem(PAGES, HOW, f"{LOOKS}\n|---|---|---|\n| some | 61 % | **.63** |\n")
    compare(HOW, LOOKS, {"some": (0.61, 0.625)})
    with pytest.raises(AssertionError, match=r"896 \(column 3\): the page shows '.63', the JSON "
                                             r"says .71 "):  # fmt: skip
        compare(HOW, LOOKS, {"some": (0.61, 0.714)})
    with pytest.raises(AssertionError, match="rows of"):
        compare(HOW, LOOKS, {"other": (0.61, 0.625)})
