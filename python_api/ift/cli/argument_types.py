"""argparse types whose errors say what came and what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


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


def one_of(*names: str) -> Callable[[str], str]:
    """One of the names."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected one of {', '.join(names)}")
        return text

    return convert


def unit(name: str) -> Callable[[str], float]:
    """A number in [0, 1]."""
    return number(f"{name} in [0, 1]", lambda x: 0 <= x <= 1)


positive = number("a number above 0", lambda x: x > 0)
positive_int = number("a whole number of at least 1", lambda x: x >= 1, int)
not_negative = number("a number of at least 0", lambda x: x >= 0)
natural = number("a whole number of at least 0", lambda x: x >= 0, int)
fraction = number("a fraction in [0, 1)", lambda x: 0 <= x < 1)
