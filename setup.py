"""Builds `ift_kernels._cpu` with ninja. Whatever is declarative stands in pyproject.toml.

Nothing here imports torch, and the extension does not link it: pip may build in an isolated
environment, and one build serves every torch.

Environment:
    CXX, CXXFLAGS, LDFLAGS, ARCHFLAGS   the compiler and flags added to ours
    IFT_REQUIRE_CPP=1                   stop when the extension cannot be built
    IFT_NO_CPP=1                        leave it out: a pure Python wheel, reference backend only
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
COMMON = sorted(ROOT.glob("csrc/cpu/*.cpp"))
PER_ISA = sorted(ROOT.glob("csrc/cpu/isa/*.cpp"))  # compiled once for each instruction set
HEADERS = sorted(ROOT.glob("csrc/**/*.h"))

# No -ffast-math: NaN and infinity must come through. No -march: the wheel runs on every machine of
# its architecture and chooses among the instruction sets at run time.
FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fno-math-errno "
    "-DNDEBUG -Wall -Wextra"
)
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
X86_ISAS = {
    "avx2": AVX2.split(),
    "avx512": AVX512.split(),
    "avx512bf16": [*AVX512.split(), "-mavx512bf16"],
}
PROBE = """
#include <Python.h>
#include <vector>
#if __cplusplus < 201703L
#error "C++17 is needed"
#endif
int probe(int n) { int a = 0; for (int i : std::vector<int>(n)) a += i; return a; }
"""


def env_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


class Compiler:
    """The C++ compiler of this machine and the flags that it takes."""

    def __init__(self, command: list[str], openmp: list[str]) -> None:
        self.command = command
        headers = sysconfig.get_path("include"), sysconfig.get_path("platinclude")
        self.compile = [*FLAGS, *openmp, *(f"-isystem{path}" for path in dict.fromkeys(headers))]
        self.compile += [*env_flags("ARCHFLAGS"), *env_flags("CXXFLAGS")]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if is_macos() else ["-shared"]
        self.link = [*shared, *openmp, *env_flags("ARCHFLAGS"), *env_flags("LDFLAGS")]
        if not openmp:
            # Without the pragmas nothing reads the thread counts.
            self.compile += ["-Wno-unknown-pragmas", "-Wno-unused", "-Wno-unused-parameter"]

    def why_not(self) -> str:
        """Empty if a small Python extension compiles and links, else the compiler's first error."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(PROBE)
            files = [str(source), "-o", str(Path(folder, "probe.so"))]
            try:
                done = subprocess.run(
                    [*self.command, *self.compile, *files, *self.link],
                    capture_output=True,
                    text=True,
                    errors="replace",
                )
            except OSError as error:
                return f"{self.command[0]}: {error.strerror}"
        if done.returncode == 0:
            return ""
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return next((line for line in lines if "error" in line), lines[-1])

    def isas(self) -> dict[str, list[str]]:
        """Flags by instruction set: `base`, and on x86-64 the wider ones."""
        ask = [*self.command, *env_flags("ARCHFLAGS"), "-dumpmachine"]
        target = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        return {"base": [], **(X86_ISAS if target.startswith(("x86_64", "amd64")) else {})}


def is_macos() -> bool:
    return sys.platform == "darwin"


@functools.cache
def compiler() -> Compiler | str:
    """The compiler to use, or the reason why there is none."""
    if os.environ.get("IFT_NO_CPP", "0") not in ("", "0"):
        return "IFT_NO_CPP is set"
    if sys.platform == "win32":
        return "the C++ backend is not built on Windows"
    named = env_flags("CXX")
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    command = named or ([found] if found else None)
    if command is None:
        return "no C++ compiler (c++, g++, clang++) is on PATH"
    reason = ""
    # macOS: torch brings its own libomp, and a second one aborts the process.
    for openmp in [[]] if is_macos() else [["-fopenmp"], []]:
        candidate = Compiler(command, openmp)
        why_not = candidate.why_not()
        if not why_not:
            if reason:
                say(f"WARNING: no OpenMP, so the C++ backend uses one thread ({reason})")
            return candidate
        reason = reason or why_not
    return reason


