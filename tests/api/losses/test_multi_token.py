"""Multi-token prediction: targets, losses and gradients against full logits in float64."""

import functools
import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

import processes
from ift import losses
from ift.losses import MultiTokenLoss, multi_token_loss, multi_token_targets

K, B, T, D, V = 3, 2, 7, 8, 23


def labels_and_starts():
    """Labels with some that have no loss, and where documents start: one is shorter than K."""
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    labels[0, 1] = labels[1, 3] = -100
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 0] = starts[0, 3] = starts[0, 5] = starts[1, 6] = True
    return labels, starts


def by_hand(labels, starts):
    target = torch.full((K, *labels.shape), -100)
    for k in range(K):
        for b in range(len(labels)):
            for t in range(labels.shape[1] - 1 - k):
                if not starts[b, t + 1 : t + 2 + k].any():
                    target[k, b, t] = labels[b, t + 1 + k]
    return target


def test_no_depth_predicts_across_the_end_of_a_document():
    labels, starts = labels_and_starts()
    wanted = by_hand(labels, starts)
    assert [int((x != -100).sum()) for x in wanted] == [7, 4, 2]  # each depth loses some
    place = torch.arange(T).expand(B, T)
    position = place - torch.where(starts, place, 0).cummax(1).values
    assert torch.equal(multi_token_targets(labels, K, position_ids=position), wanted)
    cu = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([B * T])]).int()
    assert torch.equal(multi_token_targets(labels, K, cu_seqlens=cu), wanted)
    flat = multi_token_targets(labels.flatten(), K, position_ids=position.flatten())
    assert torch.equal(flat, wanted.view(K, -1))
    assert torch.equal(multi_token_targets(labels.flatten(), K, cu_seqlens=cu), wanted.view(K, -1))
    rows = torch.zeros_like(starts)
    assert torch.equal(multi_token_targets(labels, K), by_hand(labels, rows))
    other = multi_token_targets(labels.masked_fill(labels < 0, -1), K, ignore_index=-1)
    assert torch.equal(other, by_hand(labels, rows).masked_fill(by_hand(labels, rows) < 0, -1))
    assert (multi_token_targets(labels[:, :1], K) == -100).all()  # rows shorter than a depth
    padded = torch.tensor([[1, 1, 1, 0, 1, 2, 3]])  # transformers' positions of left padding
    target = multi_token_targets(torch.arange(T)[None], K, position_ids=padded)
    assert (target[:, 0, :3] == -100).all() and target[:, 0, 3].tolist() == [4, 5, 6]


def made(heads):
    """Hidden states, heads and biases in float64, and targets."""
    draw = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    hidden = draw(K, B, T, D).requires_grad_()
    labels, starts = labels_and_starts()
    target = by_hand(labels, starts)
    if heads == "one":
        return hidden, draw(V, D).requires_grad_(), draw(V).requires_grad_(), target
    if heads == "stacked":
        return hidden, draw(K, V, D).requires_grad_(), draw(K, V).requires_grad_(), target
    sizes = (V, V + 9, V + 2)
    weight = [draw(size, D).requires_grad_() for size in sizes]
    return hidden, weight, [None, draw(sizes[1]).requires_grad_(), None], target


def naive(hidden, weight, bias, target, softcap=None):
    """Losses (K, B, T), and predicted ids, from logits."""
    found = []
    for k in range(K):
        one = isinstance(weight, torch.Tensor) and weight.dim() == 2
        w, b = (weight, bias) if one else (weight[k], None if bias is None else bias[k])
        z = F.linear(hidden[k], w, b)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        each = F.cross_entropy(z.flatten(0, 1), target[k].flatten(), reduction="none")
        found.append((each.view(B, T), z.argmax(-1)))
    return map(torch.stack, zip(*found, strict=True))


