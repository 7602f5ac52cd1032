"""Work memory kept between calls: never shared, never over its limit, never seen in results."""

import threading

import pytest
import torch

import dense
from ift_kernels import ActiveSet, linear_cross_entropy, linear_logprobs, linear_token
from ift_kernels.backends.cpu import memory
from serving import needs_cpp

pytestmark = [
    needs_cpp,
    pytest.mark.skipif(memory._use_count is None, reason="torch counts no users of a storage"),
]
MIB = 1 << 20
LIKE = torch.zeros(0)


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """On, which it is not in other tests, and empty."""
    blocks = []
    monkeypatch.setattr(memory, "LIMIT", 64 * MIB)
    monkeypatch.setattr(memory, "_blocks", blocks)
    return blocks


def take(mib, dtype=torch.float32):
    return memory.empty(LIKE.to(dtype), mib * MIB // dtype.itemsize)[0]


def test_memory_is_used_again_once_nobody_uses_it():
    first = take(8)
    address = first.data_ptr()
    view = first[10:20].view(2, 5)
    del first
    assert take(8).data_ptr() != address, "a view still uses it"
    del view
    again, new = memory.empty(LIKE.bfloat16(), 3 * MIB)  # 6 MiB, in another dtype
    assert (again.data_ptr() == address) and not new
    assert again.shape == (3 * MIB,) and again.dtype == torch.bfloat16


def test_what_is_kept_stays_inside_the_limit(kept):
    def held():
        return sum(block.nbytes() for block in kept)

    for size in (5, 30, 12, 60, 1, 33, 64, 2):
        take(size)
        assert held() <= 64 * MIB
    in_use = [take(40), take(40)]
    assert held() <= 64 * MIB
    assert in_use[0].data_ptr() != in_use[1].data_ptr()
    take(100)
    take(0)
    assert held() <= 64 * MIB


def test_a_small_request_does_not_take_a_large_block():
    large = take(40).data_ptr()
    small = take(2)
    assert small.data_ptr() != large and take(40).data_ptr() == large


def test_threads_never_share():
    clashes = []

    def work(number):
        for turn in range(200):
            mine = take(2 + turn % 3)
            mine[:1000] = number
            if not bool((mine[:1000] == number).all()):
                clashes.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


def poison(blocks):
    for block in blocks:
        torch.empty(0).set_(block, 0, (block.nbytes() // 4,), (1,)).fill_(float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["exact", ActiveSet()], ids=str)
def test_results_do_not_depend_on_what_was_there(kept, dtype, gradient, monkeypatch):
    """Calls of changing sizes, all memory NaN in between, against calls without kept memory."""
    heads = [dense.head(n, 40, v, dtype) for n, v in ((140, 9000), (60, 9001), (200, 7000))]

    def results():
        found = []
        for h in heads:
            for operation in (linear_cross_entropy, linear_logprobs):
                value = operation(h.hidden, h.weight, h.target, gradient=gradient)
                value = value if isinstance(value, torch.Tensor) else value.logprob.sin().sum()
                found += [value.detach(), *dense.gradients(value, h.inputs)]
                poison(block for block in kept if memory._use_count(block._cdata) == 1)
            found.append(linear_token(h.hidden, h.weight).ids)
        return found

    reused = results() and results()
    assert kept, "nothing was kept: the sizes are too small to test anything"
    monkeypatch.setattr(memory, "LIMIT", 0)
    for a, b in zip(reused, results(), strict=True):
        assert torch.equal(a, b)


def test_two_graphs_alive_keep_their_own(kept):
    h, other = dense.head(300, 40, 9000), dense.head(300, 40, 9000)
    first = linear_logprobs(*h.args).logprob.sin().sum()
    second = linear_logprobs(*other.args).logprob.cos().sum()
    found = [*dense.gradients(second, other.inputs), *dense.gradients(first, h.inputs)]
    alone = dense.gradients(linear_logprobs(*other.args).logprob.cos().sum(), other.inputs)
    alone += dense.gradients(linear_logprobs(*h.args).logprob.sin().sum(), h.inputs)
    for a, b in zip(found, alone, strict=True):
        assert torch.equal(a, b)
