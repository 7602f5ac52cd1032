"""Cases of a linear head at any shape: their data, what is called, and how a grid of them is run.

A point is a case at one shape. All points of a grid are measured in the same rounds, so that ratios
between them (time against the share of ignored targets, against N) are within one group.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ift_kernels
from bench.harness import data
from bench.harness.data import Errors, Exact
from bench.harness.measure import Cell, Settings, Subject, measure, record
from bench.harness.worker import Worker
from bench.peers.heads import PEERS
from bench.peers.peer import Peer
from ift_kernels import ActiveSet

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
FEW = 16  # rows of the cases with few
FLOORS = {"floor": "bare GEMMs", "floor-t": "bare GEMMs, dz stored transposed"}
# Implementations whose cells get twice the share of the time.
CORE = ("floor", "floor-t", "ours", "naive")
# Multiply-adds per second, a guess.
RATE = {("cpu", 4): 1e11, ("cpu", 2): 4e11, ("cuda", 4): 2e13, ("cuda", 2): 3e14}
# Width and vocabulary, from the configuration files of the models.
MODELS = {
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "llama-3-8b": (4096, 128256),
    "mistral-7b": (4096, 32000),
    "gemma-2-2b": (2304, 256000),
    "deepseek-v3": (7168, 129280),
}
SHAPES = ((2048, 1024, 32000), (1024, 896, 151936))  # N, D, V


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
    call: bool = False  # what a call costs the host: no memory, no wait for a GPU
    active: ActiveSet | None = None  # other options than its defaults

    @property
    def gemms(self) -> int:
        """Products of N·V·D multiply-adds that cannot be avoided."""
        return 1 + self.backward * (1 if self.frozen else 2)


class Point(NamedTuple):
    """One case at one shape; the case's name is unique in its grid."""

    shape: tuple[int, int, int]
    case: Case
    implementations: Sequence[str]
    absent: dict[str, str] = {}  # noqa: RUF012  implementation → why it is left out; read only


@dataclass
class Grid:
    """Points that share their rounds, and what else their record has."""

    name: str
    points: Sequence[Point]
    dtype: str
    flat: bool = False  # random data, not LM-like
    more: dict[str, Any] = field(default_factory=dict)


class Inputs(NamedTuple):
    """Of one case, on the device; hidden and weight are leaves."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,), −100 where ignored
    known: Tensor  # (N,) the same before any was ignored
    upstream: Tensor  # (N,) ∂/∂logprob of the per-token cases, signs mixed
    reference: Exact


# --- in the workers -------------------------------------------------------------------------------


def make(
    shape: tuple[int, int, int], dtypes: Iterable[str], flat: bool, device: str, seed: int = 0
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(dtype, inputs of one shape, figures of them), made on the device."""
    n, d, v = shape
    generator = torch.Generator(device).manual_seed(seed)
    on: Any = {"generator": generator, "device": device}
    if flat:
        made = data.Data(
            torch.randn(n, d, **on), torch.randn(v, d, **on) * d**-0.5, torch.randint(v, (n,), **on)
        )
    else:
        made = data.generate(n, d, v, seed=seed, device=device)
    generator.manual_seed(seed + 1)
    sizes = torch.rand(n, **on).mul(4).sub(3).exp()
    upstream = sizes * (torch.randint(0, 2, (n,), **on) * 2 - 1) / n
    chance = torch.rand(n, **on)  # a target is ignored where it is below the share
    chance[0] = 1.0  # at least one token has a loss
    for name in dtypes:
        hidden, weight = made.hidden.to(DTYPES[name]), made.weight.to(DTYPES[name])
        first = data.Data(hidden[: data.TILE], weight, made.target[: data.TILE])
        references = {"all": data.exact(hidden, weight, made.target)}
        if n > FEW:
            references["few"] = data.exact(hidden[:FEW], weight, made.target[:FEW])
        figures = data.survival(first) | {"reference": references["all"].words}
        inputs = {"hidden": hidden, "weight": weight, "target": made.target, "upstream": upstream}
        saved = {key: vars(value) for key, value in references.items()}
        yield name, {**inputs, "chance": chance, "references": saved}, figures