@pytest.mark.parametrize("heads", ["one", "stacked", "list"])
def test_values_gradients_and_metrics_are_those_of_full_logits(heads):
    hidden, weight, bias, target = made(heads)
    head = {"softcap": 4.0} if heads == "one" else {}
    each, predicted = naive(hidden, weight, bias, target, **head)
    counts = (target != -100).flatten(1).sum(1)
    several = [weight, bias] if heads != "list" else [*weight, bias[1]]
    inputs = [hidden, *several]
    given = (0.7, 0.2, 0.1)
    cases = (
        (0.4, "mean", None, (1, 0.2, 0.2), counts),
        (given, "mean", 50, given, torch.tensor([50, 50, 50])),
        (given, "mean", torch.tensor([9, 0, 7]), given, torch.tensor([9, torch.inf, 7])),
        (given, "sum", None, given, torch.ones(3)),
    )
    for depth_weights, reduction, num_items, factors, divisors in cases:
        loss = MultiTokenLoss(depth_weights=depth_weights, reduction=reduction)
        got = loss.from_hidden(hidden, weight, target, bias=bias, num_items=num_items, **head)
        factors = torch.tensor(factors, dtype=torch.float64) / divisors
        wanted = (each.flatten(1).sum(1) * factors).sum()
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        found, right = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (got, wanted))
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    tokenwise = MultiTokenLoss(depth_weights=given, reduction="none")
    factors = torch.tensor(given, dtype=torch.float64)[:, None, None]
    got = tokenwise.from_hidden(hidden, weight, target, bias=bias, **head)
    torch.testing.assert_close(got, each * factors)
    for k in range(K):
        valid = target[k] != -100
        assert loss.metrics[f"tokens_{k}"] == valid.sum()
        torch.testing.assert_close(
            loss.metrics[f"cross_entropy_{k}"], each[k].sum() / counts[k], check_dtype=False
        )
        right = (predicted[k] == target[k])[valid].sum() / counts[k]
        torch.testing.assert_close(loss.metrics[f"token_accuracy_{k}"], right)
        if k:
            agrees = [
                predicted[k, b, t] == predicted[0, b, t + k] for b, t in valid.nonzero().tolist()
            ]
            assert loss.metrics[f"agreement_{k}"] == torch.stack(agrees).float().mean()


def test_depths_are_one_batch_to_every_loss_and_packed_rows_need_no_batch():
    hidden, weight, bias, target = made("one")
    value = MultiTokenLoss().from_hidden(hidden, weight, target, bias=bias)
    generic = losses.from_hidden(multi_token_loss, hidden, weight, target, bias=bias)
    torch.testing.assert_close(generic, value)
    packed = hidden.flatten(1, 2), weight, target.flatten(1)
    torch.testing.assert_close(MultiTokenLoss().from_hidden(*packed, bias=bias), value)
    each = MultiTokenLoss(reduction="none").from_hidden(*packed, bias=bias)
    assert each.shape == (K, B * T)


def test_without_targets_the_loss_is_0_and_masked_values_are_not_read():
    logprob = torch.full((K, 1, T), torch.nan, requires_grad=True)
    loss = multi_token_loss(logprob, torch.zeros(K, 1, T))
    loss.backward()
    assert loss == 0 and (logprob.grad == 0).all()
    hidden, weight, _, target = made("list")
    target[1:] = -100  # depths without a target leave the others alone
    got = MultiTokenLoss(depth_weights=[1, 1, 1]).from_hidden(hidden, weight, target)
    torch.testing.assert_close(got, F.cross_entropy(hidden[0][target[0] >= 0] @ weight[0].T,
                                                    target[0][target[0] >= 0]))  # fmt: skip


