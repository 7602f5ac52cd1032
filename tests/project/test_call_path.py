"""The way of `hidden` from a public function down to the epilogue, and back to its gradient."""

import sys
from pathlib import Path

import torch

import ift_kernels
from ift_kernels.backends import cpu
from ift_kernels.schedule import plan

PACKAGE = Path(ift_kernels.__file__).parent
LAYERS = ("", "operators", "schedule", "backends")  # what a file lies under, from the top


def layer(path):
    folder = Path(path).relative_to(PACKAGE).parts[0]
    return LAYERS.index(folder) if folder in LAYERS else 0


def path_to(monkeypatch, name, call):
    """(file, function) of the package on the stack of the backend's function `name`."""
    seen = []

    def epilogue(*args):
        if not seen:
            frame = sys._getframe(1)
            while frame is not None:
                code = frame.f_code
                if code.co_filename.startswith(str(PACKAGE)):
                    seen.append((code.co_filename, code.co_qualname))
                frame = frame.f_back
        return real(*args)

    real = getattr(cpu, name)
    with monkeypatch.context() as patched:
        patched.setattr(cpu, name, epilogue)
        call()
    return seen[::-1]


def assert_short(path):
    # What decorates an operator (settings of forward, forward mode) is one layer's own.
    layers = [layer(file) for file, _ in path]
    assert len(path) + 1 <= 10, path  # and the epilogue itself
    assert layers == sorted(layers), path
    assert len(set(path)) == len(path), path


def test_hidden_passes_few_functions(monkeypatch):
    hidden = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    target = torch.arange(8)
    results = []

    def forward():
        results.append(ift_kernels.linear_logprobs(hidden, weight, target).logprob)

    with ift_kernels.use_backend("cpu"), plan.use_schedule("recompute"):
        down = path_to(monkeypatch, "stats_update", forward)
        assert_short(down)
        back = path_to(monkeypatch, "dlogits_", lambda: results[0].sum().backward())
        assert_short(back)
