"""`python -m bench device`: a dry run of all of it; what survives a hang, a crash and a kill."""

import json
import os
import signal
import sys

import pytest
import torch

from bench.gpu import device, device_cells, device_run
from bench.harness import measure
from bench.harness.data import Wrong
from bench.harness.machine import ROOT, Budget
from bench.harness.worker import Failed, Worker
from bench.peers import heads
from bench.suites import grid, head
from ift.files import JsonlLog
from ift_kernels import backends
from processes import HANG, SETTINGS, python

NEVER = Budget(60.0 * HANG)
ABOUT = {"sources": "one"}


def lines(path):
    """The results in a log, without the lines that begin something."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["phase"] != "run" and "begun" not in row]


# --- the whole way --------------------------------------------------------------------------------


# The process that measures. Importing all of it must not touch a GPU: workers are forks of a
# process that has done so, and a fork could not use it.
MEASURES = """
import sys
import torch

def refuse(*given):
    raise SystemExit("CUDA was initialised")

torch.cuda._lazy_init = refuse
import bench.gpu.tune, ift, ift_kernels
from bench.__main__ import main

assert main(["--list"]) == 0
code = main(["device", "--until=1e12", *sys.argv[1:]])
assert not torch.cuda.is_initialized()
sys.exit(code)
"""


@pytest.mark.usefixtures("triton_interpreter")
def test_dry_run(tmp_path):
    """Every phase, with Triton interpreted; nothing fails, and `bench report` could read it."""
    options = ["--dry-run", "--plot", "--output", tmp_path]
    first = {"TRITON_INTERPRET": "1"}  # else --list would import Triton without it
    done = python("-c", MEASURES, *options, cwd=ROOT, without=SETTINGS, **first)
    assert done.returncode == device.DONE, done.stdout + done.stderr
    assert "faster, for ift_kernels/backends/selection.py: {" in done.stdout
    found = lines(tmp_path / "device.jsonl")
    assert not [row for row in found if row["reason"]]
    planned = sum(len(phase.cells) for phase in device_cells.phases(True))
    assert len(found) > planned  # here Triton is not interpreted, so it is in no plan
    right = [row for row in found if row["phase"] == "correctness"]
    assert {row["implementation"] for row in right} == {"triton"}
    assert all(row["errors"]["calls"] > 0 for row in right)
    late = next(row for row in right if row["case"] == "per-token bf16")
    assert late["errors"]["backward calls"] > 0
    timed = [row for row in found if row["phase"] != "correctness"]
    assert {row["phase"] for row in timed} == {"head", "epilogues", "steps", "losses"}
    assert all(row["seconds"] > 0 for row in timed)
    shares = [row["errors"]["share"] for row in timed if row["implementation"] == "active"
              and row["case"] in ("per-token", "per-token-frozen")]  # fmt: skip
    assert len(shares) == 2 and all(0 < share <= 1 for share in shares)
    files = {file.name for file in tmp_path.iterdir()}
    suites = {"head", "losses", "e2e"}
    wanted = {f"{name}.{end}" for name in suites for end in ("json", "png")} | {"device.jsonl"}
    assert files == wanted and len(files) <= 8
    for source in device_run.tables.collect(tmp_path):
        assert source.report["suite"] in suites and source.report["groups"]
    packed = [g for g in json.loads((tmp_path / "e2e.json").read_text())["groups"]
              if "packed" in g["name"]]  # fmt: skip
    assert [c["tokens_per_second"] > 0 for c in packed[0]["cells"]] == [True] * 4


@pytest.mark.parametrize("case", ["per-token", "scalar", "statistics"])
def test_a_backend_that_does_not_serve_is_wrong(case, monkeypatch):
    cpu, reference = (backends.BACKENDS[name] for name in ("cpu", "reference"))
    if cpu.unsupported_reason(torch.device("cpu"), torch.float32):
        pytest.skip("needs the C++ extension")
    arguments = (grid.Made((6, 8, 40), "fp32"), head.CASES[case], "ours", "cpu")
    subject = device_cells.served_by("cpu", grid.prepare, arguments)
    errors = subject.check(subject.call())
    assert errors["calls"] > 0 and (errors["backward calls"] > 0 or case != "per-token")
    # One that hands its work on, as silently as it gets.
    monkeypatch.setattr(cpu, "stats_update", lambda *given: reference.stats_update(*given))
    with pytest.raises(Wrong, match="cpu was asked for; served"):
        subject.check(subject.call())


def test_the_first_waves_are_what_90_and_330_seconds_buy():
    planned = []
    for name, cases in (("head", device_cells.MAIN), ("losses", ("sft", "kto"))):
        cells = [
            measure.Cell(name, case, implementation, None, (), 0.1)
            for case in cases for implementation in ("liger", "trl", "naive", "ours")
        ]  # fmt: skip
        planned.append(device_cells.Phase(name, {"name": name}, cells))
    order = [(p.name, c.case, c.implementation) for p, c in device_cells.ordered(planned)]
    first = [("head", case, name) for case in device_cells.MAIN for name in ("naive", "ours")]
    second = [("head", case, "liger") for case in device_cells.MAIN[:2]]
    second += [("losses", "sft", name) for name in ("naive", "ours")]
    assert order[: len(first)] == first
    assert order[len(first) : len(first) + len(second)] == second
    assert len(order) == 24 and ("losses", "kto", "ours") in order[-14:]
    assert set(device_cells.PEERS) <= set(heads.PEERS)


# --- what survives --------------------------------------------------------------------------------


def fake(kind):
    """A subject that works, is wrong, hangs, or takes its process along."""

    def call():
        if kind == "hangs":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            signal.pause()
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "fails":
            raise RuntimeError("out of memory")
        return torch.ones(2)

    def check(result):
        if kind == "wrong":
            raise Wrong("loss: error 1")
        return {"loss": 0.0}

    return measure.Subject(call, lambda: None, check, torch.device("cpu"))


def plan(kinds):
    cells = [measure.Cell("g", f"{at} {kind}", "ours", fake, (kind,), 1e-6, memory=False)
             for at, kind in enumerate(kinds)]  # fmt: skip
    return device_cells.Phase("fake", measure.record("g", [1], "fp32", [], {}), cells, rounds=1)


def child(folder, kinds, after, about=ABOUT):
    """A process that measures; the guard's time is over at once where one hangs."""
    torch.set_num_threads(1)
    phase, log = plan(kinds), JsonlLog(device_run.Path(folder) / "device.jsonl")
    for cell in phase.cells:
        cell.compiled = "hangs" in cell.case  # has a limit of its own
    return device_run.run(device_cells.ordered([phase]), log, about, Budget(60.0 * HANG), after,
                          limits=(HANG, 1e-3))  # fmt: skip


