"""How the schedule of the active set takes tiles together and cuts them into ranges."""

import pytest
import torch

import dense
import ift_kernels as K
from bench.harness import data as lmlike
from ift_kernels import active, active_backward, plan
from ift_kernels.active_set import ActiveSet
from ift_kernels.backends import cpu, reference
from ift_kernels.transform import LogitTransform
from serving import BACKENDS
from test_memory import Allocations, allowed, size

MIB = 1 << 20
TOGETHER = active_backward._together
needs_cpp = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")


@pytest.mark.parametrize("limit", [1, 7, 40, 1000])
def test_ranges_of_ids(limit):
    generator = torch.Generator().manual_seed(limit)
    for columns, tail in ((300, 64), (64, 64), (1, 64), (640, 128)):
        ids = torch.randint(columns, (200,), generator=generator).square() // columns
        found = list(active_backward._ranges(ids, columns, tail, limit))
        assert [f.start for f in found] == [0, *(f.stop for f in found[:-1])]
        assert found[-1].stop == columns
        counts = torch.bincount(ids, minlength=columns)
        for f in found:
            inside = f.start // tail == (f.stop - 1) // tail
            assert inside or (f.start % tail == 0 and (f.stop % tail == 0 or f.stop == columns))
            assert counts[f].sum() <= limit or f.stop - f.start == 1


def runs_of_tiles(monkeypatch, limit=None):
    """The runs in which backward takes tiles, once it does; with another limit than its own."""
    runs, together = [], TOGETHER

    def recorded(*arguments):
        for run, counts in together(*arguments[:-1], arguments[-1] if limit is None else limit):
            runs.append(run.stop - run.start)
            yield run, counts

    monkeypatch.setattr(active_backward, "_together", recorded)
    return runs


@needs_cpp
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("transform", [{}, dense.TRANSFORM], ids=["plain", "transformed"])
@pytest.mark.parametrize("wrt", ["both", "hidden"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiles_together(dtype, wrt, transform, block, monkeypatch):
    data = lmlike.generate(300, 48, 3000, dtype=dtype)
    bias = 0.1 * torch.randn(3000, generator=torch.Generator().manual_seed(0))
    bias[::97] = -torch.inf
    bias[data.target] = 0.0
    target = data.target.clone()
    target[290:] = -100
    weight = data.weight.requires_grad_(wrt == "both")
    inputs = [data.hidden.requires_grad_()] + ([weight] if wrt == "both" else [])
    chosen = ActiveSet(threshold=2.0**-7, block=block, tail_tile=256, dW="active")

    def found():
        stats = K.linear_logprobs(
            data.hidden, weight, target, bias=bias, gradient=chosen, **transform,
            outputs=("logprob", "entropy", "lse"),
        )  # fmt: skip
        total = stats.logprob.sum() - 0.3 * stats.entropy[:200].sum() + 0.1 * stats.lse.sum()
        return torch.autograd.grad(total, inputs)

    monkeypatch.setattr(active, "TILE_BYTES", 384 * 256 * 2)
    runs = runs_of_tiles(monkeypatch, limit=-1)
    alone = found()
    assert runs == [1] * 12
    runs = runs_of_tiles(monkeypatch)
    for mine, other in zip(found(), alone, strict=True):
        distance = (mine.double() - other.double()).norm() / other.double().norm()
        assert distance <= torch.finfo(dtype).eps  # the products are not rounded alike
    assert sum(runs) == 12 and max(runs) > 1 and (block == 32 or len(runs) > 1)


@needs_cpp
@pytest.mark.parametrize("transform", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_blocks_in_several_runs(dtype, transform):
    n, block, columns, tile = 75, 32, 200, 64
    generator = torch.Generator().manual_seed(0)
    marks = torch.rand((3, columns), generator=generator) < 0.4
    marks[1, 70:] = False  # one run only, which ends early
    marks[2, :70] = False
    parts = [marks[:, some].nonzero() for some in (slice(0, 70), slice(70, 71), slice(71, columns))]
    for part, start in zip(parts, (0, 70, 71), strict=True):
        part[:, 1] += start
    pairs = torch.cat(parts)
    products = torch.randn((len(pairs), block), generator=generator).to(dtype)
    target = pairs[torch.randint(len(pairs), (n,), generator=generator), 1] + 30
    bias = torch.randn(columns, generator=generator)
    norm, coef = torch.rand((2, 96), generator=generator) + 2, torch.randn(4, 96)
    coef[:, n:] = coef[:, 5] = 0
    base = torch.randn((4, 96), generator=generator)
    profile = torch.rand(columns, generator=generator)
    widths = [-(-int(of) // 32) * 32 for of in marks.sum(1)]
    results = []
    for side in (cpu, reference):
        store = products.clone()
        copy = torch.full((block * sum(widths) + 64,), 7.0, dtype=dtype)
        side.active_gradient_(
            store, pairs, n, bias, LogitTransform(**transform), target, 30, norm, coef, base, tile,
            profile, copy if dtype != torch.float32 else None,
        )  # fmt: skip
        results.append((store, copy))
    for mine, other in zip(*results, strict=True):
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding)
    if dtype != torch.float32:  # the copy is the store, in the order of the ids
        store, copy = results[0]
        written = 0
        for number, width in enumerate(widths):
            of_block = copy[written : written + block * width].view(block, width)
            some = store[pairs[:, 0] == number]
            assert torch.equal(of_block[:, : len(some)], some.T)
            assert not of_block[:, len(some) :].any()
            written += block * width
        assert (copy[written:] == 7).all()


@needs_cpp
@pytest.mark.parametrize(("tail_tile", "block"), [(64, 128), (128, 32), (2048, 128)])
def test_peak(tail_tile, block):
    # Few active columns, so runs of very many tiles, and as many tail tiles as there can be.
    data = lmlike.generate(512, 64, 30000, dtype=torch.bfloat16)
    h = dense.Head((3 * data.hidden).requires_grad_(), data.weight.requires_grad_(), data.target)
    chosen = ActiveSet(threshold=2.0**-9, block=block, tail_tile=tail_tile, dW="active")
    start, workspace = plan.ledger.held, 8 * MIB
    with K.use_backend("cpu"):
        most = allowed(h, workspace)
        with Allocations() as forward:
            stats = K.linear_logprobs(
                h.hidden, h.weight, h.target, workspace=workspace, gradient=chosen
            )
        assert forward.peak <= most, f"{forward.peak / MIB} MiB"
        held = plan.ledger.held - start
        with Allocations() as backward:
            stats.logprob.sum().backward()
    peak = backward.peak + held - size(h.hidden.grad, h.weight.grad)
    assert peak <= most, f"{peak / MIB} MiB"


@needs_cpp
def test_a_head_that_is_cast_is_cast_tile_by_tile(monkeypatch):
    data = lmlike.generate(300, 48, 3000)
    inputs = [data.hidden.requires_grad_(), data.weight.requires_grad_()]
    chosen = ActiveSet(threshold=2.0**-7, block=32, tail_tile=256, dW="active")
    monkeypatch.setattr(active, "TILE_BYTES", 384 * 256 * 2)
    runs = runs_of_tiles(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        log_p = K.linear_logprobs(*inputs, data.target, gradient=chosen).logprob
    mixed = torch.autograd.grad(log_p.sum(), inputs)
    assert set(runs) == {1} and len(runs) > 10
    log_p = K.linear_logprobs(*inputs, data.target, gradient=chosen).logprob
    for mine, other in zip(mixed, torch.autograd.grad(log_p.sum(), inputs), strict=True):
        assert (mine - other).norm() <= 0.02 * other.norm()
