"""linear_token: greedy, k-th best and sampled ids against full logits, and how draws fall."""

import math

import pytest
import torch

import dense
import ift_kernels
from ift_kernels import linear_token
from ift_kernels.backends.reference.sampling import philox
from serving import BACKENDS

SMALL = 1 << 20
RULES = ("greedy", "kth", "sample")


def call(h, rule="greedy", **options):
    return linear_token(h.hidden, h.weight, rule=rule, **h.kwargs, **options)


def assert_logprob(h, ids, logprob):
    """`logprob` is that of `ids`."""
    named = dense.replace(h, target=ids)
    dense.assert_as_accurate(
        logprob, dense.stats(named)["logprob"], dense.stats(named.double())["logprob"]
    )


# V: under a vector, one block of 1024 and one more, a real vocabulary. N: one row, many.
@pytest.mark.parametrize(
    ("n", "d", "v"), [(1, 3, 5), (33, 9, 1025), (129, 16, 3000), (7, 5, 50257)]
)
@pytest.mark.parametrize("transform", [{}, dense.TRANSFORM], ids=["plain", "transformed"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_kth_best(dtype, n, d, v, transform, k):
    h = dense.head(n, d, v, dtype, bias=True, **transform)
    chosen = call(h, "kth", k=k)
    assert chosen.ids.dtype == torch.int64 and not chosen.logprob.requires_grad
    assert_logprob(h, chosen.ids, chosen.logprob)
    # Logits rounded to a half type tie: then it must be within rounding of the k-th best.
    z = dense.logits(h.double())
    missed = (z.gather(1, chosen.ids[:, None])[:, 0] - z.topk(k).values[:, -1]).abs()
    assert (missed <= 2 * torch.finfo(dtype).eps * z.abs().amax(1)).all()
    if k == 1:
        greedy = call(h, "greedy")
        assert torch.equal(greedy.ids, chosen.ids)
        torch.testing.assert_close(greedy.logprob, chosen.logprob)


@pytest.mark.parametrize("workspace", [SMALL, None], ids=["small", "default"])
def test_every_k_against_a_stable_sort(backend, workspace):
    """Few distinct logits, so most of them tie: equal logits come in the order of their ids."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(4, (300, 5000), generator=generator).float()
    head = dense.Head(torch.eye(300), levels.T.contiguous(), torch.zeros(300, dtype=torch.long))
    order = levels.sort(dim=1, descending=True, stable=True).indices
    for k in (1, 2, 3, 17, 64):
        ids = call(head, "kth", k=k, workspace=workspace).ids
        assert torch.equal(ids, order[:, k - 1]), f"k={k}"
    assert torch.equal(call(head, "greedy", workspace=workspace).ids, order[:, 0])


def test_k_as_large_as_the_vocabulary(backend):
    h = dense.head(10, 4, 7)
    for k in range(1, 8):
        assert torch.equal(call(h, "kth", k=k).ids, dense.logits(h).topk(k).indices[:, k - 1])


def test_kth_best_among_masked_tokens(backend):
    """With fewer than k tokens left, the masked ones follow in the order of their ids."""
    h = dense.head(20, 4, 700, bias=True)
    bias = torch.full((700,), -torch.inf)
    bias[[650, 13]] = 0.0
    h = dense.replace(h, bias=bias)
    third = call(h, "kth", k=3)
    assert (third.ids == 0).all() and (third.logprob == -torch.inf).all()
    assert set(call(h, "kth", k=2).ids.tolist()) <= {650, 13}
    assert set(call(h, "sample").ids.tolist()) <= {650, 13}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (2, 0), (2, 3, 4)], ids=str)
def test_every_batch_shape(backend, rule, shape):
    h = dense.head(shape, 6, 40)
    ids, logprob = call(h, rule)
    assert ids.shape == logprob.shape == shape
    if h.target.numel():
        flat = dense.replace(h, hidden=h.hidden.reshape(-1, 6), target=h.target.reshape(-1))
        assert torch.equal(call(flat, rule).ids, ids.reshape(-1))


@pytest.mark.parametrize("rule", RULES)
def test_nan_rows_choose_a_token_and_say_nan(backend, rule):
    h = dense.head(40, 5, 600, bias=True)
    bad = torch.arange(40) % 3 == 0
    ids, logprob = call(dense.fill_rows(h, bad, column=1), rule)
    clean = call(h, rule)
    assert torch.equal(logprob.isnan(), bad)
    assert ((ids >= 0) & (ids < 600)).all()
    assert torch.equal(ids[~bad], clean.ids[~bad])


@pytest.mark.parametrize("rule", RULES)
def test_everything_masked_is_no_good_token(backend, rule):
    h = dense.replace(dense.head(5, 4, 20), bias=torch.full((20,), -torch.inf))
    ids, logprob = call(h, rule)
    assert logprob.isnan().all() and ((ids >= 0) & (ids < 20)).all()


@pytest.mark.parametrize("rule", RULES)
def test_layouts(backend, rule):
    h = dense.head((4, 9), 6, 300, bias=True)
    wanted = call(h, rule)
    moved = h.map(lambda t: torch.stack([t.detach(), t.detach() + 1], -1)[..., 0])
    assert not moved.hidden.is_contiguous()
    got = call(moved, rule)
    assert torch.equal(got.ids, wanted.ids)
    torch.testing.assert_close(got.logprob, wanted.logprob)


# --- sampling ------------------------------------------------------------------------------------


def test_philox_known_answer():
    """Counter 0 and key 0: the first vector of kat_vectors in the authors' Random123."""
    words = philox(0, torch.tensor([0]), torch.arange(4))
    assert [f"{int(w):08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def philox_in_integers(seed, row, token):
    """Philox4x32-10 in Python's own integers, from the paper."""
    c = [token // 4, row % 2**32, row // 2**32, 0]
    k = [seed % 2**32, seed // 2**32 % 2**32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[token % 4]


SEEDS = [0, 1, -1, 2**31, 2**32 + 5, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_the_documented_ones(backend, seed):
    """argmax(z + gumbel(seed, row, id)) by the generator's definition, row numbers beyond 2³²."""
    h, first = dense.head(6, 4, 70), 2**33 + 11
    z = dense.logits(h.double())
    for row in range(6):
        u = [(philox_in_integers(seed, first + row, v) + 0.5) / 2**32 for v in range(70)]
        z[row] += torch.tensor([-math.log(-math.log1p(-x)) for x in u], dtype=torch.float64)
    chosen = call(h, "sample", seed=seed, row_offset=first)
    assert torch.equal(chosen.ids, z.argmax(1))
    assert_logprob(h, chosen.ids, chosen.logprob)


def chi_square(counts, p):
    """Statistic and degrees of freedom; cells expecting fewer than 5 are put together."""
    expected = p * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    keep = expected > 0
    return ((counts - expected)[keep].square() / expected[keep]).sum().item(), int(keep.sum()) - 1


# 1100: a block of 1024 and a tail. A flat and more and more peaked distributions: blocks are passed
# over when their best logit cannot win, which must never change a draw.
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("seed", [0, 12345])
def test_draws_follow_softmax(backend, spread, seed):
    z = torch.randn(1100, generator=torch.Generator().manual_seed(5)) * spread
    draws = 2_000 if backend == "reference" else 40_000  # whose generator is slow
    hidden = torch.ones(1, 1).expand(draws, 1)
    ids = linear_token(hidden, z[:, None], rule="sample", seed=seed).ids
    statistic, freedom = chi_square(torch.bincount(ids, minlength=1100), z.double().softmax(0))
    # Five standard deviations of the chi-square distribution; fixed seeds, so never by chance.
    assert statistic < freedom + 5 * (2 * max(freedom, 1)) ** 0.5, (statistic, freedom)


def test_temperature_applies_before_the_draw(backend):
    z = torch.tensor([[0.0], [1.0], [3.0]])
    hidden = torch.ones(1, 1).expand(20_000, 1)
    ids = linear_token(hidden, z, rule="sample", temperature=0.7).ids
    frequency = torch.bincount(ids, minlength=3) / len(ids)
    torch.testing.assert_close(frequency, (z[:, 0] / 0.7).softmax(0), rtol=0, atol=0.02)


def test_rows_seeds_and_neighbours_are_independent(backend):
    hidden, weight = torch.zeros(4000, 1), torch.zeros(4, 1)
    ids = linear_token(hidden, weight, rule="sample", seed=1).ids
    for other in (ids.roll(1), linear_token(hidden, weight, rule="sample", seed=2).ids):
        pairs = torch.bincount(ids * 4 + other, minlength=16)
        statistic, freedom = chi_square(pairs, torch.full((16,), 1 / 16))
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_draws_do_not_depend_on_tiles_shards_or_backend(spread):
    # 600 x 2000 does not fit the smallest workspace: four tiles or more.
    h = dense.head(600, 8, 2000, bias=True)
    h = h.map(lambda t: t.detach() * spread**0.5)
    results = {}
    for name in BACKENDS:
        with ift_kernels.use_backend(name):
            results[name] = call(h, "sample", seed=7)
            tiled = call(h, "sample", seed=7, workspace=SMALL)
            assert torch.equal(tiled.ids, results[name].ids)
            torch.testing.assert_close(tiled.logprob, results[name].logprob)
            shards = []
            for start, stop in ((0, 1), (1, 250), (250, 600)):
                shard = dense.replace(h, hidden=h.hidden[start:stop])
                shards.append(call(shard, "sample", seed=7, row_offset=start).ids)
            assert torch.equal(torch.cat(shards), results[name].ids)
    first, *others = results.values()
    for other in others:
        # Two perturbed logits may be so close that a last digit decides: not in 600 rows here.
        assert torch.equal(first.ids, other.ids)
        torch.testing.assert_close(first.logprob, other.logprob)


def test_a_certain_token_is_always_drawn(backend):
    """The noise is at most 22.9, so a lead of 30 cannot be made up for."""
    z = torch.zeros(3000, 1)
    z[2999] = 30.0
    ids, logprob = linear_token(torch.ones(500, 1), z, rule="sample")
    assert (ids == 2999).all() and (logprob.abs() < 1e-9).all()


def test_half_precision_draws_are_those_of_its_rounded_logits(backend):
    """Sampling perturbs what the product returned; the rounding of a half type is in the logits."""
    z = torch.randn(200, generator=torch.Generator().manual_seed(1)).bfloat16()
    hidden = torch.ones(500, 1)
    half = linear_token(hidden.bfloat16(), z[:, None], rule="sample", seed=3)
    full = linear_token(hidden, z.float()[:, None], rule="sample", seed=3)
    assert torch.equal(half.ids, full.ids)
