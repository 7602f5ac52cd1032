"""What is counted instead of timed is no more than what is committed."""

import copy

import pytest
import torch

from bench.harness.machine import ROOT
from bench.suites import counts
from processes import python


def test_no_operation_does_more_than_committed():
    """In a process of its own: this one fills fresh memory, which counts."""
    done = python("-m", "bench", "counts", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_counts_of_a_call_that_is_known(monkeypatch):
    def call():
        product = torch.ones(8, 16) @ torch.ones(16, 4)
        return (product + 1).sum().item()

    monkeypatch.undo()  # fresh memory is not filled here
    found = counts.count(call)
    assert found["products"] == 1 and found["flops"] == 2 * 8 * 16 * 4
    assert found["reads"] == 1
    assert found["bytes"] >= 4 * (8 * 16 + 16 * 4 + 2 * 8 * 4)
    assert found["operators"] >= 5  # ones twice, matmul, add, sum


def test_every_operation_is_committed_and_costs_its_products():
    n, d, v = counts.SIZES
    for backend in counts.committed().values():
        assert backend.keys() == counts.operations().keys()
        for what, products in [("linear_logprobs", 1), ("linear_token", 1)]:
            assert backend[what]["flops"] == products * 2 * n * d * v
        for what in ("linear_logprobs, backward", "linear_cross_entropy, backward"):
            assert 3 * 2 * n * d * v <= backend[what]["flops"] <= 4 * 2 * n * d * v
        assert backend["linear_logprobs, active, head trained"]["flops"] < 2.8 * 2 * n * d * v
        # With the head frozen, in so small a workspace: a dense product has to be formed again.
        assert backend["linear_logprobs, active"]["flops"] < 2.5 * 2 * n * d * v


def test_epilogues_are_counted_and_the_backend_is_left_as_it_was():
    x, before = torch.ones(2, 3), counts.reference.scan
    with counts.ift_kernels.use_backend("reference"):
        found = counts.count(lambda: counts.ift_kernels.discounted_cumsum(x, 0.5))
    assert found["epilogues"] == 1
    assert counts.reference.scan is before


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_epilogues_of_divergences_are_counted(kind):
    h, w, y = torch.ones(4, 8, requires_grad=True), torch.ones(50, 8), torch.zeros(4, 8)

    def call(reduction):
        loss = counts.ift_kernels.linear_divergence(h, w, y, w, kind=kind, reduction=reduction)
        torch.autograd.grad(loss.sum(), h)

    with counts.ift_kernels.use_backend("reference"):
        for reduction in ("mean", "none"):
            found = counts.count(lambda reduction=reduction: call(reduction))
            # Statistics of both heads, the gradient; terms unless the gradient's pass has them.
            assert found["epilogues"] >= 3


def test_every_function_of_the_contract_is_an_epilogue_or_on_the_host():
    """A new one is counted without being listed here or there."""
    named = {name for name in vars(counts.contract.Backend) if not name.startswith("_")}
    assert set(counts.EPILOGUES) | set(counts.contract.ON_HOST) == named | {"fused_statistics"}
    assert set(counts.contract.ON_HOST) <= named  # renamed, it would be missed there
    for name in counts.EPILOGUES:
        assert hasattr(counts.reference, name) or name == "fused_statistics"


@pytest.mark.parametrize("more", ["products", "bytes", "operators", "reads", "epilogues"])
def test_more_of_anything_fails_and_less_does_not(more, monkeypatch, capsys):
    known = counts.committed()
    for change, code in ((1, 1), (-1, 0)):
        now = copy.deepcopy(known)
        now["reference"]["linear_token"][more] += change
        monkeypatch.setattr(counts, "measure", lambda now=now: now)
        assert counts.main([]) == code
        assert f"{more} " in capsys.readouterr().out


@pytest.mark.parametrize("now", [5, 3])
def test_differences(now):
    found, known = ({"cpu": {"op": {"products": value, "reads": 0}}} for value in (now, 4))
    assert counts.differences(found, known) == [("cpu", "op", "products", 4, now)]
    assert counts.differences(known, known) == []
