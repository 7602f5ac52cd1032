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

import ift_kernels
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

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = size.dtype) -> Tensor:
        if size.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    hidden, weight = normal(n, d).requires_grad_(), normal(v, d, scale=d**-0.5).requires_grad_()
    frozen, teacher = weight.detach(), hidden.detach().flip(0)
    target = torch.randint(v, (n,), generator=generator).to(size.device)
    upstream = normal(n, dtype=torch.float32)
    x, ids = normal(4, n // 4, dtype=torch.float32).requires_grad_(), target.view(4, -1)
    response = x.detach() == x.detach()
    # Few columns of a block matter, or it would be dense.
    peaked = (8 * hidden.detach()).requires_grad_()

    def gradients(value: Any, seed: Tensor | None = None, *of: Tensor) -> Any:
        return torch.autograd.grad(value, of or (hidden, weight), seed)

    def logprobs(states: Tensor = hidden, head: Tensor = weight, **options: Any) -> Any:
        options = {"workspace": size.workspace} | options
        return ift_kernels.linear_logprobs(states, head, target, **options).logprob

    def forward() -> Any:
        with torch.no_grad():
            return logprobs(outputs=("logprob", "entropy", "argmax"))

    def of_entropy() -> Any:
        outputs = {"outputs": ("logprob", "entropy"), "workspace": size.workspace}
        found = ift_kernels.linear_logprobs(hidden, weight, target, **outputs)
        return gradients((found.logprob, found.entropy), (upstream, upstream))

    def sparse(head: Tensor) -> Tensor:
        return logprobs(peaked, head, gradient="active", workspace=size.wide)

    def token(**rule: Any) -> Any:
        return ift_kernels.linear_token(hidden, weight, workspace=size.workspace, **rule)

    def divergence(**options: Any) -> Any:
        return ift_kernels.linear_divergence(
            hidden, weight, teacher, frozen, workspace=size.wide, **options
        )

    def embedding() -> Any:
        soft = ift_kernels.linear_expected_embedding(
            hidden, weight, weight, workspace=size.workspace
        )
        return gradients(soft, torch.ones_like(soft))

    def residual() -> Any:
        mixed = ift_kernels.temporal_residual(weight, ids, ids, ids, 0.2)
        return gradients(mixed, torch.ones_like(mixed), weight)

    def shard() -> Any:
        one = {"is_initialized": lambda: True, "get_world_size": lambda group: 1,
               "get_rank": lambda group: 0, "all_reduce": lambda *a, **k: None}  # fmt: skip
        with mock.patch.multiple(torch.distributed, **one):
            found = ift_kernels.vocab_parallel_logprobs(
                hidden, weight, target, workspace=size.workspace
            )
            return gradients(found.logprob, upstream)

    return {
        "linear_logprobs": forward,
        "linear_logprobs, backward": lambda: gradients(logprobs(), upstream),
        "linear_logprobs, backward, head frozen": lambda: gradients(
            logprobs(head=frozen), upstream, hidden
        ),
        "linear_logprobs, backward, with entropy": of_entropy,
        "linear_logprobs, active": lambda: gradients(sparse(frozen), upstream, peaked),
        "linear_logprobs, active, head trained": lambda: gradients(
            sparse(weight), upstream, peaked, weight
        ),
        "linear_cross_entropy, backward": lambda: gradients(
            ift_kernels.linear_cross_entropy(hidden, weight, target, workspace=size.workspace)
        ),
        "linear_token": token,
        "linear_token, kth": lambda: token(rule="kth", k=8),
        "linear_token, sample": lambda: token(rule="sample", seed=1),
        "linear_expected_embedding, backward": embedding,
        "discounted_cumsum": lambda: gradients(
            ift_kernels.discounted_cumsum(x, 0.9), torch.ones_like(x), x
        ),
        "propagation_weights": lambda: gradients(
            ift_kernels.propagation_weights(x, response), torch.ones_like(x), x
        ),
        "temporal_residual": residual,
        "influence": lambda: ift_kernels.influence(
            teacher[:64], target[:64], teacher, target, frozen, workspace=size.wide
        ),
        "vocab_parallel_logprobs, backward": shard,
        "linear_divergence, backward": lambda: gradients(divergence()),
        "linear_divergence, backward, per token": lambda: gradients(
            divergence(reduction="none"), upstream
        ),
        "linear_divergence, backward, reverse": lambda: gradients(divergence(kind="reverse")),
        "linear_divergence, backward, jsd": lambda: gradients(divergence(kind="jsd")),
    } | _losses(hidden, weight, target, teacher, size.workspace)


def _losses(
    hidden: Tensor, weight: Tensor, target: Tensor, other: Tensor, workspace: int | None
) -> dict[str, Callable[[], Any]]:
    """Every loss of `ift.losses` on eight responses, with its reference model or its teacher."""
    rows = torch.ones(8, device=target.device)
    head = losses.Head(other.view(8, -1, other.shape[1]), weight.detach())

    def call(loss: Any) -> Any:
        states, ids = hidden.view_as(head.hidden), target.view(8, -1)
        if isinstance(loss, losses.Loss):
            reference = {"reference": head} if "reference" in loss_arguments(loss) else {}
            given = [rows] * loss.needs
            value = loss.from_hidden(states, weight, ids, *given, **reference, workspace=workspace)
        else:
            value = loss(states, weight, ids, head)
        return torch.autograd.grad(value, (hidden, weight))

    loss_arguments = losses._module.accepted
    kinds = (getattr(losses, name) for name in losses.__all__ if name.endswith("Loss"))
    made = [kind() for kind in kinds if kind is not losses.Loss]
    return {type(loss).__name__: lambda loss=loss: call(loss) for loss in made}  # type: ignore[misc]


# --- counting -------------------------------------------------------------------------------------


class _Dispatched(TorchDispatchMode):
    """Counts what torch's dispatcher is asked for. Reads of meta tensors get likely values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter(dict.fromkeys(QUANTITIES, 0))
        self._alive: dict[int, int] = {}  # bytes of each storage, 0 of those from before
        self._now = 0
        self._sums = WeakTensorKeyDictionary()  # of active masks: a likely value

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "ift_kernels":  # of meta tensors torch would take shapes alone
            key = torch._C.DispatchKey.CompositeExplicitAutograd  # type: ignore[attr-defined]
            with self:
                return op._op_dk(key, *args, **kwargs)
        name, on_meta = op._schema.name, False
        for tensor in _tensors((args, kwargs)):
            self._alive.setdefault(tensor.untyped_storage()._cdata, 0)
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
            a, b = args[-2:] if name.startswith("aten::mm") else args[1:3]
            self.counts["flops"] += 2 * a.numel() * b.shape[-1]
        free = op.is_view or name in FREE or not any(tensor.numel() for tensor in found)
        self.counts["operators"] += not free
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
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
    """What one call does with `backend`, after one that fills caches."""
    call()
    kept, memory.LIMIT = memory.LIMIT, 0  # what an earlier call left would not be counted
    try:
        with contextlib.ExitStack() as stack:
            spies = [
                stack.enter_context(mock.patch.object(backend, n, wraps=getattr(backend, n)))
                for n in EPILOGUES
                if hasattr(backend, n)
            ]
            found = dispatched(call)
    finally:
        memory.LIMIT = kept
    found["epilogues"] = sum(spy.call_count for spy in spies)
    return found


def dispatched(call: Callable[[], Any]) -> Counts:
    """Without epilogues; the peak is over what was there before and what is returned."""
    with _Dispatched() as seen:
        returned = call()
    storages = {t.untyped_storage()._cdata for t in _tensors(returned)}
    seen.counts["peak"] -= sum(seen._alive.get(key, 0) for key in storages)
    return dict(seen.counts)


@contextlib.contextmanager
def planned_for_h200() -> Iterator[list[Any]]:
    """Plans are those of an H200, and meta tensors are served by the Triton backend.

    Its launches, which do not run, come back. Without Triton: ImportError.
    """
    from ift_kernels.backends import triton
    from ift_kernels.backends.triton import launch

    launched: list[Any] = []
    changed = (
        (launch, "run", lambda kernel, *_: launched.append(kernel)),
        (triton, "unsupported_reason", lambda place, dtype: ""),
        (device, "of", lambda place: device.H200),
        (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # knows no meta
        (torch, "is_autocast_enabled", lambda *_: False),
    )
    with contextlib.ExitStack() as stack:
        for module, name, value in changed:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(launch.use_architecture("sm_90"))
        stack.enter_context(ift_kernels.use_backend("triton"))
        yield launched


def count_full_size(call: Callable[[], Any]) -> Counts:
    """What one call does on an H200."""
    with planned_for_h200() as launched:
        found = dispatched(call)
    return found | {"epilogues": len(launched)}


def measure() -> dict[str, dict[str, Counts]]:
    """All counts, by backend and operation; backends that are not there are left out."""
    found: dict[str, dict[str, Counts]] = {}
    torch.set_num_threads(1)  # the same everywhere
    for name in BACKENDS:
        if not backends.BACKENDS[name].unsupported_reason(torch.device("cpu"), torch.float32):
            with ift_kernels.use_backend(name):
                found[name] = {
                    what: count(call, backends.BACKENDS[name])
                    for what, call in operations().items()
                }
    with contextlib.suppress(ImportError):
        found[FULL_SIZE] = {what: count_full_size(call) for what, call in operations(FULL).items()}
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
