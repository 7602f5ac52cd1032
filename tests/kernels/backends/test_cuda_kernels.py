"""The kernels of csrc/cuda without a GPU: on the emulator, and what the compiler makes of them.

The emulator (tests/cuda_emulator) runs the sources as they are, with every thread of every block,
behind the real Python backend. It has no approximate instructions and no timing: those need a GPU.
"""

import ctypes
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import test_backends
import torch

import cuda_emulator
import ift_kernels
from ift_kernels.backends import cpu, reference, selection
from processes import python_with_tests
from serving import DTYPES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")


@pytest.fixture
def emulated(monkeypatch):
    """The extension, with CPU tensors served by its kernels."""
    return cuda_emulator.serve(monkeypatch.setattr)


# In both orders of a block's threads, so that a missing barrier shows in one of them.
@pytest.mark.parametrize(("reverse", "seed"), [(False, 1), (True, 2)], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_kernels_equal_the_reference(dtype, reverse, seed, emulated):
    set_order = ctypes.CDLL(emulated.__file__).emulated_order
    set_order(reverse, seed)
    try:
        with ift_kernels.use_backend("cuda"):
            ours = test_backends.results(dtype)
    finally:
        set_order(False, 0)
    test_backends.assert_same(ours, test_backends.of_the_reference(dtype), dtype)


WRONG = """
#include <cuda_runtime.h>

__global__ void unwritten_kernel(float* out) {  // half of what it reads was not written
  __shared__ float values[64];
  if (threadIdx.x < 32) values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[64 * blockIdx.x + threadIdx.x] = values[threadIdx.x];
}

__global__ void chain_kernel(float* out) {  // counts on the block before having run
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x ? out[blockIdx.x - 1] + 1.0f : 1.0f;
}

extern "C" __attribute__((visibility("default"))) void run(float* unwritten, float* chain) {
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(64);
  config.gridDim = dim3(2);
  cudaLaunchKernelEx(&config, unwritten_kernel, unwritten);
  config.gridDim = dim3(20);
  cudaLaunchKernelEx(&config, chain_kernel, chain);
}
"""


def test_the_emulator_shows_unwritten_shared_memory_and_dependence_on_the_order(tmp_path):
    source, library = tmp_path / "wrong.cu", tmp_path / "wrong.so"
    source.write_text(WRONG)
    flags = *cuda_emulator.FLAGS.split(), f"-I{cuda_emulator.HERE}", "-shared"
    subprocess.run([*cuda_emulator.compiler(), *flags, source, "-o", library], check=True)
    cuda_emulator.fill_shared_memory(library)
    unwritten, chain = torch.zeros(2, 64), torch.zeros(20)
    run = ctypes.CDLL(str(library)).run
    run(ctypes.c_void_p(unwritten.data_ptr()), ctypes.c_void_p(chain.data_ptr()))
    assert (unwritten[:, :32] == 1).all() and unwritten[:, 32:].isnan().all()
    assert not torch.equal(chain, torch.arange(1.0, 21.0)) and chain[0] == 1


def test_all_shared_memory_is_found():
    """By its symbols: as many variables as the sources declare, of one kernel or another."""
    sources = (cuda_emulator.ROOT / "csrc/cuda").glob("*.cuh")
    lines = [line for s in sources for line in re.findall(r"__shared__ ([^;]+);", s.read_text())]
    declared = {re.findall(r"\w+", part.split("[")[0])[-1] for line in lines
                for part in line.split(",")}  # fmt: skip
    listed = subprocess.run(["nm", "-S", cuda_emulator.build()], capture_output=True, text=True)
    found = "\n".join(m[0] for m in cuda_emulator.SHARED.finditer(listed.stdout))
    assert declared and all(re.search(rf"{len(name)}{name}$", found, re.MULTILINE)
                            for name in declared)  # fmt: skip


def test_operations_on_the_emulator():
    """Tests of the operations that any backend must pass, with the kernels serving them."""
    files = "schedule/test_active_set.py", "schedule/test_active_hidden.py", "test_residual.py"
    paths = [Path(__file__).parents[1] / file for file in files]
    # Not what names another backend, nor what a backend has no part in and takes long: torch's own
    # checks of an operator. Of the gradients that the exact schedules form, not those of many ids.
    few = "not contract and not compile and not workspace and not cpu and not reference"
    few += " and not (active_hidden and (peak or scalar))"
    # Sets formed in forward, and again in backward: not each in every workspace.
    few += " and not (error_at_the_default and (4MiB and keep or recompute and not 4MiB))"
    # Each output and each kind of head with one of the other.
    few += " and not (a_block_of_rows and (1-frozen or 2-trained))"
    pytest_ = "-m", "pytest", "-p", "cuda_emulator"
    done = python_with_tests(*pytest_, *paths, "-k", few, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_errors_carry_the_name_of_cuda(emulated):
    x = torch.zeros(4, 8)
    with pytest.raises(emulated.CudaError, match=r"cudaErrorInvalidDevice \(101\): invalid device"):
        emulated.scan(emulated.Queue(7, 0), 0, x.data_ptr(), 0, 0, x.data_ptr(), 4, 8, 0.5, True)
    with pytest.raises(RuntimeError, match=r"cudaErrorInvalidConfiguration: scan_kernel needs"):
        emulated.scan(emulated.Queue(0, 0), 0, 0, 0, 0, 0, 2**31, 8, 0.5, True)
    with pytest.raises(emulated.CudaError, match="unknown dtype code 9"):
        emulated.scan(emulated.Queue(0, 0), 9, 0, 0, 0, 0, 4, 8, 0.5, True)


def test_the_current_device_is_restored(emulated):
    """Work of a tensor on device 1 runs there; the thread's device stays what it was."""
    library = ctypes.CDLL(emulated.__file__)
    x, out = torch.ones(2, 8), torch.empty(2, 8)
    queue = emulated.Queue(1, 0)
    emulated.scan(queue, 0, x.data_ptr(), 0, 0, out.data_ptr(), 2, 8, 1.0, False)
    assert library.emulated_last_device() == 1
    assert library.emulated_current_device() == 0
    torch.testing.assert_close(out, torch.arange(1.0, 9.0).expand(2, 8))


def test_two_threads_at_once(emulated):
    x, queue = torch.rand(64, 100), emulated.Queue(0, 0)
    outs = [torch.empty_like(x) for _ in range(4)]

    def work(out):
        for _ in range(5):
            emulated.scan(queue, 0, x.data_ptr(), 0, 0, out.data_ptr(), 64, 100, 1.0, False)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        torch.testing.assert_close(out, x.cumsum(1))


def test_the_faster_backend_serves_function_by_function(monkeypatch):
    device, serving = torch.device("cuda:0"), {"cpu": cpu, "reference": reference}
    assert selection.faster(serving, device) is cpu  # nothing is measured
    table = {"sm_90": {"scan": "reference", "dlogits_": "absent"}}
    monkeypatch.setattr(selection, "FASTER", table)
    monkeypatch.setattr(selection, "_architecture", lambda index: "sm_90")
    mixed = selection.faster(serving, device)
    assert mixed.scan is reference.scan
    assert mixed.dlogits_ is cpu.dlogits_ and mixed.__name__ == cpu.__name__
    # Two heads are served by one backend: `divergence_blocks.Products` would take the reference.
    assert selection.faster(dict(serving), device) is mixed
    monkeypatch.setattr(selection, "_architecture", lambda index: "sm_80")
    assert selection.faster(serving, device) is cpu
    assert selection.faster(serving, torch.device("cpu")) is cpu
