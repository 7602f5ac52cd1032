"""What ``python -m bench device`` measures; data are made on the device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

import ift_kernels
from bench.gpu import tune
from bench.harness.data import Wrong
from bench.harness.measure import Cell, Subject, record
from bench.suites import e2e, grid, head, losses, ops
from bench.suites.counts import EPILOGUES
from bench.suites.grid import FLOORS, Grid, Made, Point
from ift_kernels import ActiveSet, backends

NAMES = {"triton": "Triton", "cuda": "CUDA C++", "cpu": "C++", "reference": "plain torch",
         "floor-copy": "a copy of as many bytes"}  # fmt: skip
MAIN = ("scalar", "per-token", "per-token-frozen", "statistics")
PEERS = ("liger", "cce", "quack")
# Of each phase the cases (none: all) and implementations of a first and a second wave: 90 seconds
# are to reach the second, 330 its end. What is in neither comes last.
Wave = dict[str, tuple[Sequence[str], Sequence[str]]]
WAVES: Sequence[Wave] = (
    {"correctness": ([f"{case} bf16" for case in MAIN], ("triton", "cuda")),
     "head": (MAIN, (*FLOORS, "ours", "naive", "active"))},
    {"head": (MAIN[:2], PEERS), "epilogues": ((), ("floor-copy", "triton", "cuda")),
     "steps": ((), ("ours", "naive")), "losses": (("sft", "dpo", "jsd"), ("ours", "naive"))},
)  # fmt: skip


class Phase(NamedTuple):
    """Cells of one group."""

    name: str
    record: dict[str, Any]  # of the group
    cells: Sequence[Cell]
    suite: str = ""  # whose report has it, if any
    rounds: int = 5  # samples of a cell; 0: it is only checked


def phases(dry: bool) -> list[Phase]:
    """All of them; a dry run has tiny shapes, and nothing that compiles."""
    device = "cpu" if dry else "cuda"
    odd = (18, 8, 131) if dry else (300, 256, 15193)
    sequences = (2, 9, 5, 40) if dry else (4, 700, 257, 1003)
    data = Made((24, 16, 130), "fp32") if dry else Made((8192, 4096, 128256), "bf16")
    pairs = ((2, 4, 8, 50), "fp32") if dry else ((16, 512, 896, 151936), "bf16")
    step = e2e.Setting("qwen2", 4, 2048, 896, 24, None, "bf16", device)
    if dry:
        step = e2e.Setting("qwen2", 2, 16, 64, 1, 100, "fp32", device)
    documents = replace(step, rows=4 * step.rows, length=step.length // 4, packed=True)
    compared = losses.plan(*pairs, list(losses.CASES), device)
    found = [
        correctness(device, odd, sequences, ("bf16",) if dry else ("bf16", "fp32")),
        heads(data, device, () if dry else (*PEERS, "compile", "flash", "verl", "trl")),
        epilogues((3, 40) if dry else (8192, 8192), torch.device(device)),
        steps(step, ("sft", "ift", "dpo")),
        *([steps(documents, ("sft", "ift"))] if dry or importlib.util.find_spec("flash_attn")
          else []),
        Phase("losses", losses.record_of(*pairs, compared), compared, "losses"),
    ]  # fmt: skip
    return [phase._replace(rounds=min(phase.rounds, 1)) for phase in found] if dry else found


def ordered(some: Sequence[Phase]) -> list[tuple[Phase, Cell]]:
    """In the order of measurement: by wave, then by phase."""

    def wave(phase: Phase, cell: Cell) -> int:
        for at, has in enumerate(WAVES):
            cases, implementations = has.get(phase.name, ((), ()))
            if cell.implementation in implementations and cell.case in (cases or [cell.case]):
                return at
        return len(WAVES)

    return sorted(((p, c) for p in some for c in p.cells), key=lambda pair: wave(*pair))


def release_inputs() -> None:
    """Free what cells of a phase share."""
    for cache in (grid.load, losses._data, ops._sequences):
        cache.cache_clear()
    grid.BUFFERS.clear()


# --- correctness ----------------------------------------------------------------------------------


def correctness(
    device: str, odd: tuple[int, int, int], sequences: tuple[int, ...], dtypes: Sequence[str]
) -> Phase:
    """Backends against fp64, each really used in every operation."""
    planned: dict[str, tuple[Callable[..., Subject], tuple[Any, ...]]] = {}
    exact = ActiveSet(threshold=0.0, block=32, tail_bucket=128)
    active = replace(head.CASES["per-token-frozen"], active=exact)
    for dtype in dtypes:
        data = Made(odd, dtype)
        for name in MAIN:
            planned[f"{name} {dtype}"] = grid.prepare, (data, head.CASES[name], "ours", device)
        planned[f"active {dtype}"] = grid.prepare, (data, active, "active", device)
        for name, case in ops.CASES.items():
            kind = "fp32" if case.group == "scan" else dtype
            source = data if case.group == "head" else sequences
            planned[f"{name} {kind}"] = ops.prepare, (name, "ours", kind, source, device)
    for name in losses.DISTILLED:
        shape = (2, 4, *odd[1:])
        planned[name] = losses.prepare, (name, "ours", "fp32", shape, device)
    missing = {backend: backends.BACKENDS[backend].unsupported_reason(
        torch.device(device), torch.float32) for backend in ("triton", "cuda")}  # fmt: skip
    cells = [
        Cell("correctness", name, backend, served_by, (backend, *what), 0.1, memory=False)
        for backend, reason in missing.items() if not reason
        for name, what in planned.items()
    ]  # fmt: skip
    absent = {"all": {backend: reason for backend, reason in missing.items() if reason}}
    kept = record("correctness", odd, "bf16", [], dict.fromkeys(planned, ""), absent=absent)
    return Phase("correctness", kept, cells, rounds=0)


def served_by(backend: str, prepare: Callable[..., Subject], arguments: tuple[Any, ...]) -> Subject:
    """A subject computed by one backend, in forward and in backward; its calls are counted."""
    subject = prepare(*arguments)
    seen: Counter[tuple[str, bool]] = Counter()

    def call() -> Any:
        seen.clear()
        with counting(seen, subject.device), ift_kernels.use_backend(backend):
            return subject.call()

    def check(result: Any) -> dict[str, float]:
        errors, backward = subject.check(result), seen[backend, True]
        # Of these the gradient cannot be formed in forward.
        late = head.CASES["per-token"] in arguments and not backward
        if late or {name for name, _ in seen} != {backend}:
            raise Wrong(f"{backend} was asked for; served, and whether in backward: {dict(seen)}")
        return errors | {"calls": seen.total(), "backward calls": backward}

    return subject._replace(call=call, warm=lambda: None, check=check)


@contextlib.contextmanager
def counting(seen: Counter[tuple[str, bool]], device: torch.device) -> Iterator[None]:
    """Count calls of epilogues inside the ``with`` block, by backend and whether in backward."""

    def spy(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        seen[name, torch._C._current_graph_task_id() >= 0] += 1
        return function(*args, **options)

    with contextlib.ExitStack() as stack:
        for name, backend in backends.BACKENDS.items():
            for each in () if backend.unsupported_reason(device, torch.float32) else EPILOGUES:
                if hasattr(backend, each):
                    counted = functools.partial(spy, name, getattr(backend, each))
                    stack.enter_context(mock.patch.object(backend, each, counted))
        yield


# --- time and memory ------------------------------------------------------------------------------


def heads(data: Made, device: str, peers: Sequence[str]) -> Phase:
    """Cases of a head, at a size that fills a GPU."""
    names = (*FLOORS, "ours", "naive", "active", *peers)
    points = [Point(data.shape, head.CASES[case], names) for case in (*MAIN, "forward")]
    whole = Grid(f"{grid.words(data.shape)} {data.dtype}", points, data.dtype)
    cells, absent = grid.plan(whole, device, None)
    return Phase("head", grid.record_of(whole, cells, absent, {}, device), cells, "head")


def epilogues(tile: tuple[int, int], device: torch.device) -> Phase:
    """Every function of the backends, beside a copy of as many bytes."""
    group = f"epilogues {grid.words(tile)}"
    functions = list(tune.calls(backends.BACKENDS["reference"], torch.device("cpu"), 3, 40))
    cells = [
        Cell(group, function, name, epilogue, (name, function, tile, device), 0.01, memory=False)
        for function in functions
        for name in NAMES
        if name == "floor-copy"
        or not backends.BACKENDS[name].unsupported_reason(device, torch.bfloat16)
    ]
    kept = record(group, tile, "bf16", [], dict.fromkeys(functions, ""))
    return Phase("epilogues", kept, cells)


def epilogue(name: str, function: str, tile: tuple[int, int], device: torch.device) -> Subject:
    """One function of a backend, checked against the reference; or the copy."""
    reference = tune.calls(backends.BACKENDS["reference"], device, *tile)[function]
    if name == "floor-copy":
        source = torch.zeros(reference.bytes // 2, dtype=torch.uint8, device=device)
        copy = functools.partial(torch.empty_like(source).copy_, source)
        return Subject(copy, copy, lambda result: {}, device)
    mine = tune.calls(backends.BACKENDS[name], device, *tile)[function]

    def check(result: Any) -> dict[str, float]:
        if not tune.same(mine.fresh(), reference.fresh()):
            raise Wrong("another result than the reference")
        return {}

    return Subject(mine.run, lambda: None, check, device)


def steps(setting: e2e.Setting, cases: Sequence[str]) -> Phase:
    """Training steps, as people write them and patched."""
    cells = e2e.plan(setting, [e2e.CASES[name] for name in cases], ("ours", "naive"))
    return Phase("steps", e2e.record_of(setting, cells), cells, "e2e", rounds=3)
