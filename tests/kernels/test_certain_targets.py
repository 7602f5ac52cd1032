"""What a nearly certain target leaves to all others is not lost: its gradient by expm1."""

import sys

import pytest
import torch

import certain_targets as certain
import cuda_emulator
import ift_kernels as K
from serving import BACKENDS

EMULATED = ["cuda"] if sys.platform == "linux" else []


@pytest.mark.parametrize("schedule", certain.SCHEDULES)
@pytest.mark.parametrize("transform", certain.TRANSFORMS)
@pytest.mark.parametrize("name", [*BACKENDS, *EMULATED])
def test_gradient_of_the_target(name, transform, schedule, sparse, monkeypatch):
    if name in EMULATED:
        cuda_emulator.serve(monkeypatch.setattr)
    transform = certain.TRANSFORMS[transform]
    # A block of 1024 columns and part of one; few, so that one of them decides.
    many, copies = (150, 1) if name in EMULATED else (1100, 6)
    for columns, dtype in ((many, torch.float32), (7, torch.float32), (70, torch.bfloat16)):
        given = certain.tokens(columns, dtype, transform, copies)
        with K.use_backend(name):
            certain.assert_gradient(given, transform, schedule)
