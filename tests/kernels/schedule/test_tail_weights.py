"""How a tail is spread over ids: as what the mean hidden state gives them."""

import math

import pytest
import torch

import dense
import ift_kernels as K
from ift_kernels import backends
from ift_kernels.backends.contract import RowGradient
from ift_kernels.common.active_set import ActiveSet
from ift_kernels.common.transform import LogitTransform
from ift_kernels.schedule.head import Head
from ift_kernels.schedule.tail_weights import CAP_SHARE, MAX_RANGE, TailWeights

THRESHOLD = 2.0**-10


def case(transform=None, n=40, v=500, d=16, dtype=torch.float64):
    """A head with a bias, and the row gradient of log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype) + 0.5
    weight = 0.3 * torch.randn(v, d, generator=generator).to(dtype)
    bias = torch.randn(v, generator=generator).to(dtype)
    transform = transform or LogitTransform()
    head = Head(backends.get(hidden), hidden, weight, bias, transform)
    z = transform.apply(hidden @ weight.T, bias)
    norm = torch.stack([z.amax(1), (z - z.amax(1, True)).exp().sum(1).log()])
    coef = torch.zeros(4, n, dtype=dtype)
    coef[0], coef[1] = 1.0, -1.0
    return head, RowGradient(torch.zeros(n, dtype=torch.int64), norm, coef)


@pytest.mark.parametrize("transform", [{}, {"scale": 0.7, "softcap": 5.0, "temperature": 1.3}])
def test_it_is_the_probability_of_the_mean_hidden_state(transform):
    transform = LogitTransform(**transform)
    head, gradient = case(transform)
    gradient.coef[:, 30:] = 0  # rows without upstream gradient have no part in the mean
    z = transform.apply(head.hidden[:30].mean(0) @ head.weight.T, head.bias)
    log_p = z - gradient.norm[:, :30].sum(0).mean()
    wanted = (log_p.exp() / (CAP_SHARE * THRESHOLD)).clamp(1 / MAX_RANGE, 1.0)
    found = TailWeights(head, gradient, THRESHOLD).of(head, slice(0, 500))
    torch.testing.assert_close(found, wanted)
    assert 0 < (wanted == 1).sum() < 500
    part = TailWeights(head, gradient, THRESHOLD).of(head, slice(100, 333))
    torch.testing.assert_close(part, wanted[100:333])


def test_the_range_shrinks_with_large_thresholds():
    head, gradient = case()
    for threshold, range_ in ((2.0**-12, 16), (2.0**-10, 16), (2.0**-8, 4), (2.0**-5, 1), (0, 1)):
        found = TailWeights(head, gradient, threshold).of(head, slice(0, 500))
        assert found.min() >= 1 / range_ and (found.min() == 1) == (range_ == 1)


def test_uniform_where_it_is_unknown():
    head, gradient = case()
    everything = slice(0, 500)
    gradient.coef[3, 7] = 0.1  # the gradient of mean_logit is the same for all ids
    assert (TailWeights(head, gradient, THRESHOLD).of(head, everything) == 1).all()
    gradient.coef[3, 7] = 0
    head.bias[3], head.weight[5] = -math.inf, math.nan
    found = TailWeights(head, gradient, THRESHOLD).of(head, everything)
    assert found[3] == found.min() < found[5] == 1 and found.isfinite().all()
    head.hidden[0] = math.nan
    assert (TailWeights(head, gradient, THRESHOLD).of(head, everything)[4:] == 1).all()
    head.hidden[0], gradient.coef[:] = 0, 0
    assert (TailWeights(head, gradient, THRESHOLD).of(head, everything) == 1).all()


@pytest.mark.parametrize("trained", [True, False])
def test_it_is_worth_having_where_ids_differ(trained, monkeypatch):
    # Frequencies of ids that differ by orders of magnitude within a bucket, as those of real
    # heads do, and rare ids whose head rows have a direction in common.
    generator = torch.Generator().manual_seed(0)
    frequency = 2 * torch.randn(3000, generator=generator)
    rows = 0.1 * torch.randn(3000, 32, generator=generator)
    rows[:, 0], rows[:, 1] = frequency, -frequency
    hidden = torch.randn(256, 32, generator=generator)
    hidden[:, 0], hidden[:, 1] = 1.0, 0.0
    target = (hidden @ rows.T).softmax(1).multinomial(1, generator=generator)[:, 0]
    h = dense.Head(hidden.requires_grad_(), rows.requires_grad_(), target)
    d = h.double()
    exact = torch.autograd.grad(dense.stats(d)["logprob"].sum(), d.inputs)

    def errors():
        weight = h.weight if trained else h.weight.detach()
        log_p = K.linear_logprobs(h.hidden, weight, h.target, gradient="active").logprob
        (found,) = torch.autograd.grad(log_p.sum(), h.hidden)
        return float((found - exact[0]).norm() / exact[0].norm())

    ours = errors()
    monkeypatch.setattr(TailWeights, "of", lambda self, head, c: torch.ones(c.stop - c.start))
    uniform = errors()
    assert 4 * ours < uniform


def unlike_the_mean(dtype, few):
    """The tail of the first block in bucket 0 is of `few` ids that no other block likes."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(4096, 64, generator=generator)
    weight[:, 0], weight[:, 1:4] = 1.0, 0.0  # a direction in common shows what is lost
    weight[: 2048 - few, 1] = 1.0
    weight[2048 - few : 2048, 2] = 1.0
    weight[2048:, 3] = 1.0
    hidden = 0.02 * torch.randn(1024, 64, generator=generator)
    hidden[:, :4] = torch.tensor([0.0, 0.0, -12.0, -16.0])
    hidden[:128, 2] = -0.6
    target = torch.randint(0, 2048 - few, (1024,), generator=generator)
    return dense.Head(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target)


@pytest.mark.parametrize("few", [1, 64])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_where_a_block_is_unlike_the_mean(dtype, trained, few):
    # u·q of active ids is subtracted in 16 bits and comes back in 32.
    h = unlike_the_mean(dtype, few)
    d = h.double()
    exact = torch.autograd.grad(dense.stats(d)["logprob"].sum(), d.inputs)
    chosen = ActiveSet(threshold=2.0**-11.3)
    inputs = h.inputs if trained else [h.hidden]
    weight = h.weight if trained else h.weight.detach()
    log_p = K.linear_logprobs(h.hidden, weight, h.target, gradient=chosen).logprob
    found = torch.autograd.grad(log_p.sum(), inputs)
    for a, b, limit in zip(found, exact, (16, 2), strict=False):
        assert (a.double() - b).norm() <= limit * torch.finfo(dtype).eps * b.norm()
