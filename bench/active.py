"""``python -m bench active``: the active-set backward, against exact gradients, peers and dropping.

The cases of a head that is trained or frozen are those of ``python -m bench head`` with two more
implementations. The sweeps change one option of the active set at a time; beside the error of each
threshold stands that of dropping the tail instead of making up for it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ift_kernels
from bench import head
from bench.harness import Cell, Settings, Subject, measure
from bench.peers import PEERS, Active, ActiveDense, Peer
from bench.plots import WIDE, Layout, pairs
from bench.worker import Worker
from ift_kernels import ActiveSet

DTYPES, SHAPES = head.DTYPES, head.SHAPES
DEFAULT = ActiveSet(dW="active")
CLOSE = 0.05  # a relative error of gradients above this is not an approximation but a mistake
OURS = {peer.name: peer for peer in (Active(), ActiveDense())}
NAMES = {name: peer.title for name, peer in OURS.items()} | {"dropped": "tail dropped, error alone"}
MAIN = ("scalar", "per-token", "scalar-frozen", "per-token-frozen")
IMPLEMENTATIONS = ("floor", "floor-t", "ours", *OURS, "naive", "naive-float", "compile", "cce",
                   "trl")  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """One setting of the active set, for log-probabilities with both gradients."""

    name: str
    title: str
    options: ActiveSet
    dropped: bool = False  # has the error of dropping beside it


def _sweeps() -> Iterator[Sweep]:
    for power in (6, 8, 10, 12, 14, 16):
        options = replace(DEFAULT, threshold=2.0**-power)
        yield Sweep(f"threshold-{power}", f"threshold 2⁻{_raised(power)}", options, dropped=True)
    for block in (64, 256, 512):
        yield Sweep(f"block-{block}", f"blocks of {block} tokens", replace(DEFAULT, block=block))
    for tile in (256, 512, 1024, 4096):
        yield Sweep(f"tail-{tile}", f"tail tiles of {tile} ids", replace(DEFAULT, tail_tile=tile))


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


SWEEPS = {sweep.name: sweep for sweep in _sweeps()}
CASES: dict[str, Any] = {**{name: head.CASES[name] for name in MAIN}, **SWEEPS}


# --- in the workers -------------------------------------------------------------------------------


def prepare(path: str, case_name: str, implementation: str, device: str) -> Subject:
    """One cell of a main case."""
    if implementation not in OURS:
        return head.prepare(path, case_name, implementation, device)
    case = head.CASES[case_name]
    return subject(path, case, OURS[implementation], device)


def prepare_sweep(path: str, name: str, implementation: str, device: str) -> Subject:
    """One cell of a sweep."""
    peer = Active(SWEEPS[name].options)
    if implementation == "dropped":
        peer = Dropped(SWEEPS[name].options)
    return subject(path, head.CASES["per-token"], peer, device)


def subject(path: str, case: head.Case, peer: Peer, device: str) -> Subject:
    """A peer in any case of a head, ready to be measured."""
    inputs = head.inputs(path, case, device)
    few = head.few(inputs, case)
    function = peer.function(case.kind)
    call = head.caller(function, case, inputs)

    def check(result: Any) -> dict[str, float]:
        errors = head.check(case, inputs, result, CLOSE if isinstance(peer, Active) else 10.0)
        if isinstance(peer, Active):
            with ift_kernels.record_active_sets() as report:
                call()
            if report[0].share == report[0].share:  # NaN: formed in backward, not known here
                errors |= {"share": report[0].share, "tail": report[0].tail_mean}
        return errors

    return Subject(call, head.caller(function, case, few), check, torch.device(device))


class Dropped(Peer):
    """The tail of every block left out, as CCE's filter does, by dense products in float32."""

    def __init__(self, options: ActiveSet) -> None:
        self.options = options

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return _DroppedFunction.apply(hidden, weight, target, self.options)  # type: ignore[no-any-return]


