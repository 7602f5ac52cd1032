"""The suites beside `head`: what they measure, what they fit, and what they refuse."""

import argparse
import functools
import itertools
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from running import run

from bench.__main__ import main
from bench.harness import machine, measure
from bench.harness.data import Wrong
from bench.harness.worker import Failed
from bench.peers import heads, peer
from bench.report import tables
from bench.suites import command, e2e, grid, head, losses
from bench.suites.command import SUITES, parse
from processes import HANG, NEVER_ENDS

TINY = e2e.Setting("qwen2", 4, 16, 64, 1, 300, "fp32", "cpu")


# --- shapes and peers -----------------------------------------------------------------------------


def test_shapes_of_models():
    assert grid.shape("llama-3-8b@4096") == (4096, 4096, 128256)
    assert grid.shape("Qwen2.5-0.5B@8") == (8, 896, 151936)
    assert grid.shape("4x8x100") == (4, 8, 100)
    for text in ("llama-3-8b", "llama@4", "llama-3-8b@0", "4x8"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            grid.shape(text)


def test_verl_ignores_what_its_users_mask(monkeypatch):
    """It has no ignored targets of its own; the stand-in is its function in plain torch."""

    class Fused:
        def __call__(self, hidden, weight, target):
            logp = (hidden @ weight.T).log_softmax(-1)
            return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    found = argparse.Namespace(FusedLinearForPPO=Fused)
    monkeypatch.setattr(peer, "optional", lambda name: (found, ""))
    hidden, weight = torch.randn(6, 8), torch.randn(20, 8)
    target = torch.tensor([1, -100, 3, -100, 5, 6])
    verl, naive = heads.PEERS["verl"], heads.PEERS["naive"]
    torch.testing.assert_close(
        verl.logprob(hidden, weight, target), naive.logprob(hidden, weight, target)
    )
    torch.testing.assert_close(
        verl.loss(hidden, weight, target), naive.loss(hidden, weight, target)
    )


# --- the clock of a GPU, played by a counter ------------------------------------------------------


def test_gpu_calls_are_timed_by_events_with_cold_caches(monkeypatch):
    elapsed, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = elapsed[0]
            order.append("mark")

        def elapsed_time(self, end):
            return end.at - self.at

    class Cold:
        def zero_(self):
            elapsed[0] += 100.0  # must not be counted
            order.append("cold")

    def call():
        elapsed[0] += 7.0
        order.append("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(measure, "_cold", lambda device: Cold())
    device = torch.device("cuda")
    subject = measure.Subject(call, call, lambda result: {}, device)
    ticks = itertools.count()
    monkeypatch.setattr(machine, "now", lambda: next(ticks) / 64)  # the host's
    seconds, host = measure._time(subject, 3)
    assert seconds == pytest.approx(7e-3) and host == 1 / 64  # of the first call alone
    assert order == ["wait", *["cold", "mark", "call", "mark"] * 3, "wait"]
    order.clear()
    # Three readings, two calls.
    assert measure._time(subject._replace(host=True), 2) == (1 / 64, None)
    assert order == ["wait", "call", "call", "wait"]
    assert measure.seconds(subject, 4) == pytest.approx(7e-3)


@pytest.mark.parametrize("kind", ["works", "raises", "is wrong"])
def test_on_a_gpu_cells_share_a_process_and_leave_nothing(kind, monkeypatch):
    """Peaks are those of torch's allocator, here made up, over what earlier cells still hold."""
    log = []
    held = [0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held[0] + 4096)
    monkeypatch.setattr(measure, "_device_time", lambda subject, repeats: (0.25, 0.125))
    alive = []

    class Data:
        pass

    def prepare(name):
        made = Data()
        alive.append(weakref.ref(made))
        held[0] += 1000

        def call():
            assert made is not None and os.getpid() == process
            if kind == "raises":
                raise RuntimeError("out of memory")
            return torch.ones(8)

        def check(result):
            if kind == "is wrong":
                raise Wrong("loss: not finite")
            return {"loss": 0.0}

        return measure.Subject(call, call, check, torch.device("cuda"))

    process = os.getpid()
    cells = [measure.Cell("g", "c", name, prepare, (name,), 0.1) for name in ("ours", "naive")]
    settings = measure.Settings(1, 2, HANG, in_process=True, budget=machine.Budget(60 * HANG))
    measure.measure(cells, settings, argparse.Namespace(at=lambda _: None, advance=lambda _: None))
    reasons = {"works": "", "raises": "RuntimeError: out of memory",
               "is wrong": "wrong result: loss: not finite"}  # fmt: skip
    assert [cell.reason for cell in cells] == [reasons[kind]] * 2
    if kind == "works":
        assert [cell.extra_bytes for cell in cells] == [4096 - 32] * 2
        assert cells[0].record()["host_seconds"] == 0.125 and cells[0].samples == [0.25] * 2
    assert len(alive) == 2  # a subject serves memory and time
    assert not [ref for ref in alive if ref() is not None] and log[-1] == "empty"


def test_what_is_measured_is_written_after_each_group(tmp_path, monkeypatch):
    """Whatever ends the run."""
    suite = SUITES["overhead"]

    def stops(*given):
        for name in ("first", "second"):
            yield measure.record(name, [1], "fp32", [], {})
        raise MemoryError

    monkeypatch.setitem(SUITES, "overhead", suite._replace(run=stops))
    file = tmp_path / "found.json"
    with pytest.raises(MemoryError):
        main(["overhead", "--json", str(file)])
    found = tables.collect(tmp_path)[0].report
    assert [group["name"] for group in found["groups"]] == ["first", "second"]


# --- masked, scaling, overhead --------------------------------------------------------------------


def test_masked_leaves_out_what_is_ignored(tmp_path):
    path = str(tmp_path / "inputs.pt")
    grid.make_groups((200, 16, 300), {"fp32": path}, False)
    masks = [grid.inputs(path, head.MASKED["scalar", share], "cpu").target == -100
             for share in head.SHARES]  # fmt: skip
    shares = [float(mask.float().mean()) for mask in masks]
    assert shares[0] == 0.0
    assert all(abs(got - want / 100) < 0.1 for got, want in zip(shares, head.SHARES, strict=True))


def test_masked_end_to_end(tmp_path, capsys):
    found = run(
        tmp_path, "masked", "--shapes", "40x16x300", "--dtype", "fp32", "--kinds", "per-token",
        "--implementations", "floor", "ours", "active", "naive", "quack",
        "--plot", str(tmp_path / "a.png"),
    )  # fmt: skip
    (group,) = found["groups"]
    assert group["titles"].keys() == {f"per-token {share} %" for share in head.SHARES}
    assert len(group["cells"]) == 16 and not [c for c in group["cells"] if c["reason"]]
    assert all(reasons.keys() == {"quack"} for reasons in group["absent"].values())
    assert group["axes"][0]["points"]["per-token 60 %"] == 60
    assert (tmp_path / "a-curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent(power):
    sizes = [64.0, 128.0, 512.0]
    assert head.exponent(sizes, [3 * s**power for s in sizes]) == pytest.approx(power)
    assert head.exponent([64.0, 64.0], [1.0, 2.0]) is None


def test_scaling_end_to_end(tmp_path, capsys):
    found = run(
        tmp_path, "scaling", "--base", "32x32x400", "--dtype", "fp32", "--axes", "V",
        "--implementations", "ours", "naive",
    )  # fmt: skip
    (group,) = found["groups"]
    points = group["axes"][0]["points"]
    assert list(points.values()) == [100, 200, 400, 800]
    for fit in group["fits"]:
        cells = [c for c in group["cells"] if c["implementation"] == fit["implementation"]]
        times = [c["seconds"] for c in cells]
        assert [c["case"] for c in cells] == list(points) and fit["axis"] == "V"
        assert fit["seconds"] == head.exponent(list(points.values()), times)
    assert "time grows as V^" in capsys.readouterr().out


def test_points_along_an_axis():
    found = head.along((8, 64, 1000), "D", "scalar")
    assert [*found.values()] == [(8, 16, 1000), (8, 32, 1000), (8, 64, 1000), (8, 128, 1000)]
    assert [case.name for case in found] == [f"scalar D={size}" for size in (16, 32, 64, 128)]


def test_grid_refuses_wrong_results_of_any_case(tmp_path):
    path = str(tmp_path / "inputs.pt")
    grid.make_groups((40, 16, 300), {"fp32": path}, True)
    case = head.MASKED["per-token", 60]
    for name in ("ours", "active"):
        subject = grid.prepare(path, case, name, "cpu")
        value, d_hidden, d_weight = subject.call()
        assert subject.check((value, d_hidden, d_weight))
        with pytest.raises(Wrong, match="d weight"):
            subject.check((value, d_hidden, 2 * d_weight))


# --- training steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", e2e.CASES)
def test_a_step_is_the_one_people_write(name):
    """In float32, with a reference that differs; then both trainers go three steps alike."""
    found = e2e.deviation(TINY, e2e.CASES[name])
    assert found.keys() == {"loss", "gradient"} and max(found.values()) < 1e-4
    both = []
    for implementation in ("ours", "naive"):
        trainer = e2e.Trainer(TINY, e2e.CASES[name], implementation)
        given = e2e.batch(TINY, TINY.rows)
        both.append(torch.stack([trainer.step(given) for _ in range(3)]))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    assert both[0][2] != both[0][0]  # the optimizer moved the weights


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_other_architectures(architecture):
    setting = replace(TINY, architecture=architecture)
    assert max(e2e.deviation(setting, e2e.CASES["ift"]).values()) < 1e-3


@pytest.mark.parametrize("name", ["sft", "ift"])
@pytest.mark.parametrize("length", [16, 32])
def test_packed_rows_are_the_rows(name, length):
    """Ours gets the documents in one row, the step that people write has them below each other."""
    setting = replace(TINY, packed=True, rows=3, length=length)
    assert max(e2e.deviation(setting, e2e.CASES[name]).values()) < 1e-4
    packed = e2e.pack(e2e.batch(setting, 3))
    assert packed["input_ids"].shape == (1, 3 * length)
    assert packed["position_ids"][0, length] == 0


def test_a_wrong_step_is_refused(monkeypatch):
    ours = e2e.STEPS["sft", "ours"]

    def wrong(*given):
        return 1.01 * ours(*given)

    monkeypatch.setitem(e2e.STEPS, ("sft", "ours"), wrong)
    subject = e2e.prepare(TINY, "sft", "ours")
    with pytest.raises(Wrong, match="loss: 0.01 from the step"):
        subject.check(subject.call())
    with pytest.raises(Wrong, match="loss: not finite"):
        subject.check(torch.tensor(torch.nan))


def test_e2e_end_to_end(tmp_path, capsys):
    found = run(
        tmp_path, "e2e", "--rows", "2", "--length", "16", "--hidden", "64", "--layers", "1",
        "--vocabulary", "300", "--cases", "ift", "--memory", "0.5", "--most", "2",
    )  # fmt: skip
    (group,) = found["groups"]
    assert [c["implementation"] for c in group["cells"]] == ["ours", "two-passes", "naive"]
    for cell in group["cells"]:
        assert cell["tokens_per_second"] == pytest.approx(32 / cell["seconds"])
        assert cell["largest"]["rows"] == 2 and cell["largest"]["capped"]
    assert "tokens/s; most rows in 0.5 GiB: ≥ 2" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--rows", "3"), ("--hidden", "65"), ("--length", "4")])
def test_e2e_refuses(option, capsys):
    with pytest.raises(SystemExit, match=f"{option[0]}.*got.*{option[1]}"):
        main(["e2e", *option])


@pytest.mark.parametrize(
    ("memory", "rows", "capped"),
    [(75, 6, False), (10, 0, False), (10_000, 20, True), (20, 2, False)],
)
def test_largest_batch(memory, rows, capped, monkeypatch):
    asked = []

    def peak(prepare, arguments, settings):
        asked.append(arguments[0])
        return 10 * arguments[0]

    monkeypatch.setattr(e2e, "peak_bytes", peak)
    found = e2e.largest(lambda n: (n,), memory, measure.Settings(1), most=20)
    assert (found["rows"], found["capped"]) == (rows, capped)
    assert len(set(asked)) == len(asked) == len(found["tried"])


def test_a_batch_that_fails_does_not_fit(monkeypatch):
    def peak(prepare, arguments, settings):
        if arguments[0] > 4:
            raise Failed("its process was killed by signal 9, out of memory?")
        return 1

    monkeypatch.setattr(e2e, "peak_bytes", peak)
    found = e2e.largest(lambda n: (n,), 10, measure.Settings(1), most=64)
    assert found["rows"] == 4 and not found["capped"]
    assert "signal 9" in found["tried"]["8"]


# --- losses ---------------------------------------------------------------------------------------

LOSS_SHAPE = (4, 3, 8, 50)


@pytest.mark.parametrize("case", losses.CASES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_losses_are_the_naive_form(case, dtype):
    ours, naive = (
        losses.prepare(case, name, dtype, LOSS_SHAPE, "cpu") for name in ("ours", "naive")
    )
    loss, *gradients = result = ours.call()
    found = ours.check(result)
    assert set(found) == {"loss", "d hidden", "d weight"}
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    with pytest.raises(Wrong, match="from the naive form"):
        ours.check((loss, gradients[0], 1.5 * gradients[1]))
    assert naive.check(naive.call()) == {}
    ours.warm()


def test_the_shape_of_losses_is_checked():
    assert losses._shape("8x64x896x151936") == losses.SHAPE
    for text in ("8x64", "3x4x5x6", "axbxcxd"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected RxTxDxV|an even number"):
            losses._shape(text)


# --- quick ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", command.PARTS, ids=lambda part: part.suite)
def test_parts_are_understood(part):
    assert parse([part.suite, *part.options.split()]).suite == part.suite


def test_the_quick_run_has_every_suite_within_its_time():
    assert {part.suite for part in command.PARTS} == set(SUITES)
    assert sum(part.share for part in command.PARTS) == pytest.approx(1.0)


def test_the_quick_run_ends_in_a_page_and_names_what_failed(tmp_path, monkeypatch, capsys):
    def here(command, seconds):  # a process of its own would import everything again
        try:
            return main(command[3:])
        except SystemExit as end:
            return end.code

    monkeypatch.setattr(command, "run_suite", here)
    monkeypatch.setattr(machine, "now", lambda: 0.0)  # no time passes, on the busiest machine
    options = " ".join(["--kinds greedy --implementations ours naive --dtype fp32", *NEVER_ENDS])
    parts = (command.Part("overhead", 0.9, options), command.Part("head", 0.1, "--shapes 1"))
    (tmp_path / "old.json").write_text("{}")
    assert command.run_short(parts, tmp_path, 0.2, 1) == {"head": "failed"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "greedy N=16" in page and page.count("data:image/png;base64,") >= 1
    assert not (tmp_path / "old.json").exists()


def test_the_quick_run_keeps_its_time(tmp_path, monkeypatch):
    """A suite that takes all of it is interrupted, and those after it are not begun."""
    called = []

    def slow(command, seconds):
        called.append((command[3], seconds))
        now[0] += seconds
        return 130

    now = [100.0]
    monkeypatch.setattr(machine, "now", lambda: now[0])
    monkeypatch.setattr(command, "run_suite", slow)
    missing = command.run_short(command.PARTS, tmp_path, 2.0, 1)
    assert missing == {part.suite: "out of time" for part in command.PARTS}
    assert called == [(command.PARTS[0].suite, pytest.approx(command.LAST * 120))]


def test_suites_share_what_is_left(tmp_path, monkeypatch):
    """What one leaves goes to those after it; one that takes more takes it from them."""
    given = []

    def suite(command, seconds):
        given.append(60 * float(command[command.index("--minutes") + 1]))
        now[0] += (0.0, 84.0, 10.0)[len(given) - 1]
        return 0

    now = [0.0]
    monkeypatch.setattr(machine, "now", lambda: now[0])
    monkeypatch.setattr(command, "run_suite", suite)
    parts = [command.Part(name, share) for name, share in (("a", 0.5), ("b", 0.25), ("c", 0.25))]
    assert command.run_short(parts, tmp_path, 2.0, 1) == {}
    assert given == pytest.approx([51.0, 51.0, 18.0], abs=0.05)  # of 102 s, 102 s and 18 s


def test_the_quick_run_ends_when_it_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_suite", lambda command, seconds: 130)
    first, second, *_ = command.PARTS
    assert command.run_short((first, second), tmp_path, 1.0, 1) == {
        first.suite: "interrupted", second.suite: "interrupted"
    }  # fmt: skip
    assert command.quick(["--output", str(tmp_path)]) == 130


@pytest.mark.parametrize("ends", [True, False], ids=["writes", "hangs"])
def test_a_suite_is_interrupted_when_its_time_is_over(ends, tmp_path, monkeypatch):
    """It may write what it has; one that does not end is killed. A shell's background jobs ignore
    SIGINT, and so would their children."""
    up, written = tmp_path / "up", tmp_path / "written"
    os.mkfifo(up)
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.{"default_int_handler" if ends else "SIG_IGN"})
try:
    open({str(up)!r}, "w").close()
    while True: pass
except KeyboardInterrupt: open({str(written)!r}, "w").close()
"""
    codes = []

    class Process(subprocess.Popen):
        """The suite's time is over once it is up; that to write only if it never ends."""

        def wait(self, timeout=None):
            if timeout == 7.0:
                up.read_text()
            if timeout == 7.0 or (timeout == command.PATIENCE and not ends):
                raise subprocess.TimeoutExpired(self.args, timeout)
            codes.append(super().wait(HANG))
            return codes[-1]

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert command.run_suite([sys.executable, "-c", code], 7.0) in command.INTERRUPTED
    assert codes == [0 if ends else -signal.SIGKILL] and written.exists() == ends


def test_a_suite_that_ends_in_time_gives_its_code():
    assert command.run_suite([sys.executable, "-c", "raise SystemExit(3)"], HANG) == 3


def test_largest_is_asked_for_rows_of_the_same_setting():
    arguments = functools.partial(e2e._with_rows, TINY, "sft", "ours")(6)
    assert arguments == (replace(TINY, rows=6), "sft", "ours")
