"""Builds `ift_kernels._cpu` and, where there is nvcc, `ift_kernels._cuda` with ninja.

Whatever is declarative is in pyproject.toml. Nothing here imports torch, and the extensions do
not link it: pip may build in an isolated environment, and one build serves every torch.

Environment:
    CXX, CXXFLAGS, LDFLAGS, ARCHFLAGS   the compiler and flags added to ours
    IFT_REQUIRE_CPP=1                   stop when the extension cannot be built
    IFT_NO_CPP=1                        leave it out: a pure Python wheel, reference backend only
    IFT_BUILD_CUDA=auto|0|1             the CUDA extension: where nvcc is and torch is no build
                                        without CUDA, never, or demanded
    CUDA_HOME                           the toolkit; else nvcc on PATH, else /usr/local/cuda
    IFT_CUDA_ARCHS                      "80;90a;90-virtual": code for 8.x and for 9.0, PTX of 9.0
    MAX_JOBS                            compilers that run at once
"""

from __future__ import annotations

import functools
import os
import re
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
HEADERS = sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")])
CUDA = sorted(ROOT.glob("csrc/cuda/*.cu"))
CUDA_BINDING = ROOT / "csrc/cuda/bindings.cpp"

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
# -ftz: subnormal floats cost every exp two instructions and decide nothing. Asserts stay in: they
# stop a kernel before it reads outside a table.
CUDA_FLAGS = shlex.split("-std=c++17 -O3 -ftz=true -Xcompiler -fPIC,-fvisibility=hidden")
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

    def unsupported_reason(self) -> str:
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
        unsupported_reason = candidate.unsupported_reason()
        if not unsupported_reason:
            if reason:
                say(f"WARNING: no OpenMP, so the C++ backend uses one thread ({reason})")
            return candidate
        reason = reason or unsupported_reason
    return reason


