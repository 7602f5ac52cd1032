"""Plans of a GPU that need not be there, and how long they would take: a model, not a measurement.

For shapes of known models: schedule, tile, blocks of rows, launches, the model's milliseconds,
their ratio to the bare products, and to the floor of the same plan (its products whole, its bytes
at full bandwidth); see `ift_kernels.schedule.cost`. Committed limits are in
tests/kernels/schedule/test_device_plan.py.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from bench.report.tables import Table, terminal
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.schedule import cost, plan
from ift_kernels.schedule.device import H200, Device

MIB = 1 << 20
# Bare products of N·V·D, and what the problem needs; "active": of a frozen head, with the usual
# share of active columns (`cost.SHARE_OF_128`), of the Triton backend and of CUDA C++, which
# gathers head rows for the vendor's products.
FROZEN: dict[str, Any] = {"need_hidden": True, "grads_in_forward": True}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "statistics": (1, {}),
    "token": (4, {"need_hidden": True, "need_weight": True}),
    "frozen": (2, FROZEN),
    "active": (2, {**FROZEN, "active": ActiveSet(), "reads_head_rows": True}),
    "active, C++": (2, {**FROZEN, "active": ActiveSet()}),
    "scalar": (3, {"need_hidden": True, "need_weight": True, "grads_in_forward": True}),
}
LARGE = (8192, 4096, 128256)  # N, D, V: Llama 3 8B
ROWS = (512, 2048, 8192, 32768, 65536)
HEADS = ((896, 151936), (2304, 256000), (5120, 152064))  # Qwen2.5 0.5B, Gemma 2 2B, Qwen2.5 32B
SHAPES = [LARGE, *((rows, *head) for head in HEADS for rows in ROWS)]
HEADINGS = (
    "case", "plan", "products", "tile", "blocks", "launches", "host ms", "ms", "of bare",
    "of floor", "peak MiB",
)  # fmt: skip


def problem(
    case: str,
    shape: tuple[int, int, int],
    device: Device = H200,
    dtype: torch.dtype = torch.bfloat16,
    workspace: int = 512 * MIB,
) -> plan.Problem:
    """A call on a head of `shape` (N, D, V)."""
    rows, width, vocabulary = shape
    needs = CASES[case][1]
    return plan.Problem(rows, vocabulary, width, dtype, workspace, device=device, **needs)


def bare(case: str, shape: tuple[int, int, int], device: Device = H200) -> float:
    """Seconds of the products that a case cannot do without, nothing else."""
    rows, width, vocabulary = shape
    return CASES[case][0] * cost.gemm(device, torch.bfloat16, rows, vocabulary, width)


def table(shape: tuple[int, int, int], device: Device, workspace: int) -> Table:
    """Every case on one shape."""
    rows = []
    for case in CASES:
        asked = problem(case, shape, device, workspace=workspace)
        made = plan.make(asked)
        taken = cost.seconds(asked, made)
        rows.append([
            case, made.schedule, f"{made.products:.2f}", f"{made.tile_rows} x {made.tile_columns}",
            _blocks(made, shape[0]), str(taken.launches), f"{1e3 * taken.host:.2f}",
            f"{1e3 * taken.device:.2f}", f"{taken.device / bare(case, shape, device):.2f}",
            f"{taken.device / cost.floor(asked, made):.2f}", f"{made.peak_bytes / MIB:.0f}",
        ])  # fmt: skip
    n, d, v = shape
    return Table(f"N={n} D={d} V={v}, bf16, {workspace // MIB} MiB", HEADINGS, rows)


def _blocks(made: plan.Plan, rows: int) -> str:
    sizes = [block.stop - block.start for block in made.blocks(rows)]
    if made.schedule != "forward":
        return "-"
    return f"{sizes[0]} + {len(sizes) - 1} x {sizes[1]}" if sizes[1:] else str(sizes[0])


def main(arguments: list[str]) -> int:
    """``python -m bench roofline``."""
    parser = argparse.ArgumentParser(prog="python -m bench roofline", description=__doc__)
    parser.add_argument("--workspace", type=int, default=512, help="MiB (512)")
    options = parser.parse_args(arguments)
    console = Console(width=130)
    console.print(f"Plans for {H200.name}: a model, not a measurement.", style="bold")
    for shape in SHAPES:
        console.print(terminal(table(shape, H200, options.workspace * MIB)))
    return 0
