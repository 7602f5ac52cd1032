"""`ift numerics`: what it measures, prints, draws and refuses."""

import json
import sys

import pytest
import torch

from ift.cli import main
from ift.numerics import inputs, invariance, measure, page, peers
from ift.numerics.calls import Call


@pytest.fixture
def small(monkeypatch):
    """Two kinds of inputs in one dtype."""
    monkeypatch.setattr(measure, "DTYPES", ("bfloat16",))
    kinds = {name: inputs.KINDS[name] for name in ("ordinary", "masked")}
    monkeypatch.setattr(inputs, "KINDS", kinds)
    monkeypatch.setattr(invariance, "DTYPES", {"float32": (torch.float32, None)})


@pytest.mark.usefixtures("small")
def test_report_and_picture(tmp_path, capsys):
    picture = tmp_path / "errors.png"
    assert main(["numerics", "--quick", "--json", "--cpu", "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = measure.rows(report)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {row["operation"] for row in rows} == set(measure.OPTIONS)
    ours = [row for row in rows if row["implementation"] == "ift"]
    assert all(0 <= row["share"] <= 1 for row in ours)
    assert {row["backend"] for row in ours} >= {"reference"}

    def largest(**given):
        return max(r["max"] for r in rows if given.items() <= r.items())

    logprob = {"operation": "linear_logprobs", "result": "logprob", "inputs": "ordinary"}
    narrow = largest(**logprob, implementation="ift", logits_dtype=None)
    wide = largest(**logprob, implementation="ift", logits_dtype="float32")
    assert wide < 1e-5 and narrow > 1e-3
    # Another's fp32 is as good, its 16 bits are not better.
    assert largest(**logprob, implementation="torch, all fp32") < 1e-5
    assert largest(**logprob, implementation="torch") > narrow / 2
    assert report["absent"]["torch.compile"] == "not in a quick run"
    assert report["machine"]["versions"]["torch"] == torch.__version__

    text = page.as_text(report)
    for words in ("ift-kernels, fp32 logits", "share of the bound", "deterministic=True", "pass"):
        assert words in text
    broken = {"threads": {"float32": 3}, "workspace": {"float32": "refused here"}}
    rows = page.invariance({"invariance": broken}).rows
    assert [row[1] for row in rows] == ["3 differ", "refused here"]


@pytest.mark.usefixtures("small")
def test_what_does_not_hold_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(measure, "_peers", lambda *_: [])
    monkeypatch.setattr(invariance, "check", lambda *_, **__: {"threads": {"float32": 1}})
    assert main(["numerics", "--quick", "--cpu"]) == 1
    assert "1 differ" in capsys.readouterr().out


def test_plain_errors(tmp_path, capsys):
    assert main(["numerics", "--plot", str(tmp_path / "no" / "a.png")]) == 2
    assert capsys.readouterr().err.startswith("ift: --plot: expected a file in a folder that")
    assert main(["numerics", "--fast"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "module"), [("TRL", "trl"), ("CCE", "cut_cross_entropy"), ("Liger", "liger_kernel")]
)
def test_who_is_not_installed_is_named(name, module, monkeypatch):
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(peers.NotServed, match="not installed|does not import"):
        peers.PEERS[name](torch.zeros(1, 2), torch.zeros(3, 2), None, torch.tensor([0]))


def test_invariance_finds_what_depends_on_the_batch():
    """Without the option some of it does, or the check would be of nothing."""
    made = inputs.make("ordinary", 30, 64, 500)
    head = invariance.Head(made.hidden.float(), made.weight.float(), made.target, {})
    shifted = head._replace(hidden=head.hidden * (1 + 1e-6))
    assert invariance._differences(head.results(), shifted.results()) > 0
    assert invariance._differences(head.results(), head.results()) == 0
    assert not invariance.holds({"threads": {"float32": 1}}, "float32")


def test_a_peer_that_fails_leaves_the_others(monkeypatch):
    def fails(*_):
        raise ValueError("one\ntwo")

    monkeypatch.setattr(peers, "PEERS", {"other": fails, "torch": peers.torch_same_dtype})
    absent = {}
    rows = list(measure._peers(Call("linear_logprobs", masked=0.0), absent, True))
    assert absent == {"other": "fails: ValueError: one"}
    assert {row["implementation"] for row in rows} == {"torch"}