def supervised(folder, kinds, about=ABOUT, most=9):
    """Exit codes of processes, one after the other, as `device.supervise` starts them."""
    codes = []
    while len(codes) < most:
        with Worker(1) as worker:
            try:
                codes.append(worker.call(child, str(folder), kinds, (codes or [None])[-1], about))
            except Failed:
                codes.append(worker._process.exitcode)
        if codes[-1] in (device.DONE, device.FAILED, device.UNUSABLE):
            break
    return codes


KINDS = ("works", "hangs", "works", "wrong", "dies", "fails", "works")


def test_nothing_is_lost_by_a_hang_a_crash_or_a_kill(tmp_path):
    file = tmp_path / "device.jsonl"
    # The first process ends in the hang: what was measured is there, on whole lines.
    assert supervised(tmp_path, KINDS, most=1) == [1]
    assert [row["case"] for row in lines(file)] == ["0 works"]
    with file.open("a", encoding="utf-8") as log:
        log.write('{"step": 3, "phase": "fa')  # the machine died while it wrote
    # A new run goes on: what hung is tried again, since someone may have mended it.
    assert supervised(tmp_path, KINDS) == [1, -signal.SIGKILL, device.FAILED]
    found = lines(file)
    assert [row["case"] for row in found] == [f"{at} {kind}" for at, kind in enumerate(KINDS)]
    reasons = {row["case"][2:]: row["reason"] for row in found}
    assert reasons == {
        "works": "", "hangs": "its process hung and was ended",
        "wrong": "wrong result: loss: error 1", "dies": "its process was killed by signal 9",
        "fails": "RuntimeError: out of memory",
    }  # fmt: skip
    # Another run tries again what failed, and nothing else; all of it after a change of sources.
    before = len(lines(file))
    assert supervised(tmp_path, ("works", "works", *KINDS[2:5])) == [-signal.SIGKILL, device.FAILED]
    assert [row["case"] for row in lines(file)[before:]] == ["1 works", "3 wrong", "4 dies"]
    before = len(lines(file))
    assert supervised(tmp_path, ("works",), {"sources": "two"}) == [device.DONE]
    assert [row["case"] for row in lines(file)[before:]] == ["0 works"]


