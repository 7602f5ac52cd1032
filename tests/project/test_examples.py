"""The examples of the integrations: short, and they learn."""

import importlib
from pathlib import Path

import pytest
import torch

from processes import join, leave, start

EXAMPLES = ("train_loop", "train_transformers", "train_trl_ift", "train_trl_dpo", "train_fsdp2")


@pytest.mark.parametrize("name", EXAMPLES)
def test_they_are_short(name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("name", EXAMPLES[:-1])
def test_they_learn(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "trl" in name:
        pytest.importorskip("trl")
    losses = importlib.import_module(f"examples.{name}").main(["--steps", "6"])
    assert len(losses) == 6 and losses[-1] < losses[0]


def worker(rank, processes, directory):
    join(rank, processes, directory)
    losses = importlib.import_module("examples.train_fsdp2").main(["--steps", "6"])
    torch.save(losses, f"{directory}/{rank}.pt")
    leave()


def test_two_processes_are_the_plain_loop_without_its_schedule(tmp_path, monkeypatch):
    start(worker, 2, tmp_path)
    sharded, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert sharded == pytest.approx(other)
    loop = importlib.import_module("examples.train_loop")
    replace = loop.ift.IFTConfig.replace
    plain = loop.ift.IFTConfig()
    monkeypatch.setattr(loop.ift.IFTConfig, "replace", lambda _, **step: replace(plain, **step))
    assert sharded == pytest.approx(loop.main(["--steps", "6"]), rel=1e-4)
