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
        colors = [COLORS[name.split()[1]][name.startswith("naive")] for name in names]
        rates, sizes = zip(*((r.tokens_per_second, r.head_mib) for r in results), strict=True)
        plotting.bars(speed, names, rates, "{:,.0f}", colors, width=0.65)
        speed.set(title="tokens/s (more is better)")
        plotting.bars(memory, names, sizes, "{:,.1f}", colors, width=0.65)
        memory.set(title="peak memory of the head, MiB (less is better)")
