"""The parser of ``ift``: options of a run, their defaults and presets.

The parser leaves options that are not given at None; `resolve` fills them from the file of
``--config``, a run that is resumed, the preset and the defaults, in this order.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import sys
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ift.cli import processes
from ift.cli.arguments import (
    Option,
    add_options,
    columns,
    flag_of,
)
from ift.cli.config_file import DATA, RUN_FILE, OptionFile, digest, read_options
from ift.cli.errors import CliError
from ift.cli.losses import (
    IFT_OPTIONS,
    LOSSES,
    OPTIONS,
    PAIR_OPTIONS,
    SFT_OPTIONS,
    losses_with,
)
from ift.cli.option_tables import (
    CHECK_OPTIONS,
    DEFAULTS,
    HEAD,
    HEATMAP_OPTIONS,
    INPUT_OPTIONS,
    MODEL_OPTIONS,
    NEEDS,
    PRESETS,
    PROBE_OPTIONS,
    REPLACES,
    REPORT_OPTIONS,
    RUN_OPTIONS,
    SCORE_OPTIONS,
    TRAINING_OPTIONS,
)
from ift.data_columns import CHOICE_KEYS


class _Version(argparse.Action):
    """Print the version and exit; it is looked up when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from ift.cli.doctor import version_of

        installed = version_of("ift-kernels") or importlib.import_module("ift_kernels").__version__
        print(f"ift {installed}")
        parser.exit()


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

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse's, which would hide that the reader has left."""
        (file or sys.stderr).write(message)

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
    parser.add_argument("--version", action=_Version, help="print the version, and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser(
        "doctor", help="say what is installed and which backend serves what, and why"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    numerics = commands.add_parser(
        "numerics", help="measure the errors of every operation on this machine, and of others"
    )
    numerics.add_argument("--json", action="store_true", help="print one JSON object")
    numerics.add_argument(
        "--quick", action="store_true", help="smaller, and without what has to be compiled"
    )
    numerics.add_argument("--plot", metavar="FILE", help="draw the errors into a PNG")
    numerics.add_argument("--cpu", action="store_true", help="the CPU, even where there is a GPU")
    train = commands.add_parser("train", help="fine-tune a causal language model on a file of rows")
    _add_train(train)
    report = commands.add_parser("report", help="compare runs: a table, and one page of HTML")
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="output of `ift train` or `ift dynamics run`"
    )
    add_options(report, "page", REPORT_OPTIONS)
    _add_score(commands.add_parser(
        "score", help="log-likelihoods of the answers in a file; a teacher's best ids, to distil"
    ))  # fmt: skip
    _add_check(commands.add_parser(
        "check", help="is it right on your model? The fused loss and gradients beside naive ones"
    ))  # fmt: skip
    _add_dynamics(commands.add_parser("dynamics", help="watch what training does to other answers"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "what to train", INPUT_OPTIONS)
    add_options(parser, "evaluation, log and checkpoints", RUN_OPTIONS)
    add_options(parser, "training", TRAINING_OPTIONS)
    add_options(parser, "supervised fine-tuning", _with_losses(SFT_OPTIONS))
    add_options(parser, "weights, memory and adapters", MODEL_OPTIONS)
    add_options(parser, "IFT loss (--loss ift); defaults as released", IFT_OPTIONS)
    pairs = _with_losses(PAIR_OPTIONS)
    add_options(parser, "preference losses; defaults as in ift.losses", pairs)


def _with_losses(options: Mapping[str, Option]) -> dict[str, Option]:
    """The options, whose help names the losses that have them."""
    return {
        name: option._replace(help=f"{option.help} [{', '.join(losses_with(name))}]")
        for name, option in options.items()
    }


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="FILE", help="rows as of `ift train --data`, or `prompt`, `choices` and "
        "`answer`"
    )  # fmt: skip
    inputs = {name: INPUT_OPTIONS[name] for name in ("model", "columns", "system")}
    with_choices = functools.partial(columns, more=CHOICE_KEYS)
    add_options(parser, "what to score", inputs | {
        "columns": inputs["columns"]._replace(type=with_choices),
        "output": Option("gets scores-*.jsonl, summary.json and with --topk the shards and "
                         "index.json; the same command again continues", str, "DIR",
                         required=True),
        **SCORE_OPTIONS,
    })  # fmt: skip
    names = ("batch_size", "max_length", "truncate", "bf16", "logits_dtype", "deterministic",
             "seed", "cpu")  # fmt: skip
    weights = {name: MODEL_OPTIONS[name] for name in ("dtype", "attn")}
    add_options(parser, "how", {name: TRAINING_OPTIONS[name] for name in names} | weights)
    parser.set_defaults(**dict.fromkeys([*DEFAULTS, *OPTIONS, "allow_new_weights"]))


