"""What the host reads of a device: each read lets a GPU run dry, so they are few, and listed."""

import re

import numpy as np
import pytest
import torch

import dense
import ift_kernels
from bench.harness.machine import ROOT
from bench.suites import counts
from ift_kernels import linear_cross_entropy, linear_logprobs
from ift_kernels.common import checks, sync_free
from ift_kernels.operators import head_call, linear_stats
from ift_kernels.schedule import plan

OF, KEPT = "ift_kernels.operators.head_call.of", "ift_kernels.operators.linear_stats._backward_rows"


def reads(call):
    """By function, of one call; without the check of targets, which a GPU does not have."""
    found = counts.dispatched(call)
    names = {name[8:]: value for name, value in found.items() if name.startswith("read by ")}
    return {name: n for name, n in names.items() if not name.endswith("check_targets")}


@pytest.fixture(autouse=True)
def on_reference():
    with ift_kernels.use_backend("reference"):
        yield


@pytest.mark.parametrize("ignored", [0, 3, 11])
@pytest.mark.parametrize("zeros", [0, 2, 9])  # rows without upstream gradient
def test_per_token(ignored, zeros):
    h = dense.head(12, 8, 50, ignored=0)
    h.target[:ignored] = -100
    up = torch.ones(12)
    up[12 - zeros :] = 0
    stats = []
    forward = reads(lambda: stats.append(linear_logprobs(h.hidden, h.weight, h.target)))
    backward = reads(lambda: torch.autograd.grad(stats[0].logprob, (h.hidden, h.weight), up))
    assert forward == {OF: 1}
    assert sum(backward.values()) == 1 and set(backward) <= {OF, KEPT}


@pytest.mark.parametrize("ignored", [0, 3, 11])
def test_what_is_formed_in_forward_reads_nothing_in_backward(ignored):
    h = dense.head(12, 8, 50, ignored=0)
    h.target[:ignored] = -100
    losses = []
    calls = (
        (lambda: linear_logprobs(h.hidden, h.weight.detach(), h.target).logprob.sum(), [h.hidden]),
        (lambda: linear_cross_entropy(h.hidden, h.weight, h.target), [h.hidden, h.weight]),
    )
    for call, inputs in calls:
        losses.clear()
        with plan.use_schedule("forward"):
            assert reads(lambda call=call: losses.append(call())) == {OF: 1}
        backward = reads(lambda inputs=inputs: torch.autograd.grad(losses[0], inputs))
        # On a CPU the factor of all gradients is read, for nothing.
        assert set(backward) <= {"ift_kernels.operators.head_call.gradients"}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_rows_are_read_once(dtype, monkeypatch):
    x, cu = torch.ones(12, requires_grad=True), torch.tensor([0, 5, 5, 12], dtype=dtype)
    seen, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: seen.append(t) or original(t))
    monkeypatch.setattr(checks, "_counts_writes", lambda t: True)  # as on a GPU

    def step():
        seen.clear()
        weights = ift_kernels.propagation_weights(-x, torch.ones(12), cu_seqlens=cu)
        torch.autograd.grad((weights * x).sum(), x)
        return len(seen)

    # In forward an int32 one is copied, so the copy that backward has is another tensor.
    assert step() == 1 and step() == 0
    cu[1] = 4  # written: read again
    assert step() == 1
    cu[1], cu[2] = 9, 7
    with pytest.raises(ValueError, match="non-decreasing"):
        step()
    with pytest.raises(ValueError, match="from 0 to 11"):
        checks.seqlens(torch.tensor([0, 12]), x[:11])


def test_the_list_of_reads_is_complete():
    """Every function that reads a value at full size has its reason in the documentation."""
    text = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`ift.*?`) \|", text, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    found = {
        name[8:]
        for calls in counts.committed()[counts.FULL_SIZE].values()
        for name in calls if name.startswith("read by ")
    }  # fmt: skip
    assert found and found <= listed
    for name in listed:  # what has moved or is gone must not stay there
        module, _, function = name.rpartition(".")
        source = (ROOT / "python_api" if name.startswith("ift.") else ROOT) / module.replace(
            ".", "/"
        )
        assert f"def {function}(" in source.with_suffix(".py").read_text(encoding="utf-8")


def test_packed_rows_of_a_cpu_are_read_every_time():
    """What numpy writes torch does not count."""
    array = np.array([0, 5, 12])
    cu = torch.from_numpy(array)
    ift_kernels.propagation_weights(torch.zeros(12), torch.ones(12), cu_seqlens=cu)
    array[1:] = 13, 12
    with pytest.raises(ValueError, match="non-decreasing"):
        ift_kernels.propagation_weights(torch.zeros(12), torch.ones(12), cu_seqlens=cu)


@pytest.mark.parametrize("target", [-1, 50, 2**40])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_target_outside_that_no_check_refuses_gives_nan(monkeypatch, target, backend):
    """As on a GPU, where the check would stall."""
    if ift_kernels.backends.BACKENDS[backend].unsupported_reason(
        torch.device("cpu"), torch.float32
    ):
        pytest.skip("not built")
    for module in (head_call, linear_stats):
        monkeypatch.setattr(module, "check_targets", lambda *_: None)
    h = dense.head(12, 8, 50, ignored=0)
    h.target[4] = target
    with ift_kernels.use_backend(backend):
        logprob = linear_logprobs(h.hidden, h.weight, h.target).logprob
        assert torch.equal(logprob.isnan(), torch.arange(12) == 4)
        assert linear_cross_entropy(h.hidden, h.weight, h.target).isnan()


@pytest.mark.parametrize("debug", ["", "0", "1"])
def test_debugging_checks_targets_on_a_gpu(monkeypatch, debug):
    pytest.importorskip("triton")
    monkeypatch.setenv("IFT_DEBUG", debug)
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda *args: asserted.append(args))
    hidden, weight = torch.empty(12, 8, device="meta"), torch.empty(50, 8, device="meta")
    target = torch.empty(12, dtype=torch.int64, device="meta")

    def call():
        with torch.no_grad(), counts.planned_for_h200():
            return linear_logprobs(hidden, weight, target)

    if debug == "1":  # a read mask is taken for all true: every target is outside
        with pytest.raises(ValueError, match=r"target: expected ids in \[0, 50\) or ignore_index"):
            counts.dispatched(call)
    else:
        assert counts.dispatched(call)["reads"] == 1
    with sync_free.sync_free():
        assert counts.dispatched(call)["reads"] == 0
    assert len(asserted) == (debug == "1")
