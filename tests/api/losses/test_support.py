"""Losses within the support of a sampler: full logits of which the rest is -inf, in fp64."""

import functools
import re
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.generation import logits_process

import dense
import processes
from ift import Support, losses
from ift_kernels.common.sync_free import sync_free

ROWS, T, D, V = 4, 5, 6, 40
TRANSFORM = {"logit_scale": 1.5, "softcap": 6.0, "temperature": 0.8}
LIMITS = [
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 8, "top_p": 0.6},
    {"top_k": 300, "top_p": 0.9, "min_p": 0.0},
    {"top_p": 0.7, "min_p": 0.4},
    {"top_k": 12, "top_p": 0.75, "min_p": 0.1},
]


def problem(seed=0):
    """hidden, weight, bias, targets of which some are masked, and a sampler's logits."""
    g = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=g, dtype=torch.float64)
    hidden, weight, bias = draw(ROWS, T, D), draw(V, D), draw(V)
    target = torch.randint(V, (ROWS, T), generator=g)
    target[0, :2], target[2, 4:] = -100, -100
    tensors = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    z = dense.logits(dense.Head(hidden, weight, target, bias, TRANSFORM))
    return SimpleNamespace(tensors=tensors, target=target, mask=target != -100, z=z, g=g)


def warped(z, sampler, top_k=None, top_p=None, min_p=None):
    """What a sampler leaves of logits, step by step, each on what the ones before left."""

    def of_top_k(z):
        return z.masked_fill(z < z.topk(min(top_k, z.shape[-1])).values[..., -1:], -torch.inf)

    def of_top_p(z):
        values, order = z.sort(dim=-1, descending=True, stable=True)
        p = values.softmax(-1)
        return z.masked_fill((p.cumsum(-1) - p >= top_p).gather(-1, order.argsort(-1)), -torch.inf)

    def of_min_p(z):
        p = z.softmax(-1)
        return z.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)

    steps = [(top_k, of_top_k), (top_p, of_top_p)]
    steps.insert(0 if sampler == "vllm" else 2, (min_p, of_min_p))
    for given, step in steps:
        z = z if given is None else step(z)
    return z


def within(z, inside, target, mask):
    """Log-probability, entropy and likeliest id of each target over the ids that are `inside`."""
    inside = inside | ~mask[..., None]
    logp = z.masked_fill(~inside, -torch.inf).log_softmax(-1)
    logprob = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    finite = logp.masked_fill(~inside, 0)
    entropy = -torch.where(inside, finite.exp() * finite, 0).sum(-1)
    return logprob, torch.where(mask, entropy, 0), logp.argmax(-1)


def with_target(inside, target):
    return inside | torch.nn.functional.one_hot(target.clamp(min=0), V).bool()


def padded_ids(inside, width=V):
    """Ids that are `inside`, in ascending order, padded with -100."""
    places = torch.where(inside, torch.arange(V), V).sort(-1).values[..., :width]
    return places.masked_fill(places == V, -100)


@pytest.mark.parametrize("sampler", ["vllm", "transformers"])
def test_a_support_is_that_of_the_sampler(sampler):
    p, found = problem(), []
    with torch.no_grad():
        for limits in LIMITS:
            left = warped(p.z, sampler, **limits)
            inside = (left > -torch.inf) & p.mask[..., None]
            hidden, weight, bias = p.tensors
            ids, outside, cut = Support(sampler=sampler, **limits).ids(
                hidden, weight, p.target, bias=bias, **TRANSFORM
            )
            lacking = p.mask & ~inside.gather(-1, p.target.clamp(min=0)[..., None])[..., 0]
            assert torch.equal(outside, lacking) and not cut.any()
            wanted = with_target(inside, p.target) & p.mask[..., None]
            ordered = torch.where(ids < 0, V, ids).sort(-1).values
            assert torch.equal(
                ordered.masked_fill(ordered == V, -100), padded_ids(wanted, len(ids[0, 0]))
            )
            found.append(wanted)
            if sampler == "transformers":
                scores = p.z.flatten(0, 1)
                for name, warper in (
                    ("top_k", logits_process.TopKLogitsWarper),
                    ("top_p", logits_process.TopPLogitsWarper),
                    ("min_p", logits_process.MinPLogitsWarper),
                ):
                    scores = warper(limits[name])(None, scores) if name in limits else scores
                assert torch.equal(scores.view_as(left), left)
    assert found[5].sum() < found[1].sum()  # min_p limits there


