"""What the modules of a model get and give in a forward, to find where two first differ."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ift.checking.as_found import whole

Digest = tuple[tuple[int, ...], Tensor]  # shape; sums of x, |x| and x times its place


@dataclass
class Trace:
    """The last call of each module, by name, in the order in which they returned."""

    inputs: dict[str, dict[str, Digest | None]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Digest]] = field(default_factory=dict)


@contextlib.contextmanager
def traced(root: nn.Module, without: nn.Module) -> Iterator[Trace]:
    """Records the calls of all modules inside of `root`, but for those inside of `without`."""
    trace, handles = Trace(), []
    left_out = set(without.modules())
    for name, module in root.named_modules():
        if not name or module in left_out:
            continue

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
            trace.inputs[name] = {
                key: None if value is None else digest(value)
                for key, value in _by_name(module, args, kwargs).items()
                if value is None or isinstance(value, Tensor)
            }

        def after(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            trace.outputs.pop(name, None)  # the last call's place
            trace.outputs[name] = {key: digest(x) for key, x in _tensors("output", output)}

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            module.register_forward_hook(after),
        ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _by_name(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        names = []
    names += [f"argument {i}" for i in range(len(names), len(args))]
    given = dict(zip(names, args, strict=False)) | kwargs
    # Pairs, such as cosines and sines of positions.
    for name, value in list(given.items()):
        if isinstance(value, tuple):
            given |= dict(_tensors(name, value))
    return given


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from _tensors(f"{name}[{number}]", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}", part)


@torch.no_grad()
def digest(tensor: Tensor) -> Digest:
    """A few sums, which stay on the device."""
    x = whole(tensor.detach()).flatten()
    x = x.to(torch.float64 if x.device.type == "cpu" else torch.float32)
    place = torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device)
    if tensor.is_floating_point():  # masks hold the least number, whose sum would hide all else
        x = x.nan_to_num(0, 1e4, -1e4).clamp(-1e4, 1e4)
    return tuple(tensor.shape), torch.stack([x.sum(), x.abs().sum(), x @ place])


def differ(one: Digest | None, other: Digest | None, tolerance: float) -> bool:
    """Whether two tensors differ by more than rounding."""
    if one is None or other is None:
        return one is not other
    if one[0] != other[0]:
        return True
    size = other[1][1].clamp(min=1e-30)
    return bool(((one[1] - other[1].to(one[1].device)).abs() > tolerance * size).any())


def first_difference(got: Trace, expected: Trace, tolerance: float) -> str:
    """In words: the first module that does something else; empty where there is none."""
    skipped = [name for name in expected.outputs if name not in got.outputs]
    added = [name for name in got.outputs if name not in expected.outputs]
    for name in expected.outputs:
        if name in skipped:
            return f"{name} runs in the forward with full logits and not in the fused one"
        pairs = expected.outputs[name], got.outputs[name]
        if any(differ(pairs[1].get(key), pairs[0].get(key), tolerance) for key in pairs[0]):
            wrong = different_inputs(got, expected, name, tolerance)
            if wrong:
                return f"{name} gets another {' and '.join(wrong)}"
            return f"{name} gives another output for the same input"
    if added:
        return f"{added[0]} runs in the fused forward only"
    return ""


def different_inputs(got: Trace, expected: Trace, name: str, tolerance: float) -> list[str]:
    """Which tensor arguments of a module differ."""
    ours, theirs = got.inputs.get(name, {}), expected.inputs.get(name, {})
    return [key for key in dict.fromkeys((*theirs, *ours))
            if differ(ours.get(key), theirs.get(key), tolerance)]  # fmt: skip


def trunk_inputs(got: Trace, expected: Trace, tolerance: float) -> str:
    """What differs among the arguments that the model's code gives to its trunk, in words."""
    for name in expected.inputs:
        if "." not in name and name in got.inputs:
            wrong = different_inputs(got, expected, name, tolerance)
            if wrong:
                return f"{' and '.join(wrong)} of {name}"
    return ""
