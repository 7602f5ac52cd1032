"""The wheel: what is in it, what it links, and that it works away from the checkout."""

import os
import re
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import processes
from processes import python

ROOT = Path(__file__).resolve().parents[2]
# Slow optimisation is not what these tests are about; a later -O wins.
QUICK = {"CXXFLAGS": "-O1", "IFT_REQUIRE_CPP": "1", "IFT_BUILD_CUDA": "0"}

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the build has no compiler to find on Windows"
)


def checkout(folder):
    """A copy of what the build reads, without anything built."""
    for name in ["setup.py", "pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", ".*")
    for name in ["csrc", "ift_kernels", "python_api"]:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def pip(*arguments, **environment):
    return python("-m", "pip", "--disable-pip-version-check", *arguments, **environment)


def build(folder, **environment):
    """The finished `pip wheel` and the wheels that it left."""
    source, out = folder / "source", folder / "out"
    source.mkdir()
    checkout(source)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "-v"]
    return pip("wheel", *flags, "-w", out, source, **environment), list(out.glob("*.whl"))


def install(wheel, folder):
    done = pip("install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    assert done.returncode == 0, done.stderr


def run(code, target):
    """Run Python outside the checkout, with the installed wheel before everything else.

    Without `site` (-S), which would load the finder of an editable install: it answers for modules
    that the wheel lacks.
    """
    paths = [str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    done = python("-S", "-c", code, cwd=target, PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done, wheels = build(folder, **QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = wheels
    return folder / "source", wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    install(built[1], target)
    return target


def test_wheel_has_both_packages_and_no_source_root(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    ours = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("ift_kernels/**/*.py")}
    api = ROOT / "python_api"
    ours |= {path.relative_to(api).as_posix() for path in api.glob("ift/**/*.py")}
    ours |= {"ift_kernels/py.typed", "ift/py.typed", "ift_kernels/backends/triton/launch.json"}
    ours.add("ift_kernels/_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_version_is_the_one_of_the_package(built):
    source = (ROOT / "ift_kernels/__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    assert built[1].name.startswith(f"ift_kernels-{version}-cp")


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_extension_links_neither_torch_nor_cuda(built, tmp_path):
    (name,) = (n for n in zipfile.ZipFile(built[1]).namelist() if n.endswith(".so"))
    library = zipfile.ZipFile(built[1]).extract(name, tmp_path)
    dynamic = processes.run("readelf", "-d", library)
    dynamic.check_returncode()
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic.stdout)
    assert "libstdc++.so.6" in needed or "libc++.so.1" in needed, dynamic.stdout
    system = r"lib(c|m|gcc_s|stdc\+\+|c\+\+|c\+\+abi|gomp|omp|pthread|dl)\.so\.\d+|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(system, name)] == []
    assert "RPATH" not in dynamic.stdout
    assert "RUNPATH" not in dynamic.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_wide_instructions_stay_in_their_namespace(built):
    """An inline function that AVX code shares with the rest may be linked from there.

    It would then stop every machine without AVX. So every function that those objects offer to
    others must carry the name of their instruction set.
    """
    wide = [path for path in built[0].glob("build/ninja-*/*.o") if path.name.count(".") == 2]
    assert wide
    shared = []
    for path in wide:
        isa = path.name.split(".")[1]
        listing = processes.run("nm", "-C", "--defined-only", path)
        listing.check_returncode()
        symbols = [line.split(maxsplit=2)[1:] for line in listing.stdout.splitlines()]
        shared += [s for kind, s in symbols if kind in "TW" and f"::{isa}::" not in s]
    assert shared == []


def test_installed_wheel_imports_from_anywhere(installed):
    imports = "import ift_kernels, ift; from ift_kernels import _cpu"
    files = run(f"{imports}; print(ift_kernels.__file__, ift.__file__, _cpu.__file__)", installed)
    assert [Path(file).is_relative_to(installed) for file in files] == [True] * 3


def test_the_ift_command_is_declared(installed):
    find = "(e,) = m.entry_points(group='console_scripts', name='ift')"
    code = f"import importlib.metadata as m; {find}; print(e.value, callable(e.load()))"
    assert run(code, installed) == ["ift.cli:main", "True"]


def test_source_root_is_no_import_name(installed):
    code = "import importlib.util as u; print(u.find_spec('python_api'))"
    assert run(code, installed) == ["None"]


def test_build_is_incremental(built):
    """A second build of the same tree compiles nothing."""
    source, _ = built
    done = python("setup.py", "build_ext", cwd=source, **QUICK)
    assert "no work to do" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_no_cuda_extension_for_a_torch_without_cuda(built, tmp_path):
    source, _ = built
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    asked = {**QUICK, "IFT_BUILD_CUDA": "auto", "CUDA_HOME": str(tmp_path)}
    done = python("setup.py", "build_ext", cwd=source, **asked)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "without the CUDA extension (the installed torch is a build without CUDA)" in output


def test_without_a_compiler_the_wheel_is_pure_and_says_so(tmp_path):
    done, wheels = build(tmp_path, CXX="/nonexistent", IFT_REQUIRE_CPP="0")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert [wheel.name.split("-", 2)[2] for wheel in wheels] == ["py3-none-any.whl"]
    warning = next(line for line in output.splitlines() if "WARNING: without the C++" in line)
    assert "/nonexistent" in warning
    assert "only the reference backend" in warning
    install(wheels[0], tmp_path / "target")
    code = (
        "import torch, ift_kernels as k; h, w = torch.ones(2, 3), torch.ones(5, 3); "
        "print(*(b['name'] for b in k.backends.describe() if b['available'])); "
        "print(k.linear_logprobs(h, w, torch.tensor([0, 1])).logprob.exp().sum().item())"
    )
    names, total = run(code, tmp_path / "target")
    assert names == "reference"
    assert float(total) == pytest.approx(0.4)


def test_a_required_extension_stops_the_build(tmp_path):
    done, wheels = build(tmp_path, CXX="/nonexistent", IFT_REQUIRE_CPP="1")
    assert done.returncode != 0
    assert wheels == []
    expected = "IFT_REQUIRE_CPP is set, but /nonexistent: No such file or directory"
    assert expected in done.stdout + done.stderr