def make_groups(
    shape: tuple[int, int, int], paths: dict[str, str], flat: bool, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Write the inputs of one shape for some dtypes (name → file); return figures of them."""
    figures = {}
    for name, inputs, of_data in make(shape, paths, flat, "cpu", seed):
        torch.save(inputs, paths[name])
        figures[name] = of_data
    return figures


@dataclass(frozen=True)
class Made:
    """Inputs that are made in the process and on the device that uses them: no file."""

    shape: tuple[int, int, int]
    dtype: str
    flat: bool = False


@functools.lru_cache(maxsize=1)
def load(source: str | Made, device: str) -> dict[str, Any]:
    """The inputs of a group: from a file, every page of it in memory, or new ones."""
    if isinstance(source, Made):
        ((_, found, figures),) = make(source.shape, [source.dtype], source.flat, device)
        return found | {"figures": figures}
    found = torch.load(source, map_location=device, mmap=device == "cpu", weights_only=True)
    for name in ("hidden", "weight"):
        found[name].sum()
    return found


def inputs(source: str | Made, case: Case, device: str) -> Inputs:
    """The inputs of a case, of those of its group."""
    found = load(source, device)
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


def prepare(source: str | Made, case: Case, implementation: str, device: str) -> Subject:
    """An implementation in any case, ready to be measured."""
    given = inputs(source, case, device)
    if implementation in FLOORS:
        return _floor(case, given, implementation == "floor-t")
    peer = PEERS[implementation]
    if case.active:
        peer = type(peer)(case.active)  # type: ignore[call-arg]
    function = peer.function(case.kind)
    given = given._replace(hidden=peer.leaf(given.hidden), weight=peer.leaf(given.weight))
    call = caller(function, case, given, peer)

    def found(result: Any) -> dict[str, float]:
        return check(case, given, result, peer.gradient_limit) | peer.details(call)

    return Subject(
        call, caller(function, case, few(given, case), peer), found, torch.device(device),
        peer.compiled, case.call,
    )  # fmt: skip


def few(inputs: Inputs, case: Case) -> Inputs:
    """A few of the rows and of the vocabulary, to warm up with."""
    return Inputs(
        inputs.hidden[:8].detach().requires_grad_(case.backward),
        inputs.weight[:1024].detach().requires_grad_(inputs.weight.requires_grad),
        torch.zeros_like(inputs.target[:8]),
        *inputs[3:],
    )


def caller(
    function: Callable[..., Any], case: Case, inputs: Inputs, peer: Peer
) -> Callable[[], Any]:
    """What is measured: `function`, and its gradients where the case has a backward.

    Those of the peer's own parameters are formed, too.
    """
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
        gradients = torch.autograd.grad(value, [*wanted, *peer.parameters], upstream)
        return value.detach(), *gradients[: len(wanted)]

    return both if case.backward else forward


def check(
    case: Case, inputs: Inputs, result: Any, gradient_limit: float | None = None
) -> dict[str, float]:
    """Errors of a result; raises Wrong. `gradient_limit`: for gradients that approximate."""
    valid_mask = inputs.target != -100
    errors = Errors(inputs.reference, inputs.hidden, inputs.weight, inputs.known, valid_mask)
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
            upstream = torch.full_like(inputs.upstream, -1.0 / int(valid_mask.sum()))
            upstream = (inputs.upstream if case.kind == "logprob" else upstream) * valid_mask
            errors.limit = gradient_limit or errors.limit
            compare = errors.d_hidden, errors.d_weight
            for against, gradient in zip(compare, gradients, strict=False):
                against(gradient, upstream)
    return errors.found


BUFFERS: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


def scratch(what: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) of a buffer that all cases of this process share, as large as the largest."""
    key, size = (what, like.dtype, like.device), rows * columns
    if key not in BUFFERS or BUFFERS[key].numel() < size:
        BUFFERS[key] = torch.full((size,), 1e-3, dtype=like.dtype, device=like.device)
    return BUFFERS[key][:size].view(rows, columns)


def _floor(case: Case, inputs: Inputs, transposed: bool) -> Subject:
    """The GEMMs that cannot be avoided, on the valid rows, into memory that is allocated."""
    rows = int((inputs.target != -100).sum())
    h, w = inputs.hidden.detach()[:rows], inputs.weight.detach()

    def buffers() -> tuple[Tensor, ...]:
        """Logits and what dW is formed from, dh, dW. Views, so that no case keeps a buffer."""
        z = scratch("logits", rows, len(w), h)
        dz_t = scratch("transposed", len(w), rows, h) if transposed else z.T
        return z, dz_t, scratch("dh", *h.shape, h), scratch("dW", *w.shape, h)

    def call() -> None:
        z, dz_t, dh, dw = buffers()
        torch.mm(h, w.T, out=z)
        if case.gemms > 1:
            torch.mm(z, w, out=dh)
        if case.gemms > 2:
            torch.mm(dz_t, h, out=dw)

    buffers()
    warm = functools.partial(torch.mm, h[:8], w[:1024].T)
    return Subject(call, warm, lambda result: {}, h.device)


# --- in the command -------------------------------------------------------------------------------


def shape(text: str) -> tuple[int, int, int]:
    """Parse N, D and V: ``2048x1024x32000`` as numbers, or ``llama-3-8b@4096``, a model and N."""
    name, at, rows = text.lower().partition("@")
    parts = [rows, *map(str, MODELS[name])] if name in MODELS else text.lower().split("x")
    if at and name not in MODELS:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(MODELS)} before @, got {text!r}"
        )
    n, d, v = sizes(
        "x".join(parts), "NxDxV", "2048x1024x32000, or a model and rows, as llama-3-8b@4096"
    )
    if d < 8:
        raise argparse.ArgumentTypeError(f"expected D ≥ 8, got {text!r}")
    return n, d, v


