"""Compiles every kernel of csrc/cuda with NVRTC: ``python .ci/nvrtc.py FOLDER [ARCH ...]``.

FOLDER holds NVRTC and the headers of one CUDA version, as pip installs them with ``--no-deps
--target FOLDER`` (`make cuda-versions`). NVRTC is the compiler of that version, front end and
assembler, so what it takes, its nvcc takes too; the launches, which are host code, are not seen.
"""

from __future__ import annotations

import ctypes
import re
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# NVRTC has no standard headers; these two are all that the kernels include.
HEADERS = {
    "cstdint": "typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t;"
    " typedef unsigned short uint16_t; typedef int int32_t; typedef unsigned int uint32_t;"
    " typedef long long int64_t; typedef unsigned long long uint64_t;"
    " typedef unsigned long long uintptr_t;",
    "cassert": "",
}
DTYPES = ("float", "ift::gpu::Bf16", "ift::gpu::Fp16")
PARAMETERS = {"class": DTYPES, "bool": ("true", "false")}


def kernels() -> list[str]:
    """Every kernel with every combination of its template arguments, as C++ names it."""
    names = []
    pattern = (
        r"(?:template <([^>]*)>\n)?(?:static )?__global__ void __launch_bounds__\(\w+\)\s+(\w+)"
    )
    for path in sorted(ROOT.glob("csrc/cuda/*.cuh")):
        for parameters, name in re.findall(pattern, path.read_text()):
            kinds = [p.split()[0] for p in parameters.split(",")] if parameters else []
            for values in product(*(PARAMETERS[kind] for kind in kinds)):
                names.append(f"ift::gpu::{name}" + (f"<{', '.join(values)}>" if values else ""))
    return names


def compile_all(folder: Path, architecture: str) -> int:
    """The size of the machine code; raises RuntimeError with NVRTC's log."""
    (library,) = folder.glob("nvidia/*/lib/libnvrtc.so.*")
    nvrtc = ctypes.CDLL(str(library))
    names, headers = kernels(), list(HEADERS)
    includes = "".join(f'#include "{p.name}"\n' for p in sorted(ROOT.glob("csrc/cuda/*.cuh")))
    found = [
        ROOT / "csrc/cuda",
        *folder.glob("nvidia/*/include"),
        *folder.glob("nvidia/*/include/cccl"),
    ]
    flags = [
        f"-arch=sm_{architecture}",
        "-std=c++17",
        "-ftz=true",
        *(f"-I{path}" for path in found),
    ]

    def strings(values: list[str]) -> ctypes.Array[ctypes.c_char_p]:
        return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))

    program = ctypes.c_void_p()
    texts = strings([HEADERS[name] for name in headers])
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), includes.encode(), b"kernels.cu", len(headers), texts,
        strings(headers),
    )  # fmt: skip
    assert created == 0, created
    for name in names:
        nvrtc.nvrtcAddNameExpression(program, name.encode())
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), strings(flags))
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode()[:4000])
    lowered = ctypes.c_char_p()
    for name in names:
        if nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered)):
            raise RuntimeError(f"{name} was not compiled")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    return size.value


def main() -> int:
    """Compile for the architectures on the command line."""
    folder, *architectures = sys.argv[1:]
    for architecture in architectures or ["90a"]:
        size = compile_all(Path(folder), architecture)
        print(f"{folder}: {len(kernels())} kernels for sm_{architecture}, {size >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