class Medusa(torch.nn.Module):
    """Heads of arXiv 2401.10774: a residual block and a head of its own for each depth."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(K))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(D, V, bias=False) for _ in range(K))

    def states(self, hidden):
        return torch.stack([hidden + F.silu(block(hidden)) for block in self.blocks])


@pytest.mark.parametrize("shared", [False, True])
def test_the_heads_of_medusa(shared):
    torch.manual_seed(0)
    medusa = Medusa().double()
    if shared:
        medusa.heads = torch.nn.ModuleList(medusa.heads[0] for _ in range(K))
    hidden = torch.randn(B, T, D, dtype=torch.float64)  # of a frozen trunk
    target = multi_token_targets(labels_and_starts()[0], K)
    weights = [0.8**k for k in range(1, K + 1)]
    heads = [head.weight for head in medusa.heads]
    loss = MultiTokenLoss(depth_weights=weights)
    got = loss.from_hidden(medusa.states(hidden), heads[0] if shared else heads, target)
    wanted = sum(
        w * F.cross_entropy(head(states).flatten(0, 1), ids.flatten())
        for w, head, states, ids in zip(
            weights, medusa.heads, medusa.states(hidden), target, strict=True
        )
    )
    torch.testing.assert_close(got, wanted)
    found, right = (torch.autograd.grad(x, [*medusa.parameters()]) for x in (got, wanted))
    torch.testing.assert_close(found, right)


X, IDS = torch.zeros(K, B, T, D), torch.zeros(K, B, T, dtype=torch.int64)
W, LOSS = torch.zeros(V, D), MultiTokenLoss()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: multi_token_loss(X[0, ..., 0], IDS[0]), "logprob: expected shape (depths, B, T)"),
        (lambda: LOSS(X[..., 0], IDS[..., :2]), "mask: expected the shape of logprob"),
        (lambda: MultiTokenLoss(depth_weights=[]), "depth_weights: expected a weight for each"),
        (lambda: MultiTokenLoss(depth_weights=-1.0), "depth_weights: expected finite numbers of"),
        (
            lambda: MultiTokenLoss(depth_weights=[1.0, 0.1]).from_hidden(X, W, IDS),
            "depth_weights: expected a number, or one for each of 3 depths, got 2",
        ),
        (lambda: MultiTokenLoss(reduction="row_mean"), "reduction: expected one of"),
        (
            lambda: MultiTokenLoss(reduction="sum")(X[..., 0], IDS, num_items=3),
            "num_items: expected None with reduction 'sum'",
        ),
        (
            lambda: LOSS(X[..., 0], IDS, num_items=torch.ones(2)),
            "num_items: expected one number, or one for each of 3 depths",
        ),
        (lambda: LOSS.from_hidden(X, W, IDS[0]), "target: expected shape (3, 2, 7)"),
        (lambda: LOSS.from_hidden(X[0, 0], W, IDS[0, 0]), "hidden: expected shape (depths, ..., T"),
        (
            lambda: LOSS.from_hidden(X, [W, W], IDS),
            "weight: expected one for all depths or for each of 3, got 2 tensors",
        ),
        (
            lambda: LOSS.from_hidden(X, torch.zeros(2, V, D), IDS),
            "weight: expected one for all depths or for each of 3, got (2, 23, 8)",
        ),
        (
            lambda: LOSS.from_hidden(X, [W, W, W], IDS, bias=torch.zeros(V)),
            "bias: expected one for all depths or for each of 3, got (23,)",
        ),
        (lambda: LOSS.from_hidden(X, W, IDS, bias=[None] * 3), "bias: expected (V,) for one head"),
        (
            lambda: LOSS.from_hidden(X, W, IDS, IDS),
            "from_hidden: expected (hidden, weight, target)",
        ),
        (lambda: multi_token_targets(IDS, 2), "labels: expected shape (B, T) or (T,)"),
        (lambda: multi_token_targets(IDS[0], 0), "depths: expected at least 1, got 0"),
        (
            lambda: multi_token_targets(IDS[0], 2, position_ids=IDS[0], cu_seqlens=IDS[0, 0]),
            "position_ids: expected None with cu_seqlens",
        ),
        (
            lambda: multi_token_targets(IDS[0], 2, cu_seqlens=torch.tensor([0, 3])),
            "cu_seqlens: expected to run from 0 to 14",
        ),
    ],
)
def test_errors_name_the_argument(call, said):
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        call()


def worker(rank, number, directory):
    """Losses and gradients of hidden and of the joined heads, vocab-parallel; and of FSDP2."""
    mesh = init_device_mesh("cpu", (number,))
    found = {}
    for heads in ("one", "list"):
        hidden, weight, _, target = made(heads)
        full = [weight] if heads == "one" else weight
        shards = [distribute_tensor(w.detach(), mesh, [Shard(0)]).requires_grad_() for w in full]
        loss = MultiTokenLoss()
        value = loss.from_hidden(hidden, shards[0] if heads == "one" else shards, target)
        value.backward()
        gradients = [hidden.grad, *(shard.grad.full_tensor() for shard in shards)]
        found[heads] = value.detach(), gradients, loss.metrics
    stacked = distribute_tensor(torch.zeros(K, V, D), mesh, [Shard(1)])
    with pytest.raises(TypeError, match="weight: expected a sequence of sharded tensors"):
        loss.from_hidden(X, stacked, IDS)
    found["fsdp"] = fsdp(mesh)
    return found


def fsdp(mesh=None):
    """Loss and gradients of the example's model, plain or under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    from examples import multi_token

    model = multi_token.model(V, K)
    if mesh is not None:
        for block in (*model.states.model.layers, *model.states.further):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    value = model(ids, torch.tensor([0, 1, 2, 3, 0, 1, 2]).expand(B, T))
    value.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if mesh is not None:
        gradients = {name: grad.full_tensor() for name, grad in gradients.items()}
    return value.detach(), gradients


def test_two_processes_are_one(tmp_path):
    results = processes.results(worker, 2, tmp_path)
    for heads in ("one", "list"):
        hidden, weight, _, target = made(heads)
        inputs = [hidden, weight] if heads == "one" else [hidden, *weight]
        loss = MultiTokenLoss()
        value = loss.from_hidden(hidden, weight, target)
        value.backward()
        for result in results:
            got, gradients, metrics = result[heads]
            torch.testing.assert_close(got, value.detach())
            for gradient, tensor in zip(gradients, inputs, strict=True):
                torch.testing.assert_close(gradient, tensor.grad)
            torch.testing.assert_close(metrics, loss.metrics)
    value, gradients = fsdp()
    for result in results:
        torch.testing.assert_close(result["fsdp"][0], value)
        assert result["fsdp"][1].keys() == gradients.keys()
        for name, gradient in result["fsdp"][1].items():
            largest = gradients[name].abs().max()
            assert (gradient - gradients[name]).abs().max() <= 1e-5 * largest, name
