"""What a machine with a GPU runs: its dry runs, and how a part goes on where it stopped."""

import ast
import importlib
import importlib.util
import json
import pkgutil
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import run as gpu
from bench.gpu import tune
from bench.harness import machine
from bench.harness.machine import ROOT
from bench.suites import command
from ift_kernels.backends import triton as backend
from processes import SETTINGS, python, run


@pytest.fixture
def static():
    """`bench.gpu.static`, which needs Triton."""
    pytest.importorskip("triton")
    from bench.gpu import static

    return static


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_has_a_dry_run(part, tmp_path):
    """With the same steps as on a GPU, none of which asks for one."""
    dry, real = ({step.name for step in gpu.steps(part, tmp_path, d)} for d in (True, False))
    assert len(dry) >= 1 and len(real) >= 1
    for step in gpu.steps(part, tmp_path, True):
        assert step.command[0] in (sys.executable, step.needs)
        assert "cuda" not in step.command
        written = [word for word in step.command if word != sys.executable]
        assert str(ROOT) not in " ".join(written)  # results stay out of the checkout


@pytest.mark.parametrize("dry", [True, False])
def test_suites_know_the_options_that_they_are_given(dry, tmp_path):
    seen = set()
    for part in gpu.PARTS:
        for step in gpu.steps(part, tmp_path, dry):
            if step.command[1:3] == ["-m", "bench"] and step.command[3] in command.SUITES:
                seen.add(command.parse(step.command[3:]).suite)
    assert seen >= {"head", "active", "ops", "losses"}


CODE = sys.executable, "-c"


def test_a_part_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    ran = tmp_path / "ran"
    note = f"open({str(ran)!r}, 'a').write('x')"
    found = [
        gpu.Step("good", [*CODE, note]),
        gpu.Step("bad", [*CODE, "raise SystemExit(3)"]),
        gpu.Step("program", [*CODE, note], needs="no-such-program"),
    ]
    monkeypatch.setattr(gpu, "steps", lambda part, out, dry: found)
    monkeypatch.setattr(gpu, "revision", lambda: "one")
    monkeypatch.setattr(machine, "now", lambda: 0.0)
    assert gpu.run("ops", tmp_path, True, 10.0) == 1  # what is absent is no failure
    printed = capsys.readouterr().out
    assert "bad: failed with 3" in printed
    assert "program needs no-such-program, which is not installed: left out" in printed
    state = json.loads((tmp_path / "ops.state.json").read_text())
    assert state["steps"]["good"]["outcome"] == "done"
    assert state["steps"]["program"]["outcome"] == "absent"
    found[1] = gpu.Step("bad", [*CODE, "pass"])
    assert gpu.run("ops", tmp_path, True, 10.0) == 0
    assert "good: done, not run again" in capsys.readouterr().out
    assert ran.read_text() == "x"
    monkeypatch.setattr(gpu, "revision", lambda: "two")
    assert gpu.run("ops", tmp_path, True, 10.0) == 0
    assert ran.read_text() == "xx"
    assert gpu.run("ops", tmp_path, True, 0.0) == 1  # no time for what is absent to be looked for


def test_a_step_that_takes_too_long_is_stopped(tmp_path):
    step = gpu.Step("long", [*CODE, "while True: pass"])
    assert gpu._run(step, tmp_path, 0)["outcome"] == "stopped after 0 s"


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


def test_backends_beside_each_other():
    found = tune.compare(torch.device("cpu"), True)
    served = {row["backend"] for row in found["rows"]}
    assert "reference" in served
    assert not [row for row in found["rows"] if "refused" in row]
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["overhead"] > 0 and row["of_copy"] > 0


def test_a_backend_with_another_result_gets_no_time(monkeypatch):
    reference = tune.installed.BACKENDS["reference"]

    class Wrong:
        unsupported_reason = staticmethod(lambda device, dtype: "")
        scan = staticmethod(lambda *arguments: reference.scan(*arguments) + 1)

        def __getattr__(self, name):
            return getattr(reference, name)

    some = {"reference": reference, "wrong": Wrong()}
    monkeypatch.setattr(tune.installed, "BACKENDS", some)
    rows = tune.compare(torch.device("cpu"), True)["rows"]
    assert [(r["backend"], r["function"]) for r in rows if "refused" in r] == [("wrong", "scan")]


def test_what_is_faster():
    def row(function, backend, seconds):
        return {"function": function, "backend": backend, "seconds": seconds}

    rows = [
        row("scan", "triton", 2.0), row("scan", "cuda", 1.0), row("scan", "reference", 9.0),
        row("dlogits_", "triton", 1.0), row("dlogits_", "cuda", 0.99),
        {"function": "residual", "backend": "triton", "refused": "another result"},
        row("residual", "cuda", 1.0),
    ]  # fmt: skip
    assert tune.faster(rows) == {"scan": "cuda"}


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
    assert compared == backend._HOME.keys() - {"fused_statistics"}  # no other backend has that
    tuned = {(kernel, kind) for kernel, kind, _ in tune.subjects(True, cpu)}
    table = launch.table()["architectures"]["default"]
    assert tuned == {(kernel, kind) for kernel, kinds in table.items() for kind in kinds}


def test_tuner_writes_a_table(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "launch.json"
    kernels = "--kernels", "residual", "split", "--output", path
    done = python("-m", "bench", "tune", "--dry-run", *kernels, cwd=ROOT, without=SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(path.read_text())
    committed = json.loads((ROOT / "ift_kernels/backends/triton/launch.json").read_text())
    written = table["architectures"].pop("interpreter")
    assert table["architectures"] == committed["architectures"]
    assert set(written) == {"residual", "split"}
    assert set(written["residual"]) == {"narrow", "wide"}
    times = table["measured"]["interpreter"]["times"]
    assert len(times) > 4 and all("seconds" in row for row in times)