def test_the_order_of_the_sampler_matters():
    hidden, weight, bias = problem().tensors
    given = {"top_p": 0.7, "min_p": 0.1}
    one, other = (
        Support(sampler=name, **given).ids(hidden, weight, problem().target, bias=bias).ids
        for name in ("vllm", "transformers")
    )
    assert (one >= 0).sum() < (other >= 0).sum()  # of what min_p leaves fewer have the mass


def test_ids_that_tie_with_the_last_are_in():
    weight = torch.eye(6)[[0, 1, 2, 2, 2, 3]]
    hidden = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0, 0.0, 0.0]])
    ids = Support(top_k=3).ids(hidden, weight, torch.tensor([0, 5])).ids
    assert [sorted(row[row >= 0].tolist()) for row in ids] == [[0, 1, 2, 3, 4], [2, 3, 4, 5]]


def test_however_many_tie():
    """More than are taken at first, of one token among others."""
    hidden = torch.zeros(3, 4)
    hidden[0] = 1.0
    weight = torch.arange(400.0).repeat(4, 1).T.contiguous()
    for top_p, width in ((None, 400), (0.5, 200)):
        found = Support(top_k=3, top_p=top_p).ids(hidden, weight, torch.tensor([399, 7, -100]))
        assert (found.ids >= 0).sum(-1).tolist()[1:] == [width, 0]
        assert not found.outside.any() and not found.cut.any()


CASES = {
    "grpo": (losses.GRPOLoss, {"kl_coef": 0.1, "entropy_coef": 0.3}),
    "gspo": (losses.GRPOLoss, {"kind": "gspo", "kl_coef": 0.1, "kl_kind": "k2"}),
    "ppo": (losses.PPOLoss, {"entropy_coef": 0.3}),
    "reinforce": (losses.REINFORCELoss, {"entropy_coef": 0.3}),
    "rloo": (losses.RLOOLoss, {}),
}


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(packed, rebuilt):
    p = problem(1)
    hidden, weight, bias = p.tensors
    target, mask, z = p.target, p.mask, p.z
    if rebuilt:
        limits = {"top_k": 9, "top_p": 0.8}
        support, inside = Support(**limits), warped(z.detach(), "vllm", **limits) > -torch.inf
        lacking = (~inside.gather(-1, target.clamp(min=0)[..., None])[..., 0] & mask).sum()
        assert 0 < lacking < mask.sum()
        inside = with_target(inside, target)
    else:
        inside = with_target(torch.rand(ROWS, T, V, generator=p.g) < 0.3, target)
        support = padded_ids(inside)
    old = -2 * torch.rand(ROWS, T, generator=p.g, dtype=torch.float64)
    rewards = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
    frozen = losses.Head(hidden.detach() + 0.1, weight.detach() * 1.2, None, softcap=9.0)
    theirs = {"softcap": 9.0, "temperature": TRANSFORM["temperature"]}
    z_frozen = dense.logits(dense.Head(frozen.hidden, frozen.weight, target, None, theirs))
    more = {}
    if packed:
        more["cu_seqlens"] = torch.arange(ROWS + 1) * T
        hidden, target, mask, old = (x.flatten(0, 1) for x in (hidden, target, mask, old))
        z, z_frozen, inside = (x.flatten(0, 1) for x in (z, z_frozen, inside))
        frozen = frozen._replace(hidden=frozen.hidden.flatten(0, 1))
        support = support if rebuilt else support.flatten(0, 1)
    logprob, entropy, argmax = within(z, inside, target, mask)
    reference = within(z_frozen, inside, target, mask)[0]
    for name, (module, options) in CASES.items():
        rest = (rewards,) if name == "reinforce" else (rewards, old)
        loss = module(**options)
        statistics = {"entropy": entropy} if "entropy_coef" in options else {}
        kl = {"reference": reference} if "kl_coef" in options else {}
        wanted = loss(logprob, mask, *rest, **statistics, **kl, **more)
        metrics = {k: v for k, v in loss.metrics.items() if k != "entropy"}
        if kl:
            kl["reference"] = frozen
        got = loss.from_hidden(
            hidden, weight, target, *rest, bias=bias, support=support, **kl, **more, **TRANSFORM
        )
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        grads = (torch.autograd.grad(x, p.tensors, retain_graph=True) for x in (got, wanted))
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)
        sizes = inside.sum(-1)[mask].double().mean()
        outside = lacking / mask.sum() if rebuilt else 0
        metrics |= {
            "entropy": entropy[mask].detach().mean(), "support_size": sizes, "support_cut": 0,
            "token_accuracy": (argmax == target)[mask].double().mean(), "support_outside": outside,
        }  # fmt: skip
        assert loss.metrics.keys() == metrics.keys()
        for key, value in metrics.items():
            assert float(loss.metrics[key]) == pytest.approx(float(value), rel=1e-5), key
    by_function = losses.from_hidden(
        losses.rloo_loss, hidden, weight, target, *rest, bias=bias, support=support, **more,
        **TRANSFORM,
    )  # fmt: skip
    assert by_function == got


