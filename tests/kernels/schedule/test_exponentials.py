"""Gradients from exponentials that the statistics leave where products were."""

from dataclasses import replace

import pytest
import torch

import dense
from ift_kernels import backends, linear_cross_entropy, linear_logprobs
from ift_kernels.backends import contract
from ift_kernels.backends.contract import Chunk
from ift_kernels.common.transform import LogitTransform
from ift_kernels.schedule import exponentials, plan
from serving import needs_cpp

INF = torch.inf


@needs_cpp
@pytest.mark.parametrize("bias", [False, True])
def test_the_epilogue(bias):
    """Tiles of a width that is not whole, whose largest logit rises slowly, fast, and not at all;
    a row of -inf, one with a NaN, and targets in the first tile, in the last one and nowhere."""
    rows, widths = 6, (70, 1, 203, 64)
    x = [torch.randn(rows, width) + 3 * number for number, width in enumerate(widths)]
    x[2][1] += 60
    x[1][2], x[3][3, 5] = INF, torch.nan
    for part in x:
        part[4] = -INF
    x[2][5], x[3][5] = -90, -91  # of a single column
    b = torch.randn(sum(widths)) if bias else None
    target = torch.tensor([7, 336, 0, 1, 2, -1])
    transform = LogitTransform(0.7, 0.0, 1.3)
    state, plain = (contract.new_state(rows, torch.device("cpu")) for _ in range(2))
    centre, total = torch.full((rows,), -INF), None
    wanted = torch.zeros(rows, 5, dtype=torch.float64)
    backend, start, kept = backends.get(x[0]), 0, []
    weight = torch.randn(sum(widths), 5)
    for part in x:
        columns = slice(start, start := start + part.shape[1])
        chunk = Chunk(part, None if b is None else b[columns], transform, columns.start)
        backend.stats_update(chunk, target, plain, 0)
        z = transform.apply(part, chunk.bias).double()
        backend.exponentials_(chunk, target, state, centre, total)
        e = (z - centre.double()[:, None]).exp().masked_fill(z == -INF, 0)
        ids = torch.arange(columns.start, columns.stop)
        e[ids == target[:, None]] = 0
        torch.testing.assert_close(part.double(), e, rtol=2e-5, atol=1e-37, equal_nan=True)
        product = part @ weight[columns]
        total = product if total is None else total.add_(product)
        kept.append((z.masked_fill(ids == target[:, None], -INF), weight[columns].double()))
    for z, of in kept:
        wanted += (z - centre.double()[:, None]).exp().masked_fill(z == -INF, 0) @ of
    assert ((centre <= plain.values[contract.MAX]) | centre.isnan())[[0, 1, 5]].all()
    torch.testing.assert_close(total.double(), wanted, rtol=2e-5, atol=2e-5, equal_nan=True)
    lse = [s.values[contract.MAX] + s.values[contract.SUM].log() for s in (state, plain)]
    torch.testing.assert_close(*lse, rtol=3e-7, atol=1e-7, equal_nan=True)
    same = [s.values[contract.TARGET] for s in (state, plain)]
    torch.testing.assert_close(*same, rtol=0, atol=0, equal_nan=True)


@needs_cpp
def test_what_it_does_not_serve_is_refused():
    state = contract.new_state(3, torch.device("cpu"))
    target, centre = torch.zeros(3, dtype=torch.int64), torch.full((3,), -INF)

    def call(dtype=torch.float32, total=None, **transform):
        chunk = Chunk(torch.randn(3, 8).to(dtype), None, LogitTransform(**transform))
        backends.get(centre).exponentials_(chunk, target, state, centre, total)

    for change, said in (
        ({"dtype": torch.bfloat16}, "float32"),
        ({"softcap": 2.0}, "transform"),
        ({"scale": 0.0}, "transform"),
        ({"total": torch.zeros(2, 4)}, "total"),
        ({"total": torch.zeros(4, 3).T}, "total"),
    ):
        with pytest.raises(RuntimeError, match=said):
            call(**change)


@pytest.fixture
def used(monkeypatch):
    found, original = [], exponentials.in_forward
    monkeypatch.setattr(exponentials, "in_forward", lambda *a: found.append(a[-1]) or original(*a))
    return found


@needs_cpp
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rising", [0.0, 100.0])
def test_gradients(used, bias, rising):
    """Several blocks of rows and tiles; of rising logits only the last tile's have a weight."""
    h = dense.head(700, 24, 3000, bias=bias, seed=3)
    with torch.no_grad():
        h.hidden[:, 0] = 1.0
        h.weight[:, 0] = torch.linspace(0, rising, 3000)
        h.target[5:40] = torch.arange(2965, 3000)  # some of them nearly certain
    options = {"z_loss": 1e-3, "workspace": 3 << 20, "reduction": "sum"}
    with plan.use_schedule("forward"):
        loss = linear_cross_entropy(*h.args, **h.kwargs, **options)
    ours = torch.autograd.grad(loss, h.inputs)
    exact = h.double()
    plain, wanted = (dense.cross_entropy(x, z_loss=1e-3, reduction="sum") for x in (h, exact))
    dense.assert_gradients(ours, h, plain, wanted, exact.inputs)
    assert len(used) == 1 and len(used[0].blocks(700)) > 1
    assert used[0].tile_columns < 3000


@needs_cpp
def test_many_tokens_of_one_target(used):
    """Equal terms: summed one by one, they would lose up to two digits that torch does not."""
    h = dense.head(5000, 4, 1000, bias=True, seed=2)
    with torch.no_grad():
        h.hidden.fill_(1.0)
        h.target[:1250] = 7
    exact = h.double()
    with plan.use_schedule("forward"):
        ours = torch.autograd.grad(linear_cross_entropy(*h.args, **h.kwargs), h.inputs)
    plain, wanted = (torch.autograd.grad(dense.cross_entropy(x), x.inputs) for x in (h, exact))
    assert len(used) == 1
    for one, other, true in zip(ours, plain, wanted, strict=True):
        assert dense.distance(one, true) < 3 * dense.distance(other, true) + 1e-7


@needs_cpp
def test_a_frozen_head(used):
    h = dense.head(300, 16, 2000, seed=1)
    frozen = replace(h, weight=h.weight.detach())
    given = torch.randn(300)
    found = []
    for served in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not served:
                patch.setattr(exponentials, "serves", lambda *a: False)
            with plan.use_schedule("forward"):
                logprob = linear_logprobs(*frozen.args, workspace=2 << 20).logprob
            found += torch.autograd.grad(logprob, frozen.hidden, given)
    assert len(used) == 1
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_what_else_is_formed_in_place(used):
    """Under a softcap the slope is each element's; smoothing gives all of them the same."""
    h = dense.head(40, 8, 200)
    for options in ({"softcap": 5.0}, {"label_smoothing": 0.1}, {"logit_scale": -1.0}):
        linear_cross_entropy(*h.args, **options).backward()
    assert not used
