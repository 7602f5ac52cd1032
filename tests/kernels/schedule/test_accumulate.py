"""Sums over tiles: what rounding every product costs, and that those of CUDA are not rounded."""

import pytest
import torch

from ift_kernels.schedule import accumulate
from ift_kernels.schedule.accumulate import Sum, SumInResult

ROWS, INNER, WIDTH = 64, 4096, 48


@pytest.fixture
def fp32_products(monkeypatch):
    """`aten::addmm.dtype` of CUDA, which torch's CPU lacks; the products that were added."""
    added = []

    def add(total, a, b):
        added.append(a.shape)
        total.addmm_(a.float(), b.float())

    monkeypatch.setattr(accumulate, "adds_fp32_products", lambda like: like.dtype.itemsize == 2)
    monkeypatch.setattr(accumulate, "add_fp32_product", add)
    return added


def operands(dtype, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(ROWS, INNER, generator=generator) + mean
    b = torch.randn(INNER, WIDTH, generator=generator) + mean
    return a.to(dtype), b.to(dtype)


def summed(a, b, tile, row_tile=ROWS):
    total = Sum((ROWS, WIDTH), a, INNER)
    for start in range(0, INNER, tile):
        for row in range(0, ROWS, row_tile):
            rows, some = slice(row, row + row_tile), slice(start, start + tile)
            total.add(rows, a[rows, some], b[some])
    return total


def error(found, a, b):
    exact = a.double() @ b.double()
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tile", "row_tile"), [(64, 64), (256, 64), (64, 16), (4096, 32)])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_products_of_tiles_are_not_rounded(fp32_products, dtype, tile, row_tile, mean):
    a, b = operands(dtype, mean)
    found = summed(a, b, tile, row_tile)
    assert len(fp32_products) == INNER // tile * (ROWS // row_tile)
    assert error(found.result(torch.float32), a, b) < 1e-6
    assert found.result(dtype).dtype == dtype


def test_rounding_every_product_errs_more(monkeypatch):
    """By sqrt(tiles) at tiles of one size, and with a bias where the sum itself is rounded."""
    a, b = operands(torch.bfloat16)
    rounded = error(summed(a, b, 64).result(torch.float32), a, b)
    once = error((a.double() @ b.double()).bfloat16(), a, b)
    assert 0.5 * once < rounded < 2 * once
    a, b = operands(torch.bfloat16, 1.0)
    running = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16)
    for start in range(0, INNER, 64):
        running += a[:, start : start + 64] @ b[start : start + 64]
    assert error(running, a, b) > 3 * error(summed(a, b, 64).result(torch.bfloat16), a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_product_of_everything_is_the_sum(fp32_products, dtype):
    a, b = operands(dtype)
    into = torch.empty(ROWS, WIDTH, dtype=dtype)
    total = Sum((ROWS, WIDTH), a, INNER, into)
    total.add(slice(0, ROWS), a, b)
    assert total.result(dtype) is into and not fp32_products
    total.restart(16)
    total.add(slice(0, 16), a[:16], b)
    assert error(total.result(dtype), a[:16], b) < 4e-3


def test_on_cuda_alone(monkeypatch):
    """The operator exists there from torch 2.8 on; the settings of others are left as they were."""
    assert not accumulate.adds_fp32_products(torch.ones(1, dtype=torch.bfloat16))
    from ift_kernels.schedule import device

    monkeypatch.setattr(device, "of", lambda place: device.H200)
    half, single = (torch.ones(1, device="meta", dtype=d) for d in (torch.float16, torch.float32))
    assert accumulate.adds_fp32_products(half) == device.H200.fp32_out
    assert not accumulate.adds_fp32_products(single)
    if device.H200.fp32_out:  # its shapes and dtypes are those that torch wants
        total = torch.ones(3, 4, device="meta")
        a, b = half.new_empty(3, 5), half.new_empty(5, 4)
        accumulate.add_fp32_product(total[:2], a[:2], b)
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with accumulate.sums_in_fp32(torch.ones(1, dtype=torch.bfloat16)):
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == before


@pytest.mark.parametrize("fp32_out", [False, True])
@pytest.mark.parametrize(
    ("size", "rows", "tile"),
    [(200, 200, 64), (201, 201, 70), (200, 100, 48), (200, 150, 200), (33, 9, 8), (1, 1, 1)],
)
def test_a_sum_in_the_memory_of_its_result(fp32_products, monkeypatch, fp32_out, size, rows, tile):
    """Of two blocks, whatever the result held; what is not among its rows is not added."""
    monkeypatch.setattr(accumulate, "adds_fp32_products", lambda like: fp32_out)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, size, INNER, generator=generator).bfloat16()
    b = torch.randn(2, INNER, WIDTH, generator=generator).bfloat16()
    result = torch.full((size, WIDTH), torch.nan, dtype=torch.bfloat16)
    total = SumInResult(result, rows)
    for block in range(2):
        for start in range(0, size, tile):
            stop = min(start + tile, size)
            total.add(slice(start, stop), a[block, start:stop], b[block])
    inside, outside = size // 2, max(rows - size // 2, 0)
    assert [len(part) for _, part in total._totals] == [min(rows, inside), outside]
    assert total.result() is result
    wanted = (a.double() @ b.double()).sum(0)[:rows]
    assert (result[:rows] - wanted).norm() < 4e-3 * wanted.norm()
