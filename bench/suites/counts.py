"""Counts what an operation does, instead of timing it: the same on every machine, noisy or not.

Matrix products and their flops, bytes allocated and how many of them are alive at once, operators
called and values read by the host, as torch's dispatcher sees them, and calls of the backend's
epilogues: of small calls on a CPU, and of whole ones as they are planned for an H200, on tensors
without memory (`meta`), with the launches of the Triton backend counted instead of run.
``python -m bench counts`` compares them with the committed ones; more of anything is a regression.
An operator or an epilogue is a launch on a GPU, and a value read by the host makes it wait there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import ift_kernels as k
from bench.report.tables import Table, terminal
from ift import losses
from ift_kernels import backends
from ift_kernels.backends import contract, reference
from ift_kernels.backends.cpu import memory
from ift_kernels.schedule import device

COMMITTED = Path(__file__).with_name("counts.json")
BACKENDS, FULL_SIZE = ("reference", "cpu"), "H200, full size"
WORKSPACE = 1 << 20
QUANTITIES = ("products", "flops", "bytes", "peak", "operators", "epilogues", "reads")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
EPILOGUES = (*contract.EPILOGUES, "fused_statistics")  # which goes beyond the contract
READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero")
# Beside views, these launch nothing.
FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh")
ACTIVE_SHARE = 0.1  # of the columns, of data like that of a language model
Counts = dict[str, int]


class Size(NamedTuple):
    """Of what is counted."""

    shape: tuple[int, int, int] = (256, 64, 3000)  # N, D, V: several blocks in every schedule
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    workspace: int | None = WORKSPACE
    wide: int | None = 4 * WORKSPACE  # of what needs a block of whole rows


SMALL, FULL = Size(), Size((8192, 4096, 128256), torch.bfloat16, "meta", None, None)


def operations(size: Size = SMALL) -> dict[str, Callable[[], Any]]:
    """What is counted, by name: every operation and every loss, with their gradients."""
    (n, d, v), generator = size.shape, torch.Generator().manual_seed(0)
    some: dict[str, Any] = {"workspace": size.workspace}
    wide: dict[str, Any] = {"workspace": size.wide}

    def normal(*shape: int, dtype: torch.dtype = size.dtype) -> Tensor:
        if size.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, weight = normal(n, d).requires_grad_(), (normal(v, d) / d**0.5).requires_grad_()
    frozen, teacher = weight.detach(), hidden.detach().flip(0)
    target = torch.randint(v, (n,), generator=generator).to(size.device)
    x, ids = normal(4, n // 4, dtype=torch.float32).requires_grad_(), target.view(4, -1)
    # Few columns of a block matter, or it would be dense.
    peaked, upstream = (8 * hidden.detach()).requires_grad_(), normal(n, dtype=torch.float32)

    def gradients(value: Any, *of: Tensor) -> Any:
        seed = upstream if value.shape == upstream.shape else torch.ones_like(value)
        return torch.autograd.grad(value, of or (hidden, weight), seed)

    def logprobs(states: Tensor = hidden, head: Tensor = weight, **options: Any) -> Any:
        return k.linear_logprobs(states, head, target, **some | options)

    def forward() -> Any:
        with torch.no_grad():
            return logprobs(outputs=("logprob", "entropy", "argmax"))

    def of_entropy() -> Any:
        found = logprobs(outputs=("logprob", "entropy"))
        return gradients(found.logprob + found.entropy)

    def active(*trained: Tensor) -> Any:
        head = trained[0] if trained else frozen
        stats = logprobs(peaked, head, gradient="active", **wide)
        return gradients(stats.logprob, peaked, *trained)

    def token(**rule: Any) -> Any:
        return k.linear_token(hidden, weight, **some, **rule)

    def divergence(**options: Any) -> Any:
        return gradients(k.linear_divergence(hidden, weight, teacher, frozen, **wide, **options))

    def shard() -> Any:
        one: Any = {"is_initialized": lambda: True, "get_world_size": lambda group: 1,
               "get_rank": lambda group: 0, "all_reduce": lambda *a, **k: None}  # fmt: skip
        with mock.patch.multiple(torch.distributed, **one):
            return gradients(k.vocab_parallel_logprobs(hidden, weight, target, **some).logprob)

    head = losses.Head(teacher.view(8, -1, d), frozen)

    def of_loss(loss: Any) -> Any:
        arguments: Any = (hidden.view_as(head.hidden), weight, target.view(8, -1))
        if not isinstance(loss, losses.Loss):
            return gradients(loss(*arguments, head))
        takes = losses._module.accepted(loss)  # a reference for a KL, which is off by default
        compares = "reference" in takes and "kl_coef" not in takes
        reference: dict[str, Any] = {"reference": head} if compares else {}
        rows = [torch.ones(8, device=size.device)] * loss.needs
        from_hidden: Any = loss.from_hidden
        return gradients(from_hidden(*arguments, *rows, **reference, **some))

    kinds = (getattr(losses, name) for name in losses.__all__ if name.endswith("Loss"))
    # Losses of a teacher's ids or hidden states, and of several depths, take other arguments.
    others = (losses.Loss, losses.TopKDistillationLoss, losses.CosineDistillationLoss,
              losses.MultiTokenLoss)  # fmt: skip
    made = [kind() for kind in kinds if kind not in others]
    return {
        "linear_logprobs": forward,
        "linear_logprobs, backward": lambda: gradients(logprobs().logprob),
        "linear_logprobs, backward, head frozen": lambda: gradients(
            logprobs(head=frozen).logprob, hidden
        ),
        "linear_logprobs, backward, with entropy": of_entropy,
        "linear_logprobs, active": active,
        "linear_logprobs, active, head trained": lambda: active(weight),
        "linear_cross_entropy, backward": lambda: gradients(
            k.linear_cross_entropy(hidden, weight, target, **some)
        ),
        "linear_token": token,
        "linear_token, kth": lambda: token(rule="kth", k=8),
        "linear_token, sample": lambda: token(rule="sample", seed=1),
        "linear_expected_embedding, backward": lambda: gradients(
            k.linear_expected_embedding(hidden, weight, weight, **some)
        ),
        "discounted_cumsum": lambda: gradients(k.discounted_cumsum(x, 0.9), x),
        "propagation_weights": lambda: gradients(k.propagation_weights(x, ids >= 0), x),
        "temporal_residual": lambda: gradients(
            k.temporal_residual(weight, ids, ids, ids, 0.2), weight
        ),
        "influence": lambda: k.influence(
            teacher[:64], target[:64], teacher, target, frozen, **wide
        ),
        "vocab_parallel_logprobs, backward": shard,
        "linear_divergence, backward": divergence,
        "linear_divergence, backward, per token": lambda: divergence(reduction="none"),
        "linear_divergence, backward, reverse": lambda: divergence(kind="reverse"),
        "linear_divergence, backward, jsd": lambda: divergence(kind="jsd"),
    } | {type(loss).__name__: functools.partial(of_loss, loss) for loss in made}


# --- counting -------------------------------------------------------------------------------------


class _Dispatched(TorchDispatchMode):
    """Counts what torch's dispatcher is asked for. Reads of meta tensors get likely values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter(dict.fromkeys(QUANTITIES, 0))
        self._alive: dict[int, int] = {}  # bytes of each storage, 0 of those from before
        self._now = 0
        self._sums = WeakTensorKeyDictionary()  # of active masks: a likely value

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "ift_kernels":  # of meta tensors torch would take shapes alone
            key = torch._C.DispatchKey.CompositeExplicitAutograd
            with self:
                return op._op_dk(key, *args, **kwargs)
        name, on_meta = op._schema.name, False
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, new=False)
            on_meta |= tensor.is_meta
        copied = on_meta and str(kwargs.get("device")) == "cpu"
        if copied or name in READS:  # a GPU's queue runs dry
            self.counts["reads"] += 1
            self.counts[f"read by {_reader()}"] += 1
            result = self._likely(name, args[0]) if on_meta else op(*args, **kwargs)
        else:
            result = op(*args, **kwargs)
        if on_meta and name in ("aten::sum", "aten::amax"):
            self._note_sum(name, args, result)
        found = _tensors(result)
        for tensor in found:
            self._note(tensor)
        if name in PRODUCTS:
            self.counts["products"] += 1
            a, b = args[:2] if name.startswith("aten::mm") else args[1:3]
            self.counts["flops"] += 2 * a.numel() * b.shape[-1]
        free = op.is_view or name in FREE or not any(tensor.numel() for tensor in found)
        self.counts["operators"] += not free
        return result

    def _note(self, tensor: Tensor, new: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, new * storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        self._now += size
        self.counts["bytes"] += size
        self.counts["peak"] = max(self.counts["peak"], self._now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)

    def _note_sum(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        if name == "aten::amax":
            self._sums[result] = self._sums.get(args[0], 1)
        elif args[0].dtype == torch.uint8:
            self._sums[result] = int(ACTIVE_SHARE * args[0].numel() / result.numel())

    def _likely(self, name: str, x: Tensor) -> Any:
        """Of masks of rows all is true, of active columns (bytes) a share."""
        if name == "aten::nonzero":
            share = ACTIVE_SHARE if x.dtype == torch.uint8 else 1
            count = x[..., 0].numel() * int(share * x.shape[-1])
            return x.new_empty((count, x.dim()), dtype=torch.int64)
        value = True if x.dtype == torch.bool else self._sums.get(x, 1)
        return value if name in READS else torch.full(x.shape, value, dtype=x.dtype)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _reader() -> str:
    """The function of ours that reads a value."""
    frame: Any = sys._getframe(1)
    while frame.f_back and not frame.f_globals["__name__"].startswith("ift"):
        frame = frame.f_back
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"


def count(call: Callable[[], Any], backend: contract.Backend = reference) -> Counts:
    """What one call does with `backend`."""
    called = 0

    def noted(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        nonlocal called  # a spy would keep the tensors of its calls
        called += 1
        return function(*args, **keywords)

    kept, memory.LIMIT = memory.LIMIT, 0  # what an earlier call left would not be counted
    try:
        with contextlib.ExitStack() as stack:
            for name in EPILOGUES:
                if function := getattr(backend, name, None):
                    noting = functools.partial(noted, function)
                    stack.enter_context(mock.patch.object(backend, name, noting))
            found = dispatched(call)
    finally:
        memory.LIMIT = kept
    return found | {"epilogues": called}


def dispatched(call: Callable[[], Any]) -> Counts:
    """Without epilogues; the peak is over what was there before and what is returned."""
    with _Dispatched() as seen:
        returned = call()
    storages = {t.untyped_storage()._cdata for t in _tensors(returned)}
    seen.counts["peak"] -= sum(seen._alive.get(key, 0) for key in storages)
    return dict(seen.counts)


@contextlib.contextmanager
def planned_for_h200() -> Iterator[list[Any]]:
    """Plans are those of an H200; the Triton backend serves meta tensors.

    Its launches do not run: their kernels come back.
    """
    from torch._dynamo import trace_rules

    from ift_kernels.backends.triton import launch

    # Once and for all, or torch.compile would look for what is replaced below.
    trace_rules.get_torch_obj_rule_map()
    launched: list[Any] = []
    changed = (
        (launch, "run", lambda kernel, *_: launched.append(kernel)),
        (backends.BACKENDS["triton"], "unsupported_reason", lambda place, dtype: ""),
        (device, "of", lambda place: device.H200),
        (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # knows no meta
        (torch, "is_autocast_enabled", lambda *_: False),
    )
    with contextlib.ExitStack() as stack:
        for module, name, value in changed:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(launch.use_architecture("sm_90"))
        stack.enter_context(k.use_backend("triton"))
        yield launched


def measure() -> dict[str, dict[str, Counts]]:
    """All counts, by backend and operation; backends that are not there are left out."""
    found: dict[str, dict[str, Counts]] = {}
    torch.set_num_threads(1)  # the same everywhere
    for name in BACKENDS:
        backend, calls = backends.BACKENDS[name], operations()
        if not backend.unsupported_reason(torch.device("cpu"), torch.float32):
            with k.use_backend(name):
                for call in calls.values():
                    call()  # fills caches
                found[name] = {what: count(call, backend) for what, call in calls.items()}
    if importlib.util.find_spec("triton"):
        found[FULL_SIZE] = {}
        with planned_for_h200() as launched:
            for what, call in operations(FULL).items():
                launched.clear()
                found[FULL_SIZE][what] = dispatched(call) | {"epilogues": len(launched)}
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
    console = Console(width=130)
    found = measure()
    if options.write:
        known = committed() if COMMITTED.exists() else {}
        text = json.dumps(known | found, indent=1) + "\n"
        COMMITTED.write_text(text, encoding="utf-8")
    head = ("case", "products", "Gflop", "MiB allocated", "at once", "operators", "epilogues",
            "reads")  # fmt: skip
    for backend, calls in found.items():
        rows = [
            [what, str(c["products"]), f"{c['flops'] / 1e9:.1f}", f"{c['bytes'] / 2**20:.1f}",
             f"{c['peak'] / 2**20:.1f}", str(c["operators"]), str(c["epilogues"]), str(c["reads"])]
            for what, c in calls.items()
        ]  # fmt: skip
        console.print(terminal(Table(backend, head, rows)))
    changed = differences(found, committed())
    for backend, what, quantity, before, now in changed:
        style = "red" if now > before else "green"
        console.print(f"{backend}: {what}: {quantity} {before} → {now}", style=style)
    return 1 if any(now > before for *_, before, now in changed) else 0
