"""What a token's results do not depend on under ``deterministic=True``, checked to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ift_kernels
from ift.numerics import inputs

OUTPUTS = ("logprob", "lse", "entropy", "argmax")
DTYPES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, fp32 logits": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, None),
    "float16, fp32 logits": (torch.float16, torch.float32),
}


class Head(NamedTuple):
    """Tokens, the head, and the options of every call."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    options: dict[str, Any]

    def results(self, rows: Tensor | None = None, grad: bool = False, **options: Any) -> Tensor:
        """(N, outputs) of some rows, with gradients asked for or not."""
        hidden = self.hidden if rows is None else self.hidden[rows]
        target = self.target if rows is None else self.target[rows]
        hidden = hidden.detach().requires_grad_(grad)
        weight = self.weight.detach().requires_grad_(grad)
        found = ift_kernels.linear_logprobs(
            hidden, weight, target, outputs=OUTPUTS, **self.options, **options
        )
        return torch.stack([getattr(found, name).detach().double() for name in OUTPUTS], -1)

    def gradients(self) -> tuple[Tensor, ...]:
        """Of hidden and weight, for uneven upstream gradients."""
        hidden, weight = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        found = ift_kernels.linear_logprobs(hidden, weight, self.target, **self.options)
        upstream = torch.linspace(-1, 1, len(self.target), device=hidden.device)
        assert found.logprob is not None
        return torch.autograd.grad(found.logprob, (hidden, weight), upstream.to(found.logprob))


def _alone(head: Head) -> int:
    count = len(head.target)
    rows = torch.arange(0, count, count // (64 if count > 64 else 8))
    single = torch.cat([head.results(rows[i : i + 1]) for i in range(len(rows))])
    return _differences(single, head.results()[rows])


def _batch_size(head: Head) -> int:
    whole, some = head.results(), torch.arange(len(head.target) // 3)
    return _differences(head.results(some), whole[some])


def _order(head: Head) -> int:
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(len(head.target), generator=g)
    return _differences(head.results(order), head.results()[order])


def _ignored(head: Head) -> int:
    """Ignored tokens beside it, as of padding; and without them, as of packing."""
    valid = torch.arange(len(head.target)) % 3 > 0
    padded = head._replace(target=head.target.masked_fill(~valid.to(head.target.device), -100))
    return _differences(padded.results()[valid], head.results(valid.nonzero()[:, 0]))


def _workspace(head: Head) -> int:
    default = head.results()
    return sum(_differences(head.results(workspace=n << 20), default) for n in (24, 64))


def _with_gradients(head: Head) -> int:
    """A policy's pass, which has gradients, against a reference's, which has none."""
    frozen = head.results()
    return _differences(head.results(grad=True), frozen)


def _threads(head: Head) -> int:
    with threads(1):
        one = head.results()
    with threads(2):
        return _differences(head.results(), one)


def _gradients_of_threads(head: Head) -> int:
    with threads(1):
        one = head.gradients()
    with threads(2):
        two = head.gradients()
    return sum(_differences(a, b) for a, b in zip(one, two, strict=True))


def _gradients_of_runs(head: Head) -> int:
    pairs = zip(head.gradients(), head.gradients(), strict=True)
    return sum(_differences(a, b) for a, b in pairs)


# What a result does not depend on → the number of elements that differ nevertheless.
CHECKS: dict[str, Callable[[Head], int]] = {
    "alone, or in a batch": _alone,
    "the number of tokens": _batch_size,
    "their order": _order,
    "ignored tokens; padded, or packed": _ignored,
    "workspace and chunks": _workspace,
    "gradients needed, or not": _with_gradients,
    "threads": _threads,
    "threads, gradients": _gradients_of_threads,
    "runs, gradients": _gradients_of_runs,
}


def check(
    device: torch.device, *, quick: bool = False, deterministic: bool = True
) -> dict[str, dict[str, int | str]]:
    """Elements that differ, by what they must not depend on and by dtype; or why a call raises."""
    rows, width, vocabulary = (48, 64, 2000) if quick else (384, 256, 6000)
    made = inputs.make("ordinary", rows, width, vocabulary, seed=3)
    found: dict[str, dict[str, int | str]] = {name: {} for name in CHECKS}
    for title, (dtype, logits_dtype) in DTYPES.items():
        options = {"logits_dtype": logits_dtype, "deterministic": deterministic}
        head = Head(
            made.hidden.to(device, dtype), made.weight.to(device, dtype), made.target.to(device),
            options,
        )  # fmt: skip
        for name, run in CHECKS.items():
            try:
                found[name][title] = run(head)
            except (RuntimeError, ValueError) as error:  # the option refuses this machine
                found[name][title] = str(error).splitlines()[0]
    return found


def holds(found: dict[str, dict[str, int | str]], dtype: str) -> bool:
    """Whether nothing differs for a dtype."""
    return all(row[dtype] == 0 for row in found.values())


def _differences(a: Tensor, b: Tensor) -> int:
    return int(((a != b) & ~(a.isnan() & b.isnan())).sum())


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch inside the ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
