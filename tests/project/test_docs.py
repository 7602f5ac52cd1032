"""The documentation: its Python runs, its index is whole, its links lead somewhere."""

import doctest
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ift
import ift_kernels
from ift.cli import main
from processes import python

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<source>.*?)^(?P=indent)```$", re.M | re.S)
NO_RUN = re.compile(r"<!-- no-run: (?P<reason>[^>]*\S) -->\n\Z")
NEEDS = re.compile(r"<!-- needs: (?P<module>\w+) -->\n\Z")
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?:#[^)]*)?\)")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    source: str
    line: int  # of its first line in the page, from 1
    reason: str | None  # why it is not run
    needs: str | None  # a module without which it is not run


def blocks(text: str) -> list[Block]:
    """The ```python blocks of a page; ``<!-- no-run: reason -->`` just before one lets it be,
    ``<!-- needs: module -->`` where the module is not installed."""
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start("source")].count("\n")
        flag, needs = (mark.search(text[: match.start()]) for mark in (NO_RUN, NEEDS))
        source = re.sub(f"^{match['indent']}", "", match["source"], flags=re.M)
        found.append(Block(source, before + 1, flag and flag["reason"], needs and needs["module"]))
    return found


def run(block: Block, page: str, names: dict[str, object]) -> None:
    """Execute a block in `names`; one with prompts is a doctest, whose output must match."""
    if ">>> " not in block.source:
        exec(compile("\n" * (block.line - 1) + block.source, page, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block.source, names, page, page, block.line - 1)
    test.globs = names  # the parser copies; later blocks use what this one defines
    told: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=told.append, clear_globs=False)
    assert not told, "".join(told)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page):
    names: dict[str, object] = {}  # blocks of a page build on one another
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.needs is not None and importlib.util.find_spec(block.needs) is not None:
            with torch.compiler.set_stance("force_eager"):  # another package's compiler takes long
                run(block, str(page), names)
        elif block.reason is None and block.needs is None:
            run(block, str(page), names)
        else:
            compile(block.source, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = [
        link["path"]
        for link in LINK.finditer(page.read_text(encoding="utf-8"))
        if not (page.parent / link["path"]).exists()
    ]
    assert not broken


def test_liger_pair_in_tritons_interpreter():
    """The block of docs/coming_from.md whose kernels need a GPU, after those that it builds on."""
    pytest.importorskip("liger_kernel")
    page = ROOT / "docs" / "coming_from.md"
    first, second, *rest = blocks(page.read_text(encoding="utf-8"))
    (liger,) = (block for block in rest if "liger_kernel" in block.source)
    done = python("-c", first.source + second.source + liger.source, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_the_first_run_of_the_readme(tmp_path, monkeypatch):
    """Its third command; `test_packaging` installs. A row that the command was not made for."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, block, _ = text.split("## Your own file, in three commands")[1].split("```", 2)
    *install, command = block.strip().splitlines()
    assert len(install) == 2 and "pip install" in install[-1]
    monkeypatch.chdir(tmp_path)
    row = '{"prompt": "Two and two?", "completion": " Four."}\n'
    (tmp_path / "train.jsonl").write_text(row * 8, encoding="utf-8")
    assert main([*command.split()[1:], "--cpu"]) == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_the_index_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    wanted = [f"ift_kernels.{name}" for name in ift_kernels.__all__]
    wanted += [f"ift.{name}" for name in ift.__all__ if name != "losses"]
    wanted += [f"ift.dynamics.{name}" for name in ift.dynamics.__all__]
    wanted += [f"ift.losses.{name}" for name in ift.losses.__all__]
    assert not [name for name in wanted if f"`{name}`" not in text]


def test_a_block_can_fail():
    page = "```python\nx = 1\n```\n\n<!-- no-run: why -->\n```python\n1 / 0\n```\n"
    page += "```python\n>>> x + 1\n3\n```\n```python\nassert x == 2\n```\n"
    first, unrun, wrong, false = blocks(page)
    assert (unrun.reason, first.reason, false.line) == ("why", None, 14)
    names: dict[str, object] = {}
    run(first, "page", names)
    with pytest.raises(AssertionError, match=r"Expected:\n +3\n +Got:\n +2"):
        run(wrong, "page", names)
    with pytest.raises(AssertionError):
        run(false, "page", names)
