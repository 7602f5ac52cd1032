"""``python -m bench head``: statistics, token choice and losses of a linear head."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ift_kernels
from bench import lmlike
from bench.exact import Errors, Exact, exact
from bench.harness import Cell, Settings, Subject, measure
from bench.peers import PEERS
from bench.shapes import SHAPES, shape
from bench.worker import Worker

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TINY = (4, 16, 64)  # so little work that what remains is the cost of the call
FEW = 16  # rows of the cases with few
IGNORED = 0.7
FLOORS = {"floor": "bare GEMMs", "floor-t": "bare GEMMs, dz stored transposed"}
# Implementations that every case has; the rest are in the cases for `everyone`.
CORE = ("floor", "floor-t", "ours", "naive")
# Multiply-adds per second, a guess.
RATE = {("cpu", 4): 1e11, ("cpu", 2): 4e11, ("cuda", 4): 2e13, ("cuda", 2): 3e14}


@dataclass(frozen=True)
class Case:
    """What is computed, and how much of it needs a gradient."""

    name: str
    title: str
    kind: str  # of bench.peers
    backward: bool = False
    frozen: bool = False  # the head weight needs no gradient
    ignored: float = 0.0  # share of the targets
    few: bool = False  # 16 rows
    everyone: bool = False  # all peers, not only what every case has

    @property
    def gemms(self) -> int:
        """Products of N·V·D multiply-adds that cannot be avoided."""
        return 1 + self.backward * (1 if self.frozen else 2)


CASES = {
    case.name: case
    for case in (
        Case("forward", "log-probability, no gradient", "logprob", everyone=True),
        Case("statistics", "log-probability, entropy, arg max, no gradient", "statistics",
             everyone=True),
        Case("greedy", "most likely token", "ids", everyone=True),
        Case("scalar", "mean cross-entropy, forward and backward", "loss", True, everyone=True),
        Case("per-token", "log-probabilities, forward and backward", "logprob", True,
             everyone=True),
        Case("scalar-frozen", "mean cross-entropy, head frozen", "loss", True, frozen=True),
        Case("per-token-frozen", "log-probabilities, head frozen", "logprob", True, frozen=True),
        Case("scalar-ignored", "mean cross-entropy, 70 % ignored", "loss", True, ignored=IGNORED),
        Case("per-token-ignored", "log-probabilities, 70 % ignored", "logprob", True,
             ignored=IGNORED),
        Case("scalar-few", "mean cross-entropy, 16 rows", "loss", True, few=True),
        Case("per-token-few", "log-probabilities, 16 rows", "logprob", True, few=True),
    )
}  # fmt: skip
# torch's chunked loss is timed where a call takes seconds, not where it takes minutes.
CHUNKED_WORK = 1e11  # multiply-adds of a GEMM
TINY_CASES = ("forward", "scalar", "per-token")


class Inputs(NamedTuple):
    """Of one case, on the device; hidden and weight are leaves."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,), −100 where ignored
    known: Tensor  # (N,) the same before any was ignored
    upstream: Tensor  # (N,) ∂/∂logprob of the per-token cases, signs mixed
    reference: Exact


# --- in the workers -------------------------------------------------------------------------------


