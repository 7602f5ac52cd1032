"""Sets of ids of a head that is spread over 2 and 4 processes: what one process gives."""

import pytest
import torch
import torch.distributed as dist

import processes
from ift_kernels import (
    SelectedLogprobs,
    linear_selected_logprobs,
    linear_topk,
    vocab_parallel_selected_logprobs,
    vocab_parallel_topk,
)

V, D, SHAPE, K = 131, 24, (2, 9), 8
NAMES = SelectedLogprobs._fields
CASES = {
    "plain": {},
    "softcap": {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3},
    "deterministic": {"deterministic": True},
    "few rows": {"vocabulary": 5},  # of four processes, one then has no row
}
TOPK = {"all": {}, "nucleus": {"top_p": 0.7, "min_p": 0.01}}


def problem(vocabulary=V, **options):
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(*SHAPE, D, generator=g)
    weight, bias = torch.randn(vocabulary, D, generator=g), torch.randn(vocabulary, generator=g)
    if vocabulary == V:
        weight[100], bias[100] = weight[7], bias[7]  # an exact tie between shards
    k = min(K, vocabulary - 1)
    ids = torch.rand(*SHAPE, vocabulary, generator=g).topk(k).indices
    ids[0, :, 1], ids[1, 3] = -100, -100
    ids[1, 4] = torch.arange(k)  # of the first shard alone
    hidden[1, 5] = torch.nan  # sends nothing
    keep = torch.ones(SHAPE)
    keep[1, 5], keep[0, 2] = 0.0, 0.0
    shapes = dict.fromkeys(NAMES, SHAPE) | dict.fromkeys(NAMES[::2][:2], ids.shape)
    upstream = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return (hidden, weight, bias), ids, upstream, keep, options


def results_of(function, tensors, ids, upstream, keep, **options):
    hidden, weight, bias = tensors
    found = function(hidden, weight, ids, bias=bias, outputs=NAMES, **options)
    loss = 0.0
    for name, up in upstream.items():
        value = getattr(found, name)
        loss = (
            loss
            + (value * up * (keep if value.dim() == 2 else keep[..., None])).nan_to_num(0).sum()
        )
    return [value.detach() for value in found], torch.autograd.grad(loss, tensors)


def shard_of(tensors):
    hidden, weight, bias = tensors
    rank, number, rows = dist.get_rank(), dist.get_world_size(), len(weight)
    parts = [rows // number + 3] * (number - 1) if rows == V else [2, 2, 1][: number - 1]
    parts = [*parts, rows - sum(parts)]
    weight, bias = (t.split(parts)[rank].clone().requires_grad_() for t in (weight, bias))
    return hidden.clone().requires_grad_(), weight, bias


def worker(rank, number, directory):
    found = {}
    for case, options in CASES.items():
        tensors, ids, upstream, keep, options = problem(**options)
        parts = shard_of(tensors)
        found[case] = results_of(
            vocab_parallel_selected_logprobs, parts, ids, upstream, keep, **options
        )
        for name, limits in TOPK.items():
            if "deterministic" not in options:
                with torch.no_grad():
                    hidden, weight, bias = parts
                    k = min(20, len(tensors[1]))
                    best = vocab_parallel_topk(hidden, weight, k, bias=bias, **limits, **options)
                    found[case, name] = tuple(best)
    one = vocab_parallel_selected_logprobs(hidden[0, 0], weight, ids[0, 0], bias=bias).logprob
    found["one token"] = one.detach()
    try:
        vocab_parallel_selected_logprobs(hidden, weight, ids + 1000)
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    return processes.results(worker, request.param, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", CASES)
def test_shards_are_one_head(results, case):
    tensors, ids, upstream, keep, options = problem(**CASES[case])
    whole = [t.requires_grad_() for t in tensors]
    wanted, grads = results_of(linear_selected_logprobs, whole, ids, upstream, keep, **options)
    for got, (d_hidden, *_) in (result[case] for result in results):
        for name, a, b in zip(NAMES, got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6, equal_nan=True, msg=name)
        torch.testing.assert_close(d_hidden, grads[0], rtol=1e-5, atol=1e-5)
    for i in (1, 2):
        joined = torch.cat([result[case][1][i] for result in results])
        torch.testing.assert_close(joined, grads[i], rtol=1e-5, atol=1e-5)
    if "deterministic" in options:
        return
    hidden, weight, bias = tensors
    for name, limits in TOPK.items():
        one = linear_topk(hidden, weight, min(20, len(weight)), bias=bias, **limits, **options)
        for result in results:
            ids, logprob, truncated = result[case, name]
            good = torch.ones(SHAPE, dtype=torch.bool)
            good[1, 5] = False
            assert torch.equal(ids[good], one.ids[good])
            assert torch.equal(truncated[good], one.truncated[good])
            torch.testing.assert_close(logprob[good], one.logprob[good], rtol=1e-6, atol=2e-6)


def test_one_token_without_other_dimensions(results):
    logprob = results[0]["few rows"][0][0]
    torch.testing.assert_close(results[0]["one token"], logprob[0, 0])


def test_refusals(results):
    assert "ids: expected ids in" in results[0]["refused"]
