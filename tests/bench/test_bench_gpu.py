"""Kernels for a GPU: what is captured of them, how they are compared, and how they are tuned."""

import ast
import importlib
import importlib.util
import json
import pkgutil
from pathlib import Path

import pytest
import torch

from bench.gpu import device_cells, tune
from bench.harness import data, machine
from bench.harness.machine import ROOT
from ift_kernels.backends import triton as backend
from processes import HANG, SETTINGS, python, run


@pytest.fixture
def static():
    """`bench.gpu.static`, which needs Triton."""
    pytest.importorskip("triton")
    from bench.gpu import static

    return static


def test_results_do_not_change_the_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.hooksPath=/dev/null"]
    for git in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "x"]):
        assert run("git", *git, cwd=tmp_path).returncode == 0
    clean = machine.revision()
    (tmp_path / "bench/results/gpu").mkdir(parents=True)
    (tmp_path / "bench/results/gpu/ops.json").write_text("{}")
    assert machine.revision() == clean and len(clean) == 12
    (tmp_path / "bench/ops.py").write_text("")
    assert machine.revision() == clean + "+"


@pytest.mark.parametrize("function", ["scan", "dlogits_", "take_active"])
def test_an_epilogue_with_another_result_gets_no_time(function, monkeypatch):
    cpu = torch.device("cpu")
    right = device_cells.epilogue("reference", function, (5, 96), cpu)
    assert right.check(right.call()) == {}
    reference = tune.installed.BACKENDS["reference"]

    class Wrong:
        def __getattr__(self, name):
            def off(*given):
                result = getattr(reference, name)(*given)
                for tensor in (result, getattr(given[0], "x", None), *given[-3:]):
                    if isinstance(tensor, torch.Tensor):
                        tensor += 1
                return result

            return off if name == function else getattr(reference, name)

    monkeypatch.setitem(tune.installed.BACKENDS, "wrong", Wrong())
    wrong = device_cells.epilogue("wrong", function, (5, 96), cpu)
    with pytest.raises(data.Wrong, match="another result than the reference"):
        wrong.check(wrong.call())


def test_the_floor_of_an_epilogue_is_a_copy():
    cpu = torch.device("cpu")
    copy = device_cells.epilogue("floor-copy", "dlogits_", (5, 96), cpu)
    assert copy.call().nbytes == 5 * 96 * 2  # read once and written once


def triton_modules():
    """Every module of the Triton backend."""
    found = pkgutil.walk_packages(backend.__path__, f"{backend.__name__}.")
    return [backend, *(importlib.import_module(module.name) for module in found)]


def test_every_kernel_is_captured(static):
    """What `bench static` does not capture has no limits, and nothing is compiled of it."""
    from triton.runtime.jit import JITFunction

    kernels, launched = set(), set()
    for module in triton_modules():
        kernels |= {
            value for name, value in vars(module).items()
            if isinstance(value, JITFunction) and name.endswith("_kernel")
        }  # fmt: skip
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "launch":
                launched.add(ast.unparse(node.args[0]))
    names = sorted(kernel.__name__ for kernel in kernels)  # of two with one name both
    assert names == sorted(launched)
    captured = {which.kernel for which in static.variants("sm_90", (torch.bfloat16,), (False,))}
    assert names == sorted(kernel.__name__ for kernel in captured)


MODULE = """
import triton
import triton.language as tl

LIMIT = tl.constexpr(3)


@triton.jit
def inner(value):
    return value + LIMIT


@triton.jit
def outer(value):
    return inner(value) * 2


@triton.jit(do_not_specialize=["rows"])
def some_kernel(x, rows, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, outer(tl.load(at)))
"""


def some_kernel(path, code):
    """The kernel of a module with this code."""
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("some_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.some_kernel


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("import triton\n", "import math\nimport triton\n\n\ndef more():\n    pass\n", True),
        ("    return inner", "    # twice what comes\n    return inner", True),
        ("    return inner", '    """What comes."""\n    return inner', True),
        ("tl.arange(0, BLOCK)", "tl.arange(\n        0, BLOCK\n    )", True),
        ("value + LIMIT", "value - LIMIT", False),
        ("constexpr(3)", "constexpr(4)", False),
        ('["rows"]', '["x", "rows"]', False),
        ("outer(tl.load(at))", "inner(tl.load(at))", False),
    ],
)
def test_digests_are_of_code(old, new, same, tmp_path, static):
    """Of a kernel, what it calls and reads: not of the lines where it is, nor of comments."""
    changed = MODULE.replace(old, new)
    assert changed != MODULE
    before = static.kernel_code(some_kernel(tmp_path / "before.py", MODULE))
    after = static.kernel_code(some_kernel(tmp_path / "after.py", changed))
    assert (before == after) == same


