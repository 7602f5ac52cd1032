"""Bad input to the linear operations: the right exception, one line, argument and both values."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import dense
import ift_kernels
from ift_kernels import (
    backends,
    linear_cross_entropy,
    linear_expected_embedding,
    linear_logprobs,
    linear_token,
)
from ift_kernels.schedule import plan

H = dense.head((4, 5), 7, 33, bias=True, ignored=0).map(torch.Tensor.detach)
E = torch.randn(33, 3)
NAN, INF = float("nan"), float("inf")


def logprobs(hidden=H.hidden, weight=H.weight, target=H.target, **options):
    return linear_logprobs(hidden, weight, target, **options)


def cross_entropy(hidden=H.hidden, weight=H.weight, target=H.target, **options):
    return linear_cross_entropy(hidden, weight, target, **options)


def token(hidden=H.hidden, weight=H.weight, **options):
    return linear_token(hidden, weight, **options)


def embedding(hidden=H.hidden, weight=H.weight, embedding=E, **options):
    return linear_expected_embedding(hidden, weight, embedding, **options)


def check(call, kind, argument, pieces, options):
    """One line of the right kind, opening with the argument, with what came and what was due."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call(**options)
    message = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {message}"
    assert "\n" not in message and len(message) < 200, message
    assert message.startswith(f"{argument}: "), message
    for piece in pieces:
        assert piece in message, f"{piece!r} is not in {message!r}"