def make_groups(
    shape: tuple[int, int, int], paths: dict[str, str], flat: bool, device: str, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Write the inputs of one shape for some dtypes (name → file); return what they look like."""
    n, d, v = shape
    if flat:
        generator = torch.Generator().manual_seed(seed)
        data = lmlike.Data(
            torch.randn(n, d, generator=generator),
            torch.randn(v, d, generator=generator) * d**-0.5,
            torch.randint(v, (n,), generator=generator),
        )
    else:
        data = lmlike.generate(n, d, v, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    sizes = torch.rand(n, generator=generator).mul(4).sub(3).exp()
    upstream = sizes * (torch.randint(0, 2, (n,), generator=generator) * 2 - 1) / n
    chance = torch.rand(n, generator=generator)  # a target is ignored where it is below the share
    chance[0] = 1.0  # a loss over no token at all is another question
    looks: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        hidden, weight = data.hidden.to(DTYPES[name]), data.weight.to(DTYPES[name])
        first = lmlike.Data(hidden[: lmlike.TILE], weight, data.target[: lmlike.TILE])
        looks[name] = dict(lmlike.survival(first))
        h, w, target = (t.to(device) for t in (hidden, weight, data.target))
        references = {"all": exact(h, w, target)}
        if n > FEW:
            references["few"] = exact(h[:FEW], w, target[:FEW])
        looks[name]["reference"] = references["all"].words
        inputs = {"hidden": hidden, "weight": weight, "target": data.target, "upstream": upstream}
        saved = {key: vars(value) for key, value in references.items()}
        torch.save({**inputs, "chance": chance, "references": saved}, path)
    return looks


@functools.lru_cache(maxsize=1)
def load(path: str, device: str) -> dict[str, Any]:
    """A group's file, every page of it in memory."""
    found = torch.load(path, map_location=device, mmap=device == "cpu", weights_only=True)
    for name in ("hidden", "weight"):
        found[name].sum()
    return found


def inputs(path: str, case: Case, device: str) -> Inputs:
    """The inputs of a case, from the file of its group."""
    found = load(path, device)
    rows = slice(0, FEW if case.few else None)
    known = found["target"][rows]
    return Inputs(
        hidden=found["hidden"][rows].detach().requires_grad_(case.backward),
        weight=found["weight"].detach().requires_grad_(case.backward and not case.frozen),
        target=known.masked_fill(found["chance"][rows] < case.ignored, -100),
        known=known,
        upstream=found["upstream"][rows],
        reference=Exact(**found["references"]["few" if case.few else "all"]),
    )


def prepare(path: str, case_name: str, implementation: str, device: str) -> Subject:
    """One cell of this suite, ready to be called."""
    return subject(path, CASES[case_name], implementation, device)


def subject(path: str, case: Case, implementation: str, device: str) -> Subject:
    """An implementation in any case, ready to be called."""
    given = inputs(path, case, device)
    if implementation in FLOORS:
        return _floor(case, given, implementation == "floor-t")
    peer = PEERS[implementation]
    function = peer.function(case.kind)
    return Subject(
        caller(function, case, given),
        caller(function, case, few(given, case)),
        functools.partial(check, case, given),
        torch.device(device),
        peer.compiled,
    )


def few(inputs: Inputs, case: Case) -> Inputs:
    """A few of the rows and of the vocabulary, to warm up with."""
    return Inputs(
        inputs.hidden[:8].detach().requires_grad_(case.backward),
        inputs.weight[:1024].detach().requires_grad_(inputs.weight.requires_grad),
        torch.zeros_like(inputs.target[:8]),
        *inputs[3:],
    )


def caller(function: Callable[..., Any], case: Case, inputs: Inputs) -> Callable[[], Any]:
    """What is measured: `function`, and its gradients where the case has a backward."""
    hidden, weight, target = inputs.hidden, inputs.weight, inputs.target
    arguments = (hidden, weight) if case.kind == "ids" else (hidden, weight, target)

    def forward() -> Any:
        with torch.no_grad():
            return function(*arguments)

    def both() -> Any:
        value = function(*arguments)
        upstream = None
        if case.kind == "logprob":
            upstream = inputs.upstream[: value.shape[0]].to(value.dtype)
        wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
        return value.detach(), *torch.autograd.grad(value, wanted, upstream)

    return both if case.backward else forward


def check(
    case: Case, inputs: Inputs, result: Any, gradient_limit: float | None = None
) -> dict[str, float]:
    """Errors of a result; raises Wrong. `gradient_limit`: for gradients that approximate."""
    counts = inputs.target != -100
    errors = Errors(inputs.reference, inputs.hidden, inputs.weight, inputs.known, counts)
    with torch.no_grad():
        if case.kind == "ids":
            errors.ids(result, inputs.reference.best)
        elif case.kind == "statistics":
            errors.logprob(result[0])
            errors.entropy(result[1])
            if result[2] is not None:
                errors.ids(result[2], inputs.reference.best)
        else:
            value, *gradients = result if case.backward else (result,)
            (errors.loss if case.kind == "loss" else errors.logprob)(value)
            upstream = torch.full_like(inputs.upstream, -1.0 / int(counts.sum()))
            upstream = (inputs.upstream if case.kind == "logprob" else upstream) * counts
            errors.limit = gradient_limit or errors.limit
            compare = errors.d_hidden, errors.d_weight
            for against, gradient in zip(compare, gradients, strict=False):
                against(gradient, upstream)
    return errors.found


@functools.lru_cache(maxsize=2)
def scratch(
    rows: int, width: int, v: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """What the bare GEMMs read and write: logits, the same transposed, dh, dW."""
    sizes = ((rows, v), (v, rows), (rows, width), (v, width))
    return [torch.full(size, 1e-3, dtype=dtype, device=device) for size in sizes]


def _floor(case: Case, inputs: Inputs, transposed: bool) -> Subject:
    """The GEMMs that cannot be avoided, on the rows that count, into memory that is there."""
    rows = int((inputs.target != -100).sum())
    h, w = inputs.hidden.detach()[:rows], inputs.weight.detach()
    z, z_t, dh, dw = scratch(inputs.hidden.shape[0], h.shape[1], w.shape[0], h.dtype, h.device)
    z, dh = z[:rows], dh[:rows]
    dz_t = z_t.view(-1)[: rows * w.shape[0]].view(w.shape[0], rows) if transposed else z.T

    def call() -> None:
        torch.mm(h, w.T, out=z)
        if case.gemms > 1:
            torch.mm(z, w, out=dh)
        if case.gemms > 2:
            torch.mm(dz_t, h, out=dw)

    warm = functools.partial(torch.mm, h[:8], w[:1024].T)
    return Subject(call, warm, lambda result: {}, h.device)


# --- in the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxDxV",
        help="rows, width and vocabulary, or a model and rows, as llama-3-8b@4096; default: "
        "2048x1024x32000 1024x896x151936",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "overhead"], metavar="CASE",
                        help="default: all; see --list")  # fmt: skip
    parser.add_argument("--implementations", nargs="+", choices=[*FLOORS, *PEERS], metavar="NAME",
                        help="default: all; see --list")  # fmt: skip
    parser.add_argument(
        "--everyone", action="store_true",
        help="every peer in every case; by default the variants of a case (head frozen, targets "
        "ignored, few rows) have the floor, naive and ours, and no call takes minutes",
    )  # fmt: skip
    parser.add_argument("--flat", action="store_true", help="random data, not LM-like")


