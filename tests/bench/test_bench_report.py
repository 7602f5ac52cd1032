"""The pages of what was measured, and what became slower: from made-up reports and real ones."""

import copy
import html.parser
import json
import re
import subprocess
import sys

import pytest
from running import assert_exits

from bench.__main__ import main
from bench.harness import machine
from bench.report import compare, headline, pages, pictures, ranking, tables
from bench.report.tables import Source


def cell(implementation, samples, size=None, case="scalar"):
    samples = list(samples)
    return {
        "case": case, "implementation": implementation, "samples": samples,
        "seconds": sorted(samples)[len(samples) // 2] if samples else None, "spread": 0.0,
        "extra_bytes": size, "errors": {}, "reason": "" if samples else "took too long",
    }  # fmt: skip


def made_up(*cells, date="2026-01-01", suite="head", group="g"):
    cells = copy.deepcopy(cells)  # what is compared is added to them
    record = {
        "name": group, "shape": [1, 8, 2], "dtype": "fp32", "data": {}, "plans": {}, "absent": {},
        "titles": dict.fromkeys((c["case"] for c in cells), "a title"), "cells": list(cells),
    }  # fmt: skip
    tables.compare(record)
    about = {"device": "A & B", "isa": "AVX2", "threads": 1, "versions": {"torch": "2"},
             "revision": "abc", "date": date, "load": 0.1}  # fmt: skip
    names = {"ours": "ours", "naive": "naive", "cce": "<CCE>", "floor": "floor"}
    return {"schema": 1, "suite": suite, "provenance": about, "load_at_end": 0.2, "options": {},
            "names": names, "groups": [record]}  # fmt: skip


def written(folder, name, found):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    return file


BASE = (cell("floor", [1.0]), cell("ours", [1.0, 1.1, 1.2], 100 << 20), cell("naive", [2.0]))


# --- where ours stands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "verdict"),
    [(2.0, "yes, of 3"), (1.08, "within 3 %, of 3"), (1.0, "no: <CCE>, by 1.10×")],
)
def test_verdict(other, verdict, tmp_path):
    found = made_up(*BASE, cell("cce", [other]))
    case = ranking.Case("scalar", found["groups"][0], Source(tmp_path / "a.json", found))
    assert case.fastest == verdict
    assert case.leanest == "–"  # nobody else's memory is known
    case.cells[2]["extra_bytes"] = 50 << 20
    assert case.leanest == "no: naive, by 2.00×"


def test_the_newest_file_counts_then_the_one_with_most_samples(tmp_path):
    sources = [
        Source(tmp_path / name, made_up(cell("ours", samples), date=date))
        for name, samples, date in [
            ("a.json", [1.0], "2026-02-01"), ("b.json", [1.0, 2.0], "2026-01-01"),
            ("c.json", [1.0, 3.0], "2026-02-01"),
        ]
    ]  # fmt: skip
    found = ranking.by_group(sources, "head")["g"]["scalar"][tmp_path.name]
    assert found.source.path.name == "c.json"


# --- pages ----------------------------------------------------------------------------------------


