"""`torch.set_default_device` elsewhere: "meta" stands for a GPU, since nothing computes on it."""

from contextlib import contextmanager

import pytest
import torch

from ift import losses
from ift_kernels import ActiveSet, influence, linear_logprobs, linear_token, record_active_sets
from ift_kernels.schedule.plan import use_schedule
from operations import IDS, OPERATIONS, TEACHER


@contextmanager
def set_globally():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


ELSEWHERE = {"set_default_device": set_globally, "with torch.device": lambda: torch.device("meta")}


@pytest.fixture(params=ELSEWHERE.values(), ids=ELSEWHERE)
def elsewhere(request):
    return request.param


def same(function, elsewhere):
    wanted = function()
    with elsewhere():
        assert torch.ones(1).device.type == "meta"
        ours = function()
    assert len(ours) == len(wanted) > 0
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["recompute", "keep", "forward"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations(operation, schedule, backend, elsewhere):
    tensors = [t.requires_grad_() for t in operation.inputs()]
    upstream = torch.randn(operation.ours(*tensors).shape)

    def run():
        with use_schedule(schedule):
            value = operation.ours(*tensors)
        # The second time, what forward has kept is gone.
        first = torch.autograd.grad(value, tensors, upstream, retain_graph=True)
        return [value, *first, *torch.autograd.grad(value, tensors, upstream)]

    same(run, elsewhere)


@pytest.mark.parametrize("rule", ["greedy", "kth", "sample"])
def test_token_choice(rule, backend, elsewhere):
    same(lambda: linear_token(*TEACHER, rule=rule), elsewhere)


def test_influence(backend, elsewhere):
    hidden, weight = TEACHER
    same(lambda: [influence(hidden, IDS, hidden, IDS, weight)], elsewhere)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("workspace", [1 << 20, None], ids=["formed again", "kept"])
def test_a_sparse_active_set(trained, workspace, backend, elsewhere):
    hidden = torch.randn(300, 16, requires_grad=True)
    weight = torch.randn(3000, 16, requires_grad=trained)
    target = torch.randint(3000, (300,))
    target[::7] = -100
    options = ActiveSet(threshold=2.0**-8, block=32, tail_bucket=64)

    def run():
        with record_active_sets() as report:
            value = linear_logprobs(
                hidden, weight, target, gradient=options, outputs=("logprob", "entropy", "argmax"),
                workspace=workspace,
            )  # fmt: skip
            total = (value.logprob + value.entropy).sum()
            grads = torch.autograd.grad(total, (hidden, weight)[: 1 + trained])
        assert len(report) == 1
        return [value.logprob, value.argmax, *grads]

    same(run, elsewhere)


@pytest.mark.parametrize("name", ["DPOLoss", "KTOLoss", "GRPOLoss", "IFTLoss", "ORPOLoss"])
def test_losses(name, elsewhere):
    hidden, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(30, 8)
    target, extra = torch.randint(30, (4, 5)), {}
    target[1, 3:] = -100
    if name in ("DPOLoss", "KTOLoss"):
        extra["reference"] = losses.Head(hidden.detach() + 0.1, weight)
    rows = {"KTOLoss": [torch.tensor([True, False, True, False])], "GRPOLoss": [torch.randn(4)]}

    def run():
        loss = getattr(losses, name)()  # checks its options on tensors of its own
        value = loss.from_hidden(hidden, weight, target, *rows.get(name, []), **extra)
        return [value, *torch.autograd.grad(value, [hidden])]

    same(run, elsewhere)
