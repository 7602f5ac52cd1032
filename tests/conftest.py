"""What every test runs under: fixed threads and seeds, and no luck with unwritten memory."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import unwritten
from ift_kernels import use_backend
from ift_kernels.backends import triton
from ift_kernels.backends.cpu import memory
from ift_kernels.schedule import active, plan
from serving import BACKENDS, SERVED

# Two give the parallel paths something to do, and the same sums on every machine. xdist workers
# already share the cores among them.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# No doctests: there is another of this name in tests/api.
collect_ignore_glob = ["*conftest.py"]
if "TRITON_INTERPRET" not in os.environ:  # run by test_triton.py, in a process of its own
    collect_ignore_glob.append("*test_triton_interpreted*.py")


def pytest_collection_finish():
    """What was imported stays: no collection of garbage goes through its million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_empty(monkeypatch):
    """Fill fresh memory with NaN (integers: their largest value), so no unwritten output can pass.

    Zeros are what a new process mostly gets, and they are right too often.
    """

    monkeypatch.setattr(memory, "LIMIT", 0)  # else it would hand out what was written before
    for owner, name in unwritten.ALLOCATORS:
        monkeypatch.setattr(owner, name, unwritten.filled(getattr(owner, name)))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of the backend that serves the test."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=SERVED, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def dtype(request):
    """A dtype, with the backend that serves it chosen."""
    with use_backend(request.param[0]):
        yield request.param[1]


@pytest.fixture(params=plan.SCHEDULES)
def schedule(request):
    """The name of the schedule that the linear operations take."""
    with plan.use_schedule(request.param):
        yield request.param


@pytest.fixture
def sparse(monkeypatch):
    """No tile is left dense, however many of its columns are active."""
    monkeypatch.setattr(active, "DENSE_SHARE", 2.0)


@pytest.fixture
def set_num_threads():
    """`torch.set_num_threads` until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def triton_interpreter():
    """Skip the test where there is no Triton, or its interpreter does not work with this numpy."""
    pytest.importorskip("triton")
    if reason := triton.interpreter_unavailable():
        pytest.skip(reason)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def backward_in_thread(monkeypatch):
    """Run every backward in a fresh thread, as autograd does for tensors of a GPU."""

    def in_thread(function):
        def run(*args, **kwargs):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(function, *args, **kwargs).result()

        return run

    for name in ("backward", "grad"):  # Tensor.backward calls the first
        monkeypatch.setattr(torch.autograd, name, in_thread(getattr(torch.autograd, name)))