class _DroppedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, options: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight, target)
        ctx.options = options
        logits = (hidden @ weight.T).float()
        return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, target = ctx.saved_tensors
        d_hidden, d_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for rows in range(0, hidden.shape[0], ctx.options.block):
            some = slice(rows, rows + ctx.options.block)
            p = (hidden[some] @ weight.T).float().softmax(1)
            ids = (p > ctx.options.threshold).any(0)
            ids[target[some]] = True
            dz = p[:, ids].neg_()
            place = ids.cumsum(0) - 1
            dz[torch.arange(dz.shape[0]), place[target[some]]] += 1
            dz *= upstream[some, None]
            d_hidden.append(dz @ weight[ids].float())
            d_weight[ids] += dz.T @ hidden[some].float()
        return torch.cat(d_hidden).to(hidden.dtype), d_weight.to(weight.dtype), None, None


# --- in the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--shapes", nargs="+", type=head.shape, default=SHAPES, metavar="NxDxV",
                        help="rows, width and vocabulary, as for head")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE",
                        help="default: all; see --list")  # fmt: skip
    parser.add_argument("--implementations", nargs="+", choices=[*IMPLEMENTATIONS, "dropped"],
                        metavar="NAME", help="default: all")  # fmt: skip
    parser.add_argument("--flat", action="store_true", help="random data, not LM-like")


def run(
    arguments: argparse.Namespace, settings: Settings, progress: Any
) -> Iterator[dict[str, Any]]:
    """Measure; one record per shape and dtype."""
    pairs = [(shape, dtype) for shape in arguments.shapes for dtype in arguments.dtype]
    for done, (shape, dtype) in enumerate(pairs):
        group = head.Group(shape, dtype)
        with tempfile.TemporaryDirectory() as folder:
            path = group.path(folder)
            progress.at(f"making data of {group.name}")
            with Worker(settings.threads) as worker:
                looks = worker.call(
                    head.make_groups, shape, {dtype: path}, arguments.flat, arguments.device
                )
            cells, absent = _plan(arguments, group, path)
            left = len(pairs) - done
            measure(cells, settings, progress, 1 / left, 1 / len(pairs))
        titles = dict.fromkeys(cell.case for cell in cells)
        yield {
            "name": group.name,
            "shape": shape,
            "dtype": dtype,
            "data": looks[dtype],
            "titles": {name: CASES[name].title for name in titles},
            "plans": {},
            "absent": absent,
            "cells": [cell.record() for cell in cells],
        }


def _plan(
    arguments: argparse.Namespace, group: head.Group, path: str
) -> tuple[list[Cell], dict[str, dict[str, str]]]:
    cells: list[Cell] = []
    absent: dict[str, dict[str, str]] = {}
    device, dtype = torch.device(arguments.device), DTYPES[group.dtype]
    for case in CASES.values():
        if arguments.cases and case.name not in arguments.cases:
            continue
        if isinstance(case, Sweep):
            for name in ("active", "dropped") if case.dropped else ("active",):
                if not arguments.implementations or name in arguments.implementations:
                    cells.append(
                        replace(
                            group.cell(head.CASES["per-token"], name, device),
                            case=case.name, prepare=prepare_sweep, memory=name == "active",
                            arguments=(path, case.name, name, arguments.device),
                        )
                    )  # fmt: skip
            continue
        for name in IMPLEMENTATIONS:
            if arguments.implementations and name not in arguments.implementations:
                continue
            if (name == "floor-t" and (case.gemms < 3 or dtype.itemsize > 2)) or (
                name == "active-dense" and case.frozen  # the same as active
            ):
                continue
            peer = OURS.get(name) or PEERS.get(name)
            if reason := peer.why_not(case.kind, device, dtype) if peer else "":
                absent.setdefault(case.name, {})[name] = reason
                continue
            cell = group.cell(case, name, device)
            cell.prepare, cell.arguments = prepare, (path, case.name, name, arguments.device)
            cell.compiled, cell.memory = peer is not None and peer.compiled, peer is not None
            cells.append(cell)
    return cells, absent


def without_sweeps(report: dict[str, Any]) -> dict[str, Any]:
    """The report with the main cases alone, for pictures that have a panel for each case."""
    groups = [
        {**g, "titles": {c: t for c, t in g["titles"].items() if c not in SWEEPS}}
        for g in report["groups"]
    ]
    return {**report, "groups": groups}


