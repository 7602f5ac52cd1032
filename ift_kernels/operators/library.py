"""The one place where operators are registered with torch's dispatcher, autograd and compiler.

What holds for every operator is here: backward runs with the settings of its forward, and no
derivative is silently 0. Forward-mode differentiation (`torch.func.jvp`, `torch.autograd.
forward_ad`) of a linear map is the map itself; every other operator refuses it by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ift_kernels.common import head_rows, settings

Formula = Callable[..., Any]


_linear: set[str] = set()  # operators that are linear in their first argument


class _Library(torch.library.Library):
    """A library whose autograd kernels handle forward-mode differentiation first."""

    def impl(self, op_name: str, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        # What `torch.library.register_autograd` registers, and `register` below.
        if dispatch_key == "Autograd":
            fn = _with_forward_mode(op_name, fn, op_name in _linear)
        base: Any = super()
        base.impl(op_name, fn, dispatch_key, **options)


_new: Any = _Library  # its __init__ has no annotations
_LIBRARY = _new("ift_kernels", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Formula | None = None,
    setup: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    *,
    linear: bool = False,
) -> None:
    """Define an operator of the namespace ``ift_kernels``.

    Args:
        schema: ``name(arguments) -> results``.
        implementation: for tensors of any device.
        fake: the same on shapes and dtypes alone.
        autograd, setup: as `torch.library.register_autograd` takes them. Without, a derivative is
            refused.
        linear: the operator is linear in its first argument and constant in all others.
    """
    name = schema.partition("(")[0]
    if linear:
        _linear.add(name)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    head_rows.OPERATORS[f"ift_kernels::{name}"] = implementation
    torch.library.register_fake(f"ift_kernels::{name}", fake, lib=_LIBRARY)
    if autograd is None:
        _LIBRARY.impl(name, _without_gradient(name), "Autograd", with_keyset=True)
    else:
        torch.library.register_autograd(
            f"ift_kernels::{name}",
            _with_settings_of_forward(name, autograd, linear),
            setup_context=_saving_settings(setup),
            lib=_LIBRARY,
        )


def no_second_derivative(operation: str) -> Formula:
    """The derivative of a backward operator: a refusal, where silence would be a wrong gradient."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{operation}: second derivatives are not supported, expected a single backward "
            "(was create_graph=True meant?)"
        )

    return refuse


def _saving_settings(setup: Callable[..., None] | None) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.settings = settings.in_forward()
        if setup is not None:
            setup(ctx, inputs, output)

    return setup_context


def _with_settings_of_forward(name: str, autograd: Formula, linear: bool) -> Formula:
    def formula(ctx: Any, *grads: Tensor | None) -> Any:
        # The formulas multiply in place what forward has formed: not where tangents come along.
        if not linear:
            _refuse_tangents(f"ift_kernels::{name}", grads)
        with settings.in_backward(ctx.settings):
            return autograd(ctx, *grads)

    return formula


def check_transforms(name: str, args: tuple[Any, ...]) -> None:
    """Refuse forward mode and gradients by torch.func, which have no formula.

    Raises:
        RuntimeError: an argument has a tangent, or a gradient of torch.func is taken by it.
    """
    _refuse_tangents(name, args)
    # torch refuses this too, but names neither the operator nor a remedy.
    if torch._C._are_functorch_transforms_active() and _requires_grad(args):
        raise RuntimeError(
            f"{name}: gradients by torch.func (grad, vjp, jacrev, hessian) are not supported, "
            "expected torch.autograd.grad or backward"
        )


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    if _has_tangent(args):
        raise RuntimeError(
            f"{name}: forward-mode differentiation (torch.func.jvp, jacfwd, linearize, "
            "torch.autograd.forward_ad) is not supported, expected torch.autograd.grad or "
            "backward, or detached arguments"
        )


def _has_tangent(values: tuple[Any, ...]) -> bool:
    """Whether any of these is a tensor with a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in values
    )


def _requires_grad(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in args
    )


def _with_forward_mode(name: str, kernel: Any, linear: bool) -> Any:
    """The autograd `kernel` of an operator, for arguments with tangents too."""

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        if linear and _has_tangent(args) and not torch.compiler.is_compiling():
            op, x = getattr(torch.ops.ift_kernels, name), forward_ad.unpack_dual(args[0])
            return forward_ad.make_dual(op(x.primal, *args[1:]), op(x.tangent, *args[1:]))
        check_transforms(f"ift_kernels::{name}", args)
        return kernel(keyset, *args)

    return autograd_kernel


def _without_gradient(name: str) -> Any:
    """The autograd kernel of an operator that has no derivative."""

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        if _requires_grad(args):
            raise RuntimeError(f"ift_kernels::{name}: has no derivative, expected torch.no_grad()")
        op = getattr(torch.ops.ift_kernels, name).default
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return autograd_kernel
