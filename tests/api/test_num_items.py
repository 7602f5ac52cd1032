"""A number of items is the same as an int, a float or a tensor, and 0 of them is a mean of 0."""

import numpy as np
import pytest
import torch

from ift import losses
from ift_kernels import linear_cross_entropy, linear_divergence
from ift_kernels.schedule.plan import use_schedule

FORMS = {
    "int": int,
    "float": float,
    "numpy": np.int64,
    "int tensor": lambda n: torch.tensor(int(n)),
    "int32 vector": lambda n: torch.tensor([int(n)], dtype=torch.int32),
    "float tensor": lambda n: torch.tensor(float(n)),
    "double tensor": lambda n: torch.tensor(n, dtype=torch.float64),
}
N, D, V = 8, 6, 40


def head():
    tensors = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return *tensors, torch.randint(V, (N,))


def policy_mask():
    return torch.arange(8).view(2, 4) % 4 < 3


def cross_entropy(hidden, weight, target, count):
    return linear_cross_entropy(hidden, weight, target, num_items=count)


def smoothed(hidden, weight, target, count):
    return linear_cross_entropy(
        hidden, weight, target, num_items=count, label_smoothing=0.1, gradient="active"
    )


def divergence(hidden, weight, target, count):
    teacher = weight.detach().roll(1, 0)
    return linear_divergence(hidden, weight, hidden.detach(), teacher, num_items=count)


def dapo(hidden, weight, target, count):
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None]).view(2, 4)
    advantages = torch.tensor([1.0, -1.0])
    return losses.grpo_loss(logprob, policy_mask(), advantages, kind="dapo", num_items=count)


def grpo_rows(hidden, weight, target, count):
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None]).view(2, 4)
    return losses.grpo_loss(logprob, policy_mask(), torch.ones(2), num_rows=count)


LOSSES = [cross_entropy, smoothed, divergence, dapo, grpo_rows]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("schedule", ["recompute", "forward"])
def test_every_form_of_a_number(loss, form, schedule):
    hidden, weight, target = head()
    whole = loss(hidden, weight, target, 1)
    for count in (3, 16, 0):
        with use_schedule(schedule):
            ours = loss(hidden, weight, target, form(count))
        wanted = whole / count if count else 0 * whole
        torch.testing.assert_close(ours, wanted)
        for a, b in zip(
            torch.autograd.grad(ours, (hidden, weight)),
            torch.autograd.grad(wanted, (hidden, weight), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_nothing_to_average(loss):
    """Without targets too: as in a batch all of whose labels are ignored."""
    hidden, weight, target = head()
    if loss in (cross_entropy, smoothed):
        values = [
            loss(hidden, weight, torch.full_like(target, -100), form(0)) for form in FORMS.values()
        ]
        values.append(linear_cross_entropy(hidden, weight, torch.full_like(target, -100)))
    else:
        values = [loss(hidden, weight, target, form(0)) for form in FORMS.values()]
    assert [value.item() for value in values] == [0.0] * len(values)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [-1, -0.5, float("nan"), True, "3", [3], torch.ones(2)], ids=repr)
def test_what_is_no_number(loss, bad):
    hidden, weight, target = head()
    with pytest.raises((TypeError, ValueError), match=r"num_(items|rows): expected"):
        loss(hidden, weight, target, bad)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_other_reductions_have_no_divisor(reduction, form):
    hidden, weight, target = head()
    with pytest.raises(ValueError, match="num_items: only divides reduction 'mean'"):
        linear_cross_entropy(hidden, weight, target, reduction=reduction, num_items=form(0))
    with pytest.raises(ValueError, match="num_items: only divides reduction 'mean'"):
        linear_divergence(hidden, weight, hidden, weight, reduction=reduction, num_items=form(0))
