"""Settings of a ``with`` block, and their values in backward.

Autograd runs backward after the block has ended, or in a thread of its own, where context
variables have other values. So every setting of this package is declared here: the autograd
formulas run with the values that their forward had (`operators.library.register`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Values = list[tuple["Setting[Any]", Any]]

_settings: list[Setting[Any]] = []


class Setting(Generic[T]):
    """A context variable whose value in backward is that of forward."""

    def __init__(self, name: str, default: T) -> None:
        self._variable = contextvars.ContextVar(name, default=default)
        _settings.append(self)

    def get(self) -> T:
        return self._variable.get()

    @contextlib.contextmanager
    def use(self, value: T) -> Iterator[None]:
        """`value` inside the ``with`` block."""
        token = self._variable.set(value)
        try:
            yield
        finally:
            self._variable.reset(token)

    def in_forward(self) -> T:
        """The value that backward restores; by default the current one."""
        return self.get()

    def in_backward(self, forward: T) -> T:
        """The value in backward, given what `in_forward` returned."""
        return forward


def in_forward() -> Values:
    """The values that backward is to use."""
    return [(setting, setting.in_forward()) for setting in _settings]


@contextlib.contextmanager
def in_backward(values: Values) -> Iterator[None]:
    """The values of `in_forward` inside the ``with`` block."""
    tokens = [(s._variable, s._variable.set(s.in_backward(value))) for s, value in values]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)
