"""How ours stands among what was measured beside it, case by case and device by device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.peers import PEERS
from bench.report import Report, times

CLOSE = 1.03  # times the fastest: within the noise of most machines
# Peers that give the gradient of a sum over tokens alone.
SUMS = tuple(name for name, peer in PEERS.items() if "logprob" in peer.lacks)
OURS = ("ours", "active", "active-dense", "shared")
ERRORS_ALONE = ("dropped",)  # nobody would train with it


class Source(NamedTuple):
    """A report and its file; the folder of the file stands for a device."""

    path: Path
    report: Report

    @property
    def device(self) -> str:
        return self.path.parent.name


class Case(NamedTuple):
    """One case of a group on one device, all of it from one file."""

    name: str
    group: Report
    source: Source

    @property
    def cells(self) -> list[Report]:
        """What has a time."""
        return [c for c in self.group["cells"] if c["case"] == self.name and c["samples"]]

    @property
    def names(self) -> dict[str, str]:
        """What readers see for each implementation."""
        names: dict[str, str] = self.source.report["names"]
        return names

    @property
    def ours(self) -> Report | None:
        """Our fastest with exact gradients, or in a sweep that has no other, with approximate."""
        for name in OURS:
            for cell in self.cells:
                if cell["implementation"] == name:
                    return cell
        return None

    @property
    def fastest(self) -> str:
        """Is ours the fastest?"""
        return self._verdict("seconds", ())

    @property
    def leanest(self) -> str:
        """Does ours take least memory among those that give a gradient of its own per token?"""
        return self._verdict("extra_bytes", SUMS)

    def _verdict(self, quantity: str, without: tuple[str, ...]) -> str:
        others = [
            c for c in self.cells
            if c["implementation"] not in (*OURS, *ERRORS_ALONE, *without)
            and (c[quantity] or 0) > 0 and not c["implementation"].startswith("floor")
        ]  # fmt: skip
        if self.ours is None or not others or self.ours[quantity] is None:
            return "–"
        best = min(others, key=lambda c: c[quantity])
        ratio = self.ours[quantity] / best[quantity]
        if ratio <= CLOSE:
            return f"{'yes' if ratio <= 1 else 'within 3 %'}, of {len(others) + 1}"
        return f"no: {self.names[best['implementation']]}, by {times(ratio)}"


def by_group(sources: Sequence[Source], suite: str) -> dict[str, dict[str, dict[str, Case]]]:
    """Group → case → device → the case; of several files with it the newest.

    Where they are of the same second, it is the one with most samples of ours. The order is that
    of the file with most cases.
    """
    found: dict[str, dict[str, dict[str, Case]]] = {}
    here = [source for source in sources if source.report["suite"] == suite]
    for source in sorted(here, key=_cases, reverse=True):
        for group in source.report["groups"]:
            for name in group["titles"]:
                case = Case(name, group, source)
                if not case.cells:
                    continue
                devices = found.setdefault(group["name"], {}).setdefault(name, {})
                known = devices.get(source.device)
                if known is None or _rank(case) > _rank(known):
                    devices[source.device] = case
    return found


def _cases(source: Source) -> int:
    return sum(len(group["titles"]) for group in source.report["groups"])


def _rank(case: Case) -> tuple[str, int]:
    samples = len(case.ours["samples"]) if case.ours else 0
    return case.source.report["provenance"]["date"], samples
