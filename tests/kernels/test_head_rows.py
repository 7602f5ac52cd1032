"""A head whose rows are computed when they are read gives what the same head in memory gives."""

import pytest
import torch
import torch.utils.checkpoint

import dense
import ift_kernels
import processes
from allocations import MIB, Allocations
from ift_kernels import HeadRows, linear_cross_entropy, linear_logprobs
from ift_kernels.schedule.plan import use_schedule

V, D = 1003, 24


def int8(vocabulary=V, width=D, dtype=torch.float32, seed=0, gather=True):
    """Rows of an int8 weight, and that weight in float64."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (vocabulary, width), dtype=torch.int8, generator=g)
    scale = (torch.rand(vocabulary, 1, generator=g) + 0.1) / 127

    def of_ids(ids):
        return codes.index_select(0, ids) * scale.index_select(0, ids)

    weight = HeadRows(
        lambda start, stop: codes[start:stop] * scale[start:stop], (vocabulary, width),
        dtype=dtype, gather=of_ids if gather else None,
    )  # fmt: skip
    return weight, (codes * scale).to(dtype)


def inputs(dtype=torch.float32, tokens=37, width=D, vocabulary=V):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=g).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=g)
    target[3:9] = -100
    bias = torch.randn(vocabulary, generator=g)
    return hidden.requires_grad_(), bias.requires_grad_(), target


def scalar(hidden, weight, target, **options):
    return linear_cross_entropy(hidden, weight, target, **options)


def per_token(hidden, weight, target, **options):
    found = linear_logprobs(hidden, weight, target, outputs=("logprob", "lse"), **options)
    coefs = torch.linspace(-1, 2, target.numel(), dtype=found.logprob.dtype)
    return (found.logprob * coefs).sum() + 0.1 * found.lse.sum()


def entropy(hidden, weight, target, **options):
    return linear_logprobs(hidden, weight, target, outputs=("entropy",), **options).entropy.sum()


TRANSFORM = dense.TRANSFORM
CASES = {
    "scalar": (scalar, {}),
    "scalar, bias, smoothing": (scalar, {"bias": True, "label_smoothing": 0.1, "z_loss": 1e-3}),
    "class weights": (scalar, {"label_smoothing": 0.1, "class_weight": torch.rand(V)}),
    "frozen": (per_token, {}),
    "frozen, softcap": (per_token, {**TRANSFORM}),
    "bias": (per_token, {"bias": True, **TRANSFORM}),
    "entropy": (entropy, {}),
    "deterministic": (per_token, {"deterministic": True}),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_float32_is_exact(case, backend):
    function, options = CASES[case]
    options = dict(options)
    weight, values = int8(gather=case != "frozen")
    hidden, bias, target = inputs()
    wide = [t.detach().double().requires_grad_() for t in (hidden, bias)]
    with_bias = options.pop("bias", False)
    tensors = [hidden, bias] if with_bias else [hidden]
    # 1 MiB: chunks of 352 columns of the head at most, in the middle of whatever blocks it has.
    with ift_kernels.use_backend(backend):
        ours = function(hidden, weight, target, bias=bias if with_bias else None,
                        workspace=MIB, **options)  # fmt: skip
    exact = function(
        wide[0], values.double(), target, bias=wide[1] if with_bias else None,
        **{k: v for k, v in options.items() if k != "deterministic"},
    )  # fmt: skip
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(exact, wide[: len(tensors)])
    for found, want in zip(torch.autograd.grad(ours, tensors), wanted, strict=True):
        assert (found.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("schedule", ["recompute", "keep", "forward"])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
def test_bfloat16_is_as_exact_as_the_head_in_memory(schedule, logits_dtype):
    weight, values = int8(dtype=torch.bfloat16)
    hidden, _, target = inputs(torch.bfloat16)
    wide = hidden.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(per_token(wide, values.double(), target), wide)
    errors = []
    for head in (weight, values):
        with use_schedule(schedule):
            loss = per_token(hidden, head, target, logits_dtype=logits_dtype)
        (found,) = torch.autograd.grad(loss, hidden)
        errors.append(float((found.double() - want).norm() / want.norm()))
    assert errors[0] <= 1.1 * errors[1] + 1e-5


def test_other_operations():
    weight, values = int8()
    other, other_values = int8(seed=5)
    hidden, _, target = inputs()
    ids = target.clamp(min=0)[:, None] + torch.arange(4)
    ids %= V

    def calls(w, t):
        yield ift_kernels.linear_token(hidden, w, rule="greedy")
        yield ift_kernels.linear_token(hidden, w, rule="kth", k=3)
        yield ift_kernels.linear_token(hidden, w, rule="sample", seed=7)
        yield ift_kernels.linear_topk(hidden, w, 5, top_p=0.9)
        for outputs in (("logprob",), ("in_set_logprob",)):
            stats = ift_kernels.linear_selected_logprobs(hidden, w, ids, outputs=outputs)
            value = getattr(stats, outputs[0])
            yield value, torch.autograd.grad(value.square().sum(), hidden)[0]
        for reduction in ("mean", "none"):
            value = ift_kernels.linear_divergence(hidden, w, hidden * 0.5, t, reduction=reduction)
            yield value, torch.autograd.grad(value.sum(), hidden)[0]
        soft = ift_kernels.linear_expected_embedding(hidden, w, t)
        yield soft, torch.autograd.grad(soft.square().sum(), hidden)[0]
        probs = torch.full((len(hidden), 4), 0.25)
        value = ift_kernels.linear_soft_cross_entropy(
            hidden, w, probs, ids=ids, label_smoothing=0.1, softcap=9.0
        )
        yield value, torch.autograd.grad(value, hidden)[0]
        yield (ift_kernels.influence(hidden[:4], target[:4], hidden, target, w),)
        stats = linear_logprobs(hidden, w, target, gradient="active")
        yield stats.logprob, torch.autograd.grad(stats.logprob.sum(), hidden)[0]
        with torch.autocast("cpu", torch.bfloat16):
            logprob = linear_logprobs(hidden, w, target).logprob
        yield (logprob,)

    for found, wanted in zip(calls(weight, other), calls(values, other_values), strict=True):
        for ours, want in zip(found, wanted, strict=True):
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, want, rtol=1e-4, atol=2e-5)


def test_a_second_backward_and_checkpointing_read_the_rows_again():
    weight, _ = int8()
    hidden, _, target = inputs()
    loss = per_token(hidden, weight, target)
    first, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, again)
    checkpointed = torch.utils.checkpoint.checkpoint(
        per_token, hidden, weight, target, use_reentrant=False
    )
    torch.testing.assert_close(torch.autograd.grad(checkpointed, hidden)[0], first)


def shards(rank, number, directory):
    """Uneven ones, with u and B of LoRA; values and gradients of this process."""
    weight, values = int8()
    hidden, _, target = inputs()
    some = slice(0, 400) if rank == 0 else slice(400, V)
    g = torch.Generator().manual_seed(2)
    u = torch.randn(len(hidden), 4, generator=g).requires_grad_()
    b = torch.randn(V, 4, generator=g)[some].clone().requires_grad_()
    rows = HeadRows(
        lambda start, stop: weight[some.start + start : some.start + stop], values[some].shape
    )
    found = []
    for head in (rows, values[some]):
        logprob = ift_kernels.vocab_parallel_logprobs(
            hidden, head, target, low_rank=(u, b), workspace=MIB
        ).logprob
        found.append([logprob.detach(), *torch.autograd.grad(logprob.sum(), (hidden, u, b))])
    return found


def test_shards_of_the_vocabulary(tmp_path):
    for ours, want in processes.results(shards, 2, tmp_path):
        for one, other in zip(ours, want, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("function", [scalar, per_token, entropy])
def test_no_copy_of_the_weight(function):
    vocabulary, width = 8192, 512
    weight, _ = int8(vocabulary, width)
    hidden, _, target = inputs(tokens=64, width=width, vocabulary=vocabulary)
    with Allocations() as used:
        function(hidden, weight, target, workspace=MIB).backward()
    # The workspace, what the function computes at once and its copy, vectors and dh: of 16 MiB.
    assert used.peak < 6 * MIB
    assert used.largest <= 2 * MIB


def test_what_it_takes_and_refuses():
    weight, values = int8(gather=False)
    ids = torch.tensor([7, 3, 3, 4, V - 1])
    assert torch.equal(weight[ids[1] : 40], values[3:40])
    assert torch.equal(weight[0:V], values)
    assert torch.equal(weight.index_select(0, ids), values[ids])
    assert weight.to(torch.float32) is weight
    assert torch.equal(weight.to(torch.bfloat16)[5:9], values[5:9].to(torch.bfloat16))
    assert repr(weight) == "HeadRows((1003, 24), dtype=torch.float32, device='cpu')"
    for refused in (lambda: weight @ values.T, lambda: weight.clone(), lambda: weight[:, :3],
                    lambda: weight.to("meta"), lambda: weight[3]):  # fmt: skip
        with pytest.raises(NotImplementedError, match="is not served for HeadRows"):
            refused()
    with pytest.raises(IndexError, match="ids: expected in"):
        weight.index_select(0, torch.tensor([V]))
    hidden, _, target = inputs()
    with pytest.raises(ValueError, match="weight: expected no gradient of HeadRows"):
        linear_logprobs(hidden, int8()[0].requires_grad_(), target)
    with pytest.raises(TypeError, match="weight: expected torch.bfloat16 like hidden"):
        linear_logprobs(hidden.bfloat16(), weight, target)
    with pytest.raises(ValueError, match=r"rows: expected rows of shape \(5, 24\), got \(1, 24\)"):
        HeadRows(lambda start, stop: values[:1], (V, D))[0:5]
    with pytest.raises(TypeError, match="rows: expected a function"):
        HeadRows(values, (V, D))
    with pytest.raises(ValueError, match="shape: expected"):
        HeadRows(lambda start, stop: values, (V,))
    with pytest.raises(TypeError, match="dtype: expected 16-bit floats"):
        HeadRows(lambda start, stop: values, (V, D), dtype=torch.int8)


def test_a_compiled_graph_refuses_it_by_name():
    weight, _ = int8()
    hidden, _, target = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(per_token, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="HeadRows"):
        compiled(hidden, weight, target)
