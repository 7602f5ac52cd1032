"""The examples: those of the integrations are short, and they learn."""

import importlib
import json
from pathlib import Path

import pytest

from examples import multi_token, policy_gradient, sampler_match, topk_distillation
from processes import results

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
    return importlib.import_module("examples.train_fsdp2").main(["--steps", "6"])


def test_two_processes_are_the_plain_loop_without_its_schedule(tmp_path, monkeypatch):
    sharded, other = results(worker, 2, tmp_path)
    assert sharded == pytest.approx(other)
    loop = importlib.import_module("examples.train_loop")
    replace = loop.ift.IFTConfig.replace
    plain = loop.ift.IFTConfig()
    monkeypatch.setattr(loop.ift.IFTConfig, "replace", lambda _, **step: replace(plain, **step))
    assert sharded == pytest.approx(loop.main(["--steps", "6"]), rel=1e-4)


def test_a_trainer_matches_a_sampler_that_treats_logits_alike(tmp_path):
    paths = tmp_path / "a.json", tmp_path / "a.png"
    arguments = ["--rows", "6", "--tokens", "12", "--json", str(paths[0]), "--plot", str(paths[1])]
    report = sampler_match.main(arguments)
    assert all(path.stat().st_size > 1000 for path in paths)
    found = [line for line in report["differences"] if line["compared"] == "head"]
    assert {line["way"] for line in found} == set(sampler_match.WAYS)
    for line in found:
        alike = line["sampler"] == line["trainer"]
        assert sum(line["histogram"]) == 72
        assert line["quantiles"][-1] < 1e-5 if alike else line["quantiles"][-1] > 1e-3, line
    # Within top-k and top-p tokens are likelier; elsewhere scores are those of the logits.
    shifts = {line["way"]: line["mean"] for line in report["differences"] if "mean" in line}
    assert shifts["top-k 50"] > 0.1 and shifts["top-p 0.9"] > 0.01
    assert abs(shifts["greedy"]) < 1e-5 and abs(shifts["temperature 0.7"]) < 1e-5


@pytest.mark.parametrize(
    "given",
    [("--rows", "0"), ("--tokens", "-3"), ("--rows", "two"), ("--json", "none/a"), ("--plot", ".")],
)
def test_what_a_sampler_cannot_do_is_refused_before_any_work(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sampler_match, "measure", None)
    with pytest.raises(SystemExit):
        sampler_match.main(given)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {given[0]}: expected a" in last and repr(given[1]) in last


def test_a_student_of_stored_ids_reaches_the_loss_of_one_of_whole_distributions(tmp_path):
    report = topk_distillation.main(["--steps", "20", "--output", str(tmp_path)])
    whole, topk = (report["divergence"][way] for way in ("whole", "topk"))
    assert whole[-1] < 0.3 * whole[0] and topk[-1] < 0.3 * topk[0]
    assert report["loss"]["topk"] == pytest.approx(report["loss"]["whole"], rel=0.02)
    assert report["stored_mass"] > 0.9  # or the line before could not hold
    size = report["bytes_per_token"]
    assert size["topk"] < size["whole"] / 7
    shards = sum(path.stat().st_size for path in (tmp_path / "scores").glob("topk-*"))
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    # Ids and labels of the rows are in the shards, too.
    assert size["topk"] < shards / summary["tokens"] < size["topk"] + 32
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_further_tokens_are_learned_without_logits_as_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_token, "BATCH", 4)
    monkeypatch.setattr(multi_token, "HELD_OUT", 4)
    sizes = ["--steps", "4", "--files", "12", "--vocabulary", "1024"]
    report = multi_token.main([*sizes, "--output", str(tmp_path)])
    for name in ("difference", "difference_after"):
        assert report[name]["loss"] < 1e-6 and report[name]["gradient"] < 1e-5
    naive, fused = (report[way] for way in multi_token.WAYS)
    assert fused["loss"] == pytest.approx(naive["loss"], rel=1e-5)
    first, last = fused["depths"][0], fused["depths"][-1]
    assert all(b < a for a, b in zip(first, last, strict=True))
    assert 0 < fused["head_mib"] < naive["head_mib"] / 2
    assert 0 <= fused["held_out"][-1]["agreement_2"] <= 1
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["grpo", "ppo", "rloo", "reinforce", "cispo"])
def test_the_reward_of_a_loop_that_samples_rises(name):
    history = policy_gradient.train(name, rounds=12)
    assert sum(history[:2]) / 2 < 0.2  # one of sixteen tokens, at random
    assert sum(history[-3:]) / 3 > sum(history[:2]) / 2 + 0.2, history
