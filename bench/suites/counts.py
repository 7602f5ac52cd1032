"""Counts what an operation does, instead of timing it: the same on every machine, noisy or not.

Matrix products and their flops, bytes allocated, operators called and values read by the host, as
torch's profiler sees them, and calls of the backend's epilogues, of small calls on a CPU.
``python -m bench counts`` compares them with the committed ones; more of anything is a regression.
An operator or an epilogue is a launch on a GPU, and a value read by the host makes it wait there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ift_kernels
from bench.report.tables import Table, terminal
from ift_kernels import backends
from ift_kernels.backends import contract, reference
from ift_kernels.backends.cpu import memory

COMMITTED = Path(__file__).with_name("counts.json")
BACKENDS = ("reference", "cpu")
SIZES = (256, 64, 3000)  # N, D, V: several blocks in every schedule
WORKSPACE = 1 << 20
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
EPILOGUES = (*contract.EPILOGUES, "fused_statistics")  # which goes beyond the contract
READS = ("aten::_local_scalar_dense", "aten::nonzero")
# Views and bookkeeping launch nothing.
FREE = frozenset(
    f"aten::{name}" for name in (
        "view", "t", "transpose", "slice", "select", "as_strided", "expand", "unsqueeze", "detach",
        "empty", "empty_strided", "empty_like", "reshape", "narrow", "alias", "squeeze", "permute",
        "_unsafe_view", "resolve_conj", "resolve_neg", "split", "unbind", "result_type",
        "lift_fresh",
    )
)  # fmt: skip
Counts = dict[str, int]


def operations() -> dict[str, Callable[[], Any]]:
    """What is counted, by name."""
    n, d, v = SIZES
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5).requires_grad_()
    target = torch.randint(v, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator)
    x, ids = torch.randn(4, n // 4, generator=generator), target.view(4, -1)
    teacher = hidden.detach().flip(0)
    size = {"workspace": WORKSPACE}
    # Few columns of a block matter, or it would be dense; a block has whole rows in its workspace.
    peaked, wide = (8 * hidden.detach()).requires_grad_(), 4 * WORKSPACE

    def gradients(value: Tensor, seed: Tensor | None = None) -> Any:
        return torch.autograd.grad(value, (hidden, weight), seed)

    def logprobs(states: Tensor = hidden, head: Tensor = weight, **options: Any) -> Tensor:
        options = size | options
        found = ift_kernels.linear_logprobs(states, head, target, **options).logprob
        assert found is not None
        return found

    def forward() -> Tensor:
        with torch.no_grad():
            return logprobs(outputs=("logprob", "entropy", "argmax"))

    def sparse(head: Tensor) -> Tensor:
        return logprobs(peaked, head, gradient="active", workspace=wide)

    return {
        "linear_logprobs": forward,
        "linear_logprobs, backward": lambda: gradients(logprobs(), upstream),
        "linear_logprobs, active": lambda: torch.autograd.grad(
            sparse(weight.detach()), peaked, upstream
        ),
        "linear_logprobs, active, head trained": lambda: torch.autograd.grad(
            sparse(weight), (peaked, weight), upstream
        ),
        "linear_cross_entropy, backward": lambda: gradients(
            ift_kernels.linear_cross_entropy(hidden, weight, target, **size)
        ),
        "linear_token": lambda: ift_kernels.linear_token(hidden, weight, **size).ids,
        "discounted_cumsum": lambda: ift_kernels.discounted_cumsum(x, 0.9),
        "temporal_residual": lambda: ift_kernels.temporal_residual(
            weight.detach(), ids, ids, ids, 0.2
        ),
        "linear_divergence, backward": lambda: gradients(
            ift_kernels.linear_divergence(hidden, weight, teacher, weight.detach(), workspace=wide)
        ),
    }


def count(call: Callable[[], Any], backend: contract.Backend = reference) -> Counts:
    """What one call does with `backend`, after one that fills caches."""
    call()
    activities = [ProfilerActivity.CPU]
    kept, memory.LIMIT = memory.LIMIT, 0  # what an earlier call left would not be counted
    try:
        with contextlib.ExitStack() as stack:
            spies = [
                stack.enter_context(mock.patch.object(backend, n, wraps=getattr(backend, n)))
                for n in EPILOGUES
                if hasattr(backend, n)
            ]
            with profile(activities=activities, profile_memory=True, record_shapes=True) as seen:
                call()
    finally:
        memory.LIMIT = kept
    found = {"products": 0, "flops": 0, "bytes": 0, "operators": 0, "reads": 0}
    found["epilogues"] = sum(spy.call_count for spy in spies)
    for event in seen.events() or ():
        found["bytes"] += max(int(event.self_cpu_memory_usage), 0)
        name = event.name
        if name in PRODUCTS:
            found["products"] += 1
            added_to = name not in ("aten::mm", "aten::bmm")  # then it comes first
            a, b = event.input_shapes[added_to : 2 + added_to]
            # By hand: the profiler knows no flops of products that are added in place.
            found["flops"] += 2 * math.prod(a) * b[-1]
        found["reads"] += name in READS
        # The outermost operators alone: what they call is their own way of doing it.
        nested = event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")
        found["operators"] += name.startswith("aten::") and name not in FREE and not nested
    return found


def measure() -> dict[str, dict[str, Counts]]:
    """All counts, by backend and operation; backends that are not built are left out."""
    found: dict[str, dict[str, Counts]] = {}
    torch.set_num_threads(1)  # the same everywhere
    for name in BACKENDS:
        if not backends.BACKENDS[name].unsupported_reason(torch.device("cpu"), torch.float32):
            with ift_kernels.use_backend(name):
                found[name] = {
                    what: count(call, backends.BACKENDS[name])
                    for what, call in operations().items()
                }
    return found


def committed() -> dict[str, dict[str, Counts]]:
    """The committed counts."""
    found: dict[str, dict[str, Counts]] = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return found


def differences(
    found: dict[str, dict[str, Counts]], known: dict[str, dict[str, Counts]]
) -> list[tuple[str, str, str, int, int]]:
    """(backend, operation, quantity, committed, now) of all that differ; new operations from 0."""
    return [
        (backend, what, quantity, before, now)
        for backend, calls in found.items()
        for what, counts in calls.items()
        for quantity, now in counts.items()
        if (before := known.get(backend, {}).get(what, {}).get(quantity, 0)) != now
    ]


def main(arguments: list[str]) -> int:
    """The command; exit code 1 if anything is more than committed."""
    parser = argparse.ArgumentParser(prog="python -m bench counts", description=__doc__)
    parser.add_argument("--write", action="store_true", help="commit to what comes out")
    options = parser.parse_args(arguments)
    console = Console()
    found = measure()
    if options.write:
        known = committed() if COMMITTED.exists() else {}
        text = json.dumps(known | found, indent=1) + "\n"
        COMMITTED.write_text(text, encoding="utf-8")
    rows = [
        [backend, what, str(c["products"]), f"{c['flops'] / 1e6:.1f}", f"{c['bytes'] / 1024:.0f}",
         str(c["operators"]), str(c["epilogues"]), str(c["reads"])]
        for backend, calls in found.items() for what, c in calls.items()
    ]  # fmt: skip
    head = ("", "case", "products", "Mflop", "KiB allocated", "operators", "epilogues", "reads")
    console.print(terminal(Table("", head, rows)))
    changed = differences(found, committed())
    for backend, what, quantity, before, now in changed:
        style = "red" if now > before else "green"
        console.print(f"{backend}: {what}: {quantity} {before} → {now}", style=style)
    return 1 if any(now > before for *_, before, now in changed) else 0
