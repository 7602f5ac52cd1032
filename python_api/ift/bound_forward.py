"""Forwards that take the place of a bound method of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

from torch import nn


class BoundForward:
    """A forward for one model object, with the interface of a bound method.

    accelerate and Trainer use `__self__`, `__func__` and the signature; when accelerate unwraps a
    model it would follow a ``__wrapped__`` to the class's forward. It is an object, since a bound
    method would unpickle as the class's forward.

    Args:
        previous: a forward that was set on the object before.
    """

    is_ift = True  # `unpatch` may remove it
    keywords: ClassVar[dict[str, Any]] = {}  # arguments beside those of the original, and defaults

    def __init__(self, model: nn.Module, previous: Callable[..., Any] | None) -> None:
        self.model = model
        self.previous = previous

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that the model had before."""
        if self.previous is not None:
            return self.previous
        return MethodType(type(self.model).forward, self.model)

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of `model`, which may be a copy of the one that this belongs to."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:
            args = args[1:]  # as from a method made of this object: accelerate's unwrap_model does
        return self.call(self.model, args, kwargs)

    @property
    def __self__(self) -> nn.Module:
        return self.model

    @property
    def __func__(self) -> Callable[..., Any]:
        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.call(model, args, kwargs)

        signature = self.__signature__
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [first, *signature.parameters.values()]
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by inspect
        forward.is_ift = True  # type: ignore[attr-defined]  # a method made from it is still ours
        return forward

    @property
    def __signature__(self) -> inspect.Signature:
        original = inspect.signature(self.original)
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in self.keywords.items()
        ]
        parameters = list(original.parameters.values())
        end = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return original.replace(parameters=[*parameters[:end], *extra, *parameters[end:]])
