"""The build of the CUDA extension: which toolkit, for what, and what comes out of it.

nvcc comes from CUDA_HOME, PATH or the Python packages of the extra `nvcc`; where there is none,
what needs it is skipped and says so. No test here needs a GPU.
"""

import json
import math
import os
import re
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import pytest

import ift_kernels
from bench.gpu import cuda_static
from processes import python, run

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA extension is for Linux")


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, fresh, without a toolkit and as with a torch for CUDA."""
    for name in ("CUDA_HOME", "CUDA_PATH", "IFT_BUILD_CUDA", "IFT_CUDA_ARCHS", "IFT_NO_CPP"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch("setuptools.setup"):
        found = runpy.run_path(str(ROOT / "setup.py"))
    names = found["toolkit"].__wrapped__.__globals__
    monkeypatch.setitem(names, "torch_without_cuda", lambda: False)
    return found


def fake_toolkit(folder, release, runtime=True):
    """A toolkit whose nvcc knows its version and nothing else."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    if runtime:
        (folder / "lib64/libcudart_static.a").touch()
    return str(folder)


@pytest.mark.parametrize(
    ("release", "names"),
    [
        ("12.6", ["80", "90a", "90-virtual"]),
        ("12.8", ["80", "90a", "100a", "120", "90-virtual"]),
        ("13.0", ["80", "90a", "100a", "120", "90-virtual"]),
    ],
)
def test_architectures_by_toolkit(setup_py, monkeypatch, tmp_path, release, names):
    monkeypatch.setenv("CUDA_HOME", fake_toolkit(tmp_path, release))
    assert setup_py["toolkit"]().architectures() == names


