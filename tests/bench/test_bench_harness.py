"""The benchmark harness: that it measures what it says, and refuses what is wrong."""

import json
import os
import re
import signal
import socket
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from running import assert_exits, run

from bench.__main__ import main
from bench.harness import data, machine, measure
from bench.harness.machine import Budget
from bench.harness.worker import Failed, InProcess, Worker
from bench.peers import heads, peer
from bench.report import pictures, tables
from bench.suites import grid, head
from processes import HANG

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- LM-like data ---------------------------------------------------------------------------------


def test_lmlike_survives_as_published():
    """The three figures of Qwen2.5-0.5B, at its vocabulary."""
    found = data.survival(data.generate(512, 64, 151936))
    assert found["above"] == pytest.approx(data.PUBLISHED["above"], rel=0.1)
    assert found["natural"] == pytest.approx(data.PUBLISHED["natural"], abs=0.04)
    assert found["permuted"] == pytest.approx(data.PUBLISHED["permuted"], abs=0.006)
    assert 0.02 < found["k"] < 0.06
    assert 1.5 < found["loss"] < 3.0  # nats; what fine-tuned models have


def test_lmlike_in_another_width_and_seed():
    """Its look depends on neither, and rounding to bf16 does not change it."""
    figures = [
        data.survival(data.generate(1024, width, 8192, seed=seed, dtype=dtype))
        for width, seed, dtype in [(64, 0, torch.float32), (256, 1, torch.bfloat16)]
    ]
    for name in ("above", "natural", "k", "loss"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=0.2), name


def test_survival_of_data_that_is_known():
    """Two ids of 256 share the probability: 1/128 of it all, in one tile of two."""
    hidden = torch.ones(128, 8)
    weight = torch.full((256, 8), -10.0)
    weight[[3, 100]] = 10.0
    found = data.survival(data.Data(hidden, weight, torch.full((128,), 3)))
    assert found["above"] == found["k"] == 2 / 256
    assert found["natural"] == 0.5
    assert found["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item())


def test_lmlike_is_reproducible_and_refuses_no_room():
    first, again = (data.generate(40, 16, 500, seed=7) for _ in range(2))
    assert all(torch.equal(getattr(first, k), getattr(again, k)) for k in vars(first))
    assert first.hidden.shape == (40, 16) and first.weight.shape == (500, 16)
    with pytest.raises(ValueError, match="width: expected at least 8, got 4"):
        data.generate(40, 4, 500)


# --- workers and memory ---------------------------------------------------------------------------


def take(mebibytes, returned):
    """What a call that needs so much, and returns some of it, is seen to take."""

    def call():
        result = torch.ones(returned << 18)
        torch.ones(mebibytes << 18).sum()
        return {"result": [result, result.view(-1)]}

    with machine.freed_at_once():
        call()  # memory that was used before must not hide what is used again
        return machine.observe(call, torch.device("cpu")).extra_bytes


@linux
@pytest.mark.parametrize(("mebibytes", "returned"), [(96, 8), (8, 96), (20, 0)])
def test_memory_is_what_is_taken_over_what_is_returned(mebibytes, returned):
    with Worker(2) as worker:
        extra = worker.call(take, mebibytes, returned)
    assert extra / 2**20 == pytest.approx(mebibytes, abs=1)


def hang():
    signal.pause()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def threads():
    print("what peers print goes nowhere")
    return torch.get_num_threads()


def test_worker_answers_and_fails_in_one_line(capfd):
    with Worker(1) as worker:
        assert worker.call(threads) == 1
        assert worker.call(divmod, 7, 2) == (3, 1)
        with pytest.raises(Failed, match=r"^ZeroDivisionError: .*$"):
            worker.call(divmod, 7, 0)
        assert worker.call(divmod, 9, 2) == (4, 1)  # still there
    assert capfd.readouterr().out == ""


# The limit of what never ends is 0: it is over on any machine. The other is never reached.
@pytest.mark.parametrize(
    ("function", "limit", "reason"),
    [(hang, 0, "took longer than 0 s"), (die, HANG, "killed by signal 9")],
)
def test_worker_that_hangs_or_dies(function, limit, reason, monkeypatch):
    monkeypatch.setattr("bench.harness.worker.PATIENCE", 0.1)
    with Worker(1) as worker, pytest.raises(Failed, match=reason):
        worker.call(function, limit=limit)
    assert worker._process.exitcode == -signal.SIGKILL


def test_calls_in_this_process_fail_in_one_line():
    with InProcess() as worker:
        assert worker.call(os.getpid, limit=0) == os.getpid()
        with pytest.raises(Failed, match=r"^ZeroDivisionError: .*$") as failed:
            worker.call(divmod, 7, 0)
    assert failed.value.__context__ is None  # which would hold on to the tensors of its frames


# --- how much is measured -------------------------------------------------------------------------


def test_rounds_fill_the_budget():
    costs, least = [0.001, 1.0, 1.0, 40.0], [1, 1, 1, 0]
    assert measure.rounds(costs, [1, 1, 2, 1], least, 5, 1000) == [5, 5, 5, 5]
    assert measure.rounds(costs, [1, 1, 2, 1], least, 5, 9.0) == [5, 3, 5, 0]
    assert measure.rounds(costs, [1, 1, 1, 1], least, 5, 0.0) == [1, 1, 1, 0]  # never none
    assert measure.rounds([], [], [], 5, 10.0) == []


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (2, 5), (3, 7), (5, 5)])
def test_samples_are_spread_over_the_rounds(count, most):
    turns = [turn for turn in range(most) if measure.due(turn, count, most)]
    assert len(turns) == count
    gaps = [b - a for a, b in pairwise(turns)]
    assert not gaps or max(gaps) - min(gaps) <= 1


