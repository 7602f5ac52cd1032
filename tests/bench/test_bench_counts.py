"""What is counted instead of timed is no more than what is committed."""

import copy

import pytest
import torch

from bench.harness.machine import ROOT
from bench.suites import counts
from ift_kernels.backends import contract
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
    assert found["peak"] < found["bytes"]
    assert found["operators"] >= 5  # ones twice, matmul, add, sum


def test_every_operation_is_committed_and_costs_its_products():
    operations = counts.operations().keys()
    for name, backend in counts.committed().items():
        n, d, v = (counts.FULL if name == counts.FULL_SIZE else counts.SMALL).shape
        assert backend.keys() == operations
        for what, products in [("linear_logprobs", 1), ("linear_token", 1)]:
            assert backend[what]["flops"] == products * 2 * n * d * v
        for what in ("linear_logprobs, backward", "linear_cross_entropy, backward"):
            assert 3 * 2 * n * d * v <= backend[what]["flops"] <= 4 * 2 * n * d * v
        if name == counts.FULL_SIZE:
            continue
        assert backend["linear_logprobs, active, head trained"]["flops"] < 2.8 * 2 * n * d * v
        # With the head frozen, in so small a workspace: a dense product has to be formed again.
        assert backend["linear_logprobs, active"]["flops"] < 2.5 * 2 * n * d * v


def test_goals_of_an_h200():
    """At full size, of the exact path and every loss: memory, launches, and what the host reads."""
    found = counts.committed()[counts.FULL_SIZE]
    n, d, v = counts.FULL.shape
    losses = {name for name in found if name.endswith("Loss")} - {"DistillationLoss"}
    assert len(losses) >= 12
    token = {"linear_logprobs, backward", "linear_logprobs, backward, with entropy", *losses}
    exact = {"linear_logprobs", "linear_logprobs, backward, head frozen", "linear_token",
             "linear_cross_entropy, backward", *token}  # fmt: skip
    for name in exact:
        counted = found[name]
        assert counted["peak"] <= 640 << 20, name
        assert counted["products"] + counted["operators"] + counted["epilogues"] <= 500, name
        reference = "ift_kernels.operators.head_call.of"
        reads = counted["reads"] - counted.get(f"read by {reference}", 0)
        assert reads == (name in token), name  # one in forward, one in backward
    for name in ("linear_logprobs, backward, head frozen", "linear_cross_entropy, backward"):
        assert found[name]["reads"] == 1, name
    assert found["linear_token"]["reads"] == 0
    assert found["linear_cross_entropy, backward"]["flops"] <= 3.001 * 2 * n * d * v


def test_a_read_on_the_device_is_answered_and_named():
    x = torch.empty(64, 8, device="meta")

    def reads_of_values():
        marked = (x > 0).to(torch.uint8)
        assert bool((x[:, 0] > 0).all()) and len((x[:, 0] > 0).nonzero()) == 64
        assert int(marked.T.sum(1).amax()) == 6 and marked.T.sum(1).tolist() == [6] * 8
        return marked.T.nonzero()

    found = counts.dispatched(reads_of_values)
    assert found["reads"] == 5
    assert found["products"] == found["flops"] == 0


def test_memory_of_what_is_returned_is_not_part_of_the_peak():
    def call():
        a = torch.empty(1000, dtype=torch.uint8, device="meta")
        del a
        return torch.empty(3000, device="meta", dtype=torch.uint8).view(30, 100)

    found = counts.dispatched(call)
    assert (found["bytes"], found["peak"]) == (4000, 0)


def test_epilogues_are_counted_and_the_backend_is_left_as_it_was():
    x, before = torch.ones(2, 3), counts.reference.scan
    with counts.k.use_backend("reference"):
        found = counts.count(lambda: counts.k.discounted_cumsum(x, 0.5))
    assert found["epilogues"] == 1
    assert counts.reference.scan is before


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_epilogues_of_divergences_are_counted(kind):
    h, w, y = torch.ones(4, 8, requires_grad=True), torch.ones(50, 8), torch.zeros(4, 8)

    def call(reduction):
        loss = counts.k.linear_divergence(h, w, y, w, kind=kind, reduction=reduction)
        torch.autograd.grad(loss.sum(), h)

    with counts.k.use_backend("reference"):
        for reduction in ("mean", "none"):
            found = counts.count(lambda reduction=reduction: call(reduction))
            # Statistics of both heads, the gradient; terms unless the gradient's pass has them.
            assert found["epilogues"] >= 3


def test_every_function_of_the_contract_is_an_epilogue_or_on_the_host():
    """A new one is counted without being listed here or there."""
    named = {name for name in vars(counts.contract.Backend) if not name.startswith("_")}
    assert set(counts.EPILOGUES) | set(contract.ON_HOST) == named | {"fused_statistics"}
    assert set(contract.ON_HOST) <= named  # renamed, it would be missed there
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