class Checker(html.parser.HTMLParser):
    """Balanced tags, and what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.links, self.ids = [], [], [], set()
        self.narrow, self.scrolls, self.last = [], [], None

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        if tag == "table":
            self.scrolls.append(self.last == ("div", "wide"))
        self.last = tag, attrs.get("class")
        self.narrow += [attrs["srcset"]] if tag == "source" else []
        self.images += [attrs["src"]] if tag == "img" else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.ids |= {attrs["id"]} if "id" in attrs else set()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path, capsys):
    for device in ("one", "two"):
        written(tmp_path / device, "head.json", made_up(*BASE, cell("cce", [1.0])))
    written(tmp_path / "two", "notes.json", {"rows": 3})
    file, text = tmp_path / "out" / "page.html", tmp_path / "page.md"
    arguments = ["--results", str(tmp_path), "--html", str(file), "--markdown", str(text)]
    assert main(["report", *arguments]) == 0
    found = file.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(found)
    assert not checker.open
    assert {link.removeprefix("#") for link in checker.links} == checker.ids == {
        "head", "provenance"
    }  # fmt: skip
    assert len(checker.images) == 4  # time and memory of both
    assert len(checker.narrow) == 4  # the same for phones
    pictures = checker.images + checker.narrow
    assert all(picture.startswith("data:image/png;base64,iVBORw0KGgo") for picture in pictures)
    assert checker.scrolls and all(checker.scrolls)  # a table may be wider than the page
    assert 'name="viewport"' in found and "<link" not in found and "<script" not in found
    assert "&lt;CCE&gt;, by 1.10×" in found and "took too long" not in found
    row = next(r for r in text.read_text(encoding="utf-8").splitlines() if r.startswith("| scalar"))
    assert row.count("1.10 s") == 2  # devices side by side


def test_who_did_not_run_is_told_once(tmp_path):
    """For all devices, without who has a time in the file that is shown, or is timed elsewhere."""
    older = made_up(*BASE, cell("cce", []), date="2025-01-01")
    older["groups"][0]["absent"] = {"scalar": {"trl": "not <here>", "naive": "broken then"}}
    other = made_up(*BASE)
    other["groups"][0]["absent"] = {"scalar": {"trl": "not <here>"}}
    sources = [
        Source(tmp_path / "one" / "a.json", older),
        Source(tmp_path / "one" / "b.json", made_up(*BASE)),
        Source(tmp_path / "two" / "c.json", other),
    ]
    assert ranking.not_run(sources, "head").rows == [
        ["trl", "not <here>", "scalar", "one, two"],
        ["<CCE>", "took too long", "scalar", "one"],
    ]
    assert "| trl | not <here> | scalar | one, two |" in ranking.benchmarks(sources, "r")
    assert "<td>not &lt;here&gt;</td>" in pages.html_page(sources)


def test_the_summary_counts_what_the_tables_say(tmp_path):
    lost = made_up(*BASE, cell("cce", [0.5]), cell("ours", [1.0], case="per-token"),
                   cell("naive", [3.0], case="per-token"))  # fmt: skip
    rows = ranking.summary([Source(tmp_path / "one" / "a.json", lost)]).rows
    assert rows[ranking.ORDER.index("head")] == ["head", "1 of 2", "–"]
    assert rows[ranking.ORDER.index("e2e")] == ["e2e", "–", "–"]
    alone = made_up(cell("ours", [1.0]), cell("dropped", [9.0]))
    rows = ranking.summary([Source(tmp_path / "one" / "a.json", alone)]).rows
    assert rows[ranking.ORDER.index("head")][1] == "–"  # nobody would train with what is dropped


def test_pictures_are_of_the_cells_in_the_table(tmp_path, monkeypatch):
    """Of several files of a device those that are shown, and not older ones of the same case."""
    drawn = []
    monkeypatch.setattr(pictures, "bars", lambda report, *_, **__: drawn.append(report) or False)
    old = made_up(*BASE, cell("ours", [7.0], case="few"), date="2025-01-01")
    sources = [
        Source(tmp_path / "one" / "a.json", old),
        Source(tmp_path / "one" / "b.json", made_up(cell("ours", [4.0]))),
    ]
    pages.html_page(sources)
    assert len(drawn) == 2  # time and memory
    (group,) = drawn[0]["groups"]
    assert [(c["case"], c["seconds"]) for c in group["cells"]] == [("scalar", 4.0), ("few", 7.0)]
    assert drawn[0]["provenance"]["date"] == "2026-01-01"


def test_the_readme_compares_with_the_best_other_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(headline, "PARTS", (("head", "g", "a head", ("scalar",)),))
    found = made_up(*BASE, cell("cce", [1.5], 300 << 20))
    found["groups"][0]["cells"][2]["extra_bytes"] = 200 << 20  # of naive
    sources = [Source(tmp_path / "one" / "a.json", found)]
    text = headline.table(sources, "one", "results")
    row = "| **1.10 s** | 2.00 s (1.82×) | 1.50 s (1.36×), <CCE> | **100 MiB** | 200 MiB (2.00×) |"
    assert row in text and "300 MiB (3.00×), <CCE>" in text and "(results/one/a.json)" in text
    assert "on a GPU | not measured" in text
    headline.draw(sources, "one", picture := tmp_path / "a.png")
    assert picture.stat().st_size > 5000
    found["provenance"] |= {"cpu": "A CPU"}
    assert "not measured" not in headline.table(sources, "one", "results")


def test_a_picture_for_phones_is_narrow(tmp_path):
    """At the width of a phone its letters are larger than those of the wide one."""
    from PIL import Image

    cells = [cell("ours", [1.0], case=f"case {i}") for i in range(6)]
    found = made_up(*cells, *(cell("naive", [2.0], case=c["case"]) for c in cells))
    inches = {}
    for layout in (pictures.WIDE, pictures.NARROW):
        file = tmp_path / "a.png"
        assert pictures.bars(found, file, "seconds", layout)
        with Image.open(file) as image:
            inches[layout] = image.width / layout.dpi
    assert inches[pictures.NARROW] < 3.8  # 366 pixels: 8 points are 10 of them or more
    assert inches[pictures.WIDE] < 1240 / 110


def test_steps_and_exponents_have_tables(tmp_path):
    most = {"rows": 8, "capped": True, "bytes": 1 << 30, "tried": {}}
    step = cell("ours", [1.0]) | {"tokens_per_second": 512.0, "largest": most}
    found = made_up(step, suite="e2e")
    found["groups"][0]["fits"] = [
        {"axis": "N", "case": "scalar", "implementation": "ours", "seconds": 0.987,
         "extra_bytes": None}
    ]  # fmt: skip
    text = ranking.benchmarks([Source(tmp_path / "a.json", found)], "r")
    assert "| 512 |" in text and "≥ 8 | 1 GiB" in text and "| 0.99 | – |" in text


def test_blocks_of_readme_and_docs_are_current():
    """Every figure of them is of the committed JSON; `python -m bench report` writes them anew."""
    sources, names = tables.collect(machine.RESULTS), []
    for page in pages.pages():
        text = page.read_text(encoding="utf-8")
        assert pages.filled(text, page, sources) == text, f"{page}: run python -m bench report"
        names += [name for _, name, _ in pages.BLOCK.findall(text)]
        assert text.count("<!-- generated") == text.count("<!-- end -->")
    assert sorted(names) == sorted(pages.BLOCKS)


def test_a_block_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setitem(pages.BLOCKS, "some", lambda sources, results: f"new, of {results}")
    page = machine.ROOT / "docs" / "integrations" / "a.md"
    text = "a\n<!-- generated: some -->\nold\n<!-- end -->\nb <!-- end -->\n"
    assert pages.filled(text, page, []) == text.replace("old", "new, of ../../bench/results")
    assert pages.filled("no block", page, []) == "no block"
    with pytest.raises(ValueError, match="a.md: no block 'other', expected one of "):
        pages.filled(text.replace("some", "other"), page, [])


def test_results_name_no_place_of_the_machine_they_are_from():
    for file in sorted(machine.RESULTS.rglob("*.json")):
        found = re.search(r"[\"\s(](/[a-z]+/[^\"\s]+)", file.read_text(encoding="utf-8"))
        assert not found, f"{file.name}: {found[1]}"


def test_nothing_to_report(tmp_path, capsys):
    assert_exits(["report", "--results", str(tmp_path)], "no report in", capsys)


# --- what became slower ---------------------------------------------------------------------------


def verdicts(before, after):
    return {c.implementation: c.verdict for c in compare.changes(made_up(*before), made_up(*after))}


def test_what_changed():
    slow = (BASE[0], cell("ours", [1.3, 1.4], 100 << 20), BASE[2])
    assert verdicts(BASE, slow)["ours"] == "slower"
    assert verdicts(slow, BASE)["ours"] == "faster"
    near = (BASE[0], cell("ours", [1.15, 1.3, 1.4], 100 << 20), BASE[2])
    assert verdicts(BASE, near)["ours"] == ""  # samples overlap
    machine = (cell("floor", [1.3]), slow[1], BASE[2])
    assert verdicts(BASE, machine)["ours"] == ""  # everything did
    quick = (cell("floor", [0.5]), slow[1], BASE[2])
    assert verdicts(BASE, quick)["ours"] == "slower"  # a faster floor makes it no worse
    assert compare.changes(made_up(*BASE), made_up(*quick))[1].seconds == pytest.approx(1.4 / 1.1)
    large = (BASE[0], cell("ours", BASE[1]["samples"], 120 << 20), BASE[2])
    assert verdicts(BASE, large)["ours"] == "more memory"
    assert verdicts(large, BASE)["ours"] == "less memory"
    gone = (BASE[0], cell("ours", []), BASE[2])
    assert verdicts(BASE, gone)["ours"] == "broken"
    assert verdicts(gone, BASE)["ours"] == "fixed"
    assert set(verdicts(BASE, BASE).values()) == {""}


def test_compare_tells_by_its_exit_code(tmp_path, capsys):
    before = written(tmp_path, "a.json", made_up(*BASE))
    slow = (BASE[0], cell("ours", [1.3, 1.4], 100 << 20), BASE[2])
    after = written(tmp_path, "b.json", made_up(*slow))
    assert main(["compare", str(before), str(after)]) == 1
    assert "1 of ours for the worse" in capsys.readouterr().out
    assert main(["compare", str(before), str(after), "--tolerance", "0.5"]) == 0
    assert main(["compare", str(before), str(before)]) == 0
    other = made_up(*BASE[:2], cell("naive", [9.0]))
    assert main(["compare", str(before), str(written(tmp_path, "c.json", other))]) == 0
    for bad, message in [
        (written(tmp_path, "d.json", {"rows": 1}), "expected a report of schema 1"),
        (tmp_path / "none.json", "not a report"),
        (written(tmp_path, "e.json", made_up(*BASE, group="h")), "no cell in common"),
    ]:
        assert_exits(["compare", str(before), str(bad)], message, capsys)


def test_runs_of_one_revision_are_one_report():
    first, second = made_up(cell("ours", [3.0, 1.0], 10)), made_up(cell("ours", [2.0, 5.0], 8))
    (found,) = compare.merge([copy.deepcopy(first), second])["groups"][0]["cells"]
    assert found["samples"] == [3.0, 1.0, 2.0, 5.0]
    assert found["seconds"] == 2.5 and found["extra_bytes"] == 8


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout whose "suite" takes as many seconds as a file in it says; two revisions."""
    root = tmp_path / "checkout"
    (root / "ift_kernels").mkdir(parents=True)
    template = written(tmp_path, "template.json", made_up(*BASE))
    script = (
        "import json, pathlib, sys\n"
        f"found = json.loads(pathlib.Path({str(template)!r}).read_text())\n"
        "ours = found['groups'][0]['cells'][1]\n"
        "ours['samples'] = [float(pathlib.Path('seconds').read_text())]\n"
        "pathlib.Path(sys.argv[-1]).write_text(json.dumps(found))\n"
        "sys.exit('no such suite' if sys.argv[1] != 'head' else 0)\n"
    )
    (root / "suite.py").write_text(script)

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "core.hooksPath=/dev/null"]
        subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)

    git("init")
    (root / "seconds").write_text("1.0")
    git("add", "-A")
    git("commit", "-m", "first")
    (root / "seconds").write_text("1.5")
    git("commit", "-am", "second")
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(compare, "COMMAND", (sys.executable, "suite.py"))
    return root


def test_run_compares_with_another_revision(repository, tmp_path, capsys):
    keep = tmp_path / "kept"
    assert main(["run", "--base", "HEAD~1", "--keep", str(keep), "head", "--dtype", "fp32"]) == 1
    assert "slower" in capsys.readouterr().out
    samples = [
        compare.load(keep / f"{name}.json")["groups"][0]["cells"][1]["samples"]
        for name in ("base", "here")
    ]
    assert samples == [[1.0, 1.0], [1.5, 1.5]]
    assert main(["run", "--base", "HEAD", "head"]) == 0
    trees = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True)
    assert trees.stdout.count(b"\n") == 1  # none is left behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "none", "head"], "git worktree: "),
        (["--base", "HEAD", "other"], "ended with 1: no such suite"),
        (["--base", "HEAD"], "expected a suite"),
        (["--base", "HEAD", "--repeats", "0", "head"], "--repeats: expected at least 1, got 0"),
    ],
)
def test_run_says_what_is_wrong(arguments, message, repository, capsys):
    assert_exits(["run", *arguments], message, capsys)