# exception, argument that the message opens with, what it must hold, the bad call
HEAD = [
    (TypeError, "hidden", ["floating", "NoneType"], {"hidden": None}),
    (TypeError, "hidden", ["floating", "list"], {"hidden": [1.0, 2.0]}),
    (TypeError, "hidden", ["floating", "int64"], {"hidden": H.hidden.long()}),
    (TypeError, "hidden", ["floating", "complex64"], {"hidden": H.hidden + 0j}),
    (ValueError, "hidden", ["(..., D)", "()"], {"hidden": torch.tensor(1.0)}),
    (TypeError, "hidden", ["16-bit", "float8"], {"hidden": H.hidden.to(torch.float8_e4m3fn)}),
    (TypeError, "hidden", ["dense", "sparse"], {"hidden": H.hidden.flatten(0, 1).to_sparse()}),
    (TypeError, "weight", ["floating", "NoneType"], {"weight": None}),
    (TypeError, "weight", ["floating", "int64"], {"weight": H.weight.long()}),
    (TypeError, "weight", ["float32", "bfloat16"], {"weight": H.weight.bfloat16()}),
    (TypeError, "weight", ["float16", "float32"], {"hidden": H.hidden.half()}),
    (ValueError, "weight", ["D=7", "(33, 3)"], {"weight": H.weight[:, :3]}),
    (ValueError, "weight", ["(V, D)", "(33,)"], {"weight": H.weight[:, 0]}),
    (ValueError, "weight", ["V > 0", "(0, 7)"], {"weight": H.weight[:0]}),
    (ValueError, "weight", ["cpu", "meta"], {"weight": H.weight.to("meta")}),
    (TypeError, "bias", ["floating", "int"], {"bias": 3}),
    (TypeError, "bias", ["floating", "int64"], {"bias": H.bias.long()}),
    (ValueError, "bias", ["V=33", "(3,)"], {"bias": H.bias[:3]}),
    (ValueError, "bias", ["V=33", "(1, 33)"], {"bias": H.bias[None]}),
    (ValueError, "bias", ["cpu", "meta"], {"bias": H.bias.to("meta")}),
    (TypeError, "logit_scale", ["number", "str"], {"logit_scale": "1"}),
    (TypeError, "logit_scale", ["number", "NoneType"], {"logit_scale": None}),
    (ValueError, "logit_scale", ["finite", "inf"], {"logit_scale": INF}),
    (ValueError, "logit_scale", ["finite", "nan"], {"logit_scale": NAN}),
    (TypeError, "softcap", ["number", "str"], {"softcap": "30"}),
    (ValueError, "softcap", ["positive", "0"], {"softcap": 0}),
    (ValueError, "softcap", ["positive", "-5"], {"softcap": -5.0}),
    (ValueError, "softcap", ["positive", "inf"], {"softcap": INF}),
    (TypeError, "temperature", ["number", "NoneType"], {"temperature": None}),
    (ValueError, "temperature", ["positive", "0"], {"temperature": 0.0}),
    (ValueError, "temperature", ["positive", "-1"], {"temperature": -1}),
    (ValueError, "temperature", ["positive", "nan"], {"temperature": NAN}),
    (TypeError, "workspace", ["int", "float"], {"workspace": 1e9}),
    (TypeError, "workspace", ["int", "bool"], {"workspace": True}),
    (ValueError, "workspace", ["1048576", "5"], {"workspace": 5}),
    (ValueError, "workspace", ["1048576", "-1"], {"workspace": -1}),
    (ValueError, "workspace", ["1208925819614629174706176"], {"workspace": 2**80}),
]
TARGET = [
    (TypeError, "target", ["Tensor", "NoneType"], {"target": None}),
    (TypeError, "target", ["int64", "float32"], {"target": H.target.float()}),
    (TypeError, "target", ["int64", "bool"], {"target": H.target.bool()}),
    (TypeError, "target", ["int64", "int16"], {"target": H.target.short()}),
    (ValueError, "target", ["(4, 5)", "(2, 5)"], {"target": H.target[:2]}),
    (ValueError, "target", ["(4, 5)", "(20,)"], {"target": H.target.flatten()}),
    (ValueError, "target", ["cpu", "meta"], {"target": H.target.to("meta")}),
    (ValueError, "target", ["[0, 33)", "33"], {"target": torch.full((4, 5), 33)}),
    (ValueError, "target", ["[0, 33)", "-7", "position 0"], {"target": torch.full((4, 5), -7)}),
    (ValueError, "target", ["[0, 33)", "-100"], {"target": H.target * 0 - 100, "ignore_index": 3}),
    (TypeError, "ignore_index", ["int", "NoneType"], {"ignore_index": None}),
    (TypeError, "ignore_index", ["int", "float"], {"ignore_index": 1.5}),
    (ValueError, "gradient", ["exact", "active", "near"], {"gradient": "near"}),
]
LOGPROBS = [
    (ValueError, "outputs", ["logprob", "sum_sq", "perplexity"], {"outputs": ("perplexity",)}),
    (TypeError, "outputs", ["names", "logprob"], {"outputs": "logprob"}),
    (TypeError, "outputs", ["names", "3"], {"outputs": 3}),
]
LOSS = [
    (ValueError, "reduction", ["mean", "sum", "none", "avg"], {"reduction": "avg"}),
    (ValueError, "reduction", ["mean", "None"], {"reduction": None}),
    (ValueError, "label_smoothing", ["[0, 1)", "1.0"], {"label_smoothing": 1.0}),
    (ValueError, "label_smoothing", ["[0, 1)", "-0.1"], {"label_smoothing": -0.1}),
    (ValueError, "label_smoothing", ["[0, 1)", "nan"], {"label_smoothing": NAN}),
    (TypeError, "label_smoothing", ["number", "str"], {"label_smoothing": "0.1"}),
    (ValueError, "z_loss", ["-1"], {"z_loss": -1}),
    (ValueError, "z_loss", ["finite", "inf"], {"z_loss": INF}),
    (TypeError, "z_loss", ["number", "NoneType"], {"z_loss": None}),
    (ValueError, "num_items", ["mean", "sum"], {"num_items": 4, "reduction": "sum"}),
    (TypeError, "num_items", ["str"], {"num_items": "5"}),
    (ValueError, "num_items", ["-1"], {"num_items": -1}),
    (ValueError, "num_items", ["2"], {"num_items": torch.tensor([5, 4])}),
]
TOKEN = [
    (ValueError, "rule", ["greedy", "kth", "sample", "nucleus"], {"rule": "nucleus"}),
    (ValueError, "k", ["[1, 33]", "0"], {"rule": "kth", "k": 0}),
    (ValueError, "k", ["[1, 33]", "34"], {"rule": "kth", "k": 34}),
    (ValueError, "k", ["[1, 64]", "65"], {"rule": "kth", "k": 65, "weight": torch.ones(99, 7)}),
    (TypeError, "k", ["int", "float"], {"rule": "kth", "k": 2.0}),
    (TypeError, "k", ["int", "str"], {"rule": "kth", "k": "2"}),
    (ValueError, "seed", ["64-bit", str(2**64)], {"rule": "sample", "seed": 2**64}),
    (TypeError, "seed", ["int", "float"], {"rule": "sample", "seed": 1.5}),
    (ValueError, "row_offset", ["[0,", "-1"], {"rule": "sample", "row_offset": -1}),
    (TypeError, "row_offset", ["int", "float"], {"rule": "sample", "row_offset": 1.5}),
]
EMBEDDING = [
    (TypeError, "embedding", ["floating", "NoneType"], {"embedding": None}),
    (TypeError, "embedding", ["floating", "int64"], {"embedding": E.long()}),
    (ValueError, "embedding", ["V=33", "(5, 3)"], {"embedding": E[:5]}),
    (ValueError, "embedding", ["V=33", "(33,)"], {"embedding": E[:, 0]}),
    (ValueError, "embedding", ["cpu", "meta"], {"embedding": E.to("meta")}),
]
CALLS = {
    logprobs: HEAD + TARGET + LOGPROBS,
    cross_entropy: HEAD + TARGET + LOSS,
    token: HEAD + TOKEN,
    embedding: HEAD + EMBEDDING,
}


