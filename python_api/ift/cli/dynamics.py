"""``ift dynamics``: a run with a probe set, its pictures, and trained types × observed types."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ift import plotting
from ift.cli import options, train
from ift.cli.arguments import flag_of
from ift.cli.checkpoints import last_checkpoint
from ift.cli.errors import CliError, refusals
from ift.cli.processes import note
from ift.cli.report import probe_records
from ift.cli.rows import raw_rows, read_rows
from ift.data_files import DataError
from ift.files import finite, write_text
from ift.text import number, table

if TYPE_CHECKING:
    from ift.dynamics import Probe

SET, CURVES = "probes.jsonl", "dynamics"


def run(arguments: argparse.Namespace) -> int:
    """One of the actions.

    Returns:
        The exit code: 0 done, 130 interrupted.

    Raises:
        CliError: bad input.
    """
    if arguments.action == "plot":
        return _plot(arguments)
    arguments = options.resolve(arguments)
    for name in ("probes", "probe_test", "probe_fluent"):
        path = getattr(arguments, name)
        if path is not None and not Path(path).is_file():
            kind = "text" if name == "probe_fluent" else "JSONL"
            raise CliError(flag_of(name), f"no file {path}; expected a {kind} file")
    if arguments.action == "run":
        return train.run_resolved(arguments, watch)
    return _heatmap(arguments)


def _plot(arguments: argparse.Namespace) -> int:
    """Draw a run's curves again, and print its table."""
    from ift.dynamics import report
    from ift.dynamics.monitor import before_and_after

    directory, records = _records(arguments.run)
    image = directory / "curves.png"
    with _writing("DIR", directory):
        report.plot_curves(records, image, arguments.title)
        report.write_html(records, directory / "curves.html", image, arguments.title)
    print(table(report.table(records)))
    print(before_and_after(records))
    return 0


def _heatmap(arguments: argparse.Namespace) -> int:
    """Trained type × observed type: ``heatmap.json``, pictures, and the tables."""
    rows, _ = read_rows(arguments)
    output = Path(arguments.output)
    train.check_output(output, resume=False)
    for name in (SET, "heatmap.json", "heatmap.png", "kernel.png"):
        path, given = output / name, arguments.probes
        if path.exists() and not (given is not None and path.samefile(given)):
            raise CliError("--output", f"{path} exists; expected a directory without another map")

    import torch  # from here on it takes seconds
    import transformers

    from ift.cli.models import check_model_path, load_model
    from ift.dynamics import report, write_probes
    from ift.dynamics.heatmap import heat_map, kernel_norms

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_model_path(arguments.model)
    model, tokenizer = load_model(arguments, rows, None)
    if not arguments.cpu and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    with refusals("--probes" if arguments.probes is not None else "--data"):
        probes = _probes(arguments, [], model, tokenizer)
    note(f"{_described(probes)}, trained on one type after the other")
    length = {"max_length": arguments.max_length}
    with refusals("--model"):
        found = {"heatmap": heat_map(
            model, tokenizer, probes, lr=arguments.lr, passes=arguments.passes,
            batch_size=arguments.batch_size, **length,
        )}  # fmt: skip
        if arguments.projections:
            found["kernel"] = kernel_norms(
                model, tokenizer, probes, projections=arguments.projections,
                seed=arguments.seed, **length,
            )  # fmt: skip
    titles = {"heatmap": "change of log π per token", "kernel": "‖K‖ per pair of tokens"}
    with _writing("--output", output):
        values = {name: map_.values.tolist() for name, map_ in found.items()}
        record = {"types": found["heatmap"].types, **values}
        write_probes(probes, output / SET)
        write_text(output / "heatmap.json", json.dumps(finite(record)) + "\n")
        for name, map_ in found.items():
            if plotting.available():
                report.plot_heat_map(
                    output / f"{name}.png", map_.types, map_.types, values[name], titles[name],
                    signed=name == "heatmap",
                )  # fmt: skip
    for name, map_ in found.items():
        body = ([t, *map(number, row)] for t, row in zip(map_.types, values[name], strict=True))
        print(f"{titles[name]}\n{table([['trained', *map_.types], *body])}\n")
    return 0


@contextlib.contextmanager
def _writing(flag: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CliError(flag, f"cannot write {path} ({error.strerror})") from None


def _records(path: str) -> tuple[Path, list[dict[str, Any]]]:
    """The evaluations of a run, and the directory that they are in."""
    try:
        directory, records = probe_records(Path(path))
    except (OSError, ValueError) as error:
        raise CliError("DIR", f"cannot read the evaluations in {path}: {error}") from None
    if not records:
        problem = f"no evaluations in {path}; expected the output of `ift dynamics run`"
        raise CliError("DIR", problem)
    return directory, records


def watch(arguments: argparse.Namespace, held_out: list[Any], model: Any, tokenizer: Any) -> Any:
    """The callback of the run; its probe set is written once and read by a resumed run."""
    from ift.dynamics import ProbeCallback, read_probes, write_probes

    output = Path(arguments.output)
    saved, given = output / SET, arguments.probes
    resumed = arguments.resume and saved.exists() and last_checkpoint(output) is not None
    with refusals("--probes" if resumed or given is not None else "--data"):
        if resumed:
            probes = read_probes(saved)
            if given is not None and read_probes(given) != probes:
                raise DataError(f"other probes than the run in {output} was started with, {saved}")
        else:
            probes = _probes(arguments, held_out, model, tokenizer)
        if not resumed:
            write_probes(probes, saved)
        callback = ProbeCallback(
            probes, output / CURVES, every=arguments.probe_every, tokenizer=tokenizer,
            max_length=arguments.max_length,
        )  # fmt: skip
    note(f"{_described(probes)}, measured every {arguments.probe_every} steps")
    return callback


def _probes(
    arguments: argparse.Namespace, held_out: list[Any], model: Any, tokenizer: Any
) -> list[Probe]:
    """The set that is given, or one made of the rows that are not held out.

    Of the held-out ones, which may be responses of any side, the places alone are used: an
    ``unrelated`` answer is a chosen one.
    """
    from ift.dynamics import build_probe_set, read_probes, sampler
    from ift.dynamics.rewrites import SENTENCES

    if arguments.probes is not None:
        return read_probes(arguments.probes)
    apart = {row.where for row in held_out}
    rows = raw_rows(arguments, arguments.data)
    test = [row for row, where in rows if where in apart]
    name = "eval_data" if arguments.probe_test is None else "probe_test"
    other = getattr(arguments, name)
    if other is not None:
        with refusals(flag_of(name)):
            test = [row for row, _ in raw_rows(arguments, other)]
    tokens = arguments.probe_sample
    return build_probe_set(
        [row for row, where in rows if where not in apart],
        size=arguments.probe_size,
        test=test or None,
        sample=sampler(model, tokenizer, max_new_tokens=tokens) if tokens else None,
        tokenizer=tokenizer,
        rules=True,
        fluent=_sentences(arguments.probe_fluent) or SENTENCES,
        seed=arguments.seed,
    )


def _sentences(path: str | None) -> list[str]:
    """The lines of a file that are not blank; none without a file."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise CliError("--probe-fluent", f"cannot read {path} ({error})") from None
    if not any(lines):
        raise CliError("--probe-fluent", f"no sentence in {path}; expected one a line")
    return [line for line in lines if line]


def _described(probes: list[Probe]) -> str:
    """How many, and what in them is made by rules."""
    made = dict.fromkeys(name for probe in probes for name in probe.by_rule)
    return f"{len(probes)} probes" + (f" (made by rules: {', '.join(made)})" if made else "")
