"""Static: what every kernel of the Triton backend takes on GPUs that need not be installed.

A launch is captured on CPU tensors instead of being run: types, alignment and constants are those
that a GPU would see. Each is compiled in every committed configuration, for NVIDIA and AMD
architectures, by Triton's own compiler, and the machine code is read with the disassembler that
comes with it. Committed limits: registers, no spills, 16-byte loads and stores of global memory,
the matrix instructions of the architecture where there is a product, and bytes that are requested
against the least that could be (`bench.gpu.traffic`). Limits of registers are per Triton version.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import inspect
import json
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from rich.console import Console
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu import traffic
from bench.report.tables import Table, percent, terminal
from ift_kernels.backends import triton as backend
from ift_kernels.backends.triton import launch

VERSION = ".".join(triton.__version__.split(".")[:2])  # as in LIMITS
LIMITS = Path(__file__).with_name("static_limits.json")
# Reads bytes, single flags, lists of ids or what they point to; nothing to gain from wide accesses.
NARROW = {"mask", "merge", "take", "put"}
# Touch every element once, so the bytes requested may hardly exceed the least; but for a bias,
# which every row reads again from a cache.
STREAMING = {"stats", "dlogits", "probabilities", "scale", "top_k", "gumbel", "scan", "residual",
             "bucket_sums", "softmax_gradient", "divergence_terms",
             "divergence_gradient"}  # fmt: skip
MAX_RATIO = 1.1
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
PRODUCTS = {"fused", "gathered"}


# --- compiling for GPUs that are not installed ----------------------------------------------------

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Of a multiprocessor or compute unit: registers, bytes of shared memory, warps, programs.
# Sources: CUDA C++ Programming Guide, compute capabilities; AMD CDNA 3 ISA (512 VGPRs a lane in
# four SIMDs of 8 waves, 64 KiB LDS).
UNITS = {
    "sm_80": (65536, 164 << 10, 64, 32),
    "sm_90": (65536, 228 << 10, 64, 32),
    "sm_100": (65536, 228 << 10, 64, 32),
    "gfx942": (4 * 512 * 64, 64 << 10, 32, 32),
}
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch would have it compiled."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return name.removesuffix("_kernel")

    @property
    def limit(self) -> str:
        """What its limit of registers is called: rows that begin anywhere take more."""
        return f"{self.name}, irregular" if self.irregular else self.name

    @property
    def about(self) -> str:
        """Types of the tensors and constants, for people."""
        types = dict.fromkeys(t[1:] for _, t in self.signature if t in ("*bf16", "*fp16", "*fp32"))
        half = [t for t in types if t != "fp32"]
        flags = [
            n if v is True else f"{n}={v}" for n, v in self.constants if v not in (None, False)
        ]
        flags += [f"{n}={v}" for n, v in self.options] + ["irregular"] * self.irregular
        return " ".join([*(half or types), *flags])

    @property
    def irregular(self) -> bool:
        """Whether rows do not begin on 16 bytes, or do not end there."""
        free = {
            p.name for p in self.kernel.params
            if p.do_not_specialize or p.do_not_specialize_on_alignment
        } | set(self.aligned)  # fmt: skip
        sizes = {"width", "stride", "columns", "length"} - dict(self.constants).keys()
        return any(n not in free and (n in sizes or kind[0] == "*") for n, kind in self.signature)

    def source(self) -> ASTSource:
        """What Triton compiles."""
        attributes = {
            (self.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in self.aligned
        }
        return ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)


def variant(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Variant:
    """The variant that this launch would compile: the rules of Triton's own launcher."""
    options = tuple((name, keywords[name]) for name in OPTIONS if name in keywords)
    named = {k: v for k, v in keywords.items() if k not in OPTIONS}
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        by_alignment = special and not parameter.do_not_specialize_on_alignment
        one = isinstance(value, int) and not isinstance(value, bool) and value == 1 and special
        if parameter.is_constexpr or value is None or one:
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, "*" + TYPES[value.dtype]))
            if by_alignment and value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if by_alignment and value % 16 == 0:
                aligned.append(name)
    return Variant(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


@contextlib.contextmanager
def captured(architecture: str) -> Iterator[list[Variant]]:
    """Collect the launches inside the ``with`` block, configured for the architecture, unrun."""
    found: dict[Variant, None] = {}
    result: list[Variant] = []

    def note(kernel: Any, programs: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.setdefault(variant(kernel, args, keywords))

    run, launch.run = launch.run, note
    try:
        with launch.use_architecture(architecture):
            yield result
    finally:
        launch.run = run
        result.extend(found)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, per thread (registers, spills in bytes) and per program."""

    registers: int
    spills: int
    shared: int
    warps: int
    programs: int  # that fit on one multiprocessor, at most
    occupancy: float  # share of the warps that one can hold
    wide_loads: int  # 16-byte loads of global memory in the disassembly (also asynchronous ones)
    wide_stores: int
    matrix: str  # matrix instructions: wgmma, mma, tcgen05, mfma or ""


def compile_for(which: Variant, architecture: str) -> Resources:
    """Compile, and read the machine code."""
    target = TARGETS[architecture]
    compiled = triton.compile(which.source(), target=target, options=dict(which.options))
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    read = _amd if target.backend == "hip" else _nvidia
    registers, spills, loads, stores, matrix = read(compiled.asm)
    programs = _programs(architecture, registers, shared, warps)
    occupancy = programs * warps / UNITS[architecture][2]
    return Resources(registers, spills, shared, warps, programs, occupancy, loads, stores, matrix)


def _programs(architecture: str, registers: int, shared: int, warps: int) -> int:
    """How many programs fit on a multiprocessor: registers are given out to warps in lots."""
    file, memory, max_warps, max_programs = UNITS[architecture]
    width = TARGETS[architecture].warp_size
    per_warp = -(-max(registers, 1) * width // 256) * 256
    reserved = 1024 if width == 32 else 0  # shared memory that the driver takes of each program
    by_memory = memory // (shared + reserved) if shared + reserved else max_programs
    return max(0, min(max_programs, max_warps // warps, file // (per_warp * warps), by_memory))


@functools.cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(asm: dict[str, Any]) -> tuple[int, int, int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(_tool("cuobjdump"), "-res-usage", file.name)
        code = _output(_tool("nvdisasm"), "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    # Local memory is where spilled registers go; our kernels have no arrays that could lie there.
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    loads = len(re.findall(r"\bLDG\.E[.\w]*\.128\b|\bLDGSTS\.E[.\w]*\.128\b", code))
    stores = len(re.findall(r"\bSTG\.E[.\w]*\.128\b", code))
    kinds = {"wgmma": r"\b\w*GMMA\b", "tcgen05": r"\bUTC\w*MMA\b", "mma": r"\bHMMA\b"}
    matrix = next((name for name, pattern in kinds.items() if re.search(pattern, code)), "")
    return registers, max(stack, 4 * local), loads, stores, matrix


def _amd(asm: dict[str, Any]) -> tuple[int, int, int, int, str]:
    text = asm["amdgcn"]

    def count(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    spills = 4 * count("vgpr_spill_count")  # scalar registers spill to vector ones, not to memory
    loads = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text))
    stores = len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text))
    return count("vgpr_count"), spills, loads, stores, "mfma" if "v_mfma" in text else ""


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# --- the check ------------------------------------------------------------------------------------


def variants(
    architecture: str, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    fullness: Sequence[bool] = (False, True),
) -> list[Variant]:  # fmt: skip
    """Every kernel as the backend would have it compiled for the architecture."""
    with captured(architecture) as found:
        for dtype in dtypes:
            for full in fullness:
                traffic.launches(dtype, full)
        traffic.irregular_launches()
    return found


def complaints(
    which: Variant, found: Resources, architecture: str, limit: int | None,
    moved: traffic.Bytes | None = None,
) -> list[str]:  # fmt: skip
    """What is wrong with a kernel; empty if nothing is. `limit` of registers."""
    wrong = []
    if found.spills:
        wrong.append(f"spills {found.spills} bytes")
    if limit is None:
        wrong.append("no committed limit")
    elif found.registers > limit:
        wrong.append(f"{found.registers} registers, limit {limit}")
    if found.programs < 1:
        wrong.append("does not fit on a multiprocessor")
    constants = dict(which.constants)
    # Documents and odd rows start anywhere; a bias is one element wide.
    anywhere = constants.get("PACKED") or constants.get("width") == 1 or which.irregular
    if not found.wide_loads and which.name not in NARROW and not anywhere:
        wrong.append("no 16-byte loads")
    half = any(t in ("*bf16", "*fp16") for _, t in which.signature)
    if which.name in PRODUCTS and half and found.matrix != MATRIX[architecture]:
        wrong.append(f"{found.matrix or 'no matrix instructions'}, not {MATRIX[architecture]}")
    once = which.name in STREAMING and not constants.get("HAS_BIAS") and not anywhere
    if once and moved is not None and moved.ratio > MAX_RATIO:
        wrong.append(f"{moved.ratio:.2f} of the least bytes")
    return wrong


def kernel_code(kernel: Any) -> str:
    """Code of a kernel and of what it calls, with the constants that they read.

    Without comments and docstrings; Triton's own key has them, and the line where each begins.
    """
    found: dict[str, Any] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        where, names = function.__module__, function.fn.__code__.co_names
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
        body = tree.body[0].body  # type: ignore[attr-defined]  # a function's
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]  # its docstring
        found[f"{where}.{function.__name__}"] = _nested(tree)
        for name, value in ((name, function.__globals__.get(name)) for name in names):
            if isinstance(value, triton.language.constexpr):
                found[f"{where}.{name}"] = value.value
            elif isinstance(value, ModuleType) and value.__name__.startswith("ift_kernels"):
                raise TypeError(f"{function.__name__}: import what it uses of {name} by name")
            elif isinstance(value, triton.runtime.JITFunction):
                key = f"{value.__module__}.{value.__name__}"
                waiting += [] if key in found or key.startswith("triton.") else [value]
    return repr(sorted(found.items()))


def _nested(node: Any) -> Any:
    """A syntax tree without empty fields: which of those there are depends on Python's version."""
    if isinstance(node, list):
        return [_nested(each) for each in node]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _nested(v)) for name, v in ast.iter_fields(node) if v not in (None, [])]
    return type(node).__name__, fields


