"""Pictures of a run: ``curves.png`` of ``ift train``.

matplotlib comes with the extra ``[train]`` and is imported when the first picture is drawn.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ift.files import replacing

# Colours that stay apart in greyscale and for colour-blind readers (Okabe and Ito).
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
# Metrics of preference losses, in the log and in the picture.
PAIR_KEYS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy",
             "logprob_chosen", "logprob_rejected", "kl")  # fmt: skip
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#555555")
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
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_run(records: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw loss, token accuracy and schedules over the steps of a log.

    Args:
        records: rows of ``log.jsonl``: ``step``, ``loss``, and where present ``eval_loss``,
            ``token_accuracy``, ``eval_token_accuracy``, ``lr`` and ``lam``; with the rewards of a
            preference loss a second row shows them, their margin and the log-probabilities.
        path: the PNG; it is replaced in one step.
        title: above the picture.
    """
    pairs = any(record.get("reward_margin") is not None for record in records)
    rows = 2 if pairs else 1
    with picture(path, rows, 3, width=11.0, height=3.3 * rows) as (figure, axes):
        figure.suptitle(title)
        loss, accuracy, schedule = axes[0] if pairs else axes
        if pairs:
            _draw_pairs(axes[1], records)
        held_out = "held out" if pairs else "held out (cross-entropy)"
        lines = ((loss, "loss", held_out), (accuracy, "token_accuracy", "held out"))
        for panel, key, about in lines:
            draw(panel, records, key, label="training", color=BLUE)
            draw(panel, records, f"eval_{key}", label=about, color=ORANGE, marker="o")
            panel.set(title=key.replace("_", " "), xlabel="step")
            if panel.has_data():
                panel.legend()
        draw(schedule, records, "lr", color=GREEN)
        schedule.set(title="schedules", xlabel="step", ylim=(0, None))
        schedule.set_ylabel("learning rate", color=GREEN)
        if any(record.get("lam") is not None for record in records):
            _right_axis(schedule, records, "lam", "λ", PURPLE, 1)


def styles(count: int) -> list[dict[str, str]]:
    """So many styles of lines: six colours, then the same with dashes."""
    dashes = ("-", "--", "-.", ":")
    return [
        {"color": COLORS[i % len(COLORS)], "linestyle": dashes[i // len(COLORS) % len(dashes)]}
        for i in range(count)
    ]


def _right_axis(
    axes: Any, records: Sequence[Mapping[str, Any]], key: str, label: str, color: str, top: float
) -> None:
    """`key` in the panel `axes`, on a second axis from 0 to `top`."""
    right = axes.twinx()
    draw(right, records, key, color=color)
    right.set(ylim=(0, top))
    right.set_ylabel(label, color=color)
    right.grid(False)
    right.spines.right.set_visible(True)


def _draw_pairs(panels: Sequence[Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Rewards, margin with accuracy, and log-probabilities of both responses."""
    rewards, margin, logprob = panels
    for axes, key in ((rewards, "reward"), (logprob, "logprob")):
        for side, color in (("chosen", BLUE), ("rejected", ORANGE)):
            draw(axes, records, f"{key}_{side}", label=side, color=color)
            draw(axes, records, f"eval_{key}_{side}", color=color, marker="o", linestyle=":")
    rewards.set(title="rewards (dotted: held out)", xlabel="step")
    logprob.set(title="log-probability of a response", xlabel="step")
    draw(margin, records, "reward_margin", label="margin", color=BLUE)
    draw(margin, records, "eval_reward_margin", label="held out", color=ORANGE, marker="o")
    margin.set(title="reward margin", xlabel="step")
    margin.set_ylabel("chosen less rejected", color=BLUE)
    if any(record.get("reward_accuracy") is not None for record in records):
        _right_axis(margin, records, "reward_accuracy", "share right", GREEN, 1.02)
    for axes in panels:
        if axes.has_data() and axes.get_legend_handles_labels()[0]:
            axes.legend()


def draw(axes: Any, records: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    """Plot ``key`` over ``step``, skipping the records that do not have it; one alone is a dot."""
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if len(points) == 1:
        style.setdefault("marker", "o")
    if points:
        axes.plot(*zip(*points, strict=True), markersize=4, **style)
        axes.xaxis.get_major_locator().set_params(integer=True)


@contextlib.contextmanager
def figure(
    path: str | Path | BytesIO, width: float, height: float, style: Any, layout: Any
) -> Iterator[Any]:
    """A figure of so many inches; at the end the PNG is there, or the old one still is.

    It needs no display, and is safe beside a program that uses pyplot.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(style):
        made = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(made)
        yield made
        if isinstance(path, BytesIO):
            made.savefig(path, format="png")
            return
        with replacing(Path(path)) as unfinished:
            made.savefig(unfinished, format="png")


@contextlib.contextmanager
def picture(
    path: str | Path | BytesIO, rows: int, columns: int, *, width: float, height: float
) -> Iterator[tuple[Any, Any]]:
    """A `figure` and its axes to draw on."""
    with figure(path, width, height, STYLE, "constrained") as made:
        yield made, made.subplots(rows, columns)


def bars(
    axis: Any, names: Sequence[str], values: Sequence[float], text: str, colors: Sequence[str],
    width: float = 0.5,
) -> None:  # fmt: skip
    """One bar for each name, labelled with its value in the format `text`."""
    drawn = axis.bar(names, values, color=colors, width=width)
    axis.bar_label(drawn, [text.format(value) for value in values], padding=2)
    axis.margins(y=0.12)
    axis.grid(axis="x", visible=False)


@contextlib.contextmanager
def png(title: str) -> Iterator[tuple[Any, BytesIO]]:
    """One panel over the steps, to draw on, and the PNG that it is at the end."""
    made = BytesIO()
    with picture(made, 1, 1, width=4.6, height=3.0) as (_, axes):
        axes.set(title=title, xlabel="step")
        yield axes, made
