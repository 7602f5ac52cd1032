"""The fixture that the other tests lean on must itself be able to fail them."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_unwritten_floats_are_nan(dtype):
    x = torch.zeros(3, 5, dtype=dtype)
    fresh = [
        torch.empty(7, dtype=dtype),
        torch.empty_like(x),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        x.new_empty(4),
        x.new_empty_strided((2, 3), (3, 1)),
    ]
    assert all(memory.isnan().all() for memory in fresh)
    assert torch.empty(3, requires_grad=True).requires_grad


def test_unwritten_integers_are_out_of_range():
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_compiled_code_still_traces():
    function = torch.compile(
        lambda x: torch.empty_like(x).copy_(x), fullgraph=True, backend="eager"
    )
    assert torch.equal(function(torch.ones(3)), torch.ones(3))