def digests(architecture: str, which: list[Variant]) -> dict[str, str]:
    """By limit, of everything that decides what comes out: sources, constants, configurations."""
    parts: dict[str, list[str]] = {}
    code = {kernel: kernel_code(kernel) for kernel in {v.kernel for v in which}}
    for v in which:
        options = f"{v.signature} {v.constants} {v.aligned} {v.options}"
        parts.setdefault(v.limit, []).append(f"{code[v.kernel]} {options}")
    return {
        name: hashlib.sha256("\n".join([architecture, *sorted(some)]).encode()).hexdigest()[:16]
        for name, some in sorted(parts.items())
    }


def committed() -> dict[str, Any]:
    """Digests of the kernels when they were last compiled, and by version of Triton their limits.

    A kernel has a limit where that Triton compiled what has this digest, with nothing wrong.
    """
    loaded: dict[str, Any] = json.loads(LIMITS.read_text(encoding="utf-8"))
    return loaded


def run(architectures: list[str], console: Console, write: bool = False) -> int:
    """Compile, print the table, and return how many kernels are not as they should be.

    `write` commits what comes out of the kernels that have changed; the others stay as they are.
    """
    known = committed()
    bad = 0
    for architecture in architectures:
        some = variants(architecture)
        code = digests(architecture, some)
        limits: dict[str, int] = known["registers"].get(VERSION, {}).get(architecture, {})
        if write:
            limits = _unchanged(limits, known["digests"].get(architecture, {}), code)
            some = [v for v in some if v.limit not in limits]
        found = [(which, compile_for(which, architecture)) for which in some]
        bytes_ = traffic.measure(architecture) if some else {}
        if write:
            for which, used in found:
                limits[which.limit] = max(used.registers, limits.get(which.limit, 0))
        rows, bad_here = [], 0
        for which, used in found:
            moved = bytes_.get(traffic.key(which.name, which.about))
            wrong = complaints(which, used, architecture, limits.get(which.limit), moved)
            bad_here += bool(wrong)
            rows.append([
                which.name, which.about, str(used.registers), str(used.spills), str(used.shared),
                str(used.programs), percent(used.occupancy, 0), str(used.wide_loads),
                str(used.wide_stores), used.matrix,
                *(("", "") if moved is None else (f"{value:.2f}" for value in moved)),
                "; ".join(wrong),
            ])  # fmt: skip
        head = ("kernel", "variant", "registers", "spills", "shared", "programs", "occupancy",
                "16-byte loads", "stores", "matrix", "bytes", "least", "result")  # fmt: skip
        console.print(terminal(Table(architecture, head, rows)))
        bad += bad_here
        if write and not bad_here:
            _commit(architecture, limits, code)
    return bad


