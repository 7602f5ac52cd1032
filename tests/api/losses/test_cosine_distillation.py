"""Distillation of hidden states by their angle, against torch, Liger and full logits in fp64."""

import functools
import re

import pytest
import torch
from torch.nn import functional as F

from ift import losses

N, D, E, V = 6, 5, 4, 13


@pytest.fixture
def made():
    """hidden and weight of the student, a projection, the teacher's hidden states, labels."""
    g = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=g, dtype=torch.float64)
    projection = torch.nn.Linear(D, E, dtype=torch.float64)
    hidden, weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
    target = torch.randint(V, (N,), generator=g)
    target[2] = -100
    return hidden, weight, projection, draw(N, E), target


@pytest.mark.parametrize("w", [0.0, 0.3])
def test_values_and_gradients_are_those_of_full_logits(made, w):
    hidden, weight, projection, teacher, target = made
    bad = teacher.clone()
    bad[2] = torch.nan  # what does not count is not read
    loss = losses.CosineDistillationLoss(projection=projection, hard_weight=w, reduction="none")
    head = {"softcap": 3.0} if w else {}
    got = loss.from_hidden(hidden, weight, target, bad, **head)
    z = 3 * torch.tanh(hidden @ weight.T / 3)
    hard = F.cross_entropy(z, target, reduction="none")
    s = projection(hidden)
    cos = (s * teacher).sum(-1) / (s.norm(dim=-1) * teacher.norm(dim=-1))
    wanted = torch.where(target < 0, 0, (1 - w) * (1 - cos) + w * hard)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    inputs = (hidden, projection.weight, projection.bias, *([weight] if w else []))
    upstream = torch.linspace(0.5, 2, N, dtype=torch.float64)
    found, right = (torch.autograd.grad((x * upstream).sum(), inputs) for x in (got, wanted))
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    assert loss.metrics["tokens"] == N - 1 and [*loss.parameters()] == [*projection.parameters()]
    for reduction, options, value in (
        ("sum", {}, wanted.sum()),
        ("mean", {}, wanted.sum() / (N - 1)),
        ("mean", {"num_items": 40}, wanted.sum() / 40),
    ):
        loss = losses.CosineDistillationLoss(
            projection=projection, hard_weight=w, reduction=reduction
        )
        torch.testing.assert_close(
            loss.from_hidden(hidden, weight, target, teacher, **head, **options), value
        )


def test_the_gradient_is_that_of_the_docs(made):
    """Across the student's hidden state; padded and packed batches are the same."""
    hidden, *_, target = made
    teacher = torch.randn(N, D, dtype=torch.float64)
    mask = target != -100
    (found,) = torch.autograd.grad(losses.cosine_distillation_loss(hidden, mask, teacher), hidden)
    s, t = (x / x.norm(dim=-1, keepdim=True) for x in (hidden.detach(), teacher))
    cos = (s * t).sum(-1, keepdim=True)
    wanted = -(t - cos * s) / hidden.detach().norm(dim=-1, keepdim=True) / (N - 1)
    torch.testing.assert_close(found, torch.where(mask[:, None], wanted, 0))
    padded = losses.cosine_distillation_loss(
        hidden.view(2, 3, D), mask.view(2, 3), teacher.view(2, 3, D), reduction="none"
    )
    packed = losses.cosine_distillation_loss(hidden, mask, teacher, reduction="none")
    torch.testing.assert_close(padded.flatten(), packed)


def test_it_is_torchs_cosine_embedding_loss(made):
    """As DistilBERT's training takes it, on the tokens that the mask selects; float32."""
    hidden, *_, target = made
    mask = target != -100
    student = hidden.detach().float().requires_grad_()
    teacher = torch.randn(N, D)
    theirs = torch.nn.CosineEmbeddingLoss()(student[mask], teacher[mask], torch.ones(N - 1))
    ours = losses.cosine_distillation_loss(student, mask, teacher)
    torch.testing.assert_close(ours, theirs)
    grads = (torch.autograd.grad(x, student)[0] for x in (ours, theirs))
    torch.testing.assert_close(*grads)
    half = losses.cosine_distillation_loss(student.bfloat16(), mask, teacher.bfloat16())
    assert half.dtype == torch.float32 and abs(half - ours) < 1e-2
    zeros = torch.zeros(2, D, requires_grad=True)
    value = losses.cosine_distillation_loss(zeros, torch.tensor([1, 0]), torch.randn(2, D))
    assert value == 1 and torch.autograd.grad(value, zeros)[0].isfinite().all()


def test_liger_takes_the_same_of_logits():
    """Its term with the hidden states as logits; of logits it changes with a common number."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    hidden, teacher = torch.randn(8, D, requires_grad=True), torch.randn(8, D)
    target = torch.arange(8) - 2
    target[0] = target[1] = -100
    one = torch.eye(D)
    theirs = liger.LigerFusedLinearCosineSimilarityLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False
    )
    labels = target.clamp(max=D - 1)
    wanted = theirs(hidden, one, teacher, one, labels)
    ours = losses.CosineDistillationLoss().from_hidden(hidden, one, target, teacher)
    torch.testing.assert_close(ours, wanted)
    grads = (torch.autograd.grad(x, hidden)[0] for x in (ours, wanted))
    torch.testing.assert_close(*grads)
    shifted = theirs(hidden, one, teacher, one, labels, torch.full((D,), 3.0))
    assert abs(shifted - wanted) > 0.05


X = torch.ones(2, 3)
REFUSED = {
    "hard_weight: expected in [0, 1], got 1.5": {"hard_weight": 1.5},
    "label_logprob: expected a tensor with hard_weight, got None": {"hard_weight": 0.5},
    "label_logprob: expected None without hard_weight": {"label_logprob": X[:, 0]},
    "label_logprob: expected the shape of mask": {"hard_weight": 0.5, "label_logprob": X},
    "reduction: expected one of": {"reduction": "row_mean"},
    "num_items: expected None with reduction 'sum'": {"reduction": "sum", "num_items": 3},
    "teacher_hidden: expected the shape of what projection gives, (2, 4), got (2, 3)": {
        "projection": torch.nn.Linear(3, 4)
    },
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_refused(problem):
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        losses.cosine_distillation_loss(X, X[:, 0], X, **REFUSED[problem])


def test_a_projection_can_be_replaced():
    loss = losses.CosineDistillationLoss()
    teacher = torch.randn(2, 4)
    assert loss.projection is None and not [*loss.parameters()]
    loss.projection = torch.nn.Linear(3, 4)
    wanted = losses.cosine_distillation_loss(X, X[:, 0], teacher, projection=loss.projection)
    assert loss(X, X[:, 0], teacher) == wanted and len([*loss.parameters()]) == 2


def test_widths_tensors_and_options_of_the_head_are_checked():
    with pytest.raises(ValueError, match=r"^teacher_hidden: expected the shape of hidden, \(2, 3"):
        losses.cosine_distillation_loss(X, X[:, 0], torch.ones(2, 4))
    loss, target = losses.CosineDistillationLoss(), torch.zeros(2).long()
    with pytest.raises(TypeError, match="got 3 tensors"):
        loss.from_hidden(X, X, target)
    with pytest.raises(ValueError, match="^softcap: expected none without hard_weight, got 3.0"):
        loss.from_hidden(X, X, target, X, softcap=3.0)
    with pytest.raises(TypeError, match="^projection: expected a function or None, got 3"):
        losses.CosineDistillationLoss(projection=3)
