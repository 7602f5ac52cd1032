"""The picture of the demo: losses, speed and memory of the four ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ift import plotting

COLORS = {"SFT": (plotting.BLUE, "#9CCBE5"), "IFT": (plotting.ORANGE, "#F2B48F")}  # fused, naive


def draw(results: Sequence[Any], path: str | Path) -> None:
    """Write the PNG.

    Args:
        results: `examples.demo.Result` of naive SFT, fused SFT, naive IFT and fused IFT.
        path: of the PNG.
    """
    with plotting.picture(path, 2, 2, width=9.0, height=6.0) as (figure, axes):
        (sft, ift), (speed, memory) = axes
        steps = len(results[0].losses)
        figure.suptitle(f"Standard-library docstrings, {steps} steps, four ways")
        for axis, pair, name in ((sft, results[:2], "SFT"), (ift, results[2:], "IFT")):
            fused, naive = COLORS[name]
            # The two nearly coincide: a broad pale line with a thin dark one on it shows both.
            axis.plot(pair[0].losses, color=naive, linewidth=5, label=pair[0].way)
            axis.plot(pair[1].losses, color=fused, linewidth=1.2, label=pair[1].way)
            axis.set(title=f"{name} training loss", xlabel="step")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend()
        names = [r.way for r in results]
        bars(speed, names, [r.tokens_per_second for r in results], "{:,.0f}")
        speed.set(title="tokens/s (more is better)")
        bars(memory, names, [r.head_mib for r in results], "{:,.1f}")
        memory.set(title="peak memory of the head, MiB (less is better)")


def bars(axis: Any, names: Sequence[str], values: Sequence[float], text: str) -> None:
    """One labelled bar for each way."""
    colors = [COLORS[name.split()[1]][name.startswith("naive")] for name in names]
    drawn = axis.bar(names, values, color=colors, width=0.65)
    axis.bar_label(drawn, [text.format(value) for value in values], padding=2)
    axis.margins(y=0.12)
    axis.grid(axis="x", visible=False)
