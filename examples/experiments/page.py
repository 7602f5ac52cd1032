"""A result page: what was expected, what was measured, and the settings, from one run."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ift import plotting

RESULTS = Path(__file__).parent / "results"


class Page:
    """Collects the parts of ``results/NAME/README.md`` and ``result.json``."""

    def __init__(self, name: str, title: str, output: Path) -> None:
        self.name, self.output = name, output / name
        self.output.mkdir(parents=True, exist_ok=True)
        self.parts = [f"# {title}", f"`python -m examples.experiments.{name}`"]
        self.numbers: dict[str, Any] = {}
        self.started = time.perf_counter()

    def text(self, heading: str, *paragraphs: str) -> None:
        """A section."""
        self.parts += [f"## {heading}", *paragraphs]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; floats get four digits."""
        cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
        lines = ["| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *cells]]
        self.parts.append("\n".join(lines))

    def picture(
        self, file: str, alt: str, rows: int, columns: int, *, width: float, height: float
    ) -> contextlib.AbstractContextManager[tuple[Any, Any]]:
        """A figure and its axes to draw a picture on, which lies beside the page."""
        self.parts.append(f"![{alt}]({file})")
        return plotting.picture(self.output / file, rows, columns, width=width, height=height)

    def close(self) -> None:
        """Write both files."""
        seconds = time.perf_counter() - self.started
        threads = torch.get_num_threads()
        self.numbers["seconds"] = round(seconds, 1)
        self.parts.append(
            f"Measured on {platform.machine()} with {threads} "
            f"thread{'s' if threads > 1 else ''}, torch {torch.__version__}, in {seconds:.0f} s. "
            "All numbers: [result.json](result.json)."
        )
        (self.output / "README.md").write_text("\n\n".join(self.parts) + "\n", encoding="utf-8")
        text = json.dumps(self.numbers, indent=1)
        (self.output / "result.json").write_text(text + "\n", encoding="utf-8")
        print(f"{self.output / 'README.md'}: written after {seconds:.0f} s")


def error_of(each: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension."""
    return each.std(0) / each.shape[0] ** 0.5


def shown(each: Tensor, form: str = ".3f", scale: float = 1.0, unit: str = "") -> str:
    """Mean ± standard error over the first dimension."""
    mean, error = scale * each.mean(0), scale * error_of(each)
    return f"{mean:{form}} ± {error:{form.strip('+')}}{unit}"


def band(axes: Any, x: Sequence[float], each: Tensor, line: str = "-", **style: Any) -> None:
    """A line of the means of (seeds, steps) and a band of standard errors."""
    mean, error = each.mean(0), error_of(each)
    axes.plot(x, mean, line, **style)
    axes.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.15, lw=0)


def main(run: Callable[[Path, bool], None], doc: str | None) -> None:
    """The command line that all experiments share."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the pages")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args()
    run(arguments.output, arguments.quick)