def test_digests_are_the_same_with_every_python(tmp_path, monkeypatch, static):
    """Later releases add fields to a syntax tree, which are empty in our code."""
    kernel = some_kernel(tmp_path / "some.py", MODULE)
    before = static.kernel_code(kernel)
    for kind, more in ((ast.FunctionDef, []), (ast.Call, None), (ast.arg, [])):
        monkeypatch.setattr(kind, "_fields", (*kind._fields, "of_a_later_python"))
        monkeypatch.setattr(kind, "of_a_later_python", more, raising=False)
    assert static.kernel_code(kernel) == before


@pytest.fixture
def table(tmp_path, monkeypatch, static):
    """Limits in a file of their own, of kernels that compile as the returned function says."""
    monkeypatch.setattr(static, "LIMITS", tmp_path / "limits.json")
    static.LIMITS.write_text('{"digests": {}, "registers": {}}')
    some = static.variants("sm_90", (torch.bfloat16,), (False,))
    some = [v for v in some if v.name in ("dlogits", "scan", "top_k") and not v.irregular]
    monkeypatch.setattr(static, "variants", lambda architecture: some)
    monkeypatch.setattr(static.traffic, "measure", lambda architecture: {})
    monkeypatch.setattr(static.backend, "interpreter_unavailable", lambda: "")

    def write(version, registers, sources, spills=0, arguments=("--write",)):
        """With this Triton; `sources` by kernel. What was compiled, and the exit code."""
        compiled = []

        def compile_for(which, architecture):
            compiled.append(which.limit)
            return static.Resources(registers, spills, 0, 4, 8, 0.5, 1, 1, "")

        monkeypatch.setattr(static, "VERSION", version)
        monkeypatch.setattr(static, "compile_for", compile_for)
        monkeypatch.setattr(static, "digests", lambda *given: sources)
        bad = static.main(["--architectures", "sm_90", *arguments])
        return sorted(set(compiled)), bad

    return write


def test_every_triton_has_its_own_limits(table, static, capsys):
    old = {"dlogits": "a", "scan": "b", "top_k": "c"}
    new = old | {"scan": "d"}
    everything = sorted(old)

    def limits(version):
        return static.committed()["registers"][version]["sm_90"]

    assert table("3.6", 40, old) == (everything, 0)
    assert table("3.7", 50, old) == (everything, 0)  # of the same sources
    assert limits("3.6") == dict.fromkeys(old, 40) and limits("3.7") == dict.fromkeys(old, 50)
    assert table("3.7", 60, new) == (["scan"], 0)
    assert limits("3.7") == dict.fromkeys(old, 50) | {"scan": 60}
    assert limits("3.6") == {"dlogits": 40, "top_k": 40}  # it has not compiled this `scan`
    assert static.committed()["digests"]["sm_90"] == new
    assert table("3.6", 41, new, spills=8) == (["scan"], 1)
    assert limits("3.6") == {"dlogits": 40, "top_k": 40}  # with something wrong, nothing is written
    assert table("3.6", 41, new) == (["scan"], 0)
    assert limits("3.6") == {"dlogits": 40, "top_k": 40, "scan": 41}
    assert limits("3.7") == dict.fromkeys(old, 50) | {"scan": 60}
    # The check is against the limits of the Triton that is installed.
    assert table("3.7", 50, new, arguments=()) == (everything, 0)
    compiled, bad = table("3.6", 50, new, arguments=())
    assert compiled == everything and bad == 1
    assert "50 registers, limit" in capsys.readouterr().out


def test_a_triton_without_limits_is_refused(table, capsys):
    sources = {"dlogits": "a", "scan": "b", "top_k": "c"}
    for version in ("3.6", "3.7"):
        table(version, 40, sources)
    for version in ("3.4", "3.9", "3.70"):
        with pytest.raises(SystemExit):
            table(version, 40, sources, arguments=())
        said = f"limits are committed of Triton 3.6, 3.7, not of {version}: see --write"
        assert said in capsys.readouterr().err


def test_what_cannot_count_bytes_is_refused(static, monkeypatch, capsys):
    monkeypatch.setattr(static.backend, "interpreter_unavailable", lambda: "needs another numpy")
    for arguments in ([], ["--write"]):
        with pytest.raises(SystemExit):
            static.main(arguments)
        said = "bytes are counted in the interpreter: needs another numpy"
        assert said in capsys.readouterr().err