def _add_check(parser: argparse.ArgumentParser) -> None:
    inputs = {name: INPUT_OPTIONS[name] for name in ("model", "data", "columns", "system")}
    add_options(parser, "what to check", inputs | CHECK_OPTIONS)
    names = ("loss", "max_length", "truncate", "logits_dtype", "deterministic", "seed", "cpu")
    weights = {name: MODEL_OPTIONS[name] for name in ("dtype", "attn")}
    add_options(parser, "how", {name: TRAINING_OPTIONS[name] for name in names} | weights)
    parser.set_defaults(**dict.fromkeys([*DEFAULTS.keys() - CHECK_OPTIONS, *OPTIONS,
                                         "allow_new_weights"]))  # fmt: skip


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
    inputs = {k: v for k, v in INPUT_OPTIONS.items() if k not in ("config", "dry_run")}
    add_options(heatmap, "what to measure", inputs | {
        "output": Option("gets heatmap.json and heatmap.png; with --projections kernel.png", str,
                         "DIR", required=True),
    })  # fmt: skip
    made = {name: option for name, option in PROBE_OPTIONS.items() if name != "probe_every"}
    add_options(heatmap, "probes; into DIR/probes.jsonl", made)
    names = ("lr", "batch_size", "max_length", "seed", "cpu")
    steps = {name: TRAINING_OPTIONS[name] for name in names}
    add_options(heatmap, "training of each type", {**steps, **HEATMAP_OPTIONS})
    heatmap.set_defaults(
        **dict.fromkeys([*DEFAULTS, *OPTIONS])
    )  # what else loading rows and models reads


