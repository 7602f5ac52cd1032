"""Options from a file: ``--config run.yaml``, and the ``run.json`` that a run leaves.

Both hold options by their names. `run.json` holds all of a run, beside what `RECORDED` names.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ift import data_files
from ift.cli import processes
from ift.cli.arguments import Option, flag_of, is_switch, one_of
from ift.cli.errors import CliError

RUN_FILE, SAMPLES_FILE = "run.json", "samples.jsonl"  # in the output of a run
DATA = ("data", "eval_data")  # files whose contents are recorded
RECORDED = ("processes", *(f"{name}_sha256" for name in DATA))
OF_A_CALL = ("config", "resume", "dry_run")  # options of the command line alone
UNSAVED = ("command", "action", "output", *OF_A_CALL)


class OptionFile(NamedTuple):
    """Options by name, converted as those of the command line, and what was recorded of a run."""

    options: dict[str, Any]
    recorded: dict[str, Any]
    others: frozenset[str] = frozenset()  # those of `ift dynamics run` alone, without values


def read_options(
    path: Path, flag: str, known: Mapping[str, Option], others: Mapping[str, Option]
) -> OptionFile:
    """Read a YAML or JSON file of options; null is an option that is not given.

    Args:
        flag: to name in errors.
        known: the options that it may hold; names with dashes or underscores.
        others: options of `ift dynamics run` alone, which the file of a run may hold.

    Raises:
        CliError: no such file, no mapping, an unknown or repeated name, a value that the option
            does not take, an option of the command line alone or of `ift dynamics run`.
    """
    options: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    found: set[str] = set()
    for key, value in _mapping(path, flag).items():
        name = str(key).replace("-", "_")
        if name in options or name in recorded:
            raise CliError(flag, f"{path}: {name} is there twice; expected it once")
        if name in RECORDED:
            recorded[name] = value
        elif name in known and name in OF_A_CALL:
            problem = f"{path}: {name} belongs on the command line; expected {flag_of(name)} there"
            raise CliError(flag, problem)
        elif name in known:
            if value is not None:
                options[name] = _converted(path, flag, name, known[name], value)
        elif name in others:
            found.add(name)
        else:
            close = difflib.get_close_matches(name, known)
            hint = f", did you mean {' or '.join(close)}?" if close else ""
            raise CliError(flag, f"{path}: unknown option {key!r}; expected those of the command "
                           f"line{hint}")  # fmt: skip
    if found and not recorded:
        raise CliError(flag, f"{path}: {min(found)} is an option of `ift dynamics run`; expected "
                       "those of `ift train`")  # fmt: skip
    return OptionFile(options, recorded, frozenset(found))


def _mapping(path: Path, flag: str) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else _yaml(text)
    except OSError as error:
        raise CliError(flag, f"{path}: {error.strerror}; expected a YAML or JSON file") from None
    except ValueError as error:
        raise CliError(flag, f"{path} is damaged ({type(error).__name__}: {error})") from None
    if not isinstance(found, dict):
        raise CliError(
            flag, f"{path}: got {type(found).__name__}; expected options, `name: value` each"
        )
    return found


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is there twice")
    return dict(pairs)


def _yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]  # has no annotations

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            _once([(key.value, value) for key, value in node.value])
        return {} if node is None else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _converted(path: Path, flag: str, name: str, option: Option, value: Any) -> Any:
    """The value as the command line would have it."""
    shown = json.dumps(value, default=str)
    if is_switch(option):
        if not isinstance(value, bool):
            raise CliError(flag, f"{path}: {name}: got {shown}; expected true or false")
        return value
    if isinstance(value, (bool, list, dict)):
        expected = "one of " + ", ".join(option.choices) if option.choices else "text or a number"
        raise CliError(flag, f"{path}: {name}: got {shown}; expected {expected}")
    convert = one_of(option.choices) if option.choices else option.type or str
    try:
        return convert(str(value))
    except argparse.ArgumentTypeError as error:
        raise CliError(flag, f"{path}: {name}: {error}") from None


# ---- run.json ------------------------------------------------------------------------------------


def saved_options(arguments: argparse.Namespace, known: Mapping[str, Option]) -> dict[str, Any]:
    """What `run.json` holds of a run: every option, paths absolute, and what `RECORDED` names."""
    saved = {
        name: absolute(value, known.get(name))
        for name, value in vars(arguments).items()
        if name not in UNSAVED
    }
    saved["processes"] = processes.count()
    for name in DATA:
        path = saved.get(name)
        saved[f"{name}_sha256"] = path and digest(Path(path), "--" + name.replace("_", "-"))
    return saved


def absolute(value: Any, option: Option | None) -> Any:
    """An existing path of an option that takes one, from the root; anything else as it is."""
    takes_paths = option is not None and option.metavar in ("FILE", "DIR", "MODEL")
    if takes_paths and isinstance(value, str) and value != "tiny" and Path(value).exists():
        return str(Path(value).resolve())
    return value


def digest(path: Path, flag: str) -> str:
    """Of the contents of a file, or of all files of a directory."""
    try:
        return data_files.digest(path)
    except OSError as error:
        raise CliError(flag, f"{path}: {error.strerror}") from None