class Toolkit:
    """A CUDA toolkit: where it is, its version, and the architectures to compile for."""

    def __init__(self, nvcc: Path) -> None:
        self.nvcc = nvcc
        said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
        # What is on PATH may be a script that calls the real one.
        ask = [str(nvcc), "--dryrun", "-c", "nothing.cu"]
        where = subprocess.run(ask, capture_output=True, text=True).stderr
        here = re.search(r"^#\$ _HERE_=(.+)$", where, re.MULTILINE)
        self.home = (Path(here[1]) if here else nvcc.resolve().parent).parent
        found = re.search(r"release (\d+)\.(\d+)", said)
        if found is None:
            raise SystemExit(f"ift-kernels: {nvcc} --version: expected 'release X.Y', got {said!r}")
        self.version = int(found[1]), int(found[2])

    def architectures(self) -> list[str]:
        """As CMake writes them: "90a" for machine code, "90-virtual" for PTX."""
        asked = os.environ.get("IFT_CUDA_ARCHS", "")
        # 8.x runs what is compiled for 8.0; PTX is for what this toolkit does not know.
        blackwell = ["100a", "120"] if self.version >= (12, 8) else []
        names = asked.replace(",", ";").split(";") if asked else [
            "80", "90a", *blackwell, "90-virtual"
        ]  # fmt: skip
        for name in names:
            if not re.fullmatch(r"\d+[af]?|\d+-virtual", name):
                raise SystemExit(
                    f"ift-kernels: IFT_CUDA_ARCHS: expected names like 80, 90a or 90-virtual, "
                    f"separated by semicolons, got {name!r}"
                )
        return names

    def flags(self) -> list[str]:
        flags = list(CUDA_FLAGS)
        for name in self.architectures():
            number = name.removesuffix("-virtual")
            code = f"compute_{number}" if name != number else f"sm_{number}"
            flags += ["-gencode", f"arch=compute_{number},code={code}"]
        return flags

    @functools.cached_property
    def runtime(self) -> str:
        """The static runtime: the wheel must not need one of the machine's, nor bring another."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            library = self.home / folder / "libcudart_static.a"
            if library.exists():
                return str(library)
        return ""


def torch_without_cuda() -> bool:
    """Whether the torch of this interpreter is a build without CUDA; not where there is none yet.

    Its version.py is read, not imported: an isolated build hides torch from imports alone.
    """
    version = Path(sysconfig.get_path("platlib"), "torch", "version.py")
    text = version.read_text(encoding="utf-8") if version.is_file() else ""
    return re.search(r"^cuda\b.*=\s*None\s*$", text, re.M) is not None


@functools.cache
def toolkit() -> Toolkit | str:
    """The CUDA toolkit to use, or the reason why there is none."""
    wanted = os.environ.get("IFT_BUILD_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"ift-kernels: IFT_BUILD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "IFT_BUILD_CUDA=0"
    if wanted == "auto" and torch_without_cuda():
        reason = "the installed torch is a build without CUDA"
        say(f"NOTE: without the CUDA extension ({reason}); IFT_BUILD_CUDA=1 builds it anyway")
        return reason
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=str(Path(home, "bin")))
        reason = f"CUDA_HOME is {home}, which has no bin/nvcc"
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        reason = "nvcc is neither on PATH nor in /usr/local/cuda/bin, and CUDA_HOME is not set"
    if isinstance(compiler(), str):
        found, reason = None, "the C++ extensions are not built"
    if found:
        candidate = Toolkit(Path(found))
        if candidate.runtime:
            return candidate
        reason = f"{candidate.home} has no libcudart_static.a"
    if wanted == "1":
        raise SystemExit(f"ift-kernels: IFT_BUILD_CUDA=1, but {reason}")
    if not is_macos():
        say(f"NOTE: without the CUDA extension ({reason}): NVIDIA GPUs are served by Triton")
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

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.distribution.has_ext_modules() and isinstance(toolkit(), str):
            self.extensions = [e for e in self.extensions if e.name != "ift_kernels._cuda"]

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
        cuda = ext.name == "ift_kernels._cuda"
        found = toolkit()
        # A folder for each choice of architectures: the one of the tests must not undo another.
        archs = found.architectures() if cuda and isinstance(found, Toolkit) else []
        kind = "-".join(["cuda", *archs]) if cuda else "ninja"
        folder = ROOT / "build" / f"{kind}-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / Path(self.get_ext_filename(ext.name)).name
        write = write_cuda_ninja if cuda else write_ninja
        write(folder / "build.ninja", library, pybind11.get_include())
        ask = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
        ask += ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run(ask).returncode:
            without = "IFT_BUILD_CUDA=0" if cuda else "IFT_NO_CPP=1"
            raise CompileError(
                f"{ext.name} did not compile, see above ({without} installs without it)"
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


def literal(text: str) -> str:
    return text.replace("$", "$$")


def shell(words: list[str]) -> str:
    return literal(shlex.join(words))


def write_ninja(path: Path, library: Path, pybind11_include: str) -> None:
    """The build graph; ninja itself compares command lines and header dependencies."""
    from ninja import ninja_syntax

    cxx = compiler()
    assert isinstance(cxx, Compiler)  # else has_ext_modules() was false
    isas = cxx.isas()
    built = [f"-DIFT_ISA_{isa.upper()}=1" for isa in isas if isa != "base"]
    flags = [*cxx.compile, f"-isystem{pybind11_include}", *built]

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


def write_cuda_ninja(path: Path, library: Path, pybind11_include: str) -> None:
    """The same for the CUDA extension: kernels by nvcc, the binding by the C++ compiler."""
    from ninja import ninja_syntax

    cxx, cuda = compiler(), toolkit()
    assert isinstance(cxx, Compiler) and isinstance(cuda, Toolkit)  # else it was left out
    host = [*cxx.compile, f"-isystem{pybind11_include}"]
    nvcc = [str(cuda.nvcc), "-ccbin", cxx.command[-1], *cuda.flags()]
    # What the runtime exports must not meet another one of the process.
    link = [cuda.runtime, "-Wl,--exclude-libs,ALL", *cxx.link, "-lpthread", "-ldl", "-lrt"]
    with path.open("w") as file:
        graph = ninja_syntax.Writer(file)
        compile_line = f"{shell(cxx.command)} {shell(host)} -MMD -MF $out.d -c $in -o $out"
        graph.rule("compile", compile_line, "compiling $out", depfile="$out.d", deps="gcc")
        compile_line = f"{shell(nvcc)} -MMD -MF $out.d -c $in -o $out"
        graph.rule("nvcc", compile_line, "compiling $out", depfile="$out.d", deps="gcc")
        graph.rule("link", f"{shell(cxx.command)} $in -o $out {shell(link)}", "linking $out")
        objects = graph.build("bindings.o", "compile", literal(str(CUDA_BINDING)))
        for source in CUDA:
            objects += graph.build(f"{source.stem}.o", "nvcc", literal(str(source)))
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
        Extension("ift_kernels._cpu", relative(COMMON + PER_ISA), depends=relative(HEADERS)),
        Extension("ift_kernels._cuda", relative([*CUDA, CUDA_BINDING])),  # left out without nvcc
    ],
    cmdclass={"build_ext": NinjaBuildExt},
    distclass=OptionalExtensions,
)