def test_architectures_of_the_environment(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", fake_toolkit(tmp_path, "12.6"))
    monkeypatch.setenv("IFT_CUDA_ARCHS", "90a;100-virtual")
    flags = " ".join(setup_py["toolkit"]().flags())
    assert "-gencode arch=compute_90a,code=sm_90a" in flags
    assert "-gencode arch=compute_100,code=compute_100" in flags
    assert flags.count("-gencode") == 2
    monkeypatch.setenv("IFT_CUDA_ARCHS", "9.0+PTX")
    with pytest.raises(SystemExit, match=r"IFT_CUDA_ARCHS: expected names like .* got '9.0\+PTX'"):
        setup_py["toolkit"]().architectures()


def test_without_nvcc(setup_py, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    reason = f"CUDA_HOME is {tmp_path}, which has no bin/nvcc"
    assert setup_py["toolkit"]() == reason
    assert f"NOTE: without the CUDA extension ({reason})" in capsys.readouterr().err


def test_demanded_without_nvcc(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("IFT_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="IFT_BUILD_CUDA=1, but CUDA_HOME is .* no bin/nvcc"):
        setup_py["toolkit"]()


def test_never_and_nonsense(setup_py, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", fake_toolkit(tmp_path, "13.0"))
    monkeypatch.setenv("IFT_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="IFT_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"):
        setup_py["toolkit"]()
    monkeypatch.setenv("IFT_BUILD_CUDA", "0")
    assert setup_py["toolkit"]() == "IFT_BUILD_CUDA=0"
    assert "NOTE" not in capsys.readouterr().err


def test_toolkit_without_the_static_runtime(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", fake_toolkit(tmp_path, "13.0", runtime=False))
    assert setup_py["toolkit"]() == f"{tmp_path} has no libcudart_static.a"


@pytest.mark.parametrize(("cuda", "tag"), [("12.9", "+cu129"), ("", "")])
def test_the_version_of_a_wheel_says_which_cuda(monkeypatch, tmp_path, cuda, tag):
    """Up to the call of pip, in whose place setup.py says the version that the wheel would get."""
    instead = tmp_path / "python"
    instead.write_text(
        f'#!/bin/sh\n"{sys.executable}" setup.py -q egg_info --egg-base "{tmp_path}" && exit 3\n'
    )
    instead.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", fake_toolkit(tmp_path / "cuda", "12.9"))
    monkeypatch.setenv("PYTHON", str(instead))
    monkeypatch.setenv("CUDA", cuda)
    done = run(ROOT / ".ci/wheel")
    assert done.returncode == 3, done.stdout + done.stderr
    metadata = (tmp_path / "ift_kernels.egg-info/PKG-INFO").read_text()
    assert f"\nVersion: {ift_kernels.__version__}{tag}\n" in metadata
    done = run(ROOT / ".ci/wheel", CUDA="12.6")
    assert done.returncode == 1 and "CUDA=12.6, but " in done.stderr
    assert done.stderr.rstrip().endswith("has nvcc 12.9")


def real_toolkit():
    """The folder of the toolkit that setup.py finds, else of the packages, else None."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia/cu13")
    # Whatever torch this is: the default leaves the extension out beside one without CUDA.
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, IFT_BUILD_CUDA="1"):
        try:
            found = runpy.run_path(str(ROOT / "setup.py"))["toolkit"]()
        except SystemExit:
            return packages if (packages / "bin/nvcc").exists() else None
    return found.home


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The extension for sm_90a. `make wheel` builds every architecture, and PTX, and checks it."""
    home = real_toolkit()
    if home is None:
        pytest.skip("THE CUDA KERNELS WERE NOT COMPILED: no nvcc (pip install '.[nvcc]')")
    out = tmp_path_factory.mktemp("cuda")
    build = "setup.py", "build_ext", "--build-lib", out
    settings = {"IFT_BUILD_CUDA": "1", "IFT_CUDA_ARCHS": "90a"}
    done = python(*build, cwd=ROOT, CUDA_HOME=str(home), **settings)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "warning" not in done.stdout
    (library,) = out.glob("ift_kernels/_cuda*.so")
    return library


@pytest.fixture(scope="module")
def cuobjdump(extension):
    tool = cuda_static.cuobjdump()
    if tool is None:
        pytest.skip("THE MACHINE CODE WAS NOT READ: no cuobjdump (pip install '.[nvcc]')")
    return tool


def printed(*command):
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_of(cuobjdump, kind, file):
    return set(re.findall(r"sm_(\w+)\.(?:cubin|ptx)", printed(cuobjdump, f"--list-{kind}", file)))


def test_machine_code_and_ptx(extension, cuobjdump, setup_py, monkeypatch, tmp_path):
    assert names_of(cuobjdump, "elf", extension) == {"90a"}
    # Both from one source: PTX of all of them takes half a minute.
    monkeypatch.setenv("CUDA_HOME", str(real_toolkit()))
    monkeypatch.setenv("IFT_CUDA_ARCHS", "90a;90-virtual")
    toolkit, source, out = setup_py["toolkit"](), ROOT / "csrc/cuda/scans.cu", tmp_path / "scans.o"
    done = run(toolkit.nvcc, *toolkit.flags(), f"-I{ROOT / 'csrc'}", "-c", source, "-o", out)
    assert done.returncode == 0, done.stderr
    assert names_of(cuobjdump, "elf", out) == {"90a"} and names_of(cuobjdump, "ptx", out) == {"90"}


def test_registers_spills_and_wide_loads(extension, cuobjdump):
    table = cuda_static.worst(cuda_static.read([extension], "90a"))
    assert len(table) >= 16
    assert cuda_static.violations(table) == []


def test_violations_are_seen(monkeypatch, tmp_path):
    fine = {"registers": 40, "shared": 0, "stack": 0, "local": 0, "wide_loads": 4}
    limits = tmp_path / "limits.json"
    limits.write_text('{"a_kernel": {"registers": 40, "shared": 0}}')
    monkeypatch.setattr(cuda_static, "LIMITS", limits)
    assert cuda_static.violations({"a_kernel": fine}) == []
    for change in ({"registers": 41}, {"local": 8}, {"stack": 8}, {"wide_loads": 0}):
        assert len(cuda_static.violations({"a_kernel": fine | change})) == 1
    assert len(cuda_static.violations({"b_kernel": fine})) == 2


def test_limits_and_table_are_of_the_kernels_in_the_sources():
    """A renamed kernel is compiled anew: its numbers are measured, and are not those of before."""
    names = runpy.run_path(str(ROOT / ".ci/nvrtc.py"))["kernels"]()
    kernels = {name.partition("<")[0].rpartition(":")[2] for name in names}
    limits = json.loads(cuda_static.LIMITS.read_text())
    saved = json.loads((ROOT / "bench/results/cuda-static/sm_90a.json").read_text())
    assert kernels == limits.keys() == saved.keys()
    assert cuda_static.violations(saved) == []
    for name, row in saved.items():
        found = {"registers": math.ceil(row["registers"] / 8) * 8, "shared": row["shared"]}
        assert limits[name] == found, name


def test_it_links_and_exports_nothing_of_cuda(extension):
    dynamic = printed("readelf", "-d", extension)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert not [n for n in needed if re.search("cuda|torch|c10", n)], needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    exported = printed("nm", "-D", "--defined-only", extension)
    names = [line.split()[-1] for line in exported.splitlines()]
    assert "PyInit__cuda" in names
    assert not [name for name in names if name.startswith("cuda")]


IMPORT = """
import sys, importlib.machinery as m, importlib.util as u, torch
loader = m.ExtensionFileLoader("ift_kernels._cuda", sys.argv[1])
spec = u.spec_from_file_location("ift_kernels._cuda", sys.argv[1], loader=loader)
cuda = u.module_from_spec(spec)
loader.exec_module(cuda)
assert cuda.built_with() >= 12060, cuda.built_with()
assert cuda.driver_version() == 0, "a driver: hidden from this test by CUDA_VISIBLE_DEVICES"
try:
    cuda.scan(cuda.Queue(0, 0), 0, 0, 0, 0, 0, 1, 1, 0.5, True)
except cuda.CudaError as error:
    print(error)
"""


def test_it_imports_without_a_driver_and_says_what_is_missing(extension):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    done = python("-c", IMPORT, extension)
    assert done.returncode == 0, done.stderr
    where = "(asking for the current device|scan_kernel)"
    assert re.match(rf"cudaError\w+ \(\d+\): .*, {where}", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", ["12.6", "12.8", "12.9"])
def test_older_compilers(version):
    """Every kernel through NVRTC of that CUDA, where `make cuda-versions` has put it."""
    folder = ROOT / "build" / f"cuda-{version}"
    if not folder.is_dir():
        pytest.skip(f"NVRTC of CUDA {version} is not in {folder.name}: make cuda-versions")
    done = python(ROOT / ".ci" / "nvrtc.py", folder, "90a")
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"\d\d kernels for sm_90a", done.stdout)
