"""What the compiler made of the CUDA kernels: ``python -m bench cuda-static LIBRARY``.

Reads the machine code of one architecture out of an object or an extension with cuobjdump:
registers, stack, local (spilled) and shared memory of every kernel, the share of a multiprocessor's
threads that fit, and its 16-byte loads. cuda_limits.json is what the tests hold them to. No GPU is
needed, and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.report.tables import Table, terminal

LIMITS = Path(__file__).with_name("cuda_limits.json")
REGISTERS, THREADS, SHARED = 65536, 2048, 228 << 10  # of a multiprocessor of sm_90
BLOCK = 256  # threads of every kernel
# Bound by latency or by one word per thread, not by the bytes of a matrix.
SCALAR = {
    "stats_merge_kernel",
    "gumbel_merge_kernel",
    "mask_counts_kernel",
    "residual_keys_kernel",
    "take_selected_kernel",
    "put_selected_kernel",
}


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel in the machine code."""

    name: str  # without its template arguments
    mangled: str
    registers: int
    stack: int
    shared: int  # with the KiB that the system takes of it
    local: int
    wide_loads: int
    wide_stores: int

    @property
    def occupancy(self) -> float:
        """The most threads that its registers and shared memory let a multiprocessor hold."""
        rounded = -(-self.registers // 8) * 8
        blocks = min(THREADS // BLOCK, REGISTERS // (rounded * BLOCK))
        if self.shared:
            blocks = min(blocks, SHARED // self.shared)
        return blocks * BLOCK / THREADS


def cuobjdump() -> str | None:
    """The tool: beside nvcc in CUDA_HOME, on PATH, or from its Python package."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    package = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin")
    folders = [str(Path(home, "bin")), os.environ.get("PATH", ""), str(package)]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def read(libraries: Iterable[Path], architecture: str = "90a") -> list[Kernel]:
    """Every kernel of the architecture, with what cuobjdump says of it."""
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump: expected in CUDA_HOME/bin or on PATH")
    kernels = []
    for library in libraries:
        dump = [tool, "-arch", f"sm_{architecture}", str(library)]
        path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])  # nvdisasm
        usage, sass = (
            subprocess.run(
                [*dump, option], env={**os.environ, "PATH": path}, capture_output=True, text=True,
                check=True,
            ).stdout
            for option in ("-res-usage", "-sass")
        )  # fmt: skip
        code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL))
        pattern = r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        for mangled, *numbers in re.findall(pattern, usage):
            found = re.search(r"\d+([a-z_]+_kernel)", mangled)
            if found is None:
                continue
            registers, stack, shared, local = map(int, numbers)
            body = code.get(mangled, "")
            loads, stores = (
                len(re.findall(rf"{op}\.E\.(?:\w+\.)*128", body)) for op in ("LDG", "STG")
            )
            kernels.append(
                Kernel(found[1], mangled, registers, stack, shared, local, loads, stores)
            )
    return kernels


def worst(kernels: Iterable[Kernel]) -> dict[str, dict[str, float]]:
    """By kernel: the most registers, stack, local and shared memory, the fewest wide loads."""
    table: dict[str, dict[str, float]] = {}
    for k in sorted(kernels, key=lambda k: k.name):
        row = table.setdefault(k.name, {"instances": 0, "wide_loads": k.wide_loads, "occupancy": 1})
        row["instances"] += 1
        for what in ("registers", "stack", "local", "shared"):
            row[what] = max(row.get(what, 0), getattr(k, what))
        row["wide_loads"] = min(row["wide_loads"], k.wide_loads)
        row["occupancy"] = min(row["occupancy"], k.occupancy)
    return table


def violations(table: dict[str, dict[str, float]]) -> list[str]:
    """What is over its limit, one line each."""
    limits = json.loads(LIMITS.read_text())
    lines = [f"{name}: in {LIMITS.name}, not in the code" for name in limits.keys() - table.keys()]
    for name, row in table.items():
        if name not in limits:
            lines.append(f"{name}: no limits in {LIMITS.name}")
            continue
        for what in ("registers", "shared"):
            if row[what] > limits[name][what]:
                lines.append(f"{name}: {what} {row[what]:.0f}, at most {limits[name][what]}")
        for what in ("stack", "local"):
            if row[what]:
                lines.append(f"{name}: {row[what]:.0f} bytes of {what} memory, expected none")
        if name not in SCALAR and not row["wide_loads"]:
            lines.append(f"{name}: an instance without 16-byte loads")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Print the table; exit code 1 where a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m bench cuda-static", description=__doc__)
    parser.add_argument("libraries", nargs="+", type=Path)
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--save", type=Path, help="the same table as JSON")
    options = parser.parse_args(arguments)
    table = worst(read(options.libraries, options.arch))
    if options.save:
        rows = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in table.items())
        options.save.write_text(f"{{\n{rows}\n}}\n")
    columns = ("instances", "registers", "stack", "local", "shared", "wide_loads", "occupancy")
    head = (f"kernel (sm_{options.arch})", *columns)
    cells = [[name, *(f"{row[c]:.3g}" for c in columns)] for name, row in table.items()]
    Console(width=120).print(terminal(Table("", head, cells)))
    lines = violations(table)
    print("\n".join(lines) or "all within limits")
    return 1 if lines else 0
