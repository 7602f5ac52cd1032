"""Which backends the tests of the operations run on: their tensors are on the CPU."""

import torch

from ift_kernels import backends

# Those for GPUs are available on a machine that has one, and serve none of these tensors.
BACKENDS = [
    name
    for name, backend in backends.BACKENDS.items()
    if not backend.unsupported_reason(torch.device("cpu"), torch.float32)
]