class Silent:
    def at(self, what): ...
    def advance(self, share): ...


def subject(kind):
    """What a peer may be like; in the process that measures, only calls advance the clock."""
    if kind == "absent":
        raise RuntimeError("does not build")
    seconds = [0.0]
    machine.now = lambda: seconds[0]

    def call():
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        seconds[0] += {"long": 70.0, "slow": 2.0 * HANG}.get(kind, 0.01)
        return torch.ones(3)

    def check(result):
        if kind == "wrong":
            raise data.Wrong("logprob: error 1, more than 0.001 is wrong")
        return {"logprob": 0.0}

    return measure.Subject(call, lambda: None, check, torch.device("cpu"), kind == "compiled")


def test_only_what_is_right_gets_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "now", lambda: 0.0)  # here, no time passes: the budget is whole
    kinds = ("right", "compiled", "long", "wrong", "slow", "dies", "absent")
    cells = [measure.Cell("g", "case", kind, subject, (kind,), 0.01) for kind in kinds]
    log = tmp_path / "log.jsonl"
    settings = measure.Settings(1, rounds=3, limit=HANG, budget=Budget(minutes=1), log=log)
    measure.measure(cells, settings, Silent())
    # A line after each measurement: the first of every cell, and three or none for its samples.
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["implementation"] for line in lines[:7]] == list(kinds) and len(lines) == 7 + 6
    last = {line["implementation"]: line["samples"] for line in lines}
    assert last == {cell.implementation: cell.samples for cell in cells}
    found = {cell.implementation: cell for cell in cells}
    # Of a long call a minute buys no sample but the first call.
    for kind, samples in (("right", [0.01] * 3), ("compiled", [0.01] * 3), ("long", [70.0])):
        assert found[kind].samples == pytest.approx(samples) and not found[kind].reason
        assert found[kind].errors == {"logprob": 0.0}
    reasons = {
        "wrong": "wrong result: logprob: error 1, more than 0.001 is wrong",
        "slow": f"took {2 * HANG} s, longer than the limit of {HANG} s",
        "dies": "its process was killed by signal 9, out of memory?",
        "absent": "RuntimeError: does not build",
    }
    for kind, reason in reasons.items():
        assert found[kind].reason == reason and found[kind].record()["seconds"] is None


# --- what is wrong --------------------------------------------------------------------------------


@pytest.fixture
def problem():
    """Inputs, their reference, and the right answers for one upstream gradient."""
    made = data.generate(40, 16, 500, dtype=torch.float64)
    valid_mask = torch.arange(40) % 3 > 0
    reference = data.exact(made.hidden, made.weight, made.target)
    errors = data.Errors(reference, made.hidden, made.weight, made.target, valid_mask)
    hidden, weight = made.hidden.requires_grad_(), made.weight.requires_grad_()
    logp = (hidden @ weight.T).log_softmax(-1)
    logprob = logp.gather(1, made.target[:, None])[:, 0] * valid_mask
    upstream = torch.randn(40, dtype=torch.float64) * valid_mask
    gradients = torch.autograd.grad(logprob, (hidden, weight), upstream, retain_graph=True)
    return errors, logp.detach(), logprob.detach(), upstream, gradients