def test_ratios_to_what_a_sampler_reports_are_1():
    """Over the whole vocabulary they are the mass that the sampler kept."""
    p = problem(2)
    hidden, weight, bias = p.tensors
    limits = {"top_k": 9, "top_p": 0.7}
    left = warped(p.z.detach(), "vllm", **limits)
    drawn = torch.multinomial(left.softmax(-1).flatten(0, 1), 1, generator=p.g).view(ROWS, T)
    reported = left.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
    loss, head = losses.GRPOLoss(), {"bias": bias, **TRANSFORM}
    given = (hidden, weight, drawn, torch.ones(ROWS), reported)
    for support in (Support(**limits), padded_ids(left > -torch.inf)):
        loss.from_hidden(*given, support=support, **head)
        assert float(loss.metrics["ratio"]) == pytest.approx(1, abs=1e-12)
        assert float(loss.metrics["approx_kl"]) == pytest.approx(0, abs=1e-12)
        assert loss.metrics["support_outside"] == 0
    loss.from_hidden(*given, **head)
    kept = (p.z.softmax(-1) * (left > -torch.inf)).sum(-1)
    assert float(loss.metrics["ratio"]) == pytest.approx(float(kept.mean()))
    assert kept.mean() < 0.9


def test_a_support_of_the_old_policy_serves_all_steps():
    """Its ids, taken once, are those of a sampler."""
    p = problem(3)
    hidden, weight, bias = p.tensors
    head = {"bias": bias, **TRANSFORM}
    support = Support(top_k=6, top_p=0.8)
    ids = support.ids(hidden, weight, p.target, **head).ids
    loss, rest = losses.GRPOLoss(), (torch.ones(ROWS),)
    at_first = [
        loss.from_hidden(hidden, weight, p.target, *rest, support=s, **head) for s in (support, ids)
    ]
    assert at_first[0] == at_first[1]
    moved = weight.detach() + 0.3 * torch.randn(V, D, generator=p.g, dtype=torch.float64)
    z = dense.logits(dense.Head(hidden, moved, p.target, bias, TRANSFORM))
    inside = torch.zeros(ROWS, T, V + 1, dtype=torch.bool)
    inside = inside.scatter(-1, torch.where(ids < 0, V, ids), True)[..., :V]
    wanted = loss(within(z, inside, p.target, p.mask)[0], p.mask, *rest)
    got = loss.from_hidden(hidden, moved, p.target, *rest, support=ids, **head)
    torch.testing.assert_close(got, wanted)


