"""Compiles launches of Triton kernels for GPUs that are not here, and reads what came out.

A launch is taken down as the backend makes it, on CPU tensors, instead of being run: types,
alignment and constants are those that a GPU would see. Triton's own compiler and the assembler and
disassembler that come with it do the rest.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ift_kernels.backends.triton import launch

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
    def about(self) -> str:
        """Types of the tensors and constants, for people."""
        types = dict.fromkeys(t[1:] for _, t in self.signature if t in ("*bf16", "*fp16", "*fp32"))
        half = [t for t in types if t != "fp32"]
        flags = [
            n if v is True else f"{n}={v}" for n, v in self.constants if v not in (None, False)
        ]
        return " ".join([*(half or types), *flags, *(f"{n}={v}" for n, v in self.options)])

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
        one = isinstance(value, int) and not isinstance(value, bool) and value == 1 and special
        if parameter.is_constexpr or value is None or one:
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, "*" + TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if special and value % 16 == 0:
                aligned.append(name)
    return Variant(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


@contextlib.contextmanager
def taken_down(architecture: str) -> Iterator[list[Variant]]:
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
    most = UNITS[architecture][2]
    return Resources(
        registers, spills, shared, warps, programs, programs * warps / most, loads, stores, matrix
    )


def _programs(architecture: str, registers: int, shared: int, warps: int) -> int:
    """How many programs fit on a multiprocessor: registers are given out to warps in lots."""
    file, memory, most_warps, most = UNITS[architecture]
    width = TARGETS[architecture].warp_size
    per_warp = -(-max(registers, 1) * width // 256) * 256
    reserved = 1024 if width == 32 else 0  # shared memory that the driver takes of each program
    by_memory = memory // (shared + reserved) if shared + reserved else most
    return max(0, min(most, most_warps // warps, file // (per_warp * warps), by_memory))


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