def resolve(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given, and refuse contradictions.

    Raises:
        CliError: two arguments exclude each other, or one has no effect; what is required is
            missing; a file of options that cannot be used.
    """
    known = known_options(arguments)
    others = {name: option for name, option in PROBE_OPTIONS.items() if name not in known}
    line = {key: value for key, value in vars(arguments).items() if value is not None}
    file, saved = OptionFile({}, {}), OptionFile({}, {})
    if "config" in line:
        path = Path(line["config"])
        file = read_options(path, "--config", known, others)
        if file.others:
            processes.note(f"{path} is of `ift dynamics run`; this run measures no probes")
        _check_repeats(path, file, line)
    run = Path(line.get("output", file.options.get("output", ""))) / RUN_FILE
    if line.get("resume") and run.is_file():
        saved = read_options(run, "--resume", known, others)
        _check_command(run.parent, saved, known)
    given = _over(file.options, line)
    preset = PRESETS.get(given.get("preset", saved.options.get("preset", "")), {})
    values = _over(DEFAULTS, preset, saved.options, given)
    values = {name: values.get(name) for name in vars(arguments)}
    _check_required(values, known, run)
    for layer in (line, file.options):
        for name, other in REPLACES.items():
            if name in layer and layer.get(other):
                problem = f"got it beside {flag_of(other)}; expected one of the two"
                raise CliError(_place(name, line), problem)
    # A run.json holds the defaults, too, which contradict nothing.
    given = {k: v for k, v in given.items() if k in line or v != DEFAULTS.get(k)}
    _check_applicable(values, given, preset, line)
    return argparse.Namespace(**values)


def of_head(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `ift.patch`."""
    return {name: getattr(arguments, name) for name in HEAD}


def known_options(arguments: argparse.Namespace) -> dict[str, Option]:
    """The options of a command, by name."""
    every = ChainMap(
        INPUT_OPTIONS, RUN_OPTIONS, TRAINING_OPTIONS, MODEL_OPTIONS, PROBE_OPTIONS, OPTIONS
    )
    return {name: every[name] for name in vars(arguments) if name in every}


def _over(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of which later layers win; one that is given replaces those that it excludes."""
    values: dict[str, Any] = {}
    for layer in layers:
        found = {name: value for name, value in layer.items() if value is not None}
        for name, other in REPLACES.items():
            if name in found:
                values.pop(other, None)
                found = {k: v for k, v in found.items() if k != other}
            elif other in found:
                values.pop(name, None)
        values |= found
    return values


def _check_command(output: Path, saved: OptionFile, known: Mapping[str, Option]) -> None:
    """Refuse to resume a run by another command: it would lose its probes, or get late ones."""
    here = "probe_every" in known
    if saved.others or (here and "probe_every" not in saved.options):
        command = "train" if here else "dynamics run"
        problem = f"{output} is a run of `ift {command}`; expected `ift {command} --resume`"
        raise CliError("--resume", problem)


def _check_required(values: Mapping[str, Any], known: Mapping[str, Option], run: Path) -> None:
    missing = [flag_of(name) for name, option in known.items()
               if option.required and values[name] is None]  # fmt: skip
    if missing and values["resume"] and values["output"] is not None and not run.is_file():
        problem = f"no {RUN_FILE} in {run.parent}; expected the output of a run, or "
        raise CliError("--resume", problem + " and ".join(missing))
    if missing:
        command = " ".join(filter(None, (values["command"], values.get("action"))))
        raise CliError(command, f"the following arguments are required: {', '.join(missing)}")


def _check_repeats(path: Path, file: OptionFile, line: Mapping[str, Any]) -> None:
    """Refuse to repeat a run on other data than its own, unless the data are given."""
    before, now = file.recorded.get("processes", 1), processes.count()
    if file.recorded and before != now:
        processes.note(f"{path} is of a run in {before} processes, this one has {now}")
    for name in DATA:
        recorded, data = file.recorded.get(f"{name}_sha256"), file.options.get(name)
        if recorded and data and name not in line and digest(Path(data), "--config") != recorded:
            raise CliError(
                "--config",
                f"{path}: {data} has other contents than when that run was started; expected the "
                f"same, or {flag_of(name)}",
            )


def _place(name: str, line: Mapping[str, Any]) -> str:
    """Where an option was given, for errors."""
    return flag_of(name) if name in line else f"--config: {name}"


def _check_applicable(
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    preset: Mapping[str, Any],
    line: Mapping[str, Any],
) -> None:
    """Refuse given options that have no effect in this run."""

    def refuse(name: str, got: str, expected: str) -> NoReturn:
        raise CliError(_place(name, line), f"got it {got}; expected {expected}")

    loss = values["loss"]
    learned = " or ".join(name for name, row in LOSSES.items() if not row.pairs)
    for name in OPTIONS:
        if name in given and not LOSSES[loss].takes(name):
            refuse(name, f"with --loss {loss}", f"--loss {' or '.join(losses_with(name))}")
    if preset and loss != preset["loss"]:
        refuse("preset", f"with --loss {loss}", f"--loss {preset['loss']}")
    for name, (other, expected) in NEEDS.items():
        value = values[other] or next(iter(IFT_OPTIONS[other].choices or ()))  # the default
        if given.get(name) and value not in expected:
            flag = flag_of(other)
            refuse(name, f"with {flag} {value}", f"{flag} {' or '.join(expected)}")
    if values["deterministic"] and values["gradient"] == "active":
        refuse("deterministic", "with --gradient active, whose columns depend on the other tokens",
               "--gradient exact")  # fmt: skip
    if values["deterministic"] and values["rule"] == "soft":
        refuse("deterministic", "with --rule soft", "a rule that picks a token")
    if "eval_steps" in given and not (values["eval_data"] or values["eval_split"]):
        refuse("eval_steps", "without --eval-data or --eval-split", "one of the two")
    for name in ("probe_size", "probe_test", "probe_sample", "probe_fluent"):
        changed = given.get(name, DEFAULTS[name]) != DEFAULTS[name]
        if changed and values["probes"] is not None and not values["resume"]:
            refuse(name, "beside --probes", "one of the two")
    if "responses" in given and LOSSES[loss].pairs:
        both = f"--loss {learned}: a preference loss takes both responses"
        refuse("responses", f"with --loss {loss}", both)
    if given.get("samples") and not (values["eval_data"] or values["eval_split"]):
        refuse("samples", "without --eval-data or --eval-split", "one of the two")
    if values["packing"] and LOSSES[loss].pairs:
        refuse("packing", f"with --loss {loss}", f"--loss {learned}")
    for name in ("lora_alpha", "lora_dropout", "lora_targets"):
        if name in given and not values["lora_rank"]:
            refuse(name, "without --lora-rank", "both")
    if values["lora_dropout"] and not values["dropout"]:
        refuse("lora_dropout", "with --no-dropout", "--dropout beside it")
    sources = [name for name in ("lora_rank", "lora_config") if values[name]]
    if len(sources) > 1:
        refuse("lora_config", "beside --lora-rank", "one of the two")
    if sources and values["model"] == "tiny":
        refuse(sources[0], "with --model tiny, whose weights are in no file that an adapter could "
               "name", "a model's directory or hub id")  # fmt: skip
