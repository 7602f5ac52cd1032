"""``ift report``: runs side by side, as a table on stdout and on one page of HTML."""

from __future__ import annotations

import argparse
import html
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ift import pages, plotting
from ift.cli.config_file import SAMPLES_FILE
from ift.cli.errors import CliError
from ift.cli.option_tables import REPORT_OPTIONS
from ift.files import JsonlLog, write_text
from ift.text import number, one_line, table

Record = Mapping[str, Any]

# Panels of the page, in order; those that no run has are left out.
PANELS = {
    "loss": "training loss",
    "eval_loss": "held-out loss",
    "token_accuracy": "token accuracy in training",
    "eval_token_accuracy": "held-out token accuracy",
    "reward_margin": "reward margin in training",
    "eval_reward_margin": "held-out reward margin",
    "reward_accuracy": "reward accuracy in training",
    "eval_reward_accuracy": "held-out reward accuracy",
    "logprob_chosen": "log-probability of the chosen",
    "logprob_rejected": "log-probability of the rejected",
    "entropy": "entropy (nats)",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
    "lam": "λ",
}
PROMPTS = 8  # of the samples that are shown


@dataclass(frozen=True)
class Run:
    """What a run left in its directory."""

    name: str
    settings: dict[str, Any]  # run.json
    log: Sequence[Record]
    samples: Sequence[Record]
    probes: Sequence[Record]  # evaluations of the probe set

    def last(self, key: str) -> str:
        """The last value of a key of the log, as text; "" where no record has it."""
        return next((number(record[key]) for record in reversed(self.log) if key in record), "")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print the table.

    Returns:
        0.

    Raises:
        CliError: no run, the same run twice, a damaged file, or a page that cannot be written.
    """
    output = Path(arguments.output or REPORT_OPTIONS["output"].default)
    if not output.absolute().parent.is_dir():
        raise CliError("--output", f"no directory {output.parent}; expected one that exists")
    if output.is_dir():
        raise CliError("--output", f"got the directory {output}; expected a file to write")
    if output.is_file() and not _is_page(output):
        raise CliError("--output", f"{output} is no page of HTML; expected a new file or a page")
    runs, places = [], set()
    for path in arguments.runs:
        place = Path(path).resolve()
        if place in places:
            raise CliError("RUN", f"got {path} twice; expected different runs")
        places.add(place)
        runs.append(read_run(path))
    if not plotting.available():
        missing = "matplotlib is not installed (ift-kernels[train])"
        print(f"ift report: the page has no curves: {missing}", file=sys.stderr)
    title = arguments.title or REPORT_OPTIONS["title"].default
    try:
        write_text(output, pages.page(title, parts(runs)))
    except OSError as error:
        raise CliError("--output", f"cannot write {output} ({error.strerror})") from None
    if any(each.log for each in runs):
        print(table(results(runs)))
    for each in runs:
        for line in probe_lines(each):
            print(line)
    print(f"page: {output}")
    return 0


def _is_page(path: Path) -> bool:
    """Whether a file is HTML, or empty, so that a page may take its place."""
    try:
        with path.open("rb") as file:
            start = file.read(64).strip().lower()
    except OSError as error:
        raise CliError("--output", f"cannot read {path} ({error.strerror})") from None
    return not start or start.startswith((b"<!doctype html", b"<html"))


# ---- reading -------------------------------------------------------------------------------------


def read_run(path: str) -> Run:
    """What ``ift train``, ``ift dynamics run`` or a `ProbeCallback` left in a directory."""
    place = Path(path)
    settings: dict[str, Any] = {}
    try:
        if (place / "run.json").exists():
            settings = json.loads((place / "run.json").read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError("run.json: expected an object")
        log, samples = (JsonlLog(place / f).read() for f in ("log.jsonl", SAMPLES_FILE))
        _, probes = probe_records(place)
    except NotADirectoryError:
        log, samples, probes = [], [], []
    except (OSError, ValueError) as error:
        raise CliError("RUN", f"cannot read {path}: {error}") from None
    if not log and not probes:
        raise CliError("RUN", f"no log.jsonl in {path}; expected the output of `ift train`")
    return Run(path, settings, log, samples, probes)


def probe_records(place: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The evaluations of a run's probe set, none where there are none, and their directory.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    for directory in (place / "dynamics", place):
        if (directory / "curves.jsonl").is_file():
            from ift.dynamics.callback import read_records  # loads transformers

            return directory, read_records(directory)
    return place, []


# ---- what is compared ----------------------------------------------------------------------------


def results(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each run, below a head; columns that no run has are left out."""
    rows = [["run", "steps", "loss", "accuracy", "eval loss", "best eval loss", "eval accuracy",
             "eval margin", "tokens/s"]]  # fmt: skip
    for each in runs:
        accuracy = "reward_accuracy" if each.last("reward_margin") else "token_accuracy"
        best = min(((r["eval_loss"], r["step"]) for r in each.log
                    if r.get("eval_loss") is not None), default=None)  # fmt: skip
        speeds = [r["tokens_per_second"] for r in each.log if r.get("tokens_per_second")]
        values = [each.last(key) for key in ("loss", accuracy, "eval_loss")]
        values.append("" if best is None else f"{number(best[0])} at {best[1]}")
        values += [each.last(key) for key in (f"eval_{accuracy}", "eval_reward_margin")]
        values.append(number(statistics.median(speeds)) if speeds else "")
        rows.append([each.name, str(each.log[-1]["step"] if each.log else ""), *values])
    kept = [i for i, column in enumerate(zip(*rows[1:], strict=True)) if i == 0 or any(column)]
    return [[row[i] for i in kept] for row in rows]


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each setting that is not the same in all runs, below a head."""
    names = dict.fromkeys(name for each in runs for name in each.settings)
    rows = [["setting", *(each.name for each in runs)]]
    for name in names:
        values = [each.settings.get(name) for each in runs]
        if any(value != values[0] for value in values):
            rows.append([name.replace("_", "-"), *map(_setting, values)])
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] + "…" if len(text) == 64 and " " not in text else text  # a digest


def probe_lines(each: Run) -> Iterator[str]:
    """The table of a run's probe set, and the line of its monitor."""
    if each.probes:
        from ift.dynamics import report
        from ift.dynamics.monitor import before_and_after

        yield f"\n{each.name}\n{table(report.table(each.probes))}"
        yield before_and_after(each.probes)


