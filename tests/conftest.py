"""What every test runs under: fixed threads and seeds, and no luck with unwritten memory."""

import os
import threading

import pytest
import torch

from ift_kernels.backends.cpu import memory

# Two give the parallel paths something to do, and the same sums on every machine. xdist workers
# already share the cores among them.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# Run by test_triton.py, in a process of its own.
collect_ignore_glob = [] if "TRITON_INTERPRET" in os.environ else ["*test_triton_interpreted*.py"]

ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_empty(monkeypatch):
    """Fill fresh memory with NaN (integers: their largest value), so no unwritten output can pass.

    Zeros are what a new process mostly gets, and they are right too often.
    """

    def filled(allocate):
        def wrapper(*args, **kwargs):
            memory = allocate(*args, **kwargs)
            with torch.no_grad():
                if memory.dtype == torch.bool:
                    return memory.fill_(True)
                floating = memory.is_floating_point() or memory.is_complex()
                return memory.fill_(float("nan") if floating else torch.iinfo(memory.dtype).max)

        return wrapper

    monkeypatch.setattr(memory, "LIMIT", 0)  # else it would hand out what was written before
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def backward_in_thread(monkeypatch):
    """Run every backward in a fresh thread, as autograd does for tensors of a GPU."""

    def in_thread(function):
        def run(*args, **kwargs):
            return fresh_thread(lambda: function(*args, **kwargs))

        return run

    for name in ("backward", "grad"):  # Tensor.backward calls the first
        monkeypatch.setattr(torch.autograd, name, in_thread(getattr(torch.autograd, name)))


def fresh_thread(function):
    """What `function` returns or raises in a thread without any context of this one."""
    done = []

    def work():
        try:
            done.append((function(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((value, error),) = done
    if error is not None:
        raise error
    return value