def test_right_answers_have_no_error(problem):
    errors, logp, logprob, upstream, (d_hidden, d_weight) = problem
    errors.logprob(logprob)
    errors.loss(-logprob.sum() / errors.valid_mask.sum())
    errors.entropy(-(logp.exp() * logp).sum(-1))
    errors.ids(logp.argmax(-1), errors.reference.best)
    errors.d_hidden(d_hidden, upstream)
    errors.d_weight(d_weight, upstream)
    assert set(errors.found) == {"logprob", "loss", "entropy", "ids", "d hidden", "d weight"}
    assert max(errors.found.values()) < 1e-9
    second = logp.topk(2).indices[:, 1]
    assert torch.allclose(errors.logits(second), errors.reference.second)


def test_wrong_answers_are_refused(problem):
    errors, logp, logprob, upstream, (d_hidden, d_weight) = problem
    uniform = (
        upstream.mean() * errors.valid_mask
    )  # as of peers that take a scalar upstream gradient
    nan = d_weight.clone()
    nan[-1, 0] = torch.nan
    wrong = [
        ("logprob: error", lambda: errors.logprob(logprob * 1.01)),
        ("logprob: not 0", lambda: errors.logprob(errors.reference.logprob)),
        ("loss: error", lambda: errors.loss(-logprob.mean())),
        ("entropy: error", lambda: errors.entropy(logprob)),
        ("ids: error", lambda: errors.ids(logp.argmin(-1), errors.reference.best)),
        ("ids: outside", lambda: errors.ids(logp.argmax(-1) + 500, errors.reference.best)),
        ("d hidden: error", lambda: errors.d_hidden(d_hidden, uniform)),
        ("d hidden: not 0", lambda: errors.d_hidden(d_hidden + 1e-9, upstream)),
        ("d weight: error", lambda: errors.d_weight(d_weight, uniform)),
        ("d weight: not finite", lambda: errors.d_weight(nan, upstream)),
        ("d weight: shape", lambda: errors.d_weight(d_weight.T, upstream)),
    ]
    for message, check in wrong:
        with pytest.raises(data.Wrong, match=message):
            check()


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", peer.KINDS)
@pytest.mark.parametrize("name", [name for name, p in heads.PEERS.items() if not p.compiled])
def test_a_peer_is_right_or_says_why_it_cannot_run(name, kind, tmp_path):
    """In the cases of `bench head`, with some targets ignored: 70 % of them."""
    peer = heads.PEERS[name]
    device, dtype = torch.device("cpu"), torch.float32
    if reason := peer.unsupported_reason(kind, device, dtype):
        assert len(reason) > 10
        assert name not in ("ours", "naive"), reason
        return
    path = str(tmp_path / "inputs.pt")
    grid.make_groups((40, 16, 600), {"fp32": path}, False)
    for case in head.CASES.values():
        if case.kind == kind:
            call, _, check, *_ = grid.prepare(path, case, name, "cpu")
            check(call())  # raises if wrong


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("liger", torch.bfloat16, "GPU"),
        ("quack", torch.bfloat16, "^its kernels need a GPU$"),
        ("flash", torch.bfloat16, "^its kernels need a GPU$"),
        ("naive-float", torch.float32, "^the same as naive$"),
    ],
)
def test_peers_that_cannot_run_say_why(name, dtype, reason):
    assert re.search(
        reason, heads.PEERS[name].unsupported_reason("loss", torch.device("cpu"), dtype)
    )


def test_missing_peers_are_named():
    assert peer.optional("no_such_peer") == (None, "no_such_peer is not installed")


# --- the command ----------------------------------------------------------------------------------


