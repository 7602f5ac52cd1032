"""Groups of cells over cases of a head that are not the table of ``python -m bench head``.

A point is a case at one shape. All points of a grid are measured in the same rounds, so that ratios
between them (time against the share of ignored targets, against N) are within one group.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import active, head
from bench.harness import Cell, Settings, Subject, measure
from bench.peers import PEERS
from bench.worker import Worker

IMPLEMENTATIONS = ("floor", "floor-t", "ours", "active", "naive", "naive-float", "compile", "cce",
                   "quack", "verl", "flash", "trl", "torch-chunked", "liger")  # fmt: skip


class Point(NamedTuple):
    """One case at one shape; the case's name is unique in its grid."""

    shape: tuple[int, int, int]
    case: head.Case


def prepare(path: str, case: head.Case, implementation: str, device: str) -> Subject:
    """A cell, ready to be measured."""
    if implementation in active.OURS:
        return active.subject(path, case, active.OURS[implementation], device)
    return head.subject(path, case, implementation, device)


def add_arguments(parser: argparse.ArgumentParser, implementations: Sequence[str]) -> None:
    """Options that every grid has."""
    parser.add_argument("--dtype", nargs="+", choices=head.DTYPES, default=["bf16"])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME",
                        default=list(implementations),
                        help=f"default: {' '.join(implementations)}")  # fmt: skip


def run(
    name: str,
    points: Sequence[Point],
    dtype: str,
    arguments: argparse.Namespace,
    settings: Settings,
    progress: Any,
    *,
    flat: bool = False,
    prepare: Callable[..., Subject] = prepare,
    parts: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Measure a grid; its record.

    Args:
        flat: random data, not LM-like.
        prepare: of the cells, called like `prepare` of this module.
        parts: how many grids are left with this one, and how many there are.
    """
    shapes = list(dict.fromkeys(point.shape for point in points))
    with tempfile.TemporaryDirectory() as folder:
        paths, looks = {}, {}
        for shape in shapes:
            progress.at(f"making data of {'x'.join(map(str, shape))}")
            paths[shape] = str(Path(folder, "x".join(map(str, shape)) + ".pt"))
            with Worker(settings.threads) as worker:
                looks[shape] = worker.call(
                    head.make_groups, shape, {dtype: paths[shape]}, flat, arguments.device
                )[dtype]
        cells, absent = plan(name, points, dtype, arguments, paths, prepare)
        measure(cells, settings, progress, 1 / parts[0], 1 / parts[1])
    return {
        "name": name,
        "shape": shapes[-1],
        "dtype": dtype,
        "data": looks[shapes[-1]],
        "titles": {point.case.name: point.case.title for point in points},
        "plans": {
            p.case.name: head.Group(p.shape, dtype).explain(p.case, arguments.device)
            for p in points if p.case.kind != "ids"
        },
        "absent": absent,
        "cells": [cell.record() for cell in cells],
    }  # fmt: skip


def plan(
    name: str,
    points: Iterable[Point],
    dtype: str,
    arguments: argparse.Namespace,
    paths: dict[tuple[int, int, int], str],
    prepare: Callable[..., Subject],
) -> tuple[list[Cell], dict[str, dict[str, str]]]:
    """What is to be measured, and what is not (case → implementation → reason)."""
    cells: list[Cell] = []
    absent: dict[str, dict[str, str]] = {}
    device, kind = torch.device(arguments.device), head.DTYPES[dtype]
    for shape, case in points:
        group = head.Group(shape, dtype)
        for implementation in arguments.implementations:
            if implementation == "floor-t" and (case.gemms < 3 or kind.itemsize > 2):
                continue  # other products do not mind how dz is stored
            peer = active.OURS.get(implementation) or PEERS.get(implementation)
            if reason := peer.why_not(case.kind, device, kind) if peer else "":
                absent.setdefault(case.name, {})[implementation] = reason
                continue
            cells.append(
                replace(
                    group.cell(case, implementation, device),
                    group=name, case=case.name, prepare=prepare,
                    arguments=(paths[shape], case, implementation, arguments.device),
                    memory=peer is not None, compiled=peer is not None and peer.compiled,
                )
            )  # fmt: skip
    return cells, absent
