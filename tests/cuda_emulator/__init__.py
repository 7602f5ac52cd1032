"""csrc/cuda compiled for the CPU: its kernels run thread by thread, without a GPU.

`build` compiles the sources as they are against the headers beside this file, which stand in for
CUDA's; `serve` lets the extension that comes out serve CPU tensors through the real Python backend.
`python -m pytest -p cuda_emulator ...` runs tests so, with IFT_BACKEND=cuda.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Not that of the extension for GPUs: where that is loaded, it would be returned in place of this.
NAME = "cuda_emulator._cuda"
SOURCES = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "csrc/cuda/bindings.cpp"]
# In what nm -S prints, address and size of a static variable of a kernel: its `__shared__` memory.
SHARED = re.compile(r"^(\w+) (\w+) [bdBDuvV] _ZZ\w+_kernel\w+$", re.MULTILINE)
# No fused multiply-adds: the kernels say where one would change a logit, and elsewhere it decides
# last digits only. _FORTIFY_SOURCE takes jumps between stacks for an attack. A wide access at an
# address that is no multiple of its size, which a GPU refuses, ends the program.
FLAGS = (
    "-x c++ -std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -U_FORTIFY_SOURCE -w "
    "-fsanitize=alignment -fsanitize-undefined-trap-on-error"
)


def build() -> Path:
    """The path of the compiled extension; compiled once for each state of the sources."""
    digest = hashlib.sha256(FLAGS.encode())
    for path in sorted([*ROOT.glob("csrc/**/*.*"), *HERE.rglob("*.*h")]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"cuda-emulator-{digest.hexdigest()[:16]}"
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one of several test processes compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(folder, library)
    return library


def compiler() -> list[str]:
    """The command; what it compiles finds the headers beside this file."""
    return os.environ.get("CXX", "c++").split()


def _compile(folder: Path, library: Path) -> None:
    import pybind11

    include = [HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*FLAGS.split(), *(f"-I{path}" for path in include)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*compiler(), *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    finished = folder / "finished.so"
    subprocess.run([*compiler(), "-shared", *objects, "-o", finished], check=True)
    finished.replace(library)  # whole or not at all


def fill_shared_memory(path: Path) -> None:
    """Have every `__shared__` variable of a loaded library filled with NaN before each block."""
    listed = subprocess.run(["nm", "-S", path], check=True, capture_output=True, text=True).stdout
    register = ctypes.CDLL(str(path)).emulated_shared
    offset = re.search(r"^(\w+) \w+ \w emulated_shared$", listed, re.MULTILINE)
    assert offset is not None
    base = ctypes.cast(register, ctypes.c_void_p).value - int(offset[1], 16)
    for address, size in SHARED.findall(listed):
        register(ctypes.c_void_p(base + int(address, 16)), ctypes.c_size_t(int(size, 16)))


@functools.cache
def load() -> Any:
    """The extension as a module."""
    path = str(build())
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    spec = importlib.util.spec_from_file_location(NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    fill_shared_memory(Path(path))
    return module


def serve(put: Callable[[Any, str, Any], None] = setattr) -> Any:
    """Give CPU tensors to the emulated kernels, through `put` (monkeypatch.setattr undoes it)."""
    from ift_kernels.backends.cuda import extension as served

    extension = load()
    put(served, "_cuda", extension)
    put(served, "_import_error", "")
    put(served, "DEVICE", "cpu")
    put(served, "stream_of", lambda device: (0, 0))
    put(served, "_no_device", lambda: "")
    return extension


def pytest_configure(config: Any) -> None:
    """As a plugin: every test under IFT_BACKEND=cuda, on the CPU."""
    serve()
    os.environ["IFT_BACKEND"] = "cuda"