def test_head_end_to_end(tmp_path, capsys):
    names = ["floor", "ours", "naive"]
    cases = ["statistics", "per-token", "scalar", "scalar-ignored", "greedy"]
    picture = tmp_path / "found.png"
    found = run(
        tmp_path, "head", "--shapes", "40x16x600", "--dtype", "fp32", "--implementations", *names,
        "--cases", *cases, "--plot", str(picture), rounds=2,
    )  # fmt: skip
    (head,) = found["groups"]
    assert head["name"] == "40x16x600 fp32" and not list(tmp_path.glob("*.jsonl"))
    cells = {(c["case"], c["implementation"]): c for c in head["cells"]}
    assert set(cells) == {(case, name) for case in cases for name in names}
    for (case, name), cell in cells.items():
        assert len(cell["samples"]) == 2 and not cell["reason"]
        assert cell["of_floor"] == pytest.approx(cell["seconds"] / cells[case, "floor"]["seconds"])
        if name != "floor":
            assert cell["errors"] and max(cell["errors"].values()) < 1e-4
            assert sys.platform != "linux" or cell["extra_bytes"] >= 0
    full, part = (cells[case, "ours"] for case in ("scalar", "scalar-ignored"))
    assert part["of_full"] == pytest.approx(part["seconds"] / full["seconds"])
    assert "products" in head["plans"]["per-token"]
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "ift-kernels" in printed and "per-token" in printed and "plan: " in printed


def test_ops_end_to_end(tmp_path, capsys):
    found = run(
        tmp_path, "ops", "--shape", "40x16x600", "--batch", "3x50", "--dtype", "fp32",
        "--implementations", "floor", "ours",
    )  # fmt: skip
    cells = [cell for group in found["groups"] for cell in group["cells"]]
    assert len(cells) == 14 + 8 and not [c["reason"] for c in cells if c["reason"]]
    errors = [e for c in cells for e in c["errors"].values()]
    assert len(errors) > 14 and max(errors) < 1e-4


def test_report_names_no_machine(tmp_path, capsys):
    found = run(
        tmp_path, "head", "--shapes", "20x8x100", "--dtype", "fp32", "--implementations", "ours",
        "--cases", "greedy",
    )  # fmt: skip
    text = json.dumps(found)
    about = found["provenance"]
    assert set(about) >= {"device", "cores", "threads", "isa", "versions", "revision", "date"}
    assert about["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*", about["date"])
    assert str(tmp_path) not in text and str(Path.home()) not in text
    assert socket.gethostname() not in text


def test_compare_takes_the_fastest_floor_and_naive():
    def cell(implementation, seconds, size=None):
        return {"case": "c", "implementation": implementation, "seconds": seconds,
                "samples": [seconds] if seconds else [], "extra_bytes": size}  # fmt: skip

    group = {"titles": {"c": ""}, "cells": [
        cell("floor", 2.0), cell("floor-t", 1.0), cell("naive", 4.0, 100),
        cell("naive-float", 3.0, 200), cell("ours", 1.5, 50), cell("refused", None),
    ]}  # fmt: skip
    tables.compare(group)
    *_, ours, refused = group["cells"]
    assert (ours["of_floor"], ours["of_naive"], ours["memory_of_naive"]) == (1.5, 0.5, 0.5)
    assert refused["of_floor"] is refused["memory_of_naive"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.14159, "3.14 s"), (0.0123456, "12.3 ms"), (1e-6, "1.00 µs"), (123.4, "123 s")],
)
def test_durations_are_readable(value, text):
    assert tables.duration(value) == text


def test_list_says_what_there_is(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    for word in ("head", "ops", "per-token-frozen", "soft-backward", "torch-chunked", "Liger"):
        assert word in printed
    assert torch.cuda.is_available() or "need a GPU" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head", "--shapes", "4x5"], "a model and rows, as llama-3-8b@4096, got '4x5'"),
        (["head", "--shapes", "4x2x9"], "expected D ≥ 8, got '4x2x9'"),
        (["ops", "--batch", "0x4"], "expected BxT of at least 1, as 16x1024, got '0x4'"),
        (["head", "--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["head", "--plot", "a.pdf"], "expected a file name that ends in .png, got 'a.pdf'"),
        (["head", "--cases", "none"], "invalid choice"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    assert_exits(arguments, message, capsys)


def test_pictures_of_nothing_are_not_drawn(tmp_path):
    empty = {"groups": [{"name": "g", "titles": {"c": ""}, "cells": []}], "names": {}}
    assert pictures.write(empty, tmp_path / "a.png") == [] and not list(tmp_path.iterdir())
