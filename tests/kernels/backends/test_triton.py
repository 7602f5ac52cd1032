"""The Triton backend without a GPU: interpreted in another process, compiled for GPUs elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ift_kernels
from ift_kernels import backends
from ift_kernels.backends import triton as backend
from processes import SETTINGS, python

triton = pytest.importorskip("triton")

# Of a new process: without this one's settings.
ALONE = {"without": SETTINGS, "OMP_NUM_THREADS": "1"}


INTERPRETED = sorted(Path(__file__).parent.glob("test_triton_interpreted*.py"))


@pytest.mark.slow
@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("half", [0, 1])
def test_interpreted(half):
    """TRITON_INTERPRET decides when kernels are imported, so it needs its own process."""
    files = INTERPRETED[half::2]
    quiet = "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"
    done = python("-m", "pytest", "-n", "0", *quiet, *files, TRITON_INTERPRET="1", **ALONE)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert files and " passed" in done.stdout


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        ift_kernels.use_backend("triton"),
        pytest.raises(RuntimeError, match="backend 'triton' .* TRITON_INTERPRET=1 is not set"),
    ):
        backends.get(torch.ones(1))
    assert backends.get(torch.ones(1)).__name__ != "ift_kernels.backends.triton"


def test_the_interpreter_is_chosen_before_kernels_load():
    code = (
        "import os, torch, ift_kernels as k\n"
        "from ift_kernels.backends import triton\n"
        "from ift_kernels.backends.triton import launch\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "print(triton.unsupported_reason(torch.device('cpu'), torch.float32))\n"
    )
    assert "after the kernels had been loaded" in python("-c", code, **ALONE).stdout


def test_triton_is_not_imported_with_the_package():
    code = "import sys, ift_kernels; print('triton' in sys.modules)"
    assert python("-c", code, **ALONE).stdout.strip() == "False"


def test_an_absent_triton(monkeypatch):
    backend._unavailable.cache_clear()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    try:
        reason = backend.unsupported_reason(torch.device("cuda"), torch.float32)
        assert reason == "triton is not installed"
        row = backend.describe()
        assert not row["available"] and row["reason"] == reason
    finally:
        backend._unavailable.cache_clear()


@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "refused"),
    [("3.6.0", "2.5.5", True), ("3.4.0", "2.4.0", True), ("3.6.0", "2.3.5", False),
     ("3.7.1", "2.5.5", False)],
)  # fmt: skip
def test_an_interpreter_that_needs_an_older_numpy(monkeypatch, of_triton, of_numpy, refused):
    import numpy

    from ift_kernels.backends.triton import launch

    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend.interpreter_unavailable.cache_clear()
    try:
        for device in ("cpu", "cuda"):
            reason = backend.unsupported_reason(torch.device(device), torch.float32)
            said = f"the interpreter of triton {of_triton} needs numpy below 2.4, got {of_numpy}"
            assert reason == (said if refused else "")
        assert backend.describe()["reason"] == (said if refused else "")
    finally:
        backend.interpreter_unavailable.cache_clear()


@pytest.mark.parametrize(
    ("version", "checked"),
    [("3.4.0", False), ("3.6.0", True), ("3.7.2", True), ("3.9.0", False), ("3.60.0", False)],
)
def test_a_version_without_limits_is_reported(version, checked, monkeypatch):
    """In one line of ``ift doctor``, with a GPU or without."""
    from ift.cli import doctor

    monkeypatch.setattr(triton, "__version__", version)
    lines = [line for line in doctor.as_text(doctor.examine()).split("\n") if "untested" in line]
    assert bool(lines) != checked
    if not checked:
        (line,) = lines
        said = f"triton {version} is untested: compiled kernels are checked with 3.6 and 3.7"
        assert line.endswith(said)


@pytest.fixture
def static():
    """`bench.gpu.static`, where the Triton that is installed has limits."""
    from bench.gpu import static

    known = static.committed()["registers"]
    if static.VERSION not in known:
        pytest.skip(f"limits are committed of Triton {', '.join(known)}, not of {static.VERSION}")
    return static


def test_every_checked_version_has_limits():
    from bench.gpu import static

    assert static.committed()["registers"].keys() == set(backend.CHECKED)


# What the schedules hand to `dlogits_`, and the rest, comes with rows on cache lines: so do these.
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_committed_sources_compile(architecture, static):
    """Every kernel in every configuration was compiled as it is, and nothing was wrong with it.

    With every Triton that has limits. The digests are of sources, constants and configurations.
    Where one differs, ``python -m bench static --write`` compiles that kernel, and drops its limits
    of other versions until it has run with those: ``make triton-versions``.
    """
    known = static.committed()
    found = static.digests(architecture, static.variants(architecture))
    said = "kernels or configurations have changed: run python -m bench static --write"
    assert known["digests"][architecture] == found, said
    for version, limits in known["registers"].items():
        assert limits[architecture].keys() == found.keys(), f"with Triton {version}: {said}"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90"])
def test_compiled_kernels_stay_within_their_limits(architecture, static):
    """A quarter of the variants, compiled for certain; `test_committed_sources_compile` has all."""
    limits = static.committed()["registers"][static.VERSION][architecture]
    some = static.variants(architecture, (torch.bfloat16,), (False,))
    assert {v.limit for v in some} == set(limits)
    regular = [v for v in some if not v.irregular]
    for which in dict(reversed([(v.name, v) for v in regular])).values():  # one of each kernel
        found = static.compile_for(which, architecture)
        wrong = static.complaints(which, found, architecture, limits.get(which.limit))
        assert not wrong, f"{which.name} {which.about}: {'; '.join(wrong)}"


def test_complaints():
    """The check of the table finds what it is there to find."""
    from bench.gpu import static, traffic

    which = next(v for v in static.variants("sm_90", (torch.bfloat16,)) if v.name == "fused")
    good = static.Resources(90, 0, 1024, 8, 2, 0.25, 4, 2, "wgmma")
    assert static.complaints(which, good, "sm_90", 100) == []
    for change, word in (
        ({"spills": 8}, "spills"), ({"registers": 101}, "limit 100"), ({"programs": 0}, "fit"),
        ({"wide_loads": 0}, "16-byte"), ({"matrix": ""}, "matrix"),
        ({"matrix": "mma"}, "mma, not wgmma"),
    ):  # fmt: skip
        assert word in "".join(static.complaints(which, replace(good, **change), "sm_90", 100))
    assert "no committed limit" in static.complaints(which, good, "sm_90", None)
    streaming = next(v for v in static.variants("sm_90", (torch.bfloat16,)) if v.name == "dlogits")
    odd = next(v for v in static.variants("sm_90", ()) if v.name == "dlogits" and v.irregular)
    assert static.complaints(odd, replace(good, wide_loads=0), "sm_90", 100) == []
    assert not streaming.irregular and "irregular" in odd.about
    for bytes_, wanted in (((4.4, 4.0), []), ((6.0, 4.0), ["1.50 of the least bytes"])):
        assert static.complaints(streaming, good, "sm_90", 100, traffic.Bytes(*bytes_)) == wanted


def test_no_module_has_the_name_of_a_function():
    """Importing a submodule sets it on the package, where the function of that name should be."""
    folder = Path(backend.__file__).parent
    assert not {path.stem for path in folder.glob("*.py")} & set(backend._HOME)
