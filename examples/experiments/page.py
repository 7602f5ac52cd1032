"""A result page: what was expected, what was measured, and the settings, from one run."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

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

    def picture(self, file: str, alt: str) -> None:
        """A picture that lies beside the page."""
        self.parts.append(f"![{alt}]({file})")

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


def main(run: Callable[[Path, bool], None], doc: str | None) -> None:
    """The command line that all experiments share."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the pages")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args()
    run(arguments.output, arguments.quick)
