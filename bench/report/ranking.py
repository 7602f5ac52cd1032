"""How ours ranks among what was measured beside it: by case, by suite, by device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.peers.heads import PEERS
from bench.report.tables import (
    OURS,
    Report,
    Source,
    Table,
    duration,
    markdown,
    rows_that_fit,
    size,
    times,
)

ORDER = ("e2e", "losses", "masked", "head", "active", "scaling", "ops", "overhead")
ABOUT = {
    "e2e": "Whole training steps of small random models: tokens per second, memory over weights "
    "and optimizer, and the most rows that fit. A heading names the architecture, layers x width, "
    "vocabulary, rows x tokens and dtype.",
    "losses": "Every loss from hidden states and head, against the form that holds the logits. "
    "A heading names sequences x tokens x width x vocabulary, and dtype.",
    "masked": "Time and memory against the share of targets that are ignored.",
    "head": "Log-probabilities, statistics, token choice and cross-entropy of a linear head. "
    "A heading names tokens x width x vocabulary, and dtype.",
    "active": "The active-set backward, whose gradients are approximate, against exact ones. The "
    "tables have ours with exact gradients, where there is no sweep; the pictures have both.",
    "scaling": "Cost against rows, width and vocabulary, with fitted exponents.",
    "ops": "Token choice, expected embedding, temporal residual and scans.",
    "overhead": "What a call costs where there is next to nothing to compute.",
}
WHAT = """\
ift-kernels computes log-probabilities and losses of language models from hidden states and the
output head, with gradients, without holding the tokens × vocabulary matrix of logits. Below are its
time and memory beside those of what people write in plain torch (*naive*), and of other
packages."""
READ = (
    ("time", "median time of one call"),
    ("of floor", "that time over the time of the matrix products that the case cannot do without; "
     "below 1, ours took less than they did alone"),
    ("memory", "peak of one call, over inputs and results"),
    ("of naive", "time over that of the fastest form that holds the logits, memory over that of "
     "the leanest"),
    ("fastest", "is ours the fastest of all that were measured beside it, and of how many, or "
     "within 3 % of that? Where not, it names what is faster and by how much. Of ours it is the "
     "exact gradient that is judged"),
    ("leanest", "the same of memory, among those that give a gradient of its own per token"),
)  # fmt: skip
RATIOS = "Ratios are within one run. A dash is what was not measured."
HOW = "How it is measured: [benchmarking.md](benchmarking.md)."
COLUMNS = ["time", "of floor", "of naive", "memory", "of naive", "fastest", "leanest"]
CLOSE = 1.03  # times the fastest: within the noise of most machines
# Peers that give the gradient of a sum over tokens alone.
SUMS = tuple(name for name, peer in PEERS.items() if "logprob" in peer.lacks)
ERRORS_ALONE = ("dropped",)  # measured for its error: not a way to train


class Case(NamedTuple):
    """One case of a group on one device, all of it from one file."""

    name: str
    group: Report
    source: Source

    @property
    def cells(self) -> list[Report]:
        """What has a time."""
        return [c for c in self.group["cells"] if c["case"] == self.name and c["samples"]]

    @property
    def names(self) -> dict[str, str]:
        """What readers see for each implementation."""
        names: dict[str, str] = self.source.report["names"]
        return names

    @property
    def ours(self) -> Report | None:
        """Our fastest with exact gradients, or in a sweep that has no other, with approximate."""
        for name in OURS:
            for cell in self.cells:
                if cell["implementation"] == name:
                    return cell
        return None

    @property
    def fastest(self) -> str:
        """Is ours the fastest?"""
        return self._verdict("seconds", ())

    @property
    def leanest(self) -> str:
        """Does ours take least memory among those that give a gradient of its own per token?"""
        return self._verdict("extra_bytes", SUMS)

    def _verdict(self, quantity: str, without: tuple[str, ...]) -> str:
        others = [
            c for c in self.cells
            if c["implementation"] not in (*OURS, *ERRORS_ALONE, *without)
            and (c[quantity] or 0) > 0 and not c["implementation"].startswith("floor")
        ]  # fmt: skip
        if self.ours is None or not others or self.ours[quantity] is None:
            return "–"
        best = min(others, key=lambda c: c[quantity])
        ratio = self.ours[quantity] / best[quantity]
        if ratio <= CLOSE:
            return f"{'yes' if ratio <= 1 else 'within 3 %'}, of {len(others) + 1}"
        return f"no: {self.names[best['implementation']]}, by {times(ratio)}"


def by_group(sources: Sequence[Source], suite: str) -> dict[str, dict[str, dict[str, Case]]]:
    """Group → case → device → the case; of several files with it the newest.

    Where they are of the same second, it is the one with most samples of ours. The order is that
    of the file with most cases.
    """
    found: dict[str, dict[str, dict[str, Case]]] = {}
    of_suite = [source for source in sources if source.report["suite"] == suite]
    of_suite.sort(key=lambda s: -sum(len(group["titles"]) for group in s.report["groups"]))
    for source in of_suite:
        for group in source.report["groups"]:
            for name in group["titles"]:
                case = Case(name, group, source)
                if not case.cells:
                    continue
                devices = found.setdefault(group["name"], {}).setdefault(name, {})
                known = devices.get(source.device)
                if known is None or _rank(case) > _rank(known):
                    devices[source.device] = case
    return found


def _rank(case: Case) -> tuple[str, int]:
    samples = len(case.ours["samples"]) if case.ours else 0
    return case.source.report["provenance"]["date"], samples


def suite_tables(sources: Sequence[Source], suite: str) -> dict[str, list[Table]]:
    """By group: ours beside the fastest other, devices side by side; steps and exponents."""
    devices = list(dict.fromkeys(source.device for source in sources))
    found = {}
    for group, cases in by_group(sources, suite).items():
        shown = [d for d in devices if any(d in case for case in cases.values())]
        rows, notes = [], {}
        for name, by_device in cases.items():
            row = [name]
            for device in shown:
                row += _ranked(by_device.get(device))
            rows.append(row)
            notes[name] = next(iter(by_device.values())).group["titles"][name]
        over = [("", 1), *((device, len(COLUMNS)) for device in shown)]
        table = Table(group, ["case", *COLUMNS * len(shown)], rows, over, notes)
        found[group] = [table, *_extra(group, cases, shown)]
    return found


def _ranked(case: Case | None) -> list[str]:
    if case is None or case.ours is None:
        return ["–"] * len(COLUMNS)
    cell = case.ours
    values = [
        duration(cell["seconds"]), times(cell.get("of_floor")), times(cell.get("of_naive")),
        size(cell["extra_bytes"]), times(cell.get("memory_of_naive")), case.fastest, case.leanest,
    ]  # fmt: skip
    return [value or "–" for value in values]


def _extra(group: str, cases: dict[str, dict[str, Case]], devices: list[str]) -> list[Table]:
    """Tokens per second and exponents, where a group has them."""
    steps, fits = [], []
    for device in devices:
        shown = [case[device] for case in cases.values() if device in case]
        for case in shown:
            for cell in case.cells:
                if cell.get("tokens_per_second"):
                    largest = cell.get("largest")
                    steps.append([
                        device, case.name, case.names[cell["implementation"]],
                        f"{cell['tokens_per_second']:.0f}", size(cell["extra_bytes"]) or "–",
                        rows_that_fit(largest) if largest else "–",
                        f"{largest['bytes'] / 2**30:g} GiB" if largest else "–",
                    ])  # fmt: skip
        for fit in shown[0].group.get("fits", ()) if shown else ():
            values = [f"{fit[q]:.2f}" if fit[q] is not None else "–"
                      for q in ("seconds", "extra_bytes")]  # fmt: skip
            name = shown[0].names[fit["implementation"]]
            fits.append([device, fit["case"], fit["axis"], name, *values])
    found = []
    if steps:
        head = ["device", "step", "by", "tokens/s", "memory", "most rows", "in"]
        found.append(Table(f"{group}: steps", head, steps))
    if fits:
        head = ["device", "case", "against", "by", "time, exponent", "memory, exponent"]
        found.append(Table(f"{group}: exponents", head, fits))
    return found


def summary(sources: Sequence[Source]) -> Table:
    """In how many cases of each suite ours is fastest and leanest, or within 3 %, per device."""
    devices = list(dict.fromkeys(source.device for source in sources))
    rows = []
    for suite in ORDER:
        groups = by_group(sources, suite).values()
        row = [suite]
        for device in devices:
            some = [c[device] for cases in groups for c in cases.values() if device in c]
            for verdicts in ([c.fastest for c in some], [c.leanest for c in some]):
                judged = [verdict for verdict in verdicts if verdict != "–"]
                good = sum(not verdict.startswith("no") for verdict in judged)
                row.append(f"{good} of {len(judged)}" if judged else "–")
        rows.append(row)
    head = ["suite", *["fastest", "leanest"] * len(devices)]
    over = [("", 1), *((device, 2) for device in devices)]
    return Table("Cases in which ours is fastest or leanest, or within 3 % of that", head, rows,
                 over)  # fmt: skip


def not_run(sources: Sequence[Source], suite: str) -> Table:
    """Implementations without a time in a case, and why; none that has one in the case shown."""
    timed = {
        (group, name, device, cell["implementation"])
        for group, cases in by_group(sources, suite).items()
        for name, by_device in cases.items()
        for device, case in by_device.items()
        for cell in case.cells
    }
    found: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for source in sources:
        for group in source.report["groups"] if source.report["suite"] == suite else ():
            for name, implementation, reason in _reasons(group):
                if (group["name"], name, source.device, implementation) not in timed:
                    title = source.report["names"].get(implementation, implementation)
                    cases, devices = found.setdefault((title, reason), ({}, {}))
                    cases[name] = devices[source.device] = None
    rows = [[who, why, *map(", ".join, where)] for (who, why), where in found.items()]
    return Table("Not run, and why", ["", "reason", "cases", "devices"], rows)


def _reasons(group: Report) -> Iterator[tuple[str, str, str]]:
    """(case, implementation, reason)."""
    for case, reasons in group["absent"].items():
        for implementation, reason in reasons.items():
            yield case, implementation, reason
    for cell in group["cells"]:
        if not cell["samples"]:
            yield cell["case"], cell["implementation"], cell["reason"] or "no sample"


def provenance_table(sources: Sequence[Source]) -> Table:
    """Where each file comes from."""
    rows = []
    for source in sources:
        about = source.report["provenance"]
        rows.append([
            source.label, about["device"], about["isa"],
            str(about["threads"]), about["versions"].get("torch", "–"), about["revision"],
            about["date"][:10], f"{about['load']} / {source.report['load_at_end']}",
        ])  # fmt: skip
    head = ["file", "device", "ISA", "threads", "torch", "revision", "date", "load, start / end"]
    return Table("Where it comes from", head, rows)


# --- as Markdown ----------------------------------------------------------------------------------


def benchmarks(sources: Sequence[Source], results: str) -> str:
    """Everything measured; `results`: the folder of the files, seen from the page."""
    parts = [WHAT, "\n".join(f"- *{term}*: {text}." for term, text in READ),
             f"{RATIOS} {HOW}",
             markdown(summary(sources))]  # fmt: skip
    for suite in ORDER:
        groups = suite_tables(sources, suite)
        if not groups:
            continue
        notes: dict[str, str] = {}
        for some in groups.values():
            notes |= some[0].notes or {}
        parts += [f"## {suite}", ABOUT[suite]]
        parts.append("; ".join(f"`{name}`: {note}" for name, note in notes.items()) + ".")
        parts += [markdown(table) for some in groups.values() for table in some]
        absent = not_run(sources, suite)
        parts += [markdown(absent)] if absent.rows else []
        parts += [
            link(f"{picture.parent.name}/{picture.name}", results)
            for source in sources if source.report["suite"] == suite
            for picture in sorted(source.path.parent.glob(f"{source.path.stem}*.png"))
            if picture.stem.removeprefix(source.path.stem)
            in ("", "-memory", "-curves", "-sweeps")
        ]  # fmt: skip
    table = provenance_table(sources)
    rows = [[link(row[0], results), *row[1:]] for row in table.rows]
    return "\n\n".join([*parts, f"## {table.title}", markdown(table._replace(title="", rows=rows))])


def link(name: str, results: str) -> str:
    """Of a file of results."""
    return f"[{name}]({results}/{name})"