def say(message: str) -> None:
    print(f"ift-kernels: {message}", file=sys.stderr, flush=True)


class OptionalExtensions(Distribution):
    """A distribution that is pure Python where the extension cannot be built."""

    def has_ext_modules(self) -> bool:
        return bool(self.ext_modules) and can_build()


@functools.cache
def can_build() -> bool:
    reason = compiler()
    if not isinstance(reason, str):
        return True
    if os.environ.get("IFT_REQUIRE_CPP", "0") not in ("", "0"):
        raise SystemExit(f"ift-kernels: IFT_REQUIRE_CPP is set, but {reason}")
    say(
        f"WARNING: without the C++ extension ({reason}): only the reference backend, plain torch "
        "and slow, will be available. Install a C++17 compiler and Python's headers and reinstall."
    )
    return False


class NinjaBuildExt(build_ext):
    """Compiles with ninja: in parallel, and only what has changed."""

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            import ninja
            import pybind11
        except ImportError as error:
            raise CompileError(
                f"the build needs {error.name}: pip install ninja pybind11, or leave out "
                "--no-build-isolation"
            ) from error
        # Not `build_temp`: for an editable install that is a new folder each time.
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"ninja-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / Path(self.get_ext_filename(ext.name)).name
        write_ninja(folder / "build.ninja", library, pybind11.get_include())
        ask = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
        if subprocess.run(ask).returncode:
            raise CompileError(
                "the C++ extension did not compile, see above (IFT_NO_CPP=1 installs without it)"
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


def write_ninja(path: Path, library: Path, pybind11_include: str) -> None:
    """The build graph; ninja itself compares command lines and header dependencies."""
    from ninja import ninja_syntax

    cxx = compiler()
    assert isinstance(cxx, Compiler)  # else has_ext_modules() was false
    isas = cxx.isas()
    built = [f"-DIFT_ISA_{isa.upper()}=1" for isa in isas if isa != "base"]
    flags = [*cxx.compile, f"-isystem{pybind11_include}", *built]

    def literal(text: str) -> str:
        return text.replace("$", "$$")

    def shell(words: list[str]) -> str:
        return literal(shlex.join(words))

    with path.open("w") as file:
        graph = ninja_syntax.Writer(file)
        command = shell(cxx.command)
        compile_line = f"{command} {shell(flags)} $isa -MMD -MF $out.d -c $in -o $out"
        graph.rule("compile", compile_line, "compiling $out", depfile="$out.d", deps="gcc")
        graph.rule("link", f"{command} $in -o $out {shell(cxx.link)}", "linking $out")
        objects = []
        for source in COMMON:
            objects += graph.build(f"{source.stem}.o", "compile", literal(str(source)))
        for source in PER_ISA:
            for isa, wider in isas.items():
                variables = {"isa": shell([f"-DIFT_ISA={isa}", *wider])}
                name = f"{source.stem}.{isa}.o"
                objects += graph.build(name, "compile", literal(str(source)), variables=variables)
        graph.build(library.name, "link", objects)


def relative(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


setup(
    # python_api is a source root, never an import name.
    packages=[
        *find_packages(str(ROOT), include=["ift_kernels", "ift_kernels.*"]),
        *find_packages(str(ROOT / "python_api")),
    ],
    package_dir={"ift_kernels": "ift_kernels", "ift": "python_api/ift"},
    package_data={"ift_kernels": ["py.typed", "backends/triton/launch.json"], "ift": ["py.typed"]},
    # `depends` puts the headers into the source distribution.
    ext_modules=[
        Extension("ift_kernels._cpu", relative(COMMON + PER_ISA), depends=relative(HEADERS))
    ],
    cmdclass={"build_ext": NinjaBuildExt},
    distclass=OptionalExtensions,
)
