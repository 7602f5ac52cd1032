"""The arguments of ``ift``, their defaults and presets.

The parser leaves options that are not given at None; `resolve` fills them from the preset, then
from the defaults, so a preset never overrides a given option.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from ift.cli.argument_types import (
    fraction,
    natural,
    number,
    one_of,
    positive,
    positive_int,
)
from ift.cli.errors import CliError
from ift.cli.losses import IFT_OPTIONS, LOSSES, OPTIONS, PAIR_OPTIONS, losses_with

DEFAULTS: dict[str, Any] = {
    "loss": "ift",
    "eval_split": 0.0,
    "epochs": 1.0,
    "max_steps": None,
    "lr": 5e-5,
    "optimizer": "adamw",
    "scheduler": "linear",
    "lr_warmup_steps": 0,
    "batch_size": 8,
    "accumulate": 1,
    "max_length": 1024,
    "bf16": False,
    "gradient": "exact",
    "freeze_head": False,
    "seed": 0,
    "save_steps": 500,
    "eval_steps": None,
    "log_steps": 10,
    "resume": False,
    "cpu": False,
    "allow_new_weights": False,
    "probe_every": 25,
    "probe_size": 64,
    "probe_sample": 32,
}

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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: argument, what came, what was expected."""

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
    _add_dynamics(commands.add_parser("dynamics", help="watch what training does to other answers"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    _add_training(parser)
    _add_losses(parser)


def _add_dynamics(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    run = actions.add_parser("run", help="train as `ift train`, measuring a probe set on the way")
    _add_train(run)
    add = _Group(run, "probes; into DIR/probes.jsonl and DIR/dynamics")
    add("--probes", str, "probe set to use (default: made from --data)", "FILE")
    add("--probe-every", positive_int, "measure every N steps", "N")
    add("--probe-size", positive_int, "prompts of the set that is made", "N")
    add("--probe-test", str, "JSONL of rows not trained on, for the type `unrelated` "
        "(default: the rows held out)", "FILE")  # fmt: skip
    add("--probe-sample", natural, "tokens of a sample of the model before training, for the type "
        "`sample`; 0: none", "N")  # fmt: skip
    plot = actions.add_parser("plot", help="draw the curves of a run again")
    plot.add_argument("run", metavar="DIR", help="output of `ift dynamics run`, or of the callback")
    plot.add_argument("--title", default="", help="above the picture")
    compare = actions.add_parser("compare", help="draw runs over one another, and print a table")
    compare.add_argument("runs", nargs="+", metavar="DIR", help="outputs of `ift dynamics run`")
    compare.add_argument("--output", default="compare.png", metavar="PNG")


class _Group:
    """`group(flag, …)` with defaults left at None and shown in the help."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def __call__(self, flag: str, type: Any, help: str, metavar: str | None = None) -> None:
        default = DEFAULTS.get(flag.lstrip("-").replace("-", "_"))
        if default is not None:
            help += f" (default: {default})"
        self._group.add_argument(flag, type=type, help=help, metavar=metavar)

    def choice(self, flag: str, help: str, *names: str) -> None:
        self(flag, one_of(*names), help, "{" + ",".join(names) + "}")

    def switch(self, flag: str, help: str) -> None:
        action = argparse.BooleanOptionalAction
        self._group.add_argument(flag, action=action, default=None, help=help)


def _add_run(parser: argparse.ArgumentParser) -> None:
    required = parser.add_argument_group("what to train")
    required.add_argument(
        "--model",
        required=True,
        help="a directory, a hub id, or `tiny`: a small random Llama with a tokenizer trained on "
        "the data",
    )
    required.add_argument(
        "--allow-new-weights",
        action="store_true",
        default=None,
        help="train a model of which --model (or --reference) lacks weights, a head for one: they "
        "start from random numbers",
    )
    required.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="JSONL; each line has `prompt` and `completion`, or `messages`; for preference losses "
        "`prompt`, `chosen` and `rejected`",
    )
    required.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="gets checkpoints, model/, log.jsonl and curves.png",
    )
    add = _Group(parser, "evaluation, log and checkpoints")
    add("--eval-split", fraction, "share of the rows to hold out for evaluation", "F")
    add("--eval-data", str, "JSONL to evaluate on, instead of a split", "FILE")
    add("--eval-steps", positive_int, "evaluate every N steps (default: once an epoch)", "N")
    add("--log-steps", positive_int, "log every N steps", "N")
    add("--save-steps", positive_int, "write a checkpoint every N steps, and at the end", "N")
    add.switch("--resume", "continue from the last checkpoint in --output")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = _Group(parser, "training")
    add.choice("--loss", "loss to train with", *LOSSES)
    add.choice("--preset", "settings of a publication; options given beside it win", *PRESETS)
    add("--epochs", positive, "passes over the data", "X")
    add("--max-steps", positive_int, "optimizer steps, instead of --epochs", "N")
    add("--lr", positive, "peak learning rate", "X")
    add.choice("--gradient", "of the head; active approximates it by the columns that matter",
               "exact", "active")  # fmt: skip
    add.switch("--freeze-head", "do not train the output head (nor an embedding tied to it)")
    add.choice("--optimizer", "", "adamw", "rmsprop", "sgd", "adafactor")
    add.choice("--scheduler", "of the learning rate", "linear", "cosine", "constant")
    add("--lr-warmup-steps", natural, "steps of linear learning-rate warm-up", "N")
    add("--batch-size", positive_int, "rows per forward on each device", "N")
    add("--accumulate", positive_int, "forwards per optimizer step", "N")
    add("--max-length", number("a whole number of at least 2", lambda x: x >= 2, int),
        "cut rows at N tokens", "N")  # fmt: skip
    add.switch("--bf16", "bf16 autocast over fp32 weights")
    add(
        "--seed",
        number("a whole number in [0, 2**32)", lambda x: 0 <= x < 2**32, int),
        "of the initial weights, the order of the data and the sampling",
        "N",
    )
    add.switch("--cpu", "stay off the accelerator")


def _add_losses(parser: argparse.ArgumentParser) -> None:
    groups = {
        "IFT loss (--loss ift); defaults as released": IFT_OPTIONS,
        "preference losses; defaults as in ift.losses": PAIR_OPTIONS,
    }
    for title, named in groups.items():
        add = _Group(parser, title)
        for name, option in named.items():
            flag, users = "--" + name.replace("_", "-"), ", ".join(losses_with(name))
            help = option.help if named is IFT_OPTIONS else f"{option.help} [{users}]"
            if option.type is None:
                add.switch(flag, help)
            else:
                add(flag, option.type, help, option.metavar)


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
            flag, expected = "--" + name.replace("_", "-"), " or ".join(losses_with(name))
            raise CliError(flag, f"got it with --loss {loss}; expected --loss {expected}")
    if preset and loss != preset["loss"]:
        raise CliError("--preset", f"got it with --loss {loss}; expected --loss {preset['loss']}")
    if "eval_data" in given and given.get("eval_split"):
        raise CliError("--eval-split", "got it beside --eval-data; expected one of the two")
    if "max_steps" in given and "epochs" in given:
        raise CliError("--max-steps", "got it beside --epochs; expected one of the two")
    return argparse.Namespace(**values)
