"""Which backends and dtypes the tests of the operations run on: their tensors are on the CPU."""

import pytest
import torch

from ift_kernels import backends

# Those for GPUs are available on a machine that has one, and serve none of these tensors.
BACKENDS = [
    name
    for name, backend in backends.BACKENDS.items()
    if not backend.unsupported_reason(torch.device("cpu"), torch.float32)
]
needs_cpp = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# fp64 is served by the reference whatever the backend.
SERVED = [(b, d) for b in BACKENDS for d in DTYPES] + [("reference", torch.float64)]
