"""Opens finished wheels and says what is in them: ``python .ci/check_wheel.py dist/*.whl``.

Fails on what must not be there (torch, a CUDA or OpenMP runtime, python_api) and on what must: both
packages, the extensions that the name of the wheel promises, machine code for every architecture.
``--cuda`` asks for the CUDA extension; ``--archs "80;90a"`` for its machine code, where it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

LARGEST = 40 << 20
BANNED = re.compile(r"lib(torch|c10|cudart|gomp|omp|iomp5|cublas)[\w-]*\.(so|dylib|dll)")
SYSTEM = re.compile(
    r"lib(c|m|gcc_s|stdc\+\+|c\+\+|c\+\+abi|gomp|omp|pthread|dl|rt)\.so\.\d+|ld-linux.*"
)


def sass_of(library: Path) -> set[str] | None:
    """The architectures of a library's machine code; None without cuobjdump."""
    package = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin")
    folders = [os.environ.get("PATH", ""), str(package)]
    tool = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if tool is None:
        return None
    listing = subprocess.run([tool, "--list-elf", str(library)], capture_output=True, text=True)
    return set(re.findall(r"\.sm_(\w+)\.cubin", listing.stdout))


def problems(wheel: Path, cuda: bool, archs: list[str]) -> list[str]:
    """What is wrong with a wheel, one line each; prints what it has."""
    found = []
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 2**20:.2f} MiB")
    if size > LARGEST:
        found.append(f"{size / 2**20:.1f} MiB, expected at most {LARGEST >> 20}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
        allowed = {"ift", "ift_kernels", "ift_kernels.libs"}
        found += [f"unexpected top folder {top}" for top in sorted(tops - allowed)]
        found += [f"bundled {name}" for name in names if BANNED.search(name)]
        for package in ("ift", "ift_kernels"):
            if f"{package}/__init__.py" not in names:
                found.append(f"{package} is missing")
        pure = wheel.stem.endswith("none-any")
        wanted = [] if pure else ["_cpu", *(["_cuda"] if cuda else [])]
        for name in wanted:
            if not any(re.fullmatch(rf"ift_kernels/{name}\..*(so|pyd)", n) for n in names):
                found.append(f"the extension {name} is missing")
        for name in (n for n in names if n.endswith(".so")):
            library = Path(archive.extract(name, folder))
            found += [f"{name}: {line}" for line in _linked(library)]
            print(f"  {name}: {library.stat().st_size / 2**20:.2f} MiB")
            if "/_cuda." not in name:
                continue
            sass = sass_of(library)
            if sass is None:
                found.append("cuobjdump is not on PATH: the machine code cannot be listed")
                continue
            print(f"    machine code for {', '.join(sorted(sass))}")
            found += [f"{name}: no machine code for sm_{a}" for a in archs if a not in sass]
    return found


def _linked(library: Path) -> list[str]:
    tool = shutil.which("readelf")
    if tool is None:
        return ["readelf is not on PATH: what it links cannot be listed"]
    done = subprocess.run([tool, "-d", str(library)], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)
    return [f"links {name}" for name in needed if not SYSTEM.fullmatch(name)]


def main() -> int:
    """Exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--archs", default="", help='as IFT_CUDA_ARCHS: "80;90a;90-virtual"')
    arguments = parser.parse_args()
    archs = [name for name in arguments.archs.split(";") if name and "virtual" not in name]
    failed = False
    for wheel in arguments.wheels:
        for problem in problems(wheel, arguments.cuda, archs):
            print(f"  PROBLEM: {problem}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