def test_a_token_of_more_ids_than_are_taken_is_left_out():
    p = problem(4)
    hidden, weight, bias = p.tensors
    head = {"bias": bias, **TRANSFORM}
    inside = warped(p.z.detach(), "vllm", top_p=0.9) > -torch.inf
    cut = (inside.sum(-1) > 8) & p.mask
    assert 0 < cut.sum() < p.mask.sum() / 2
    rest = (torch.ones(ROWS), torch.full((ROWS, T), -1.5))
    loss = losses.GRPOLoss(kind="dapo", entropy_coef=0.1)
    got = loss.from_hidden(
        hidden, weight, p.target, *rest, support=Support(top_p=0.9, max_ids=8), **head
    )
    found, mask = dict(loss.metrics), p.mask & ~cut
    logprob, entropy, _ = within(p.z, with_target(inside, p.target), p.target, mask)
    wanted = loss(logprob, mask, *rest, entropy=entropy)
    torch.testing.assert_close(got, wanted)
    grads = (torch.autograd.grad(x, p.tensors, retain_graph=True) for x in (got, wanted))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)
    assert float(found["support_cut"]) == pytest.approx(float(cut.sum() / p.mask.sum()))
    assert found["tokens"] == mask.sum()
    rloo, sums = losses.RLOOLoss(), torch.zeros(ROWS)
    with pytest.raises(ValueError, match=r"support: expected one with top_k, or log-prob.*\(4,\)"):
        rloo.from_hidden(
            hidden, weight, p.target, sums, sums, support=Support(top_p=0.9, max_ids=8), **head
        )
    rloo.from_hidden(hidden, weight, p.target, sums, sums, support=Support(top_p=0.9), **head)


def test_what_else_is_in_the_call_changes_nothing():
    """An id that is the ignore index of targets, no syncs, a deterministic head, no target."""
    p = problem(5)
    hidden, weight, bias = p.tensors
    loss, rest, support = losses.GRPOLoss(), (torch.ones(ROWS),), Support(top_k=V - 4)
    call = functools.partial(loss.from_hidden, hidden, weight, bias=bias)
    target = p.target.clamp(min=1).masked_fill(~p.mask, -100)
    wanted = call(target, *rest, support=support)
    ids = support.ids(hidden, weight, target, bias=bias).ids
    assert (ids[p.mask] == 0).any(-1).sum() > 5
    zeros = target.masked_fill(~p.mask, 0)
    for given in (support, ids):
        assert call(zeros, *rest, support=given, ignore_index=0) == wanted
    with sync_free():
        torch.testing.assert_close(call(target, *rest, support=support), wanted)
    torch.testing.assert_close(call(target, *rest, support=support, deterministic=True), wanted)
    nothing = call(torch.full_like(target, -100), *rest, support=support)
    assert nothing == 0 and not any(x.any() for x in torch.autograd.grad(nothing, p.tensors))
    assert call(target.int(), *rest, support=ids.int()) == wanted


def test_impossible_ids_and_certain_ones():
    """An id without probability sends no NaN; a support of one id is certain of it."""
    p = problem(6)
    hidden, weight, _ = p.tensors
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = -torch.inf
    target = torch.full((ROWS, T), 7)
    ids = torch.tensor([3, 7, 9]).expand(ROWS, T, 3)
    loss = losses.GRPOLoss(entropy_coef=0.1)
    value = loss.from_hidden(hidden, weight, target, torch.ones(ROWS), support=ids, bias=bias)
    same = loss.from_hidden(
        hidden, weight, target, torch.ones(ROWS), support=ids[..., 1:], bias=bias
    )
    torch.testing.assert_close(value, same)
    grads = (torch.autograd.grad(x, (hidden, weight)) for x in (value, same))
    torch.testing.assert_close(*grads)
    value = loss.from_hidden(hidden, weight, target, torch.ones(ROWS), support=target[..., None])
    assert loss.metrics["perplexity"] == loss.metrics["token_accuracy"] == 1
    assert loss.metrics["entropy"] == 0
    assert not any(x.any() for x in torch.autograd.grad(value, (hidden, weight)))