def run(
    arguments: argparse.Namespace, settings: Settings, progress: Any
) -> Iterator[dict[str, Any]]:
    """Measure; one record per group, as soon as it is complete."""
    groups = [Group(shape, name) for shape in arguments.shapes for name in arguments.dtype]
    groups = [] if arguments.cases == ["overhead"] else groups
    if not arguments.cases or "overhead" in arguments.cases:
        groups.append(Group(TINY, arguments.dtype[0]))
    planned = {group: group.plan(arguments) for group in groups}
    cost = {group: sum(c.estimate + 0.3 for c in cells) for group, (cells, _) in planned.items()}
    total = left = sum(cost.values())
    with tempfile.TemporaryDirectory() as folder:
        for shape, same in groupby(groups, key=lambda group: group.shape):
            some = list(same)
            paths = {group.dtype: group.path(folder) for group in some}
            progress.at(f"making data of {'x'.join(map(str, shape))}")
            with Worker(settings.threads) as worker:
                flat = arguments.flat or shape == TINY
                looks = worker.call(make_groups, shape, paths, flat, arguments.device)
            for group in some:
                cells, absent = planned[group]
                for cell in cells:
                    cell.arguments = (group.path(folder), *cell.arguments)
                measure(cells, settings, progress, cost[group] / left, cost[group] / total)
                left -= cost[group]
                Path(group.path(folder)).unlink()
                yield group.record(looks[group.dtype], cells, absent, arguments.device)


