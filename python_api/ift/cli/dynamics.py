"""``ift dynamics``: a run with a probe set, its pictures, and runs over one another."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ift.cli import options, train
from ift.cli.arguments import flag_of
from ift.cli.errors import CliError, refusals
from ift.cli.processes import note
from ift.cli.rows import raw_rows
from ift.data_files import DataError

SET, CURVES = "probes.jsonl", "dynamics"


def run(arguments: argparse.Namespace) -> int:
    """One of the actions.

    Returns:
        The exit code: 0 done, 130 interrupted.

    Raises:
        CliError: bad input.
    """
    if arguments.action == "run":
        arguments = options.resolve(arguments)
        for name in ("probes", "probe_test"):
            path = getattr(arguments, name)
            if path is not None and not Path(path).is_file():
                raise CliError(flag_of(name), f"no file {path}; expected a JSONL file")
        return train.run_resolved(arguments, watch)
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
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def watch(arguments: argparse.Namespace, held_out: list[Any], model: Any, tokenizer: Any) -> Any:
    """The callback of the run; its probe set is written once and read by a resumed run."""
    from ift.dynamics import ProbeCallback, build_probe_set, read_probes, sampler, write_probes

    output = Path(arguments.output)
    saved, given = output / SET, arguments.probes
    resumed = arguments.resume and saved.exists()
    made = "--data" if arguments.probe_test is None else "--probe-test"
    with refusals("--probes" if resumed or given is not None else made):
        if resumed:
            probes = read_probes(saved)
            if given is not None and read_probes(given) != probes:
                raise DataError(f"other probes than the run in {output} was started with, {saved}")
        elif given is not None:
            probes = read_probes(given)
        else:
            # Of a preference, the chosen side.
            learned = [row for row in held_out if getattr(row, "desirable", None) is not False]
            held = [getattr(row, "chosen", row).content for row in learned]
            tokens = arguments.probe_sample
            probes = build_probe_set(
                raw_rows(arguments, held_out),
                size=arguments.probe_size,
                test=arguments.probe_test or held or None,
                sample=sampler(model, tokenizer, max_new_tokens=tokens) if tokens else None,
                tokenizer=tokenizer,
                seed=arguments.seed,
            )
        if not resumed:
            write_probes(probes, saved)
        callback = ProbeCallback(
            probes, output / CURVES, every=arguments.probe_every, tokenizer=tokenizer,
            max_length=arguments.max_length,
        )  # fmt: skip
    note(f"{len(probes)} probes, measured every {arguments.probe_every} steps")
    return callback
