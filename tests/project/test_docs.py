"""The documentation: its Python runs, its index is whole, its links lead somewhere."""

import doctest
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import ift
import ift_kernels

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<source>.*?)^(?P=indent)```$", re.M | re.S)
NO_RUN = re.compile(r"<!-- no-run: (?P<reason>[^>]*\S) -->\n\Z")
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?:#[^)]*)?\)")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    source: str
    line: int  # of its first line in the page, from 1
    reason: str | None  # why it is not run


def blocks(text: str) -> list[Block]:
    """The ```python blocks of a page; ``<!-- no-run: reason -->`` just before one lets it be."""
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start("source")].count("\n")
        flag = NO_RUN.search(text[: match.start()])
        source = re.sub(f"^{match['indent']}", "", match["source"], flags=re.M)
        found.append(Block(source, before + 1, flag and flag["reason"]))
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
        if block.reason is None:
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