X, IDS = torch.randn(2, 3, 4), torch.arange(5).expand(2, 3, 5)
CALL = (X, torch.randn(9, 4), torch.ones(2, 3).long(), torch.ones(2))
REFUSED = {
    "support: expected ids (..., K) or an ift.Support, got int": {"support": 5},
    "support: expected int64 or int32 ids, got torch.float32": {"support": IDS.float()},
    "support: expected (..., K) for targets (2, 3), got (2, 3)": {"support": IDS[..., 0]},
    "support: expected ids that hold the target, 1 at (0, 0), got [2, 3, 4]": {
        "support": IDS[..., 2:]
    },
    "support: expected every id of a token once": {"support": IDS.clamp(max=3)},
    "support: expected ids in [0, 9)": {"support": IDS + 5 * (IDS == 4)},
    "gradient: expected 'exact' with support, got 'active'": {"support": IDS, "gradient": "active"},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_refused(problem):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(problem)}"):
        losses.GRPOLoss().from_hidden(*CALL, **REFUSED[problem])


def test_other_targets_and_losses_of_the_whole_vocabulary_are_refused():
    given = {"support": Support(top_k=3)}
    with pytest.raises(ValueError, match="^target: expected ids in .*, got 9"):
        losses.GRPOLoss().from_hidden(*CALL[:2], CALL[2] + 8, CALL[3], **given)
    with pytest.raises(ValueError, match="support: expected None with 'lse'"):
        losses.SFTLoss(z_loss=0.1).from_hidden(*CALL[:3], **given)
    head = losses.Head(*CALL[:2])
    with pytest.raises(ValueError, match="kl_coef: expected 0 with support"):
        losses.SFTLoss(kl_coef=0.1).from_hidden(*CALL[:3], reference=head, **given)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "top_k, top_p, min_p: expected one that limits"),
        ({"top_p": 1.0, "min_p": 0.0}, "top_k, top_p, min_p: expected one that limits"),
        ({"top_k": 0}, "top_k: expected None or 1 to 511, got 0"),
        ({"top_k": 512}, "top_k: expected None or 1 to 511, got 512"),
        ({"top_k": 2.0}, "top_k: expected an int"),
        ({"top_p": 0.0}, "top_p: expected None or a number in"),
        ({"min_p": 1.5}, "min_p: expected None or a number in"),
        ({"top_k": 5, "max_ids": 8}, "max_ids: expected None with top_k"),
        ({"top_k": 5, "sampler": "sglang"}, "sampler: expected one of"),
    ],
)
def test_supports_that_are_refused(options, problem):
    with pytest.raises((TypeError, ValueError), match=f"^{problem}"):
        Support(**options)


def sharded(rank, number, directory):
    """A head of which each process has some rows: value, metrics and whole gradients."""
    mesh = init_device_mesh("cpu", (number,))
    p, found = problem(7), []
    hidden = p.tensors[0].detach().requires_grad_()
    weight, bias = (
        distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in p.tensors[1:]
    )
    ids = Support(top_k=9, top_p=0.8).ids(*problem(7).tensors[:2], p.target).ids
    for support in (Support(top_k=9, top_p=0.8), ids):
        loss = losses.GRPOLoss(entropy_coef=0.1)
        value = loss.from_hidden(
            hidden, weight, p.target, torch.ones(ROWS), support=support, bias=bias, **TRANSFORM
        )
        grads = torch.autograd.grad(value, (hidden, weight, bias))
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        found.append((value.detach(), dict(loss.metrics), whole))
    return found


def test_a_sharded_head(tmp_path):
    p = problem(7)
    hidden, weight, bias = p.tensors
    ids = Support(top_k=9, top_p=0.8).ids(hidden, weight, p.target).ids
    for found in processes.results(sharded, 2, tmp_path):
        for support, got in zip((Support(top_k=9, top_p=0.8), ids), found, strict=True):
            loss = losses.GRPOLoss(entropy_coef=0.1)
            value = loss.from_hidden(
                hidden, weight, p.target, torch.ones(ROWS), support=support, bias=bias, **TRANSFORM
            )
            grads = torch.autograd.grad(value, p.tensors)
            torch.testing.assert_close(got[0], value.detach())
            torch.testing.assert_close(got[1], dict(loss.metrics))
            torch.testing.assert_close(got[2], list(grads))