def name_of(value):
    if isinstance(value, torch.Tensor):
        return "x".join(map(str, value.shape)) + str(value.dtype)[5:] + f"-{value.device}"
    return str(value)


def cases():
    for call, rows in CALLS.items():
        for kind, argument, pieces, options in rows:
            label = ",".join(f"{key}={name_of(value)}" for key, value in options.items())
            yield pytest.param(call, kind, argument, pieces, options, id=f"{call.__name__}-{label}")


@pytest.mark.parametrize(("call", "kind", "argument", "pieces", "options"), list(cases()))
def test_bad_argument(call, kind, argument, pieces, options):
    check(call, kind, argument, pieces, options)


def test_the_calls_above_are_good_without_the_bad_argument():
    """Or something else would be what they are refused for."""
    for call in CALLS:
        call()
        call(bias=H.bias, logit_scale=2, softcap=30, temperature=1, workspace=1 << 20)


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.__name__)
def test_an_error_leaves_nothing_behind(call):
    """After an error the same call works: nothing was half set."""
    held = plan.ledger.reserved
    with pytest.raises(ValueError, match="bias"):
        call(bias=H.bias[:3])
    call(bias=H.bias)
    assert plan.ledger.reserved == held


def test_a_device_without_float64_is_refused():
    on = {"device": "mps"}
    with FakeTensorMode():
        hidden, weight, embedding_ = (torch.empty(s, **on) for s in ((2, 7), (33, 7), (33, 3)))
        rows = {"hidden": hidden, "weight": weight}
        target = torch.zeros(2, dtype=torch.int64, **on)
        each = {
            logprobs: {"target": target}, cross_entropy: {"target": target}, token: {},
            embedding: {"embedding": embedding_},
        }  # fmt: skip
        for call, more in each.items():
            check(call, RuntimeError, "hidden", ["mps", "float64", "expected"], rows | more)


def test_position_of_a_bad_target():
    target = H.target.clone()
    target[2, 3] = 99
    with pytest.raises(ValueError, match=r"got 99 at flat position 13"):
        logprobs(target=target)


def test_bad_targets_are_found_in_backward_too():
    """A target that turns bad after forward is an in-place change, which torch notices."""
    hidden, target = H.hidden.clone().requires_grad_(), H.target.clone()
    loss = cross_entropy(hidden=hidden, target=target)
    target.fill_(10**6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.__name__)
def test_numbers_of_numpy_are_numbers(call):
    for scale in (np.float32(2.0), np.float64(2.0), np.int64(2)):
        call(logit_scale=scale, temperature=scale, workspace=np.int64(1 << 20))


def test_use_backend_and_use_schedule():
    names = sorted(row["name"] for row in backends.describe())
    with pytest.raises(ValueError, match="name: expected one of .* got 'gpu'") as caught:
        ift_kernels.use_backend("gpu").__enter__()
    assert all(name in str(caught.value) for name in names)
    with pytest.raises(ValueError, match="name: expected one of .* got 'fast'"):
        plan.use_schedule("fast").__enter__()


# What outside autocast cannot be multiplied: the message says what to do.
MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("call", [logprobs, cross_entropy, token, embedding])
def test_hidden_and_head_of_different_dtypes(call, dtypes):
    hidden, weight = H.hidden.to(dtypes[0]), H.weight.to(dtypes[1])
    remedy = ["cast one of them"] + ["torch.autocast"] * (torch.float64 not in dtypes)
    pieces = [f"expected {dtypes[0]}", f"got {dtypes[1]}", *remedy]
    check(call, TypeError, "weight", pieces, {"hidden": hidden, "weight": weight})
    # Both remedies work.
    call(hidden=hidden.to(weight.dtype), weight=weight)
    if torch.float64 not in dtypes:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call(hidden=hidden, weight=weight)


@pytest.mark.parametrize("side", ["", "teacher_"])
@pytest.mark.parametrize("dtypes", MIXED[:3], ids=str)
def test_divergence_of_mixed_dtypes(dtypes, side):
    same = {f"{s}{n}": getattr(H, n) for s in ("", "teacher_") for n in ("hidden", "weight")}
    mixed = {f"{side}hidden": H.hidden.to(dtypes[0]), f"{side}weight": H.weight.to(dtypes[1])}
    check(
        lambda **tensors: ift_kernels.linear_divergence(**tensors), TypeError, f"{side}weight",
        [f"expected {dtypes[0]} like {side}hidden", f"got {dtypes[1]}", "torch.autocast"],
        {**same, **mixed},
    )  # fmt: skip
