"""Options of the command line, as data, and argparse types whose errors show the expected value."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from ift.data_columns import CHOICE_KEYS, column_names


def number(
    expected: str, accepts: Callable[[float], bool], kind: type = float
) -> Callable[[str], Any]:
    """A finite number for which `accepts` holds."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
            good = math.isfinite(value) and accepts(value)
        except ValueError:
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")
        return value

    return convert


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """One of the names."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected one of {', '.join(names)}")
        return text

    return convert


def names_of(known: Collection[str] = ()) -> Callable[[str], str]:
    """Names with commas between them, each one of `known` if any are given."""

    def convert(text: str) -> str:
        found = [name.strip() for name in text.split(",")]
        if not all(found):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected names with commas between")
        for name in found if known else ():
            one_of(known)(name)
        return ",".join(found)

    return convert


def unit(name: str) -> Callable[[str], float]:
    """A number in [0, 1]."""
    return number(f"{name} in [0, 1]", lambda x: 0 <= x <= 1)


def columns_of(more: Collection[str] = ()) -> Callable[[str], str]:
    """``key=column,…``, each key once, one of rows or of `more`; a name alone is both."""

    def convert(text: str) -> str:
        try:
            column_names(text, more)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return convert


columns = columns_of()
score_columns = columns_of(CHOICE_KEYS)
positive = number("a number above 0", lambda x: x > 0)
positive_int = number("a whole number of at least 1", lambda x: x >= 1, int)
not_negative = number("a number of at least 0", lambda x: x >= 0)
natural = number("a whole number of at least 0", lambda x: x >= 0, int)
fraction = number("a fraction in [0, 1)", lambda x: 0 <= x < 1)


ON_OR_OFF = {True: "on", False: "off"}


class Option(NamedTuple):
    """An option of the command line.

    Args:
        help: for ``--help``.
        type: of argparse.
        metavar: of the value, in the help.
        default: None where something else decides, such as a loss.
        choices: the names that it may be, in place of `type`. Without either it is a switch,
            ``--name`` and ``--no-name``.
        required: whether it has to be given, on the command line or in a file.
    """

    help: str
    type: Callable[[str], Any] | None = None
    metavar: str | None = None
    default: Any = None
    choices: Collection[str] | None = None
    required: bool = False


def flag_of(name: str) -> str:
    """The flag of an option: ``eval_split`` → ``--eval-split``."""
    return "--" + name.replace("_", "-")


def is_switch(option: Option) -> bool:
    """Whether it takes no value."""
    return option.type is None and option.choices is None


def add_options(
    parser: argparse.ArgumentParser, title: str, options: Mapping[str, Option]
) -> argparse._ArgumentGroup:
    """Add a group of options; those that are not given are None, required ones too."""
    group = parser.add_argument_group(title)
    for name, option in options.items():
        if is_switch(option):
            default = "" if option.default is None else f" (default: {ON_OR_OFF[option.default]})"
            group.add_argument(
                flag_of(name), action=argparse.BooleanOptionalAction, default=None,
                help=option.help + default,
            )  # fmt: skip
            continue
        convert, metavar = option.type or str, option.metavar
        if option.choices is not None:
            convert, metavar = one_of(option.choices), "{" + ",".join(option.choices) + "}"
        default = "" if option.default is None else f" (default: {option.default})"
        default = " (required)" if option.required else default
        group.add_argument(flag_of(name), type=convert, metavar=metavar, help=option.help + default)
    return group
