"""Everything that a machine with a GPU should run, in parts that fit into short slices of time.

Parts are tests, head, active, ops, losses, e2e and tune; each is a list of steps, and a step that
has finished at this revision is not run again, so an interrupted part goes on where it stopped. No
step needs a network; peers that are not installed are left out by the suites, and a step whose
program is absent is left out by name, which is no failure. Results go to
bench/results/<device>/: JSON, pictures, logs. ``--dry-run`` goes the same way on a CPU, on tiny
shapes and Triton's interpreter, and writes elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine
from bench.harness.machine import RESULTS, ROOT, Budget, provenance, revision

PARTS = ("tests", "head", "active", "ops", "losses", "e2e", "tune")
# Rows, width, vocabulary: of Llama 3 8B, Mistral 7B, Qwen2.5 0.5B, Gemma 2 2B.
SHAPES = ("8192x4096x128256", "8192x4096x32000", "8192x896x151936", "4096x2304x256000")

# The kernels of a GPU on a CPU: those of Triton, those of CUDA C++.
EMULATED = {"PYTHONPATH": "tests"}
INTERPRETED = {"TRITON_INTERPRET": "1", "IFT_BACKEND": "triton"}


@dataclass(frozen=True)
class Step:
    """One command with a log of its own."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a program that may be absent
    minutes: float = 8.0  # after which it is stopped


def steps(part: str, out: Path, dry: bool) -> list[Step]:
    """What a part runs."""
    python = sys.executable
    device = "cpu" if dry else "cuda"
    if part == "tests":
        pytest = [python, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
        env = INTERPRETED if dry else {}
        gpu = [*pytest, "-m", "gpu", "tests/kernels/backends/test_gpu.py"]
        few = ["-k", "extension or graph"]
        run = [
            Step("gpu-tests", gpu, env),
            # On a GPU the step above has run both backends.
            *([Step("emulated-tests", [*gpu, "-p", "cuda_emulator"], EMULATED)] if dry else []),
            Step("memory-checker", ["compute-sanitizer", "--error-exitcode", "9", *gpu, *few],
                 needs="compute-sanitizer"),
        ]  # fmt: skip
        # The rest of the suite holds on any machine.
        return run if dry else [*run, Step("all-tests", [python, "-m", "pytest", "-n", "8"])]
    if part == "e2e":
        demo = [python, "-m", "examples.demo", "--output", str(out / "demo")]
        size = ["--dtype", "bf16", "--minutes", "7"]
        if dry:
            tiny = "--rows 2 --length 8 --hidden 64 --layers 1 --vocabulary 100 --dtype fp32"
            size = [*tiny.split(), "--implementations", "ours", "--minutes", "0.1"]
        return [
            Step("demo", [*demo, "--steps", "1"] if dry else demo),
            _suite(part, part, ["--device", device, *size], out),
        ]
    if part == "tune":
        extra = ["--dry-run"] if dry else []
        return [Step("tune", [python, "-m", "bench", "tune", *extra,
                              "--output", str(out / "launch.json")])]  # fmt: skip
    common = ["--device", device, "--minutes", "0.1" if dry else "7"]
    few = ["--implementations", "ours", "--rounds", "1"] if dry else []
    if part == "ops":
        tiny = ["--shape", "16x8x100", "--batch", "2x8", "--dtype", "fp32"]
        beside = [python, "-m", "bench", "backends", "--json", str(out / "backends.json")]
        return [
            Step("backends", [*beside, "--dry-run"] if dry else beside),
            _suite(part, part, [*common, *few, *(tiny if dry else [])], out),
        ]
    if part == "losses":
        size = ["--shape", "2x4x8x100", "--dtype", "fp32", "--cases", "sft", "ift", "--rounds", "1"]
        return [_suite(part, part, [*common, *(size if dry else [])], out)]
    if dry and part == "head":
        few += ["--cases", "forward", "scalar"]
    return [
        _suite(part, f"{part}-{shape}", [*common, *few, "--shapes", shape, "--dtype", dtype], out)
        for shape, dtype in ([("16x8x100", "fp32")] if dry else [(s, "bf16") for s in SHAPES])
    ]


def _suite(suite: str, name: str, arguments: list[str], out: Path) -> Step:
    files = ["--json", f"{out / name}.json", "--plot", f"{out / name}.png"]
    command = [sys.executable, "-m", "bench", suite, *arguments, *files]
    return Step(name, command, INTERPRETED if "cpu" in arguments else {})


def results_folder(dry: bool) -> Path:
    """Where results go: named after the device."""
    if dry:
        return ROOT / "build" / "gpu-dry-run"
    name = torch.cuda.get_device_name(0).lower()
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def run(part: str, out: Path, dry: bool, minutes: float) -> int:
    """Run what is left of a part; how many steps failed or were left for another time."""
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / f"{part}.state.json"
    state: dict[str, Any] = {"revision": revision(), "steps": {}}
    if state_file.exists():
        old = json.loads(state_file.read_text(encoding="utf-8"))
        state = old if old["revision"] == state["revision"] else state
    device = torch.device("cpu" if dry else "cuda")
    state["provenance"] = provenance(device, torch.get_num_threads())
    budget, bad = Budget(minutes), 0
    for step in steps(part, out, dry):
        known = state["steps"].get(step.name, {})
        if known.get("outcome") == "done":
            print(f"{part}: {step.name}: done, not run again")
            continue
        left = budget.left()
        if left < 10:
            print(f"{part}: {step.name}: no time left; run this part again to go on")
            bad += 1
            continue
        outcome = _run(step, out, min(left, 60 * step.minutes))
        state["steps"][step.name] = outcome
        state_file.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        print(f"{part}: {step.name}: {outcome['outcome']} ({outcome['seconds']:.0f} s)")
        if outcome["outcome"] == "absent":
            print(f"{part}: {step.name} needs {step.needs}, which is not installed: left out")
        bad += outcome["outcome"] not in ("done", "absent")
    return bad


def _run(step: Step, out: Path, limit: float) -> dict[str, Any]:
    if step.needs and shutil.which(step.needs) is None:
        return {"outcome": "absent", "seconds": 0.0, "needs": step.needs}
    start, log = machine.now(), out / f"{step.name}.log"
    with log.open("w", encoding="utf-8") as file:
        # Nothing may be fetched: what is not installed is left out.
        env = {**os.environ, **step.env, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(step.command, cwd=ROOT, env=env, stdout=file,
                                  stderr=subprocess.STDOUT, timeout=limit)  # fmt: skip
            outcome = "done" if done.returncode == 0 else f"failed with {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
    # Logs are committed: no paths of this machine.
    text = log.read_text(encoding="utf-8", errors="replace")
    log.write_text(text.replace(str(ROOT), "."), encoding="utf-8")
    return {"outcome": outcome, "seconds": round(machine.now() - start, 1)}


def main(arguments: list[str]) -> int:
    """``python -m bench gpu``, which is what ``make gpu`` calls."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all, in order")
    parser.add_argument("--dry-run", action="store_true", help="the same way on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each part (8)")
    parser.add_argument("--output", type=Path, help="default: bench/results/<device>")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run (make gpu DRY=1) goes without one")
    out = options.output or results_folder(options.dry_run)
    parts = options.part or PARTS
    bad = sum(run(part, out, options.dry_run, options.minutes) for part in parts)
    print(f"results: {out.relative_to(ROOT) if out.is_relative_to(ROOT) else out}")
    return 1 if bad else 0
