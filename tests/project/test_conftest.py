"""What all tests lean on: fresh memory that can fail them, and no clock that can."""

import re
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_unwritten_floats_are_nan(dtype):
    x = torch.zeros(3, 5, dtype=dtype)
    fresh = [
        torch.empty(7, dtype=dtype),
        torch.empty_like(x),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        x.new_empty(4),
        x.new_empty_strided((2, 3), (3, 1)),
    ]
    assert all(memory.isnan().all() for memory in fresh)
    assert torch.empty(3, requires_grad=True).requires_grad


def test_unwritten_integers_are_out_of_range():
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_compiled_code_still_traces():
    function = torch.compile(
        lambda x: torch.empty_like(x).copy_(x), fullgraph=True, backend="eager"
    )
    assert torch.equal(function(torch.ones(3)), torch.ones(3))


# A clock, a sleep, or a limit that a busy machine may reach. A test counts, puts a counter in place
# of `bench.harness.machine.now`, gives what never ends a limit of 0, and all else HANG seconds.
CLOCKS = re.compile(
    r"\bimport time\b|\bfrom time import|\btime(?:it)?\.\w+\(|perf_counter|monotonic\("
    r"|datetime\.now|\bsleep\(|\b(?:timeout|timedelta\(seconds)=(?P<seconds>[\d.]+)"
)
SHORT = 600  # seconds that a busy machine may need for a test
READERS = {
    "test_cli.py": "waits for a file of another process; its deadline only ends a hang",
    "test_conftest.py": "this list",
}


def clocks(text):
    """What reads a clock in the source of a test."""
    return [
        found[0]
        for found in CLOCKS.finditer(text)
        if not found["seconds"] or 0 < float(found["seconds"]) < SHORT
    ]


def test_no_test_reads_a_clock():
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    found = {file.name: clocks(file.read_text(encoding="utf-8")) for file in files}
    assert len(files) > 60
    assert {name: some for name, some in found.items() if some and name not in READERS} == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [("import time", 1), ("from time import sleep", 1), ("code = 'time.sleep(1)'", 1),
     ("start = perf_counter()", 1), ("run(command, timeout=30)", 1), ("timedelta(seconds=60)", 1),
     ("p.wait(timeout=0.5)", 1),
     ("timeout=HANG, timeout=0, timeout=600, minutes=1, seconds=1.5, at a time (t)", 0)],
)  # fmt: skip
def test_clocks_are_seen(text, count):
    assert len(clocks(text)) == count
    assert clocks(f"{text} {text}") == 2 * clocks(text)
