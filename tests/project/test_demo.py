"""The demo in small, and its measure of the head's memory."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from examples import demo, docstrings
from examples.head_memory import head_peak_bytes


def test_four_ways_agree(tmp_path, monkeypatch, capsys):
    few = docstrings.stdlib_files()[:40]
    monkeypatch.setattr(docstrings, "stdlib_files", lambda: few)
    sizes = ["--steps", "3", "--vocab-size", "2000", "--layers", "1", "--hidden", "64"]
    assert demo.main(["--output", str(tmp_path), *sizes, "--batch-size", "4"]) == 0
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "table.txt").read_text() in capsys.readouterr().out
    results = {r["way"]: r for r in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert tuple(results) == demo.WAYS
    for loss in ("SFT", "IFT"):
        naive, fused = results[f"naive {loss}"], results[f"fused {loss}"]
        assert len(naive["losses"]) == 3
        assert fused["losses"] == pytest.approx(naive["losses"], rel=1e-5)
        assert fused["eval_loss"] == pytest.approx(naive["eval_loss"], rel=1e-5)
        assert 0 < fused["head_mib"] < naive["head_mib"]
        assert [d["step"] for d in fused["differences"]] == [0, 1, 2] and not naive["differences"]
        assert all(d["loss"] <= 5e-6 and d["gradient"] <= 1e-5 for d in fused["differences"])
    assert results["naive SFT"]["losses"] != results["naive IFT"]["losses"]


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        few = docstrings.stdlib_files()[:20]
        patch.setattr(docstrings, "stdlib_files", lambda: few)
        return demo.Demo(demo.Setting(vocab_size=500, hidden=32, layers=1, batch_size=3))


@pytest.mark.parametrize("loss", ["SFT", "IFT"])
@pytest.mark.parametrize("step", [0, 7])
def test_naive_and_fused_agree_from_the_same_weights(small, loss, step):
    model = small.model()
    found = small.difference(loss, model, step)
    assert (found.step, found.loss <= 5e-6, found.gradient <= 1e-5) == (step, True, True), found
    assert found.parameter in dict(model.named_parameters())
    assert all(p.grad is None for p in model.parameters())  # computed on copies


@pytest.mark.parametrize("factor", [1.01, -1.0, 0.0])
def test_a_fused_loss_that_is_wrong_is_seen(small, factor, monkeypatch):
    original = demo.make_loss

    def wrong(way, model):
        loss_of, after_step = original(way, model)
        scale = factor if way.startswith("fused") else 1.0
        return lambda batch, step: loss_of(batch, step) * scale, after_step

    monkeypatch.setattr(demo, "make_loss", wrong)
    found = small.difference("SFT", small.model(), 0)
    assert found.loss > 1e-2 and found.gradient > 5e-3


@pytest.mark.parametrize(
    ("steps", "points"),
    [(1, {0}), (3, {0, 1, 2}), (10, {0, 2, 4, 6, 9}), (181, {0, 45, 90, 135, 180})],
)
def test_points_of_comparison_run_from_first_to_last(steps, points):
    assert demo.compared_steps(steps) == points


class Trunk(nn.Module):
    """Holds much more memory than the head, before, between and after."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return ((x[:, None] * self.scale).expand(-1, 4096, -1).contiguous().sum(1) / 4096,)


@pytest.mark.parametrize("passes", [1, 2])
def test_head_memory_is_the_heads_alone(passes):
    trunk, head = Trunk(), nn.Linear(64, 10_000, bias=False)
    x = torch.randn(16, 64)

    def step():
        for _ in range(passes - 1):
            with torch.no_grad():
                head(trunk(x)[0])
        return head(trunk(x)[0]).sum()

    logits, weight = 16 * 10_000 * 4, 64 * 10_000 * 4
    peak = head_peak_bytes(trunk, step)
    # Logits, at times with a second one of their size, and the gradient of the weight.
    assert logits + weight * 0.9 <= peak <= 2.5 * logits + weight
    with pytest.raises(RuntimeError, match="trunk: its forward was not called"):
        head_peak_bytes(Trunk(), lambda: step().sum())