def _unchanged(
    limits: dict[str, int], before: dict[str, str], code: dict[str, str]
) -> dict[str, int]:
    return {k: v for k, v in limits.items() if k in code and code[k] == before.get(k)}


def _commit(architecture: str, limits: dict[str, int], code: dict[str, str]) -> None:
    known = committed()  # again: another run may have written its architecture
    before = known["digests"].get(architecture, {})
    for other in known["registers"].values():  # their Triton has not compiled what has changed
        other[architecture] = _unchanged(other.get(architecture, {}), before, code)
    known["registers"].setdefault(VERSION, {})[architecture] = limits
    known["digests"][architecture] = code
    LIMITS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """``python -m bench static``."""
    parser = argparse.ArgumentParser(prog="python -m bench static", description=__doc__)
    parser.add_argument("--architectures", nargs="+", choices=TARGETS,
                        default=list(TARGETS))  # fmt: skip
    parser.add_argument(
        "--write",
        action="store_true",
        help="compile what has changed, and commit to what comes out unless something is wrong",
    )
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    if reason := backend.interpreter_unavailable():
        parser.error(f"bytes are counted in the interpreter: {reason}")
    some = committed()["registers"]
    if VERSION not in some and not options.write:
        versions = ", ".join(sorted(some))
        parser.error(f"limits are committed of Triton {versions}, not of {VERSION}: see --write")
    console = Console(width=170)
    return 1 if run(options.architectures, console, options.write) else 0
