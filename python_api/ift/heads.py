"""The weight of an output head, of quantized ones as rows that are dequantized when they are read.

A kind of head is known by the type of its module or, of a `torch.nn.Linear`, of its weight. Those
of bitsandbytes and torchao are built in (`ift.quantized_heads`); `register_head` adds others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ift_kernels import HeadRows

HeadFunction = Callable[[Any], "tuple[HeadRows, Tensor | None]"]

_registered: dict[type, HeadFunction] = {}
_BUILT_IN = ("bitsandbytes", "torchao")  # packages whose kinds are in `ift.quantized_heads`
# LoRA of PEFT around a linear layer: modules, and the kinds in them.
_LORA = {
    "peft.tuners.lora.layer": ("Linear",),
    "peft.tuners.lora.bnb": ("Linear4bit", "Linear8bitLt"),
}


def register_head(kind: type, function: HeadFunction) -> None:
    """Let `ift.patch` serve output heads of a kind, frozen, by rows of their weight.

    Their logits are ``hidden @ weight.T + bias`` of what `function` returns; patching compares them
    with the module's own, of four tokens. Modules of a subclass are served where they have the
    forward of `kind`.

    Args:
        kind: type of the head's module, or of the weight inside a `torch.nn.Linear`.
        function: the module to its weight as `ift_kernels.HeadRows`, and its bias (V,) or None. It
            is called in every forward and should compute nothing: the rows are computed later.

    Raises:
        TypeError: `kind` is no type of module or tensor.

    >>> class Int8Head(torch.nn.Module):
    ...     def __init__(self, weight):
    ...         super().__init__()
    ...         self.scale = weight.abs().amax(1, keepdim=True) / 127
    ...         self.packed = (weight / self.scale).round().to(torch.int8)
    ...
    ...     def forward(self, hidden):
    ...         return hidden @ (self.packed * self.scale).T
    >>> def rows_of(head):
    ...     packed, scale = head.packed, head.scale
    ...     return HeadRows(
    ...         lambda start, stop: packed[start:stop] * scale[start:stop],
    ...         packed.shape,
    ...         gather=lambda ids: packed[ids] * scale[ids],
    ...     ), None
    >>> register_head(Int8Head, rows_of)
    >>> head, hidden = Int8Head(torch.randn(100, 16)), torch.randn(3, 16)
    >>> weight, bias = head_weight(head)
    >>> bool(torch.allclose(hidden @ weight[0:100].T, head(hidden)))
    True
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module | Tensor)):
        raise TypeError(f"kind: expected a type of module or of tensor, got {kind!r}")
    if not callable(function):
        raise TypeError(f"function: expected a function, got {type(function).__name__}")
    _registered[kind] = function


def head_function(head: nn.Module) -> HeadFunction | None:
    """The function of the kind of this head; None where it has none, as a plain one."""
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    of_weight: tuple[type, ...] = ()
    if linear:
        of_weight = tuple(t for t in type(head.weight).__mro__ if t not in (nn.Parameter, Tensor))
    # A plain linear layer is known by its weight alone.
    of_module = () if linear else type(head).__mro__
    for package in {t.__module__.split(".")[0] for t in (*of_module, *of_weight)}:
        if package in _BUILT_IN and package in sys.modules:
            importlib.import_module("ift.quantized_heads").register(package, register_built_in)
    for kind in (*of_module, *of_weight):
        found = _registered.get(kind)
        forward = getattr(kind, "forward", None)
        if found is not None and (kind in of_weight or type(head).forward is forward):
            return found
    return None


def register_built_in(kind: type, function: HeadFunction) -> None:
    """`register_head`, unless something is registered for `kind`."""
    _registered.setdefault(kind, function)


def is_lora(head: Any) -> bool:
    """Whether it is PEFT's LoRA around a linear layer."""
    for module, names in _LORA.items():
        for kind in (getattr(sys.modules.get(module), name, None) for name in names):
            # FSDP2 makes a subclass of it.
            if kind is not None and isinstance(head, kind) and type(head).forward is kind.forward:
                return True
    return False


def base_layer(head: Any) -> Any:
    """The layer inside of PEFT's LoRA; any other head itself."""
    return head.base_layer if is_lora(head) else head


def head_weight(head: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of a head: its own, or of a quantized one `HeadRows`.

    Args:
        head: a linear layer, a module of a registered kind, or PEFT's LoRA around one, whose
            weight is that of the layer inside.
        dtype: of those rows; None: that of the kind.

    Raises:
        TypeError: a kind that is not known, or not as it is, by name.
    """
    base = base_layer(head)
    function = head_function(base)
    if function is None:
        return base.weight, base.bias
    weight, bias = function(base)
    if not isinstance(weight, HeadRows):
        raise TypeError(
            f"{type(base).__name__}: expected ift_kernels.HeadRows from its function of "
            f"register_head, got {type(weight).__name__}"
        )
    return weight if dtype is None else weight.to(dtype), bias