def draw(report: dict[str, Any], path: str | Path, layout: Layout = WIDE) -> list[Path]:
    """Time against active share, and error against threshold, of every group that has sweeps."""
    groups = [g for g in report["groups"] if any(c["case"] in SWEEPS for c in g["cells"])]
    if not groups:
        return []

    path = Path(path)
    with pairs(path, len(groups), 3.1, layout) as panels:
        for (left, right), group in zip(panels, groups, strict=True):
            _time_panel(left, group)
            _error_panel(right, group)
    return [path]


def _cells(group: dict[str, Any], kind: str, implementation: str) -> list[dict[str, Any]]:
    return [
        c for c in group["cells"]
        if c["case"].startswith(kind) and c["implementation"] == implementation and c["errors"]
    ]  # fmt: skip


def _time_panel(axes: Any, group: dict[str, Any]) -> None:
    """Time over the three bare GEMMs of the per-token case, against the active share."""
    bare = [
        c["seconds"] for c in group["cells"]
        if c["case"] == "per-token" and c["implementation"].startswith("floor") and c["seconds"]
    ]  # fmt: skip
    if not bare:
        axes.set_visible(False)
        return
    styles = {"threshold": ("o-", "#0072B2"), "block": ("s", "#009E73"), "tail": ("^", "#CC79A7")}
    for kind, (style, colour) in styles.items():
        cells = [
            c for c in _cells(group, kind, "active") if c["seconds"] and "share" in c["errors"]
        ]
        points = sorted((c["errors"]["share"], c["seconds"] / min(bare), c["case"]) for c in cells)
        x, y, names = ([p[i] for p in points] for i in range(3))
        values = sorted(int(name.split("-")[1]) for name in names)
        title = kind if kind == "threshold" else f"{kind} {', '.join(map(str, values))}"
        axes.plot(x, y, style, color=colour, markersize=4, linewidth=1.2, label=title)
        for at, height, name in zip(x, y, names, strict=True):
            if kind == "threshold":
                text = f"2⁻{_raised(int(name.split('-')[1]))}"
                axes.annotate(text, (at, height), xytext=(0, 6), textcoords="offset points",
                              fontsize=7, ha="center")  # fmt: skip
    ours = [c["seconds"] for c in _cells(group, "per-token", "ours")
            if c["case"] == "per-token" and c["seconds"]]  # fmt: skip
    if ours:
        axes.axhline(ours[0] / min(bare), color="#D55E00", linewidth=1, label="exact gradient")
    axes.axhline(1, color="#222222", linewidth=1, linestyle=":", label="three bare GEMMs")
    axes.set(xlabel="active share k", ylabel="time / three bare GEMMs", ylim=(0, None))
    axes.set_title(f"{group['name']}: time", loc="left", fontsize=9, weight="bold")
    axes.legend(fontsize=7, framealpha=0.85, edgecolor="none")


def _error_panel(axes: Any, group: dict[str, Any]) -> None:
    """Relative error of both gradients against the threshold, ours and by dropping."""
    lines = {("active", "d hidden"): ("o-", "#0072B2"), ("active", "d weight"): ("o--", "#56B4E9"),
             ("dropped", "d hidden"): ("x-", "#D55E00"),
             ("dropped", "d weight"): ("x--", "#E69F00")}  # fmt: skip
    for (name, error), (style, colour) in lines.items():
        points = sorted(
            (int(c["case"].split("-")[1]), c["errors"][error])
            for c in _cells(group, "threshold", name)
        )
        tail = "tail as sums" if name == "active" else "tail dropped"
        label = f"{tail}, {error.replace(' ', '')}"
        axes.plot([-p for p, _ in points], [e for _, e in points], style, color=colour,
                  markersize=4, linewidth=1.2, label=label)  # fmt: skip
    axes.set(yscale="log", xlabel="log₂ threshold", ylabel="relative error against fp64")
    axes.set_title(f"{group['name']}: error", loc="left", fontsize=9, weight="bold")
    axes.legend(fontsize=7, framealpha=0.85, edgecolor="none")
    axes.grid(alpha=0.25)