# ---- the page ------------------------------------------------------------------------------------


def parts(runs: Sequence[Run]) -> Iterator[str]:
    """The page, piece by piece."""
    if any(each.log for each in runs):
        yield pages.table(results(runs))
    if any(each.settings for each in runs) and len(runs) > 1:
        yield "<h2>Settings that differ</h2>"
        rows = differences(runs)
        yield pages.table(rows) if len(rows) > 1 else "<p>None.</p>"
    if plotting.available():
        yield from _curves(runs)
    yield from _samples(runs)
    probed = [each for each in runs if each.probes]
    if probed:
        yield from _probed(runs, probed)


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    pictures = []
    for key, title in PANELS.items():
        if not any(record.get(key) is not None for each in runs for record in each.log):
            continue
        with plotting.png(title) as (axes, made):
            for each, style in zip(runs, plotting.styles(len(runs)), strict=True):
                marker = {"marker": "o"} if key.startswith("eval_") else {}
                plotting.draw(axes, each.log, key, **style, **marker)
        pictures.append(pages.image(made.getvalue(), title))
    if pictures:
        yield "<h2>Curves</h2>"
        yield _key(runs)
        yield pages.grid(pictures)


def _key(runs: Sequence[Run]) -> str:
    """Which line is which run."""
    css = {"-": "solid", "--": "dashed", "-.": "dashed", ":": "dotted"}
    lines = (
        f'<li><i style="border-top:3px {css[style["linestyle"]]} {style["color"]}"></i>'
        f"{html.escape(each.name)}</li>"
        for each, style in zip(runs, plotting.styles(len(runs)), strict=True)
    )
    return f'<ul class="key">{"".join(lines)}</ul>'


def _samples(runs: Sequence[Run]) -> Iterator[str]:
    """The last continuations of each run, beside each other by prompt."""
    by_prompt: dict[str, list[tuple[Run, Record]]] = {}
    for each in runs:
        last = max((record["step"] for record in each.samples), default=0)
        for record in each.samples:
            if record["step"] == last:
                by_prompt.setdefault(json.dumps(record.get("prompt")), []).append((each, record))
    if by_prompt:
        yield "<h2>Samples</h2>"
        yield "<p>Greedy continuations of held-out prompts, at the last evaluation.</p>"
    for prompt, found in list(by_prompt.items())[:PROMPTS]:
        yield f"<pre>{html.escape(_text(json.loads(prompt)))}</pre>"
        cards = [_card("in the data", found[0][1].get("answer", ""))]
        cards += [_card(f"{e.name}, step {r['step']}", r.get("text", "")) for e, r in found]
        yield pages.grid(cards)


def _text(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)
    return str(prompt)


def _card(name: str, text: Any) -> str:
    quoted = html.escape(str(text))
    head = f'<span class="quiet">{html.escape(name)}</span>'
    return f'<div class="card">{head}<pre>{quoted}</pre></div>'


def _probed(runs: Sequence[Run], probed: Sequence[Run]) -> Iterator[str]:
    """What the runs did to the answers of their probe sets."""
    from ift.dynamics import report
    from ift.dynamics.monitor import before_and_after

    yield "<h2>Answers that were watched</h2>"
    records = {each.name: each.probes for each in probed}
    if plotting.available():
        styles = dict(zip((e.name for e in runs), plotting.styles(len(runs)), strict=True))
        yield "<p>Log-probability of a token; dotted: of the greedy token in its place.</p>"
        yield _key(runs)
        pictures = report.comparison(records, [styles[name] for name in records])
        yield pages.grid(pages.image(png, name) for name, png in pictures.items())
        types, values = report.changes(records)
        made = BytesIO()
        names = [one_line(name, 30, end=True) for name in records]
        title = "change of log π per token, first to last evaluation"
        report.plot_heat_map(made, names, types, values, title)
        yield pages.wide(pages.image(made.getvalue(), title))
    for each in probed:
        yield f"<h2>{html.escape(each.name)}</h2>"
        yield f"<p>{html.escape(before_and_after(each.probes))}</p>"
        yield pages.table(report.table(each.probes))
