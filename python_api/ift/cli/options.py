"""The parser of ``ift``: options of a run, their defaults and presets.

The parser leaves options that are not given at None; `resolve` fills them from the preset, then
from the defaults, so a preset never overrides a given option.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from ift.cli.arguments import (
    Option,
    add_options,
    flag_of,
    fraction,
    natural,
    number,
    positive,
    positive_int,
)
from ift.cli.errors import CliError
from ift.cli.losses import IFT_OPTIONS, LOSSES, OPTIONS, PAIR_OPTIONS, losses_with

# The settings reported in the IFT paper; the loss options of the preset are IFTConfig.paper()'s.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "loss": "ift",
        "epochs": 3.0,
        "lr": 5e-7,
        "optimizer": "rmsprop",
        "scheduler": "cosine",
        "batch_size": 8,
        "accumulate": 64,
        "max_length": 1024,
        "bf16": True,
    }
}
PRESETS["noisy"] = PRESETS["paper"]  # with λ noise: IFTConfig.noisy()
INPUT_OPTIONS = {
    "model": Option("a directory, a hub id, or `tiny`: a small random Llama with a tokenizer "
                    "trained on the data", str, "MODEL", required=True),
    "data": Option("JSONL; each line has `prompt` and `completion`, or `messages`; for preference "
                   "losses `prompt`, `chosen` and `rejected`", str, "FILE", required=True),
    "output": Option("gets checkpoints, model/, log.jsonl and curves.png", str, "DIR",
                     required=True),
}  # fmt: skip
RUN_OPTIONS = {
    "eval_split": Option("share of the rows to hold out for evaluation", fraction, "F", 0.0),
    "eval_data": Option("JSONL to evaluate on, instead of a split", str, "FILE"),
    "eval_steps": Option("evaluate every N steps (default: once an epoch)", positive_int, "N"),
    "log_steps": Option("log every N steps", positive_int, "N", 10),
    "save_steps": Option("write a checkpoint every N steps, and at the end", positive_int, "N",
                         500),
    "samples": Option("held-out prompts to continue at each evaluation, into DIR/samples.jsonl; "
                      "0: none", natural, "N", 3),
    "resume": Option("continue from the last checkpoint in --output", default=False),
}  # fmt: skip
TRAINING_OPTIONS = {
    "loss": Option("loss to train with", choices=LOSSES, default="ift"),
    "preset": Option("settings of a publication; options given beside it win", choices=PRESETS),
    "responses": Option("of a preference, what `sft` and `ift` learn: both is the `extend` of the "
                        "paper on learning dynamics", choices=("chosen", "rejected", "both"),
                        default="chosen"),
    "epochs": Option("passes over the data", positive, "X", 1.0),
    "max_steps": Option("optimizer steps, instead of --epochs", positive_int, "N"),
    "lr": Option("peak learning rate", positive, "X", 5e-5),
    "gradient": Option("of the head; active approximates it by the columns that matter",
                       choices=("exact", "active"), default="exact"),
    "freeze_head": Option("do not train the output head (nor an embedding tied to it)",
                          default=False),
    "optimizer": Option("", choices=("adamw", "rmsprop", "sgd", "adafactor"), default="adamw"),
    "scheduler": Option("of the learning rate", choices=("linear", "cosine", "constant"),
                        default="linear"),
    "lr_warmup_steps": Option("steps of linear learning-rate warm-up", natural, "N", 0),
    "batch_size": Option("rows per forward on each device", positive_int, "N", 8),
    "accumulate": Option("forwards per optimizer step", positive_int, "N", 1),
    "max_length": Option("cut rows at N tokens",
                         number("a whole number of at least 2", lambda x: x >= 2, int), "N", 1024),
    "bf16": Option("bf16 autocast over fp32 weights", default=False),
    "seed": Option("of the initial weights, the order of the data and the sampling",
                   number("a whole number in [0, 2**32)", lambda x: 0 <= x < 2**32, int), "N", 0),
    "cpu": Option("stay off the accelerator", default=False),
}  # fmt: skip
PROBE_OPTIONS = {
    "probes": Option("probe set to use (default: made from --data)", str, "FILE"),
    "probe_every": Option("measure every N steps", positive_int, "N", 25),
    "probe_size": Option("prompts of the set that is made", positive_int, "N", 64),
    "probe_test": Option("JSONL of rows not trained on, for the type `unrelated` (default: the "
                         "rows held out)", str, "FILE"),
    "probe_sample": Option("tokens of a sample of the model before training, for the type "
                           "`sample`; 0: none", natural, "N", 32),
    "probe_fluent": Option("sentences that have nothing to do with the data, one a line, for the "
                           "type `fluent` (default: 20 English ones)", str, "FILE"),
}  # fmt: skip
HEATMAP_OPTIONS = {
    "passes": Option("over the answers of a type", positive_int, "N", 1),
    "projections": Option("measure ‖K‖, too, with N random projections of each answer; 0: do not",
                          number("0, or a whole number of at least 2",
                                 lambda x: x == 0 or x >= 2, int), "N", 0),
}  # fmt: skip
REPORT_OPTIONS = {
    "output": Option("page to write", str, "HTML", "report.html"),
    "title": Option("above the page", str, "TEXT", "Runs"),
}
DEFAULTS = {
    name: option.default
    for options in (RUN_OPTIONS, TRAINING_OPTIONS, PROBE_OPTIONS, HEATMAP_OPTIONS)
    for name, option in options.items()
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: argument, given and expected value."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        name, separator, problem = message.removeprefix("argument ").partition(": ")
        if separator and message.startswith("argument "):
            raise CliError(name, problem)
        raise CliError(self.prog.removeprefix("ift").strip() or "arguments", message)

    def parse(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """As `parse_args`, but an unknown option is reported with the closest existing ones."""
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            command = " ".join(filter(None, (parsed.command, getattr(parsed, "action", None))))
            raise CliError(unknown[0], f"unknown option; {self._closest(command, unknown)}")
        return parsed

    def _closest(self, command: str, unknown: Sequence[str]) -> str:
        parser: argparse.ArgumentParser = self
        for name in command.split():
            subparsers = next(
                a for a in parser._actions if isinstance(a, argparse._SubParsersAction)
            )
            parser = subparsers.choices[name]
        known = list(parser._option_string_actions)
        close = difflib.get_close_matches(unknown[0].split("=")[0], known)
        return f"expected one of those that `ift {command} --help` lists" + (
            f", did you mean {' or '.join(close)}?" if close else ""
        )


def build_parser() -> Parser:
    """The parser of ``ift``."""
    parser = Parser(prog="ift", description="Fine-tune language models with fused losses.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser(
        "doctor", help="say what is installed and which backend serves what, and why"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    train = commands.add_parser("train", help="fine-tune a causal language model on a JSONL file")
    _add_train(train)
    report = commands.add_parser("report", help="compare runs: a table, and one page of HTML")
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="output of `ift train` or `ift dynamics run`"
    )
    add_options(report, "page", REPORT_OPTIONS)
    _add_dynamics(commands.add_parser("dynamics", help="watch what training does to other answers"))
    return parser


def _add_input(parser: argparse.ArgumentParser, title: str, options: dict[str, Option]) -> None:
    add_options(parser, title, options).add_argument(
        "--allow-new-weights", action="store_true", default=None,
        help="train a model of which --model (or --reference) lacks weights, a head for one: they "
        "start from random numbers",
    )  # fmt: skip


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_input(parser, "what to train", INPUT_OPTIONS)
    add_options(parser, "evaluation, log and checkpoints", RUN_OPTIONS)
    add_options(parser, "training", TRAINING_OPTIONS)
    add_options(parser, "IFT loss (--loss ift); defaults as released", IFT_OPTIONS)
    pairs = {
        name: option._replace(help=f"{option.help} [{', '.join(losses_with(name))}]")
        for name, option in PAIR_OPTIONS.items()
    }
    add_options(parser, "preference losses; defaults as in ift.losses", pairs)


def _add_dynamics(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    run = actions.add_parser("run", help="train as `ift train`, and measure a probe set meanwhile")
    _add_train(run)
    add_options(run, "probes; into DIR/probes.jsonl and DIR/dynamics", PROBE_OPTIONS)
    plot = actions.add_parser("plot", help="draw the curves of a run again")
    plot.add_argument("run", metavar="DIR", help="output of `ift dynamics run`, or of the callback")
    plot.add_argument("--title", default="", help="above the picture")
    heatmap = actions.add_parser(
        "heatmap", help="train on each type of answer alone, and measure what it does to each other"
    )
    _add_input(heatmap, "what to measure", INPUT_OPTIONS | {
        "output": Option("gets heatmap.json and heatmap.png; with --projections kernel.png", str,
                         "DIR", required=True),
    })  # fmt: skip
    made = {name: option for name, option in PROBE_OPTIONS.items() if name != "probe_every"}
    add_options(heatmap, "probes; into DIR/probes.jsonl", made)
    names = ("lr", "batch_size", "max_length", "seed", "cpu")
    steps = {name: TRAINING_OPTIONS[name] for name in names}
    add_options(heatmap, "training of each type", {**steps, **HEATMAP_OPTIONS})


def resolve(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given from the preset and the defaults, and refuse contradictions.

    Raises:
        CliError: two arguments exclude each other.
    """
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    preset = PRESETS.get(given.get("preset", ""), {})
    values = {**dict.fromkeys(vars(arguments)), **DEFAULTS, **preset, **given}
    loss = values["loss"]
    for name in OPTIONS:
        if name in given and not LOSSES[loss].takes(name):
            expected = " or ".join(losses_with(name))
            raise CliError(flag_of(name), f"got it with --loss {loss}; expected --loss {expected}")
    if "responses" in given and LOSSES[loss].pairs:
        expected = "--loss sft or ift: a preference loss takes both responses"
        raise CliError("--responses", f"got it with --loss {loss}; expected {expected}")
    if preset and loss != preset["loss"]:
        raise CliError("--preset", f"got it with --loss {loss}; expected --loss {preset['loss']}")
    if given.get("samples") and not ("eval_data" in given or given.get("eval_split")):
        expected = "an evaluation set, --eval-split or --eval-data"
        raise CliError("--samples", f"got it without an evaluation; expected {expected}")
    if "eval_data" in given and given.get("eval_split"):
        raise CliError("--eval-split", "got it beside --eval-data; expected one of the two")
    if "max_steps" in given and "epochs" in given:
        raise CliError("--max-steps", "got it beside --epochs; expected one of the two")
    return argparse.Namespace(**values)
