"""Which backend and instruction set serves a call, and that all of them give the same results."""

import functools
import importlib.machinery
import importlib.util
import inspect
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dense
import ift_kernels
from ift_kernels import (
    backends,
    linear_cross_entropy,
    linear_expected_embedding,
    linear_logprobs,
    linear_token,
)
from ift_kernels.backends import contract, cpu, cuda, loading, reference
from ift_kernels.backends.cuda import sampling
from processes import python, python_with_tests
from serving import BACKENDS, DTYPES, needs_cpp

CPU = torch.device("cpu")


FEW = ("logprob", "entropy", "argmax")  # another way through the C++ code than all outputs


# 1: no full vector. 517: a tail of 5. 3003: blocks of 1024, an AVX-512 tail of 11.
SHAPES = ((2, 3, 1), (33, 9, 517), (70, 12, 3003))


def results(dtype):
    """Of every operation: values and gradients, for sizes with tails of every vector width."""
    out = {}
    for n, d, v in SHAPES:
        for transform in ({}, dense.TRANSFORM):
            h = dense.head(n, d, v, dtype, bias=bool(transform), **transform)
            hidden = h.hidden.detach().clone()
            hidden[1, 0] = torch.nan
            stats = linear_logprobs(h.hidden, h.weight, h.target, outputs=dense.OUTPUTS, **h.kwargs)
            grads = dense.gradients(dense.send(stats, dense.upstream(h)), h.inputs)
            key = f"{n}x{d}x{v}-{bool(transform)}"
            out[f"{key}-stats"] = [value.detach() for value in stats]
            few = linear_logprobs(h.hidden, h.weight, h.target, outputs=FEW, **h.kwargs)
            out[f"{key}-few"] = [value.detach() for value in few if value is not None]
            out[f"{key}-grads"] = grads
            poisoned = linear_logprobs(hidden, h.weight, h.target, outputs=dense.OUTPUTS)
            out[f"{key}-nan"] = [value.detach().isnan() for value in poisoned]
            sampled = linear_token(h.hidden, h.weight, rule="sample", seed=5, **h.kwargs)
            best = linear_token(h.hidden, h.weight, rule="kth", k=min(3, v), **h.kwargs)
            out[f"{key}-tokens"] = [*sampled, *best]
            soft = linear_expected_embedding(h.hidden, h.weight, h.weight, **h.kwargs)
            out[f"{key}-soft"] = [soft.detach(), *dense.gradients(soft.sin().sum(), h.inputs)]
    return out


def assert_same(ours, wanted, dtype):
    # A gradient has the rounding of its dtype. Values have that of fp32, but tiles differ between
    # backends, and with them how the vendor's half-precision product rounds a logit now and then.
    of_values = 2**-17 if dtype.itemsize == 2 else 2**-20
    for key in wanted:
        for i, (a, b) in enumerate(zip(ours[key], wanted[key], strict=True)):
            what = f"{key}[{i}]"
            assert a.dtype == b.dtype and a.shape == b.shape, what
            if not b.is_floating_point():
                # Such a logit may also decide between two tokens that nearly tie.
                allowed = 1 + b.numel() // 50 if dtype.itemsize == 2 else 0
                assert (a != b).sum() <= allowed, what
                continue
            tolerance = max(of_values, 8 * torch.finfo(b.dtype).eps)
            if key.endswith("soft"):  # its upstream gradient has been through a rounding of its own
                tolerance *= 4
            # At least that of the logits, of which a mean is small beside what was added up.
            scale = max(1.0, b.nan_to_num(0, 0, 0).abs().max().item())
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=what)


@functools.cache
def of_the_reference(dtype):
    with ift_kernels.use_backend("reference"):
        return results(dtype)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_equals_reference(dtype):
    with ift_kernels.use_backend("cpu"):
        assert_same(results(dtype), of_the_reference(dtype), dtype)


def run_python(code, *args, **env):
    """Runs `code` in a new process; its last line of output."""
    done = python_with_tests("-c", code, *args, OMP_NUM_THREADS="2", **env)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


SAVE = """
import sys, torch, test_backends as t
torch.manual_seed(0)
torch.set_num_threads(2)
torch.save({str(d): t.results(d) for d in t.DTYPES}, sys.argv[1])
print(t.backends.BACKENDS["cpu"].describe()["detail"])
"""


# "base" is SSE2 on x86-64 and NEON on ARM; the wider ones run where this machine has them.
@needs_cpp
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_equals_the_reference(isa, tmp_path):
    file = tmp_path / "results.pt"
    failed, line = run_python(SAVE, str(file), IFT_BACKEND="cpu", IFT_CPU_ISA=isa)
    if failed and "IFT_CPU_ISA" in line:
        pytest.skip(f"this machine has no {isa}: {line}")
    assert not failed, line
    assert line.startswith(f"{isa},")
    saved = torch.load(file)
    for dtype in DTYPES:
        assert_same(saved[str(dtype)], of_the_reference(dtype), dtype)