@dataclass(frozen=True)
class Group:
    """One shape and dtype."""

    shape: tuple[int, int, int]
    dtype: str

    @property
    def name(self) -> str:
        words = "overhead" if self.shape == TINY else "x".join(map(str, self.shape))
        return f"{words} {self.dtype}"

    def path(self, folder: str) -> str:
        """Where its inputs are."""
        return str(Path(folder, self.name.replace(" ", "-") + ".pt"))

    def cases(self, asked: list[str] | None) -> list[Case]:
        """What makes sense at this shape."""
        if self.shape == TINY:
            return [CASES[name] for name in TINY_CASES]
        many = self.shape[0] > FEW
        return [c for c in CASES.values() if (not asked or c.name in asked) and (many or not c.few)]

    def plan(self, arguments: argparse.Namespace) -> tuple[list[Cell], dict[str, dict[str, str]]]:
        """What is to be measured, and what is not (case → implementation → reason)."""
        cells: list[Cell] = []
        absent: dict[str, dict[str, str]] = {}
        device, dtype = torch.device(arguments.device), DTYPES[self.dtype]
        for case in self.cases(arguments.cases):
            for name in (*FLOORS, *PEERS):
                if arguments.implementations and name not in arguments.implementations:
                    continue
                if name in FLOORS and self.shape == TINY:
                    continue  # what is measured there is the cost of a call, not of its products
                if name == "floor-t" and (case.gemms < 3 or dtype.itemsize > 2):
                    continue  # other products do not mind how dz is stored
                if not (case.everyone or arguments.everyone or name in CORE):
                    continue
                peer = PEERS.get(name)
                reason = peer.why_not(case.kind, device, dtype) if peer else ""
                if name == "torch-chunked" and not (reason or arguments.everyone):
                    n, d, v = self.shape
                    if case.kind != "loss" or n * d * v > CHUNKED_WORK:
                        reason = "may take minutes: only with --everyone"
                if reason:
                    absent.setdefault(case.name, {})[name] = reason
                else:
                    cells.append(self.cell(case, name, device))
        return cells, absent

    def cell(self, case: Case, name: str, device: torch.device) -> Cell:
        """A cell of this group, to be measured by `prepare`."""
        n, d, v = self.shape
        rows = FEW if case.few else n
        work = case.gemms * rows * v * d / RATE[device.type, DTYPES[self.dtype].itemsize]
        peer = PEERS.get(name)
        return Cell(
            self.name, case.name, name, prepare, (case.name, name, device.type),
            estimate=1e-4 + work * (peer.slowness if peer else 1.0),
            weight=2.0 if name in CORE else 1.0,
            memory=peer is not None and self.shape != TINY,
            compiled=peer is not None and peer.compiled,
        )  # fmt: skip

    def record(
        self, looks: dict[str, Any], cells: list[Cell], absent: dict[str, Any], device: str
    ) -> dict[str, Any]:
        """What the report says of it."""
        cases = list(dict.fromkeys(cell.case for cell in cells))
        return {
            "name": self.name,
            "shape": self.shape,
            "dtype": self.dtype,
            "data": looks,
            "titles": {name: CASES[name].title for name in cases},
            "plans": {
                name: self.explain(CASES[name], device)
                for name in cases if CASES[name].kind != "ids"
            },
            "absent": absent,
            "cells": [cell.record() for cell in cells],
        }  # fmt: skip

    def explain(self, case: Case, device: str) -> str:
        """How ours goes about it."""
        n, d, v = self.shape
        rows = FEW if case.few else round(n * (1 - case.ignored))
        return str(
            ift_kernels.explain(
                rows, v, d, DTYPES[self.dtype], device=device, scalar=case.kind == "loss",
                need_hidden=case.backward, need_weight=case.backward and not case.frozen,
            )
        )  # fmt: skip
