"""Distillation from a teacher's best ids, against full logits in fp64."""

import functools
import re

import pytest
import torch

from ift import losses
from ift_kernels import linear_topk

N, D, V, K = 7, 6, 23, 5
KINDS = ("forward", "reverse", "jsd")


@pytest.fixture
def made():
    """hidden, weight and bias of the student, teacher's log-probabilities, its best ids, labels.

    The first token has fewer ids, the second none, the third no label; the fourth one's label is
    the best id, others' are outside of their sets.
    """
    g = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, generator=g, dtype=torch.float64)
    hidden, weight, bias = draw(N, D), 0.5 * draw(V, D), draw(V)
    teacher = (2 * draw(N, V)).log_softmax(-1)
    ids = teacher.topk(K).indices
    ids[0, 2:], ids[1] = -100, -100
    target = torch.randint(V, (N,), generator=g)
    target[2], target[3] = -100, ids[3, 0]
    for t in (hidden, weight, bias):
        t.requires_grad_()
    return hidden, weight, bias, teacher, ids, target


def dense(made, kind, tail, w, beta=0.3):
    """The loss of each token from full logits, and G by the table of docs/losses.md."""
    hidden, weight, bias, teacher, ids, target = made
    z = hidden @ weight.T + bias
    p, q = z.log_softmax(-1), teacher
    values, gradients = [], []
    for row in range(N):
        inside = ids[row][ids[row] >= 0]
        if not len(inside) or target[row] == -100:
            values.append(z.new_zeros(()))
            gradients.append(torch.zeros(V, dtype=z.dtype))
            continue
        out = torch.ones(V, dtype=torch.bool).index_fill(0, inside, False)
        s, t = p[row, inside], q[row, inside]
        if tail == "bucket":
            s = torch.cat([s, p[row, out].logsumexp(0, keepdim=True)])
            t = torch.cat([t, q[row, out].logsumexp(0, keepdim=True)])
        else:
            s, t = s.log_softmax(0), t.log_softmax(0)
        m = ((1 - beta) * s.exp() + beta * t.exp()).log()
        own = (s.exp() * (s - m)).sum()
        value, factor = {
            "forward": ((t.exp() * (t - s)).sum(), 1 - (t - s).exp()),
            "reverse": ((s.exp() * (s - t)).sum(), s - t - (s.exp() * (s - t)).sum()),
            "jsd": ((1 - beta) * own + beta * (t.exp() * (t - m)).sum(),
                    (1 - beta) * (s - m - own)),
        }[kind]  # fmt: skip
        each = torch.zeros(V, dtype=z.dtype)
        mass = p[row].exp() if tail == "bucket" else each.index_copy(0, inside, s.exp())
        each = each.index_copy(0, inside, factor[: len(inside)])
        if tail == "bucket":
            each = torch.where(out, factor[-1], each)
        e = torch.eye(V, dtype=z.dtype)[target[row]]
        values.append((1 - w) * value - w * p[row, target[row]])
        gradients.append((1 - w) * mass * each + w * (p[row].exp() - e))
    return z, torch.stack(values), torch.stack(gradients).detach()


