"""``ift dynamics``: a run with a probe set, its pictures, and runs over one another."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ift.cli import train
from ift.cli.arguments import flag_of
from ift.cli.errors import CliError
from ift.cli.processes import note
from ift.data_rows import FORMATS, DataError, parsed_lines

SET, CURVES = "probes.jsonl", "dynamics"


def run(arguments: argparse.Namespace) -> int:
    """One of the actions.

    Returns:
        The exit code: 0 done, 130 interrupted.

    Raises:
        CliError: bad input.
    """
    if arguments.action == "run":
        for name in ("probes", "probe_test"):
            path = getattr(arguments, name)
            if path is not None and not Path(path).is_file():
                raise CliError(flag_of(name), f"no file {path}; expected a JSONL file")
        return train.run(arguments, watch)
    from ift.dynamics import report
    from ift.dynamics.monitor import before_and_after

    if arguments.action == "plot":
        directory, records = _records(arguments.run)
        image = directory / "curves.png"
        with _writing("DIR", directory):
            report.plot_curves(records, image, arguments.title)
            report.write_html(records, directory / "curves.html", image, arguments.title)
        print(_text(report.table(records)))
        print(before_and_after(records))
        return 0
    runs, places = {}, set()
    for path in arguments.runs:
        directory, records = _records(path)
        if directory.resolve() in places:
            raise CliError("DIR", f"got {path} twice; expected different runs")
        places.add(directory.resolve())
        runs[str(path)] = records
    output = Path(arguments.output)
    if not output.absolute().parent.is_dir():
        raise CliError("--output", f"no directory {output.parent}; expected one that exists")
    with _writing("--output", output):
        report.plot_comparison(runs, output)
    for name, records in runs.items():
        print(f"{name}\n{_text(report.table(records))}\n{before_and_after(records)}\n")
    return 0


@contextlib.contextmanager
def _writing(flag: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CliError(flag, f"cannot write {path} ({error.strerror})") from None


def _records(path: str) -> tuple[Path, list[dict[str, Any]]]:
    """The evaluations of a run, and the directory that they are in."""
    from ift.dynamics.callback import read_records

    for directory in (Path(path) / CURVES, Path(path)):
        try:
            records = read_records(directory)
        except NotADirectoryError:
            continue
        except (OSError, ValueError) as error:
            raise CliError("DIR", f"cannot read the evaluations in {directory}: {error}") from None
        if records:
            return directory, records
    raise CliError("DIR", f"no evaluations in {path}; expected the output of `ift dynamics run`")


def _text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )  # fmt: skip
    return "\n".join(lines)


def watch(arguments: argparse.Namespace, held_out: list[Any], model: Any, tokenizer: Any) -> Any:
    """The callback of the run; its probe set is written once and read by a resumed run."""
    from ift.dynamics import ProbeCallback, build_probe_set, read_probes, sampler, write_probes

    output = Path(arguments.output)
    saved = output / SET
    flag = "--probes"
    try:
        if arguments.resume and saved.exists():
            probes = read_probes(saved)
            if arguments.probes is not None and read_probes(arguments.probes) != probes:
                raise DataError(f"other probes than the run in {output} was started with, {saved}")
        elif arguments.probes is not None:
            probes = read_probes(arguments.probes)
        else:
            flag = "--data" if arguments.probe_test is None else "--probe-test"
            test: Any = arguments.probe_test or _contents(held_out) or None
            tokens = arguments.probe_sample
            sample = sampler(model, tokenizer, max_new_tokens=tokens) if tokens else None
            build = functools.partial(build_probe_set, size=arguments.probe_size, test=test)
            probes = build(
                _trained(arguments.data, held_out), sample=sample, tokenizer=tokenizer,
                seed=arguments.seed,
            )  # fmt: skip
        if not (arguments.resume and saved.exists()):
            write_probes(probes, saved)
        callback = ProbeCallback(
            probes, output / CURVES, every=arguments.probe_every, tokenizer=tokenizer,
            max_length=arguments.max_length,
        )  # fmt: skip
    except DataError as error:
        raise CliError(flag, error) from None
    note(f"{len(probes)} probes, measured every {arguments.probe_every} steps")
    return callback


def _trained(path: str, held_out: list[Any]) -> list[dict[str, Any]]:
    """The raw rows of a file, without those that are held out."""
    apart = {row.where for row in held_out}
    return [row for row, where in parsed_lines(Path(path), FORMATS) if where not in apart]


def _contents(rows: list[Any]) -> list[dict[str, Any]]:
    """The rows that a split has set aside, of a preference the chosen side."""
    return [getattr(row, "chosen", row).content for row in rows]
