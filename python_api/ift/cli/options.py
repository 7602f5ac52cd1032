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
    names_of,
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
GPU_ATTENTION = ("flash_attention_2", "flash_attention_3", "flex_attention")
# Of transformers' Trainer.
REPORTERS = (
    "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "dvclive",
    "neptune", "azure_ml", "codecarbon", "dagshub", "flyte", "kubeflow",
)  # fmt: skip
RUN_OPTIONS = {
    "eval_split": Option("share of the rows to hold out for evaluation", fraction, "F", 0.0),
    "eval_data": Option("JSONL to evaluate on, instead of a split", str, "FILE"),
    "eval_steps": Option("evaluate every N steps (default: once an epoch)", positive_int, "N"),
    "log_steps": Option("log every N steps", positive_int, "N", 10),
    "save_steps": Option("write a checkpoint every N steps, and at the end", positive_int, "N",
                         500),
    "save_total_limit": Option("checkpoints to keep, the last ones; 0: all", natural, "N", 2),
    "report_to": Option("log to these, too, with commas between: " + ", ".join(REPORTERS),
                        names_of(REPORTERS), "NAMES"),
    "resume": Option("continue from the last checkpoint in --output", default=False),
}  # fmt: skip
TRAINING_OPTIONS = {
    "loss": Option("loss to train with", choices=LOSSES, default="ift"),
    "preset": Option("settings of a publication; options given beside it win", choices=PRESETS),
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
MODEL_OPTIONS = {
    "dtype": Option("of the weights in training and in model/; auto: float32 where they are "
                    "trained, and as in the files of --model in model/ and where they are frozen",
                    choices=("auto", "float32", "bfloat16", "float16"), default="auto"),
    "attn": Option("attention of transformers (default: its choice)",
                   choices=("eager", "sdpa", *GPU_ATTENTION)),
    "gradient_checkpointing": Option("compute activations again in backward instead of keeping "
                                     "them", default=False),
    "packing": Option("put the rows of a forward into one sequence without padding; none attends "
                      "to another", default=False),
    "lora_rank": Option("train a LoRA adapter of rank N alone; model/ is the adapter",
                        positive_int, "N"),
    "lora_alpha": Option("the adapter is scaled by α / rank (2 · rank)", positive, "α"),
    "lora_dropout": Option("dropout before the adapter (0)", fraction, "P"),
    "lora_targets": Option("layers that get one, with commas between (all-linear: each linear "
                           "layer but the head)", names_of(), "NAMES"),
    "lora_config": Option("PEFT's adapter_config.json, instead of these four", str, "FILE"),
    "merge": Option("write the model with its adapter added to the weights to model/",
                    default=False),
    "quantize": Option("keep the frozen weights under an adapter in 4 or 8 bits (bitsandbytes)",
                       choices=("4bit", "8bit")),
}  # fmt: skip
PROBE_OPTIONS = {
    "probes": Option("probe set to use (default: made from --data)", str, "FILE"),
    "probe_every": Option("measure every N steps", positive_int, "N", 25),
    "probe_size": Option("prompts of the set that is made", positive_int, "N", 64),
    "probe_test": Option("JSONL of rows not trained on, for the type `unrelated` (default: the "
                         "rows held out)", str, "FILE"),
    "probe_sample": Option("tokens of a sample of the model before training, for the type "
                           "`sample`; 0: none", natural, "N", 32),
}  # fmt: skip
DEFAULTS = {
    name: option.default
    for options in (RUN_OPTIONS, TRAINING_OPTIONS, MODEL_OPTIONS, PROBE_OPTIONS)
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
    _add_dynamics(commands.add_parser("dynamics", help="watch what training does to other answers"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "what to train", INPUT_OPTIONS).add_argument(
        "--allow-new-weights", action="store_true", default=None,
        help="train a model of which --model (or --reference) lacks weights, a head for one: they "
        "start from random numbers",
    )  # fmt: skip
    add_options(parser, "evaluation, log and checkpoints", RUN_OPTIONS)
    add_options(parser, "training", TRAINING_OPTIONS)
    add_options(parser, "weights, memory and adapters", MODEL_OPTIONS)
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
    compare = actions.add_parser("compare", help="draw runs over one another, and print a table")
    compare.add_argument("runs", nargs="+", metavar="DIR", help="outputs of `ift dynamics run`")
    compare.add_argument("--output", default="compare.png", metavar="PNG")


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
    if preset and loss != preset["loss"]:
        raise CliError("--preset", f"got it with --loss {loss}; expected --loss {preset['loss']}")
    if "eval_data" in given and given.get("eval_split"):
        raise CliError("--eval-split", "got it beside --eval-data; expected one of the two")
    if values["packing"] and LOSSES[loss].pairs:
        expected = " or ".join(name for name, row in LOSSES.items() if not row.pairs)
        raise CliError("--packing", f"got it with --loss {loss}; expected --loss {expected}")
    _check_lora(given, values["model"])
    if "max_steps" in given and "epochs" in given:
        raise CliError("--max-steps", "got it beside --epochs; expected one of the two")
    return argparse.Namespace(**values)


def _check_lora(given: dict[str, Any], model: str) -> None:
    """Refuse options of an adapter that there is none of, and two sources of one."""
    sources = [name for name in ("lora_rank", "lora_config") if given.get(name)]
    for name in ("lora_alpha", "lora_dropout", "lora_targets"):
        if name in given and "lora_rank" not in given:
            raise CliError(flag_of(name), "got it without --lora-rank; expected both")
    if len(sources) > 1:
        raise CliError("--lora-config", "got it beside --lora-rank; expected one of the two")
    if sources and model == "tiny":
        raise CliError(
            flag_of(sources[0]),
            "got it with --model tiny, whose weights are in no file that an adapter could name; "
            "expected a model's directory or hub id",
        )