@pytest.mark.parametrize("w", [0.0, 0.4])
@pytest.mark.parametrize("tail", ["bucket", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_full_logits(made, kind, tail, w):
    hidden, weight, bias, teacher, ids, target = made
    of_ids = torch.where(ids >= 0, teacher.gather(-1, ids.clamp(min=0)), 0)
    out = torch.ones(N, V + 1, dtype=torch.bool).scatter(-1, torch.where(ids < 0, V, ids), False)
    rest = teacher.masked_fill(~out[:, :V], -torch.inf).logsumexp(-1)
    loss = losses.TopKDistillationLoss(
        kind=kind, tail=tail, beta=0.3, hard_weight=w, reduction="none"
    )
    given = {"bias": bias} | ({"teacher_tail_logprob": rest} if tail == "bucket" else {})
    got = loss.from_hidden(hidden, weight, target, ids, of_ids, **given)
    z, expected, table = dense(made, kind, tail, w)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(0.5, 2, N, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((expected * upstream).sum(), z, retain_graph=True)[0],
        table * upstream[:, None],
    )
    inputs = (hidden, weight, bias)
    wanted = torch.autograd.grad((expected * upstream).sum(), inputs)
    found = torch.autograd.grad((got * upstream).sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    counted = int(((ids >= 0).any(-1) & (target != -100)).sum())
    assert loss.metrics["tokens"] == counted == N - 2


def test_all_ids_are_the_whole_divergence(made):
    """Of the whole vocabulary there is no tail, and the default one is nothing but rounding."""
    hidden, weight, bias, teacher, _, _ = made
    target, ids = torch.zeros(N, dtype=torch.int64), torch.arange(V).expand(N, V)
    s = (hidden @ weight.T + bias).log_softmax(-1)
    for kind, whole in (
        ("forward", (teacher.exp() * (teacher - s)).sum(-1)),
        ("reverse", (s.exp() * (s - teacher)).sum(-1)),
    ):
        for tail in ("bucket", "drop"):
            loss = losses.TopKDistillationLoss(kind=kind, tail=tail)
            got = loss.from_hidden(hidden, weight, target, ids, teacher, bias=bias)
            torch.testing.assert_close(got, whole.mean())
            for mine, theirs in zip(
                torch.autograd.grad(got, (hidden, weight)),
                torch.autograd.grad(whole.mean(), (hidden, weight), retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(mine, theirs)


def test_the_default_tail_is_what_the_ids_leave_and_reductions_divide(made):
    hidden, weight, _, teacher, _, _ = made
    target = torch.zeros(N, dtype=torch.int64)
    values, ids = teacher.topk(K)
    rest = (1 - values.exp().sum(-1)).log()
    loss = losses.TopKDistillationLoss(reduction="none")
    each = loss.from_hidden(hidden, weight, target, ids, values)
    of_given = loss.from_hidden(hidden, weight, target, ids, values, teacher_tail_logprob=rest)
    torch.testing.assert_close(each, of_given)
    for reduction, options, value in (
        ("sum", {}, each.sum()),
        ("mean", {}, each.mean()),
        ("mean", {"num_items": 100}, each.sum() / 100),
    ):
        loss = losses.TopKDistillationLoss(reduction=reduction)
        torch.testing.assert_close(
            loss.from_hidden(hidden, weight, target, ids, values, **options), value
        )


def test_a_nucleus_of_the_teacher_is_taken_as_it_is():
    """Renormalised, with nothing outside of it; float32, of a set that is padded."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=g), torch.randn(40, 8, generator=g)
    hidden.requires_grad_()
    best = linear_topk(torch.randn(4, 8, generator=g), weight, 12, top_p=0.8)
    assert (best.ids < 0).any()
    target = torch.zeros(4, dtype=torch.int64)
    lost = torch.full((4,), -torch.inf)
    values = best.logprob.masked_fill(best.ids < 0, -torch.inf).log_softmax(-1)
    values = values.masked_fill(best.ids < 0, torch.nan)  # padding is not read
    for kind in ("forward", "jsd"):
        value = losses.TopKDistillationLoss(kind=kind).from_hidden(
            hidden, weight, target, best.ids, values, teacher_tail_logprob=lost
        )
        (gradient,) = torch.autograd.grad(value, hidden)
        assert value > 0 and gradient.isfinite().all() and (gradient != 0).any()
    reverse = losses.TopKDistillationLoss(kind="reverse").from_hidden(
        hidden, weight, target, best.ids, values, teacher_tail_logprob=lost
    )
    assert reverse == torch.inf


@pytest.mark.parametrize("kind", KINDS)
def test_outcomes_without_probability(kind):
    """0 · log 0 is 0, of either model or both, and no gradient is NaN."""
    never = -torch.inf
    p, q = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    s, t = p.log().requires_grad_(), q.log()
    tail = torch.tensor([never])
    loss = losses.topk_distillation_loss(
        s, torch.ones(1, 4), t, kind=kind, tail_logprob=tail, teacher_tail_logprob=tail
    )
    assert loss == 0 and torch.autograd.grad(loss, s)[0].isfinite().all()
    for student, teacher in (([0.5, 0.5], [1.0, 0.0]), ([1.0, 0.0], [0.5, 0.5])):
        p, q = torch.tensor([student]), torch.tensor([teacher])
        s = p.log().requires_grad_()
        loss = losses.topk_distillation_loss(
            s, torch.ones(1, 2), q.log(), kind=kind, tail_logprob=tail, teacher_tail_logprob=tail
        )
        m = (p + q) / 2
        first, second = {"forward": (q, p), "reverse": (p, q), "jsd": (p, m)}[kind]
        wanted = torch.special.xlogy(first, first / second).nan_to_num(0.0, torch.inf).sum()
        if kind == "jsd":
            wanted = (wanted + torch.special.xlogy(q, q / m).nan_to_num(0.0).sum()) / 2
        torch.testing.assert_close(loss.detach(), wanted)
        assert not torch.autograd.grad(loss, s)[0].isnan().any()


X, ONE, TEACHER = torch.full((2, 3), -2.0), torch.ones(2, 3), torch.full((2, 3), -1.5)
TAIL = {"tail_logprob": X[:, 0]}
REFUSED = {
    "kind: expected one of": {"kind": "both", **TAIL},
    "tail: expected one of": {"tail": "cut"},
    "beta: expected in (0, 1), got 1": {"beta": 1, **TAIL},
    "hard_weight: expected in [0, 1], got 1.5": {"hard_weight": 1.5, **TAIL},
    "tail_logprob: expected a tensor with tail 'bucket', got None": {},
    "tail_logprob: expected None without tail 'bucket', got a tensor": {"tail": "drop", **TAIL},
    "label_logprob: expected a tensor with hard_weight, got None": {"hard_weight": 0.5, **TAIL},
    "label_logprob: expected None without hard_weight": {"label_logprob": X[:, 0], **TAIL},
    "num_items: expected None with reduction 'sum'": {"reduction": "sum", "num_items": 3, **TAIL},
    "tail_logprob: expected the shape of logprob without its last dimension, (2,), got (2, 3)": {
        "tail_logprob": X
    },
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_refused(problem):
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        losses.topk_distillation_loss(X, ONE, TEACHER, **REFUSED[problem])


def test_a_teacher_that_is_normalised_inside_its_set_needs_drop_and_shapes_fit():
    with pytest.raises(ValueError, match="probabilities of a token that sum to 1.1"):
        losses.topk_distillation_loss(X, ONE, torch.full((2, 3), 0.37).log(), **TAIL)
    inside = torch.full((2, 3), 1 / 3).log()  # beside a tail
    for student, teacher in ((inside, TEACHER), (X, inside)):
        name = "logprob" if student is inside else "teacher_logprob"
        with pytest.raises(ValueError, match=f"^{name}: .* sum to 1.1353"):
            losses.topk_distillation_loss(
                student, ONE, teacher, **TAIL, teacher_tail_logprob=TAIL["tail_logprob"]
            )
    rounded = torch.full((1, 509), 1 / 509).log().bfloat16()  # sums to 1.0138
    losses.topk_distillation_loss(rounded - 2, torch.ones(1, 509), rounded, tail_logprob=X[:1, 0])
    with pytest.raises(TypeError, match="^loss: expected one of a log-probability for each token"):
        losses.from_hidden(
            losses.topk_distillation_loss, X, X, torch.zeros(2).long(), X, tail="drop"
        )
    loss = losses.TopKDistillationLoss()
    hidden, weight, target = torch.randn(2, 4), torch.randn(9, 4), torch.zeros(2).long()
    with pytest.raises(TypeError, match="got 3 tensors"):
        loss.from_hidden(hidden, weight, target)
    with pytest.raises(TypeError, match="^target: expected a Tensor, got NoneType"):
        loss.from_hidden(hidden, weight, None, target[:, None], X[:, :1])
    with pytest.raises(ValueError, match=r"ids: expected \(..., K\) for hidden"):
        loss.from_hidden(hidden, weight, target, target, X)
