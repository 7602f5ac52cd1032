"""Recipes for trainers of reinforcement learning, executed as written, against each one's calls."""

from types import SimpleNamespace

import pytest
import rl_recipes
import torch
from recipes import install, recipe, run

import processes
from ift_kernels import linear_topk

V, D, T, K = 24, 16, 12, 5


def drawn(dtype=torch.bfloat16):
    """hidden (1, T, D), weight and ids of a packed row; leaves."""
    hidden, weight = torch.randn(1, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (1, T))


def same(ours, theirs, leaves):
    """Values to float32; gradients through all of them to the rounding of the leaves' dtype."""
    found = []
    for values in (ours, theirs):
        loss = sum(
            (v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum()
            for v in values if v.requires_grad
        )  # fmt: skip
        found.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    rounding = 0.02 if leaves[0].dtype == torch.bfloat16 else 1e-5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * float(b.abs().max()))


# --- prime-rl -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", [(0.7,), (1.0, 0.5, 2.0)], ids=["one", "several"])
def test_prime_rl(monkeypatch, temperatures):
    hidden, weight, ids = drawn()
    lengths = [5, 4, 3]
    each = torch.cat([
        torch.full((n,), temperatures[i % len(temperatures)]) for i, n in enumerate(lengths)
    ])[None]  # fmt: skip
    heads = [type("Head", (rl_recipes.FusedOutputLinear,), {})(D, V, 4) for _ in range(2)]
    members = {"FusedOutputLinear": type(heads[1]), "PrimeLmOutput": rl_recipes.PrimeLmOutput}
    install(monkeypatch, prime_rl__trainer__models__layers__lm_head=members)
    run(recipe("prime_rl"))
    results = []
    for head in heads:
        del head.weight
        head.weight = weight  # one leaf of both
        logprobs, entropy = rl_recipes.prime_step(head, hidden, ids, each, lengths)
        results.append([*logprobs, *entropy])
    same(results[1], results[0], (hidden, weight))


# --- verl -----------------------------------------------------------------------------------------


def megatron(monkeypatch):
    """verl's module with the function of the recipe."""
    module = install(monkeypatch, verl__models__mcore__model_forward_fused={})
    run(recipe("verl", 1))
    return module


def test_verl_without_a_group(monkeypatch):
    """As its Triton backend calls it, of the FSDP engine."""
    hidden, weight, ids = drawn()
    call = megatron(monkeypatch).linear_cross_entropy
    logp = (hidden.float() @ weight.float().T / 0.7).log_softmax(-1)[0]
    own = logp.gather(-1, ids[0, :, None])[:, 0]
    same(call(hidden, weight, ids, 0.7, "none"), (own, -(logp.exp() * logp).sum(-1)),
         (hidden, weight))  # fmt: skip
    assert call(hidden, weight, ids, None)[0].shape == (T,)
    with pytest.raises(ValueError, match="reduction: expected 'none', got 'mean'"):
        call(hidden, weight, ids, 1.0, "mean")


def jagged(values):
    return torch.nested.nested_tensor(list(values[0].split([5, 4, 3])), layout=torch.jagged)


@pytest.mark.parametrize("least", [None, -2.5])
def test_verl_distillation(least):
    hidden, weight, _ = drawn(torch.float32)
    values, ids = torch.randn(1, T, V).log_softmax(-1).topk(K)
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=least))
    ours = run(recipe("verl", 2))["forward_kl_topk"](
        hidden, weight, jagged(values), jagged(ids), config, temperature=0.8
    )
    theirs = rl_recipes.compute_forward_kl_topk(
        hidden @ weight.T / 0.8, jagged(values), jagged(ids), config, "thd"
    )
    assert ours.keys() == theirs.keys() and ours["overlap_count"].sum() > 0
    same(*([each[name] for name in theirs] for each in (ours, theirs)), (hidden, weight))


# --- NeMo-RL --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_nemo_rl_distillation(whole):
    hidden, weight, _ = drawn()
    teacher_hidden, teacher_weight = torch.randn(1, T, D), torch.randn(V, D)
    values, ids = (teacher_hidden @ teacher_weight.T).topk(K)
    best = linear_topk(teacher_hidden, teacher_weight, K)
    assert torch.equal(best.ids, ids)
    call = run(recipe("nemo_rl", 1))["distillation_topk_logprobs"]
    ours = call(hidden, weight, best.logprob, best.ids, whole, whole)
    theirs = rl_recipes.get_distillation_topk_logprobs_from_logits(
        hidden.float() @ weight.float().T, values, ids, whole, whole
    )
    assert (ours[2] is None) == (theirs[2] is None) == (not whole)
    count = 3 if whole else 2
    same(ours[:count], theirs[:count], (hidden, weight))


# --- A head sharded along its vocabulary, hidden states along the sequence ------------------------


def whole():
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(T, 1, D, generator=g), torch.randn(V, D, generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (1, T), generator=g)


def loss_of(*values):
    return sum((v * torch.linspace(0, 1, v.numel()).view_as(v)).sum() for v in values)


def sharded(rank, size, directory):
    """Values and the gradients of this process's hidden states and rows, of both libraries."""
    group, found = torch.distributed.group.WORLD, {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        verl = megatron(monkeypatch)
        members = {
            "gather_from_sequence_parallel_region": rl_recipes.gather_from_sequence_parallel_region
        }
        install(monkeypatch, megatron__core__tensor_parallel=members)
        nemo = install(monkeypatch, nemo_rl__distributed__model_utils={})
        run(recipe("nemo_rl"))
        for name in ("verl", "nemo_rl"):
            hidden, weight, ids = whole()
            own, rows = (
                x.detach().chunk(size)[rank].clone().requires_grad_() for x in (hidden, weight)
            )
            if name == "verl":
                values = rl_recipes.megatron_forward(verl, own, rows, ids, 0.7, group)
            else:
                values = (rl_recipes.nemo_forward(nemo, own, rows, ids, group),)
                frozen = rl_recipes.nemo_forward(nemo, own, rows, ids, group, inference=True)
                assert not frozen.requires_grad
                torch.testing.assert_close(frozen, values[0].detach())
            loss_of(*values).backward()
            found[name] = [v.detach() for v in values], own.grad, rows.grad
    return found


def test_sharded_heads(tmp_path):
    results = processes.results(sharded, 2, tmp_path)
    for name, temperature in (("verl", 0.7), ("nemo_rl", 1.0)):
        hidden, weight, ids = whole()
        logp = (hidden[:, 0] @ weight.T / temperature).log_softmax(-1)
        if name == "verl":
            own = logp.gather(-1, ids[0, :, None])[:, 0]
            values = own, -(logp.exp() * logp).sum(-1)
        else:
            values = (logp[:-1].gather(-1, ids[0, 1:, None])[:, 0][None],)
        loss_of(*values).backward()
        for rank, result in enumerate(results):
            found, *grads = result[name]
            torch.testing.assert_close(found, [v.detach() for v in values])
            wanted = [x.grad.chunk(2)[rank] for x in (hidden, weight)]
            torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)