def test_a_process_that_ends_before_it_measures_is_not_started_again(tmp_path, capsys):
    log = JsonlLog(tmp_path / "device.jsonl")
    assert device_run.run([], log, ABOUT, NEVER) == device.DONE
    assert device_run.run([], log, ABOUT, NEVER, after=1) == device.UNUSABLE
    assert "ended with 1 before it measured" in capsys.readouterr().err
    assert device_run.run([], log, ABOUT, NEVER, after=device.RENEW) == device.DONE


def test_a_gpu_that_does_not_answer_gets_a_new_process(tmp_path, monkeypatch):
    log, phase = JsonlLog(tmp_path / "device.jsonl"), plan(("works", "works"))
    cells = device_cells.ordered([phase])
    monkeypatch.setattr(device_run, "answers", lambda: False)
    monkeypatch.setattr(device_run.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    assert device_run.run(cells, log, ABOUT, NEVER) == device.RENEW
    monkeypatch.undo()
    monkeypatch.setattr(device_run.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    assert device_run.run(cells, log, ABOUT, NEVER, device.RENEW) == device.DONE
    assert [row["case"] for row in lines(log.path)] == ["0 works", "1 works"]


def test_an_error_outside_a_measurement_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(device_run, "main", lambda options: 1 // 0)
    assert device.main(["--until", "0"]) == device.UNUSABLE
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_no_time_is_begun_that_is_not_left(tmp_path, capsys):
    log = JsonlLog(tmp_path / "device.jsonl")
    cells = device_cells.ordered([plan(("works", "works"))])
    assert device_run.run(cells, log, ABOUT, Budget(0.0)) == device.FAILED
    assert "no time was left for 2 measurements" in capsys.readouterr().out
    assert lines(log.path) == []


@pytest.mark.parametrize(
    ("codes", "seconds", "code"),
    [
        ((0,), 0, 0), ((3,), HANG, 1), ((4,), HANG, 1), ((2,), HANG, 1), ((1, 5, 0), HANG, 0),
        ((-9, 1, 3), HANG, 1), ((1,), 0, 1),
    ],
)  # fmt: skip
def test_the_process_that_measures_is_started_again(codes, seconds, code, tmp_path, monkeypatch):
    """With the code that the last one ended with, until it gets to its end or time is over."""
    monkeypatch.setattr(signal, "signal", lambda *given: None)  # of pytest's own process
    script = f"""
import os, sys, json
path = {str(tmp_path / "calls")!r}
open(path, "a").write(json.dumps(sys.argv[1:]) + "\\n")
code = {list(codes)!r}[len(open(path).readlines()) - 1]
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""
    assert device.supervise([sys.executable, "-c", script], seconds) == code
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[1:] for call in calls] == [
        [], *([f"--after={before}"] for before in codes[:-1])
    ]  # fmt: skip
    assert all(call[0].startswith("--until=") for call in calls)


def test_backends_that_are_faster():
    def cell(case, implementation, seconds):
        return {"case": case, "implementation": implementation, "seconds": seconds,
                "samples": [seconds] if seconds else []}  # fmt: skip

    cells = [
        cell("scan", "floor-copy", 0.1), cell("scan", "triton", 2.0), cell("scan", "cuda", 1.0),
        cell("scan", "reference", 9.0), cell("dlogits_", "triton", 1.0),
        cell("dlogits_", "cuda", 0.99), cell("residual", "triton", None),
        cell("residual", "cuda", 1.0),
    ]  # fmt: skip
    assert device_run.faster(cells) == {"scan": "cuda"}
