"""The table of losses of `ift train`: rows fit the losses, and a new loss needs a row alone."""

import importlib
import inspect
import json
import typing

import pytest

from command_line import read_log, train, write_rows
from ift import IFTConfig
from ift.cli import losses as table
from ift.cli import main
from ift.cli.arguments import Option, positive
from ift.losses import Loss
from ift.losses.preference import PairTokens, not_negative, record_rewards

ROWS = [{"prompt": "say red:", "chosen": " red", "rejected": " blue round"}] * 6


def toy_loss(
    logprob, mask, *, scale=1.0, offset=0.0, cu_seqlens=None, num_pairs=None, metrics=None
):
    """A squared margin on means per token."""
    not_negative("offset", offset)
    if scale == 3:
        raise ValueError(f"scale: expected another number than 3, got {scale}")
    tokens = PairTokens(logprob, mask, cu_seqlens)
    means = tokens.pair_means(tokens.logprob)
    record_rewards(metrics, tokens, means)
    loss = (scale - (means.chosen - means.rejected) + offset).relu().square()
    return tokens.reduce(loss, "mean", num_pairs)


class ToyLoss(Loss):
    function = staticmethod(toy_loss)
    pairs = True

    def __init__(self, *, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__(scale=scale, offset=offset)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """`ift train` with the toy loss in the table, as a function of further arguments."""
    options = {"toy_scale": "scale", "margin": "offset"}
    row = table.CliLoss(f"{__name__}:ToyLoss", options, pairs=True)
    monkeypatch.setitem(table.LOSSES, "toy", row)
    scale = Option("width of the toy", positive, "X")
    monkeypatch.setitem(table.PAIR_OPTIONS, "toy_scale", scale)
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    sizes = ["--max-steps", 3, "--batch-size", 3, "--log-steps", 1]

    def run(*arguments):
        return main(train(data, tmp_path / "out", *sizes, *arguments))

    return run


def test_a_toy_loss_trains(toy, tmp_path, capsys):
    assert toy("--loss", "toy", "--toy-scale", "0.5", "--lr", "1e-2", "--eval-split", "0.3") == 0
    out = tmp_path / "out"
    records = read_log(out)
    assert len(records) == 3 and records[-1]["loss"] < records[0]["loss"]
    assert {"reward_margin", "eval_reward_margin", "token_accuracy"} <= set(records[-1])
    assert json.loads((out / "run.json").read_text())["toy_scale"] == 0.5
    assert toy("--loss", "toy", "--toy-scale", "0.25", "--eval-split", "0.3", "--resume") == 2
    assert "--toy-scale: got 0.25; expected 0.5, as the run in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "width of the toy [toy]" in text and "[simpo, slic, toy]" in text and "[asft]" in text
    assert "{sft,asft,psft,ift,dpo,kto,orpo,simpo,cpo,slic,toy}" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--loss dpo --toy-scale 1", "--toy-scale: got it with --loss dpo; expected --loss toy"),
        ("--loss toy --beta 1", "--beta: got it with --loss toy; expected --loss dpo"),
        ("--loss toy --reference x", "--reference: got it with --loss toy"),
        ("--loss toy --preset paper", "--preset: got it with --loss toy; expected"),
        ("--loss toy --toy-scale 0", "--toy-scale: got '0'; expected a number above 0"),
        ("--loss toy --toy-scale 3", "--toy-scale: expected another number than 3"),
        ("--loss tay", "--loss: got 'tay'; expected one of sft, asft, psft, ift, dpo"),
    ],
)
def test_its_options_are_checked(toy, capsys, arguments, said):
    assert toy(*arguments.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, loss in table.LOSSES.items() if loss.builds])
def test_rows_fit_what_they_build(name):
    loss = table.LOSSES[name]
    module, _, attribute = loss.builds.partition(":")
    built = getattr(importlib.import_module(module), attribute)
    parameters = inspect.signature(built).parameters
    assert {*loss.options.values(), *loss.fixed} <= set(parameters)
    assert set(loss.options) <= {*table.OPTIONS, "seed"}
    if loss.pairs:
        accepted = inspect.signature(built.function).parameters
        assert loss.reference == ("reference" in accepted)
        assert built.pairs or {"desirable", "kl"} <= set(accepted)


def test_choices_and_defaults_of_ift_are_those_of_its_configuration():
    hints, default = typing.get_type_hints(IFTConfig), IFTConfig()
    for name, option in table.IFT_OPTIONS.items():
        choices = typing.get_args(hints[name])
        if choices:
            assert option.choices == choices
        value = getattr(default, name)
        if option.type is None and option.choices is None:
            assert value is False  # a switch
        else:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            assert f"{shown})" in option.help