def test_digests_refuse_what_they_do_not_see(tmp_path, static):
    code = MODULE.replace("import triton\n", "import triton\nfrom ift_kernels import backends\n", 1)
    kernel = some_kernel(tmp_path / "some.py", code.replace("outer(tl", "backends.outer(tl"))
    with pytest.raises(TypeError, match="some_kernel: import what it uses of backends by name"):
        static.kernel_code(kernel)


def test_every_function_has_a_call():
    """In the comparison of backends, and for every class of shapes of the launch table."""
    pytest.importorskip("triton")
    from ift_kernels.backends.triton import launch

    cpu = torch.device("cpu")
    compared = {name.partition(",")[0] for name in tune.calls(backend, cpu, 3, 40)}
    # No other backend has these.
    alone = {"fused_statistics", "add_active_products", "partly_plain_torch"}
    assert compared == backend._HOME.keys() - alone
    tuned = {(kernel, kind) for kernel, kind, _ in tune.subjects(True, cpu)}
    table = launch.table()["architectures"]["default"]
    assert tuned == {(kernel, kind) for kernel, kinds in table.items() for kind in kinds}


@pytest.mark.usefixtures("triton_interpreter")
def test_tuner_writes_a_table(tmp_path):
    path = tmp_path / "launch.json"
    kernels = "--kernels", "residual", "take", "--minutes", HANG, "--output", path
    done = python("-m", "bench", "tune", "--dry-run", *kernels, cwd=ROOT, without=SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(path.read_text())
    committed = json.loads((ROOT / "ift_kernels/backends/triton/launch.json").read_text())
    written = table["architectures"].pop("interpreter")
    assert table["architectures"] == committed["architectures"]
    assert set(written) == {"residual", "take"}
    assert set(written["residual"]) == {"narrow", "wide"}
    times = table["measured"]["interpreter"]["times"]
    assert len(times) == 8 and all("seconds" in row for row in times)
    # In rounds, the classes of large shapes first; the committed configuration is the first.
    order = [(row["kernel"], row["class"]) for row in times]
    assert order[:4] == order[4:]
    wanted = ["take", "wide"], ["residual", "wide"], ["take", "narrow"], ["residual", "narrow"]
    assert [list(each) for each in order[:4]] == list(wanted)
    default = committed["architectures"]["default"]
    assert all(row["config"] == default[row["kernel"]][row["class"]] for row in times[:4])
    assert all(row["config"] != default[row["kernel"]][row["class"]] for row in times[4:])


@pytest.mark.parametrize("kernel", ["dlogits", "fused", "mask"])
def test_neighbours_are_tried_first(kernel):
    committed = tune.CANDIDATES[kernel][3]
    first, *others = tune.candidates(kernel, committed)
    assert first == committed
    assert len(others) == len(tune.CANDIDATES[kernel]) - 1 and committed not in others
    changed = [sum(c[name] != committed[name] for name in c) for c in others]
    assert changed[0] == 1 and changed[-1] > 1
    odd = {name: 3 * value for name, value in committed.items()}  # not among the candidates
    assert tune.candidates(kernel, odd)[0] == odd


def test_tuner_keeps_to_its_time(tmp_path, monkeypatch):
    """What was measured by then is in the table, and the fastest so far is chosen."""
    launch = pytest.importorskip("ift_kernels.backends.triton.launch")
    now, path = [0.0], tmp_path / "launch.json"
    monkeypatch.setattr(machine, "now", lambda: now[0])
    monkeypatch.setattr(tune, "provenance", lambda *given: {})

    def call(seconds_of):
        return tune.Call(1, lambda: None, lambda: [torch.ones(1)])

    some = [
        ("residual", "narrow", call(1)),
        ("dlogits", "wide", call(2)),
        ("stats", "wide", call(3)),
    ]
    monkeypatch.setattr(tune, "subjects", lambda dry, device: iter(some))
    taken = iter((5.0, 1.0, 7.0, 4.0))

    def timed(subject, samples):
        now[0] += 20.0
        return next(taken)

    monkeypatch.setattr(tune, "seconds", timed)
    files = []
    replace = tune.write_text
    monkeypatch.setattr(tune, "write_text", lambda *given: (replace(*given), files.append(given)))
    options = ["--dry-run", "--minutes", "1.1", "--output", str(path)]
    assert tune.tune(options) == 0
    assert len(files) == 4  # after each, all of it in one step
    table = json.loads(path.read_text())
    times = table["measured"]["interpreter"]["times"]
    order = ["dlogits", "stats", "residual", "dlogits"]
    assert [row["kernel"] for row in times] == order
    chosen = table["architectures"]["interpreter"]
    assert chosen["dlogits"]["wide"] == times[3]["config"]  # the faster of two
    assert chosen["stats"]["wide"] == launch.config("stats", "wide", torch.device("cpu"))
