"""Pictures of a run: ``curves.png`` of ``ift train``.

matplotlib comes with the extra ``[train]`` and is imported when the first picture is drawn.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Colours that stay apart in greyscale and for colour-blind readers (Okabe and Ito).
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
STYLE: Any = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def available() -> bool:
    """Is matplotlib installed?"""
    return importlib.util.find_spec("matplotlib") is not None


def plot_run(records: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw loss, token accuracy and schedules over the steps of a log.

    Args:
        records: rows of ``log.jsonl``: ``step``, ``loss``, and where present ``eval_loss``,
            ``token_accuracy``, ``eval_token_accuracy``, ``lr`` and ``lam``.
        path: the PNG; it is replaced in one step.
        title: above the picture.
    """
    with picture(path, 1, 3, width=11.0, height=3.3) as (figure, (loss, accuracy, schedule)):
        figure.suptitle(title)
        draw(loss, records, "loss", label="training", color=BLUE)
        draw(loss, records, "eval_loss", label="held out (cross-entropy)", color=ORANGE, marker="o")
        loss.set(title="loss", xlabel="step")
        draw(accuracy, records, "token_accuracy", label="training", color=BLUE)
        draw(accuracy, records, "eval_token_accuracy", label="held out", color=ORANGE, marker="o")
        accuracy.set(title="token accuracy", xlabel="step")
        for axes in (loss, accuracy):
            if axes.has_data():
                axes.legend()
        draw(schedule, records, "lr", color=GREEN)
        schedule.set(title="schedules", xlabel="step", ylim=(0, None))
        schedule.set_ylabel("learning rate", color=GREEN)
        if any(record.get("lam") is not None for record in records):
            right = schedule.twinx()
            draw(right, records, "lam", color=PURPLE)
            right.set(ylim=(0, 1))
            right.set_ylabel("λ", color=PURPLE)
            right.grid(False)
            right.spines.right.set_visible(True)


def draw(axes: Any, records: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    """Plot ``key`` over ``step``, skipping the records that do not have it."""
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), markersize=3, **style)


@contextlib.contextmanager
def picture(
    path: str | Path, rows: int, columns: int, *, width: float, height: float
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes to draw on; at the end the PNG is there, or the old one still is.

    It needs no display, and is safe beside a program that uses pyplot.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