def sizes(text: str, form: str, example: str) -> tuple[int, ...]:
    """Numbers of at least 1, as many as `form` has, joined by ``x``."""
    try:
        found = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        found = ()
    if len(found) != form.count("x") + 1 or min(found) < 1:
        raise argparse.ArgumentTypeError(
            f"expected {form} of at least 1, as {example}, got {text!r}"
        )
    return found


def words(sizes: Sequence[int]) -> str:
    """``1024x896x151936``."""
    return "x".join(map(str, sizes))


def run(
    grids: Sequence[Grid], arguments: argparse.Namespace, settings: Settings, progress: Any
) -> Iterator[dict[str, Any]]:
    """Measure grids, each with a share of the time that grows with its work; one record each."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = None if settings.in_process else Path(temporary)
        plans = [plan(grid, arguments.device, folder) for grid in grids]
        costs = [sum(cell.estimate + 0.3 for cell in cells) for cells, _ in plans]
        for done, (grid, (cells, absent)) in enumerate(zip(grids, plans, strict=True)):
            shapes, figures = list(dict.fromkeys(point.shape for point in grid.points)), {}
            for sizes in shapes:
                progress.at(f"making data of {words(sizes)}")
                data_of = {grid.dtype: source(folder, grid.name, sizes, grid.dtype, grid.flat)}
                figures = figures_of(data_of, sizes, grid.flat, settings)[grid.dtype]
            left = max(sum(costs[done:]), 1e-9)
            measure(cells, settings, progress, costs[done] / left, costs[done] / sum(costs))
            for file in Path(temporary).iterdir():
                file.unlink()
            yield record_of(grid, cells, absent, figures, arguments.device)


def source(
    folder: Path | None, name: str, sizes: tuple[int, int, int], dtype: str, flat: bool = False
) -> str | Made:
    """A file, which processes share, or without a folder inputs of the process that measures."""
    if folder is None:
        return Made(sizes, dtype, flat)
    return str(folder / f"{name.replace(' ', '-')}-{words(sizes)}.pt")


def figures_of(
    sources: dict[str, Any], sizes: tuple[int, int, int], flat: bool, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Figures of the inputs of one shape, by dtype; files of them are written."""
    if settings.in_process:
        return {name: load(each, "cuda")["figures"] for name, each in sources.items()}
    with Worker(settings.threads) as worker:
        found: dict[str, dict[str, Any]] = worker.call(make_groups, sizes, sources, flat)
    return found


def plan(
    grid: Grid, device: str, folder: Path | None
) -> tuple[list[Cell], dict[str, dict[str, str]]]:
    """What is to be measured, and what is not (case → implementation → reason).

    Args:
        folder: see `source`.
    """
    cells: list[Cell] = []
    absent: dict[str, dict[str, str]] = {}
    dtype = DTYPES[grid.dtype]
    for point in grid.points:
        (n, d, v), case = point.shape, point.case
        work = case.gemms * (FEW if case.few else n) * v * d / RATE[device, dtype.itemsize]
        for name in point.implementations:
            if name == "floor-t" and (case.gemms < 3 or dtype.itemsize > 2):
                continue  # how dz is stored matters to the product of dW in 16 bits alone
            peer = PEERS.get(name)
            reason = peer.unsupported_reason(case.kind, torch.device(device), dtype) if peer else ""
            if reason := reason or point.absent.get(name, ""):
                absent.setdefault(case.name, {})[name] = reason
                continue
            cells.append(
                Cell(
                    grid.name, case.name, name, prepare,
                    (source(folder, grid.name, point.shape, grid.dtype, grid.flat), case, name,
                     device),
                    estimate=1e-4 + work * (peer.slowness if peer else 1.0),
                    weight=2.0 if name in CORE else 1.0,
                    memory=peer is not None and name != "dropped" and not case.call,
                    compiled=peer is not None and peer.compiled,
                )
            )  # fmt: skip
    return cells, absent


def record_of(
    grid: Grid, cells: list[Cell], absent: dict[str, Any], figures: dict[str, Any], device: str
) -> dict[str, Any]:
    """What a report keeps of a grid."""
    measured = {cell.case for cell in cells}
    points = [point for point in grid.points if point.case.name in measured]
    return record(
        grid.name, grid.points[-1].shape, grid.dtype, cells,
        {point.case.name: point.case.title for point in points}, data=figures, absent=absent,
        plans={p.case.name: explain(p, grid.dtype, device) for p in points if p.case.kind != "ids"},
        **grid.more,
    )  # fmt: skip


def explain(point: Point, dtype: str, device: str) -> str:
    """The plan that ours follows."""
    (n, d, v), case = point.shape, point.case
    rows = FEW if case.few else round(n * (1 - case.ignored))
    return str(
        ift_kernels.explain(
            rows, v, d, DTYPES[dtype], device=device, scalar=case.kind == "loss",
            need_hidden=case.backward, need_weight=case.backward and not case.frozen,
        )
    )  # fmt: skip
