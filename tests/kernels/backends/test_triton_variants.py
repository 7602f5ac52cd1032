"""Triton compiles a kernel once, whatever the batch: not for sizes, offsets or unaligned rows."""

import pytest
import torch

import ift_kernels
from ift_kernels import (
    backends,
    linear_cross_entropy,
    linear_divergence,
    linear_expected_embedding,
    linear_logprobs,
)
from ift_kernels.schedule import plan

pytest.importorskip("triton")

HOT = {"stats", "merge", "dlogits", "probabilities", "softmax_gradient", "divergence_terms",
       "divergence_gradient", "top_k", "gumbel", "scale", "mask"}  # fmt: skip
MIB = 1 << 20


@pytest.fixture
def launches(monkeypatch):
    """Calls an operation, on a CPU, with launches captured for an H100; their variants."""
    from bench.gpu import static

    monkeypatch.setattr(backends.BACKENDS["triton"], "unsupported_reason", lambda *_: "")

    def captured(work):
        with static.captured("sm_90") as found, ift_kernels.use_backend("triton"):
            work()
        return [which for which in found if which.name in HOT]

    return captured


def work(rows, width, vocabulary, start, seed, dtype=torch.bfloat16, bias=False):
    """Every operation of the hot path, on rows that begin at `start` of larger tensors."""
    hidden = torch.zeros(start + rows, width, dtype=dtype)[start:].requires_grad_()
    weight = torch.zeros(vocabulary, width, dtype=dtype).requires_grad_()
    b = torch.zeros(vocabulary) if bias else None
    target, up = torch.zeros(start + rows, dtype=torch.int64)[start:], torch.ones(start + rows)
    options = {"bias": b, "workspace": MIB}
    for outputs in (("logprob",), ("logprob", "argmax")):
        for states, target_ids in ((hidden, target), (hidden, target.clone().fill_(-100))):
            target_ids[: rows - rows // 3] = 0  # others are dropped in the second
            stats = linear_logprobs(states, weight, target_ids, outputs=outputs, **options)
            torch.autograd.grad(stats.logprob, (hidden, weight), up[start:])
    with plan.use_schedule("forward"):
        (2 * linear_cross_entropy(hidden, weight, target, **options)).backward()
    for rule in ({}, {"rule": "kth", "k": 3}, {"rule": "sample", "seed": seed}):
        ift_kernels.linear_token(hidden, weight, **options, **rule)
    for reduction in ("mean", "none"):
        linear_divergence(
            hidden,
            weight,
            hidden.detach(),
            weight.detach(),
            bias=b,
            teacher_bias=b,
            reduction=reduction,
            workspace=MIB,
        ).sum().backward()
    if not bias:
        linear_expected_embedding(hidden, weight, weight, workspace=MIB).sum().backward()


def family(which):
    """What a kernel must be compiled for: constants, and the types of its tensors."""
    constants = tuple((name, value) for name, value in which.constants if name.isupper())
    types = tuple((name, kind) for name, kind in which.signature if kind.startswith("*"))
    return which.name, constants, types, which.options


CALLS = [
    (128, 64, 2560, 0, 1),
    (129, 64, 2501, 3, 2**33 + 5),  # odd
    (96, 60, 2303, 1, 2**32 - 1),  # widths that are no multiple of 8
    (1, 64, 2499, 5, -7),
    (2, 129, 2101, 0, 2**63),
    (300, 65, 2049, 2, 3),  # of which a tile has one column left
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, False), (torch.float32, True)])
def test_no_size_compiles_a_kernel_anew(launches, dtype, bias):
    compiled = {}
    for call in CALLS:
        found = launches(lambda call=call: work(*call, dtype, bias))
        for which in found:
            known = compiled.setdefault(family(which), which)
            assert which == known, f"{which.name} of {call}: {set_of(which) ^ set_of(known)}"
    names = {name for name, *_ in compiled}
    assert names == HOT - {"mask"} - ({"probabilities", "softmax_gradient"} if bias else set())


def set_of(which):
    return set(which.signature) | set(which.constants) | set(which.aligned)


def test_columns_of_active_masks(launches):
    def mask(rows, columns, offset):
        x = torch.zeros(rows, 128, dtype=torch.bfloat16)[:, :columns]
        target = torch.zeros(rows + 1, dtype=torch.int64)[1:]
        of = backends.contract.RowGradient(target, *torch.zeros(6, rows).split((2, 4)))
        chunk = backends.contract.Chunk(x, None, offset=offset)
        backends.BACKENDS["triton"].mark_active(chunk, of, 0.0, 32, 64, None)

    found = {which for sizes in ((64, 128, 0), (37, 101, 7), (1, 1, 1))
             for which in launches(lambda sizes=sizes: mask(*sizes))}  # fmt: skip
    assert len(found) == 1


def test_the_rows_of_every_tile_are_aligned(launches):
    """So 16-byte loads stay: what is assumed of `x` and its stride in each variant."""
    for call in CALLS:
        for which in launches(lambda call=call: work(*call)):
            if which.name not in ("merge", "scale"):
                assert {"x", "stride"} <= set(which.aligned), (which.name, call)
                assert dict(which.constants)["PADDED"], (which.name, call)
