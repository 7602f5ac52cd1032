"""The table and the picture of the README: what people ask first, from the committed results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.machine import ROOT
from bench.report.pictures import COLOURS, OTHER, WIDE, figure
from bench.report.ranking import SUMS, Case, by_group, link
from bench.report.tables import OPTIONS, OURS, Source, Table, duration, markdown, size, times

PICTURE = ROOT / "docs" / "headline.png"
# Suite, its group, what readers see for the group, and its cases.
PARTS = (
    ("e2e", "qwen2 4x256 V=151936, 4x256 tokens, fp32", "training step", ("sft", "ift", "dpo")),
    ("head", "1024x896x151936 bf16", "head", ("statistics", "scalar", "per-token")),
)
TITLES = {
    "sft": "SFT", "ift": "IFT, both passes", "dpo": "DPO, reference in the step",
    "statistics": "log-probability, entropy, arg max, no gradient",
    "scalar": "mean cross-entropy with gradient",
    "per-token": "log-probabilities with gradient",
}  # fmt: skip
QUANTITIES = ("seconds", "extra_bytes")
SHOWN: tuple[Callable[[Any], str], ...] = (duration, size)
NOT_MEASURED = "not measured"


class Line(NamedTuple):
    """A case, and of each quantity what ours, plain torch and the best other package take."""

    title: str
    ours: tuple[float, float]
    naive: tuple[float, float]
    peer: tuple[float | None, float | None]
    peer_name: tuple[str, str]
    case: Case


def lines(sources: Sequence[Source], device: str) -> list[Line]:
    """The cases of `PARTS` on a device."""
    found = []
    for suite, group, of, names in PARTS:
        cases = by_group(sources, suite)[group]
        for name in names:
            case = cases[name][device]
            values = [_of(case, quantity) for quantity in QUANTITIES]
            found.append(Line(f"{of}: {TITLES[name]}", *zip(*values, strict=True), case))
    return found


def _of(case: Case, quantity: str) -> tuple[float, float, float | None, str]:
    """Ours, the best plain form, the best of the other packages, and its name."""
    best: dict[str, dict[str, Any]] = {}
    for cell in case.cells:
        kind = _kind(cell["implementation"], quantity)
        if (cell[quantity] or 0) > 0 and (
            kind not in best or cell[quantity] < best[kind][quantity]
        ):
            best[kind] = cell
    peer = best.get("peer")
    return (
        best["ours"][quantity],
        best["naive"][quantity],
        peer and peer[quantity],
        case.names[peer["implementation"]] if peer else "",
    )


def _kind(name: str, quantity: str) -> str:
    if name in OURS:
        return "" if name in OPTIONS else "ours"
    if name.startswith("naive"):
        return "naive"
    without = SUMS if quantity == "extra_bytes" else ()  # as `Case.leanest`
    return "" if name.startswith("floor") or name in without else "peer"


def table(sources: Sequence[Source], device: str, page: str) -> str:
    """The block of the README; `page`: the folder of the results, seen from there."""
    found = lines(sources, device)
    rows = []
    for line in found:
        row = [line.title]
        for index, shown in enumerate(SHOWN):
            ours, naive, peer = line.ours[index], line.naive[index], line.peer[index]
            best = f"{shown(peer)} ({times(peer / ours)}), {line.peer_name[index]}" if peer else "–"
            row += [f"**{shown(ours)}**", f"{shown(naive)} ({times(naive / ours)})", best]
        rows.append(row)
    if not any(_on_gpu(source) for source in sources):
        rows.append(["the same on a GPU", *[NOT_MEASURED] * 6])
    kinds = ["ours", "plain torch", "best other"]
    head = ["", *(f"{what}: {kind}" for what in ("time", "memory") for kind in kinds)]
    files = dict.fromkeys(link(line.case.source.label, page) for line in found)
    about = found[0].case.source.report["provenance"]
    shapes = "; ".join(f"{of}: {group}" for _, group, of, _ in PARTS)
    return (
        f"{markdown(Table('', head, rows))}\n\n"
        f"{about['device']}, {about['threads']} threads. In parentheses: over ours. {shapes}. "
        f"From {', '.join(files)}."
    )


def _on_gpu(source: Source) -> bool:
    """Whether a report was measured on one: its device is then not the processor."""
    about = source.report["provenance"]
    return bool(about.get("cpu", about["device"]) != about["device"])


def draw(sources: Sequence[Source], device: str, path: Path = PICTURE) -> None:
    """Time and memory of each case, as shares of plain torch's."""
    found = lines(sources, device)
    bar, height = 0.27, 0.78 + 0.62 * len(found)
    with figure(path, 9.2, height, WIDE, "constrained") as page:
        panels = page.subplots(1, 2, sharey=True)
        for index, (axes, what) in enumerate(zip(panels, ("time", "peak memory"), strict=True)):
            for row, line in enumerate(found):
                naive = line.naive[index]
                shown = (("ours", line.ours[index], COLOURS["ours"]),
                         ("best other", line.peer[index], OTHER))  # fmt: skip
                for place, (label, value, colour) in enumerate(shown):
                    if value is None:
                        continue
                    where = row + bar * (place - 0.5) * 1.1
                    drawn = value / naive
                    axes.barh(where, drawn, bar, color=colour, label=label)
                    inside = drawn > 0.25
                    axes.text(drawn + (-0.015 if inside else 0.015), where, times(value / naive),
                              va="center", ha="right" if inside else "left", fontsize=8,
                              color="white" if inside and not place else "black")  # fmt: skip
            axes.axvline(1, color=COLOURS["naive"], linewidth=1.2, label="plain torch")
            axes.set(xlim=(0, 1.1), yticks=range(len(found)))
            axes.set_yticklabels([line.title for line in found])
            axes.set_title(f"{what}, of plain torch's", loc="left", fontsize=9, weight="bold")
        panels[0].invert_yaxis()
        handles, labels = _legend(panels[0])
        page.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """One entry for each label, whichever row it is from."""
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    return list(by_label.values()), list(by_label)
