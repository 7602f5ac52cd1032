"""Backward in another thread, under other settings: as forward has decided."""

import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch

import ift_kernels
from ift_kernels import backends, use_backend
from ift_kernels.common import settings
from ift_kernels.schedule import plan
from operations import OPERATIONS
from serving import BACKENDS

needs_two = pytest.mark.skipif(len(BACKENDS) < 2, reason="the C++ extension is not built")


@pytest.fixture
def served(monkeypatch):
    """The names of the backends that operators took since the last look, and in which thread."""
    names, get = [], backends.get

    def spy(*args):
        backend = get(*args)
        names.append((backend.__name__.rpartition(".")[2], threading.get_ident()))
        return backend

    monkeypatch.setattr(backends, "get", spy)
    return names


def environment(name):
    """IFT_BACKEND inside a ``with`` block; None for unset."""
    patch = pytest.MonkeyPatch()
    stack = ExitStack()
    stack.callback(patch.undo)
    patch.setenv("IFT_BACKEND", name) if name else patch.delenv("IFT_BACKEND", raising=False)
    return stack


# Gathered head rows are multiplied by torch alone.
SERVED = {name: op for name, op in OPERATIONS.items() if name != "log-probabilities in a set"}
# Settings of forward, settings of backward, and the backend of both.
CASES = {
    "reference, then none": (lambda: use_backend("reference"), nullcontext, "reference"),
    "none, then reference": (nullcontext, lambda: use_backend("reference"), "cpu"),
    "reference, then cpu": (
        lambda: use_backend("reference"), lambda: use_backend("cpu"), "reference",
    ),
    "cpu, then the environment's": (
        lambda: use_backend("cpu"), lambda: environment("reference"), "cpu",
    ),
    "none, then the environment's": (nullcontext, lambda: environment("reference"), "cpu"),
    "the environment's, then none": (
        lambda: environment("reference"), lambda: environment(None), "reference",
    ),
}  # fmt: skip


@needs_two
@pytest.mark.usefixtures("backward_in_thread")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", ["recompute", "keep", "forward"])
@pytest.mark.parametrize("operation", SERVED.values(), ids=SERVED)
def test_backward_has_the_backend_of_forward(operation, schedule, case, served):
    first, then, name = CASES[case]
    tensors = [t.requires_grad_() for t in operation.inputs()]
    with first(), plan.use_schedule(schedule):
        value = operation.ours(*tensors)
    forward = len(served)
    # The operations in plain torch around ours may run in either thread.
    with then():
        torch.autograd.grad(value.sum(), tensors, retain_graph=True)
        torch.autograd.grad(value.sum(), tensors)
    names = [name for name, _ in served]
    assert forward and set(names) == {name}
    # Gradients that forward has formed need no backend in backward, but the second call does.
    assert len(names) > forward
    assert {thread for _, thread in served[forward:]} - {threading.get_ident()}


@needs_two
@pytest.mark.parametrize("name", ["logprobs", "divergence per token", "temporal residual"])
def test_two_threads_at_once(name, served):
    """The backward of each call takes its own backend, while the other's runs."""
    operation, wanted = OPERATIONS[name], {}
    start, values = threading.Barrier(2), {}
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            tensors = [t.requires_grad_() for t in operation.inputs()]
            values[backend] = operation.ours(*tensors).sum(), tensors
            wanted[backend] = torch.autograd.grad(operation.ours(*tensors).sum(), tensors)
    served.clear()

    def work(backend):
        value, tensors = values[backend]
        start.wait()
        for _ in range(10):
            gradients = torch.autograd.grad(value, tensors, retain_graph=True)
        return gradients

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, values))
    torch.testing.assert_close(found, list(wanted.values()), rtol=1e-6, atol=1e-7)
    calls = Counter(name for name, _ in served)
    assert calls["reference"] == calls["cpu"] > 0


def test_two_threads_in_one_graph():
    """What forward has kept is consumed by one of them alone."""
    for name in ("logprobs", "cross-entropy", "logprobs of a frozen head", "active", "divergence"):
        operation = OPERATIONS[name]
        tensors = [t.requires_grad_() for t in operation.inputs()]
        wanted = torch.autograd.grad(operation.plain(*tensors).sum(), tensors)
        for _ in range(5):
            value, start = operation.ours(*tensors).sum(), threading.Barrier(3)

            def work(_, value=value, start=start, tensors=tensors):
                start.wait()
                return torch.autograd.grad(value, tensors, retain_graph=True)

            with ThreadPoolExecutor(3) as pool:
                found = list(pool.map(work, range(3)))
            torch.testing.assert_close(found, [wanted] * 3, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backward_in_thread")
def test_launch_configurations_go_with_forward(monkeypatch):
    pytest.importorskip("triton")
    from ift_kernels.backends.triton import launch

    seen, get = [], backends.get

    def spy(*args):
        seen.append(launch.config("dlogits", "wide", torch.device("cpu")))
        return get(*args)

    monkeypatch.setattr(backends, "get", spy)
    for operation in (OPERATIONS["cross-entropy per token"], OPERATIONS["discounted sums"]):
        tensors = [t.requires_grad_() for t in operation.inputs()]
        seen.clear()
        with launch.use_config("dlogits", {"BLOCK": 7}), launch.use_architecture("sm_90"):
            value = operation.ours(*tensors)
        with launch.use_config("dlogits", {"BLOCK": 8}):
            torch.autograd.grad(value.sum(), tensors)
        assert len(seen) > 1 and seen == [{"BLOCK": 7}] * len(seen)


def test_every_context_variable_is_a_setting():
    """One that is declared elsewhere would have another value in backward."""
    sources = {
        path: path.read_text(encoding="utf-8")
        for path in Path(ift_kernels.__file__).parent.rglob("*.py")
        if path.name != "settings.py"
    }
    assert not [
        p for p, text in sources.items() if re.search(r"ContextVar\(|threading\.local", text)
    ]
    used = sum(len(re.findall(r"^_\w+ = (?:Setting\[.*\]|_[A-Z]\w+)\(\"ift_", text, re.M))
               for text in sources.values())  # fmt: skip
    declared = {setting._variable.name for setting in settings._settings}
    assert {"ift_backend", "ift_schedule", "ift_sync_free", "ift_active_report"} <= declared
    assert used >= len(declared)