@needs_cpp
def test_unknown_instruction_set():
    code = "import torch, ift_kernels as k; k.linear_token(torch.ones(1, 2), torch.ones(3, 2))"
    failed, line = run_python(code, IFT_CPU_ISA="sse9", IFT_BACKEND="cpu")
    assert failed
    assert "IFT_CPU_ISA: expected" in line and "base" in line and "'sse9'" in line


CHOICE = "import torch, ift_kernels as k; print(k.backends.get(torch.ones(1)).__name__)"


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_of_the_environment(name):
    assert run_python(CHOICE, IFT_BACKEND=name) == (0, f"ift_kernels.backends.{name}")


def test_unknown_backend_of_the_environment():
    failed, line = run_python(CHOICE, IFT_BACKEND="quick")
    assert failed and line.startswith("ValueError: IFT_BACKEND: expected one of")
    assert line.endswith("got 'quick'")


def test_context_manager_beats_the_environment(monkeypatch):
    monkeypatch.setenv("IFT_BACKEND", "nonsense")
    with ift_kernels.use_backend("reference"):
        assert backends.get(torch.ones(1)).__name__.endswith("reference")
    with pytest.raises(ValueError, match="IFT_BACKEND"):
        backends.get(torch.ones(1))
    monkeypatch.setenv("IFT_BACKEND", "")
    backends.get(torch.ones(1))


def test_context_manager_nests_and_survives_errors():
    default = backends.get(torch.ones(1))
    with ift_kernels.use_backend("reference"):
        with pytest.raises(ZeroDivisionError), ift_kernels.use_backend(BACKENDS[0]):
            raise ZeroDivisionError
        assert backends.requested() == "reference"
    assert backends.requested() is None and backends.get(torch.ones(1)) is default


def test_context_manager_is_of_one_thread():
    seen = []
    with ift_kernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
    assert seen == [None]


@needs_cpp
def test_the_choice_by_device_and_dtype():
    for dtype in DTYPES:
        assert backends.get(torch.ones(1, dtype=dtype)).__name__.endswith("cpu")
    assert backends.get(torch.ones(1, dtype=torch.float64)).__name__.endswith("reference")
    assert backends.get(torch.ones(1, device="meta")).__name__.endswith("reference")
    with ift_kernels.use_backend("cpu"):
        assert backends.get(torch.ones(1, dtype=torch.float64)).__name__.endswith("reference")
        with pytest.raises(RuntimeError, match="backend 'cpu' .* cannot serve: device meta"):
            backends.get(torch.ones(1, device="meta"))


def test_without_the_extension(monkeypatch):
    """What a machine without a compiler sees."""
    from ift_kernels.backends.cpu import extension

    monkeypatch.setattr(extension, "_cpu", None)
    monkeypatch.setattr(extension, "_import_error", "the C++ extension was not built")
    row = next(row for row in backends.describe() if row["name"] == "cpu")
    assert not row["available"] and "not built" in row["reason"]
    h = dense.head(9, 4, 50)
    loss = linear_cross_entropy(h.hidden, h.weight, h.target)
    torch.testing.assert_close(loss, dense.cross_entropy(h))
    with (
        ift_kernels.use_backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' .* not built"),
    ):
        linear_cross_entropy(h.hidden, h.weight, h.target)


SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.mark.parametrize("suffix", importlib.machinery.EXTENSION_SUFFIXES)
def test_sources_that_hide_an_installed_package(suffix, monkeypatch, tmp_path):
    """What is missing is not a compiler."""
    here = Path(ift_kernels.__file__).resolve().parent
    installed = tmp_path / "site-packages" / "ift_kernels"
    installed.mkdir(parents=True)
    (tmp_path / "linked").symlink_to(here.parent)  # the same sources by another name
    monkeypatch.setattr(sys, "path", [str(tmp_path / "linked"), *sys.path, str(installed.parent)])
    arguments = "the C++ extension", "_other", ImportError("no"), ": install a compiler"
    assert loading.extension_error(*arguments) == (
        "the C++ extension was not built: install a compiler"
    )
    (installed / f"_other{suffix}").touch()
    said = loading.extension_error(*arguments)
    assert str(here) in said and str(installed) in said and "python -m" in said
    assert "compiler" not in said and "not built" not in said


