"""The blocks of docs/numerics.md, from committed results of `ift numerics` and of the sampler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bench.harness.machine import RESULTS
from bench.report import tables
from bench.report.ranking import link
from bench.report.tables import Source, Table
from examples import sampler_match
from ift.numerics import page

DEVICE = "epyc-zen3-2-threads"
NUMERICS, SAMPLER = f"{DEVICE}/numerics.json", f"{DEVICE}/sampler.json"
# Of each option: its results, its implementation, and the one that it is compared with.
PRICES = {
    "`deterministic=True`, beside the default": (
        f"{DEVICE}/deterministic.json", "deterministic", "ours"
    ),
    "`logits_dtype=torch.float32`, beside fp32 copies of hidden and weight": (
        f"{DEVICE}/fp32-logits.json", "fp32-logits", "fp32-copies"
    ),
}  # fmt: skip


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def _markdown(table: page.Table, title: str = "") -> str:
    return tables.markdown(Table(title, table.head, table.rows))


def units(sources: Sequence[Source], results: str) -> str:
    """`bounds.UNITS`."""
    return _markdown(page.unit_table())


def errors(sources: Sequence[Source], results: str) -> str:
    """Of log-probabilities and of the gradient of hidden, with the versions of the others."""
    report = _read(NUMERICS)
    parts = [
        _markdown(table, table.title)
        for result, measure in (("logprob", "max"), ("d hidden", "relative"))
        for table in page.errors(report, result, measure)
    ]
    machine, size = report["machine"], report["size"]
    versions = ", ".join(
        f"{name} {version or 'not installed'}" for name, version in machine["versions"].items()
    )
    parts.append(
        f"{size['rows']} tokens, D = {size['width']}, V = {size['vocabulary']}, "
        f"{machine['device']}, {machine['isa']}; {versions}. From {link(NUMERICS, results)}, which "
        "has every operation, backend and schedule, root mean squares and ulp."
    )
    return "\n\n".join(parts)


def shares(sources: Sequence[Source], results: str) -> str:
    """Of the bounds."""
    return _markdown(page.shares(_read(NUMERICS)))


def invariance(sources: Sequence[Source], results: str) -> str:
    """Pass or fail."""
    return _markdown(page.invariance(_read(NUMERICS)))


def price(sources: Sequence[Source], results: str) -> str:
    """Time with an option over time without it."""
    parts = []
    for title, (name, option, other) in PRICES.items():
        rows, heads = [], []
        for group in _read(name)["groups"]:
            seconds = {(c["case"], c["implementation"]): c["seconds"] for c in group["cells"]}
            heads = ["tokens × D × V", *group["titles"].values()]
            shares = (
                tables.times(tables.ratio(seconds[case, option], seconds[case, other]))
                for case in group["titles"]
            )
            size = " × ".join(map(str, group["shape"]))
            rows.append([f"{size}, {group['dtype']}", *shares])
        table = Table(f"{title}, from {link(name, results)}", heads, rows)
        parts.append(tables.markdown(table))
    return "\n\n".join(parts)


def sampler(sources: Sequence[Source], results: str) -> str:
    """Differences to what a sampler reports."""
    report = _read(SAMPLER)
    titles = {
        "head": "From the sampler's hidden states",
        "whole model": "From a forward of the whole sequence",
    }
    parts = [
        tables.markdown(Table(title, sampler_match.HEAD, sampler_match.rows_of(report, compared)))
        for compared, title in titles.items()
    ]
    means = {
        line["way"]: line["mean"]
        for line in report["differences"]
        if line["compared"] == "truncated"
        and line["sampler"] == "fp32"
        and abs(line["mean"]) > 1e-3
    }
    larger = ", ".join(f"{way} {value:.2f}" for way, value in means.items())
    parts.append(
        f"{report['tokens']} tokens each, V = {report['vocabulary']}, from "
        f"{link(SAMPLER, results)}. Log-probabilities within the truncated support are larger on "
        f"average: {larger}."
    )
    return "\n\n".join(parts)


BLOCKS = {
    "numerics-units": units,
    "numerics-errors": errors,
    "numerics-shares": shares,
    "numerics-invariance": invariance,
    "numerics-price": price,
    "numerics-sampler": sampler,
}