def test_an_extension_that_does_not_load_is_another_matter(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    said = loading.extension_error("the C++ extension", "_cpu", ImportError("wrong ABI"), ": x")
    assert said == "the C++ extension does not load (wrong ABI)"


def test_an_extension_of_other_sources_is_refused():
    """It would compute what older Python asked of it."""
    loading.check_contract(SimpleNamespace(contract=contract.VERSION))
    for module in (SimpleNamespace(), SimpleNamespace(contract=contract.VERSION + 1)):
        with pytest.raises(ImportError, match="this package has version .* rebuild it"):
            loading.check_contract(module)


def test_the_warning_names_both_folders(tmp_path):
    """As ``python -m something`` from a checkout that nothing was built in."""
    here, checkout = Path(ift_kernels.__file__).parent, tmp_path / "checkout"
    site = tmp_path / "site" / "ift_kernels"
    site.mkdir(parents=True)
    left_out = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(here, checkout / "ift_kernels", ignore=left_out)
    (site / f"_cpu{SUFFIX}").touch()
    (checkout / "start.py").write_text(
        # An editable install would find the extension in its own folder.
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"
        "import ift_kernels\nfrom ift_kernels import backends\n"
        "print([row['reason'] for row in backends.describe() if row['name'] == 'cpu'])\n"
    )
    done = python("-m", "start", cwd=checkout, PYTHONPATH=str(site.parent), OMP_NUM_THREADS="1")
    for text in (done.stdout, done.stderr):  # what `ift doctor` shows, and the warning
        assert str(checkout / "ift_kernels") in text and str(site) in text, done.stderr
        assert "compiler" not in text


def test_describe():
    rows = {row["name"]: row for row in backends.describe()}
    assert set(rows) == set(backends.BACKENDS)
    assert rows["reference"]["available"]
    for row in rows.values():
        assert set(row) == {"name", "available", "reason", "detail", "plain_torch"}
        assert bool(row["reason"]) != row["available"]
        assert not row["plain_torch"] or row["available"]
    if rows["cpu"]["available"]:
        assert rows["cpu"]["plain_torch"] == ["scale_", "softmax_gradient_"]


def test_what_plain_torch_serves_is_listed(monkeypatch):
    """In part or whole, of a backend for GPUs: nothing falls back without a word."""
    of_cuda = ["scale_", "softmax_gradient_", "divergence_terms", "divergence_gradient_"]
    monkeypatch.setattr(sampling, "compiled", lambda: SimpleNamespace(MAX_TOP_K=16))
    assert backends.plain_torch(cuda) == [*of_cuda, "top_k_update of k > 16"]
    everything = backends.plain_torch(reference)
    assert "scan" in everything and "transpose" not in everything  # never called
    monkeypatch.setattr(cuda, "scan", reference.scan)
    assert "scan" in backends.plain_torch(cuda)


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads, set_num_threads):
    h = dense.head(131, 8, 1500, torch.bfloat16, bias=True)
    outcomes = []
    for count in (1, threads):
        set_num_threads(count)
        stats = linear_logprobs(h.hidden, h.weight, h.target, outputs=dense.OUTPUTS)
        outcomes.append([*stats, *dense.gradients(stats.logprob.sum(), h.inputs[:2])])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


CONTRACT = [
    name
    for name, value in vars(contract.Backend).items()
    if inspect.isfunction(value) and not name.startswith("__")
]


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_every_backend_keeps_the_contract(name):
    """Also those that cannot run here: a missing function would show on somebody's GPU first."""
    assert "dlogits_" in CONTRACT and "residual_grad" in CONTRACT
    for function in CONTRACT:
        wanted = list(inspect.signature(getattr(contract.Backend, function)).parameters)[1:]
        try:
            given = getattr(backends.BACKENDS[name], function)
        except ModuleNotFoundError:
            pytest.skip("its kernels cannot be imported here")  # Triton is not everywhere
        assert list(inspect.signature(given).parameters) == wanted, function


@needs_cpp
def test_wrong_layouts_are_refused_by_name():
    x, target = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64)
    chunk = contract.Chunk(x)
    state, long_state = (contract.new_state(n, x.device) for n in (4, 5))
    gradient = contract.RowGradient(target, torch.zeros(2, 4), torch.zeros(4, 4))
    for function, arguments, word in (
        (cpu.probabilities_, (chunk._replace(bias=x[0, 1:]), gradient.norm), "bias: expected .10"),
        (cpu.probabilities_, (contract.Chunk(x.T), torch.zeros(2, 10)), "x: expected consecutive"),
        (cpu.probabilities_, (chunk, gradient.norm[:, :3]), "norm: expected rows of 4"),
        (cpu.stats_update, (chunk, target[:3], state, 0), "target"),
        (cpu.stats_update, (chunk, target, long_state, 0), "state: expected rows of 4"),
        (cpu.stats_update, (chunk, target, state._replace(argmax=long_state.argmax), 0), "argmax"),
        (cpu.dlogits_, (chunk, gradient._replace(coef=torch.zeros(4, 5))), "coef"),
        (cpu.dlogits_, (chunk, gradient, torch.zeros(10, 3)), "transposed"),
        (cpu.top_k_update, (chunk, torch.zeros(3, 2), target[:3, None].repeat(1, 2)), "4 rows"),
    ):
        with pytest.raises(RuntimeError, match=word):
            function(*arguments)


def test_the_table_of_statistics_is_what_operators_return():
    names = [s.name for s in contract.STATISTICS]
    assert names == list(ift_kernels.TokenStats._fields)
    assert len({s.track for s in contract.STATISTICS}) == 1 + 6  # argmax has two outputs
    assert {row for s in contract.STATISTICS for row in s.state} == set(range(contract.STATE_ROWS))
    differentiable = [s.name for s in contract.STATISTICS if s.differentiable]
    h = dense.head(5, 4, 30)
    stats = linear_logprobs(h.hidden, h.weight, h.target, outputs=dense.OUTPUTS)
    assert [n for n in names if getattr(stats, n).requires_grad] == differentiable
