"""A head whose vocabulary is spread over 2 and 4 processes gives what one process gives."""

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import certain_targets as certain
import processes
from ift_kernels import (
    ActiveSet,
    TokenStats,
    backends,
    linear_logprobs,
    use_backend,
    vocab_parallel_logprobs,
)
from ift_kernels.schedule.plan import use_schedule

V, D, SHAPE = 131, 24, (3, 9)  # odd: the shards are not of one size
OUTPUTS = TokenStats._fields
CASES = {
    "plain": {},
    "softcap": {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3},
    "recompute": {"workspace": 1 << 20},
    # A threshold that no probability of any shard passes: the set is the whole vocabulary.
    "active": {"gradient": ActiveSet(threshold=0.0, block=32, tail_bucket=64)},
    "active, some": {"gradient": ActiveSet(threshold=2.0**-10)},
    "tokens -1 ignored": {"ignore_index": -1},
    "few rows": {"vocabulary": 5},  # of four processes, one then has no row
    "certain": {"scale": 40.0},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, float32 logits": {"dtype": torch.bfloat16, "logits_dtype": torch.float32},
    "deterministic": {"deterministic": True},
    "adapter": {"adapter": True},
    "adapter, few rows": {"adapter": True, "vocabulary": 5},
    "masked shards": {"masked": 66},  # with every number of processes and each way to shard
}
FORMS = ("group", "dtensor", "sequence")


def problem(
    vocabulary=V, scale=1.0, dtype=torch.float32, ignore_index=-100, masked=None, adapter=False,
    **options,
):  # fmt: skip
    """Hidden, weight and bias, and with `adapter` u, B and a scale of the columns."""
    g = torch.Generator().manual_seed(3)
    hidden = scale * torch.randn(*SHAPE, D, generator=g)
    weight, bias = torch.randn(vocabulary, D, generator=g), torch.randn(vocabulary, generator=g)
    if vocabulary == V:
        weight[100], bias[100] = weight[7], bias[7]  # an exact tie between shards
        hidden[0, 0] = 3 * weight[7]
    target = torch.randint(vocabulary, SHAPE, generator=g)
    target[1, 3:7] = ignore_index
    upstream = {k: torch.randn(SHAPE, generator=g) for k in ("logprob", "lse", "entropy")}
    for name in ("mean_logit", "target_logit"):
        upstream[name] = torch.randn(SHAPE, generator=g)
    upstream["logprob"][2] = 0.0
    if masked is not None:
        bias[masked:] = -torch.inf
        # No gradient comes to a shard of masked tokens alone, not even of a log-probability -inf.
        for name in ("logprob", "target_logit"):
            upstream[name].masked_fill_(target >= masked, 0.0)
        upstream["mean_logit"].zero_()
    tensors = [t.to(dtype) for t in (hidden, weight, bias)]
    if adapter:
        tensors += [torch.randn(*s, generator=g) for s in ((*SHAPE, 3), (vocabulary, 3))]
        tensors.append(1 + torch.rand(vocabulary, generator=g))
    return tensors, target, upstream, {"ignore_index": ignore_index, **options}


def adapter_arguments(tensors):
    if not tensors:
        return {}
    u, b, scale = tensors
    return {"low_rank": (u, b), "column_scale": scale}


def loss_of(stats, upstream):
    return sum((getattr(stats, name) * factor).sum() for name, factor in upstream.items())


def run(case, form, mesh):
    """Statistics and gradients; those of the head joined, as the one process has them."""
    (hidden, weight, bias, *adapter), target, upstream, options = problem(**CASES[case])
    sharded, tokens = [weight, bias, *adapter[1:]], [hidden, *adapter[:1]]
    rank, number = dist.get_rank(), dist.get_world_size()
    if form == "group":
        first = V // number + 3 if len(weight) == V else 1 + len(weight) // number
        parts = [first] * (number - 1)  # uneven: the last process has what is left
        parts = [*parts, max(0, len(weight) - sum(parts))]
        if sum(parts) != len(weight):
            parts = [2, 2, 1, 0]
        sharded = [t.split(parts)[rank].clone() for t in sharded]
    else:
        sharded = [distribute_tensor(t, mesh, [Shard(0)]) for t in sharded]
        if form == "sequence":
            tokens = [distribute_tensor(t, mesh, [Shard(1)]) for t in tokens]
    for tensor in (*tokens, *sharded):
        tensor.requires_grad_()
    (hidden, *of_tokens), (weight, bias, *of_columns) = tokens, sharded
    adapter = [*of_tokens, *of_columns]
    options |= adapter_arguments(adapter)
    stats = vocab_parallel_logprobs(hidden, weight, target, bias=bias, outputs=OUTPUTS, **options)
    loss_of(stats, upstream).backward(retain_graph=True)
    first = hidden.grad.clone()
    loss_of(stats, upstream).backward()  # nothing was consumed that a second backward needs
    grads = []
    for tensor in (hidden, weight, bias, *adapter):
        grad = tensor.grad / 2
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        elif not any(tensor is each for each in tokens):
            pieces = [None] * number
            dist.all_gather_object(pieces, grad)
            grad = torch.cat(pieces)
        grads.append(grad)
    full = first.full_tensor() if isinstance(first, DTensor) else first
    assert torch.allclose(full, grads[0], rtol=1e-2, atol=1e-4)
    return [s.detach() for s in stats], grads


def certain_tokens(name):
    return certain.tokens(V, torch.float32, certain.TRANSFORMS[name])


def of_certain_targets(name):
    """Gradients of the targets' logits, and log-probabilities."""
    given, options = certain_tokens(name), certain.TRANSFORMS[name].options()
    parts = [torch.eye(V), torch.zeros(V) if given.bias is None else given.bias]
    weight, bias = (t.tensor_split(dist.get_world_size())[dist.get_rank()] for t in parts)
    hidden = given.x.requires_grad_()
    found = vocab_parallel_logprobs(hidden, weight, given.target, bias=bias, **options).logprob
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    return gradient.gather(1, given.target[:, None])[:, 0], found.detach()


def of_bias(value):
    """Statistics and gradients with a bias of -inf everywhere, but for one `value` at the end."""
    (hidden, weight, bias), target, *_ = problem()
    bias = bias.fill_(-torch.inf)
    bias[-1] = value
    number, rank = dist.get_world_size(), dist.get_rank()
    weight, bias = (t.tensor_split(number)[rank].requires_grad_() for t in (weight, bias))
    stats = vocab_parallel_logprobs(
        hidden.requires_grad_(), weight, target, bias=bias, outputs=OUTPUTS
    )
    gradients = torch.autograd.grad(stats.lse.sum(), (hidden, weight, bias))
    return [s.detach() for s in stats], gradients


def worker(rank, number, directory):
    mesh = init_device_mesh("cpu", (number,))
    found = {(c, f): run(c, f, mesh) for c in CASES for f in FORMS}
    found |= {("bias", str(value)): of_bias(value) for value in (-torch.inf, torch.nan)}
    found |= {("certain", name): of_certain_targets(name) for name in certain.TRANSFORMS}
    (hidden, weight, bias), target, *_ = problem()
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    options = {"outputs": OUTPUTS, "deterministic": True}
    together = vocab_parallel_logprobs(hidden, sharded, target, **options)
    alone = vocab_parallel_logprobs(hidden[2, 4:5], sharded, target[2, 4:5], **options)
    found["alone"] = [torch.equal(a, b[2, 4:5]) for a, b in zip(alone, together, strict=True)]
    wrong = {
        "placements": lambda: vocab_parallel_logprobs(
            hidden, distribute_tensor(weight, mesh, [Replicate()]), target
        ),
        "bias": lambda: vocab_parallel_logprobs(hidden, sharded, target, bias=bias),
        "group": lambda: vocab_parallel_logprobs(hidden, sharded, target, group=dist.group.WORLD),
        "target": lambda: vocab_parallel_logprobs(hidden, sharded, target.clamp(min=0) + 1000),
        "plain": lambda: linear_logprobs(hidden, sharded, target),
    }
    for name, call in wrong.items():
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        found[name] = str(error.value)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    return processes.results(worker, request.param, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_shards_are_one_head(results, case, form):
    tensors, target, upstream, options = problem(**CASES[case])
    options.pop("gradient", None)
    for tensor in tensors:
        tensor.requires_grad_()
    hidden, weight, bias, *adapter = tensors
    options |= adapter_arguments(adapter)
    stats = linear_logprobs(hidden, weight, target, bias=bias, outputs=OUTPUTS, **options)
    loss_of(stats, upstream).backward()
    tolerance = 2e-2 if case.startswith("bfloat16") else 1e-5
    tolerance = 5e-3 if case == "active, some" else tolerance  # dh is approximate
    for got, grads in (result[case, form] for result in results):
        for name, a, b in zip(stats._fields, got, stats, strict=True):
            if a.dtype == torch.int64:
                assert torch.equal(a, b), name
            else:
                limit = 1e-5 * (40.0 if case == "certain" else 1.0)
                torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=limit, msg=name)
        for grad, tensor in zip(grads, tensors, strict=True):
            largest = tensor.grad.float().abs().max()
            assert (grad.float() - tensor.grad.float()).abs().max() <= tolerance * largest


@pytest.mark.parametrize("name", certain.TRANSFORMS)
def test_nearly_certain_targets(results, name):
    given = certain_tokens(name)
    for gradient, logprob in (result["certain", name] for result in results):
        certain.assert_close(gradient, given.gradient, given.allowed, "gradient")
        certain.assert_close(logprob, given.logprob, given.allowed, "logprob")


def test_masked_everywhere_is_as_in_a_whole_head(results):
    (hidden, weight, bias), target, *_ = problem()
    bias.fill_(-torch.inf)
    stats = linear_logprobs(hidden, weight, target, bias=bias, outputs=OUTPUTS)
    for got, gradients in (result["bias", "-inf"] for result in results):
        torch.testing.assert_close(tuple(got), tuple(stats), rtol=0, atol=0, equal_nan=True)
        assert all(g.isnan().any() for g in gradients)


def test_a_nan_beside_masked_shards_shows(results):
    valid = problem()[1] != -100
    for got, (d_hidden, *_) in (result["bias", "nan"] for result in results):
        assert all(got[OUTPUTS.index(name)][valid].isnan().all() for name in ("logprob", "lse"))
        assert d_hidden[valid].isnan().all()


def test_a_tie_between_shards_goes_to_the_lowest_id(results):
    got, _ = results[0]["plain", "group"]
    assert got[3][0, 0] == 7


def ulp(values):
    values = values.abs()
    return torch.nextafter(values, torch.full_like(values, torch.inf)) - values


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_shards_differ_by_roundings(results, form):
    (hidden, weight, bias), target, _, options = problem(**CASES["deterministic"])
    one = linear_logprobs(hidden, weight, target, bias=bias, outputs=OUTPUTS, **options)
    got = TokenStats(*results[0]["deterministic", form][0])
    of_sums = ulp(torch.tensor(float(V)).log())  # each shard's, beyond its largest logit
    for name, own in {"lse": 1, "logprob": 2}.items():  # of results, and of the target's shard
        a, b = getattr(got, name), getattr(one, name)
        allowed = own * ulp(torch.maximum(a.abs(), b.abs())) + of_sums
        assert ((a.double() - b.double()).abs() <= allowed).all(), name
    assert torch.equal(got.target_logit, one.target_logit)


def test_a_token_alone_has_the_same_results(results):
    assert all(all(result["alone"]) for result in results)


@pytest.mark.parametrize(
    ("name", "match"),
    {
        "placements": "weight: expected a DTensor with placements",
        "bias": "bias: expected a DTensor sharded like weight",
        "group": "group: expected None for a DTensor weight",
        "target": "target: expected ids in",
        "plain": "weight: expected a plain tensor, got a DTensor",
    }.items(),
)
def test_what_cannot_serve_is_refused(results, name, match):
    assert match in results[0][name]


@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("transform", ["jvp", "dual numbers", "grad"])
def test_forward_mode_and_functorch_are_refused(one_process, which, transform):
    (hidden, weight, bias), target, _, options = problem()
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    x = tensors[which]

    def loss(value):
        given = {**tensors, which: value}
        return vocab_parallel_logprobs(**given, target=target, **options).logprob.sum()

    def by_dual_numbers():
        with forward_ad.dual_level():
            loss(forward_ad.make_dual(x, torch.ones_like(x)))

    run = {
        "jvp": lambda: torch.func.jvp(loss, (x,), (torch.ones_like(x),)),
        "dual numbers": by_dual_numbers,
        "grad": lambda: torch.func.grad(loss)(x),
    }[transform]
    with pytest.raises(RuntimeError, match="vocab_parallel_logprobs: .* not supported, expected"):
        run()


@pytest.mark.usefixtures("backward_in_thread")
@pytest.mark.parametrize("schedule", ["recompute", "keep", "forward"])
def test_backward_has_the_backend_of_forward(one_process, schedule, monkeypatch):
    (hidden, weight, bias), target, upstream, options = problem()
    tensors = [t.requires_grad_() for t in (hidden, weight, bias)]
    served, get = [], backends.get

    def spy(*args):
        served.append(get(*args))
        return served[-1]

    monkeypatch.setattr(backends, "get", spy)
    with use_backend("reference"), use_schedule(schedule):
        stats = vocab_parallel_logprobs(
            hidden, weight, target, bias=bias, outputs=OUTPUTS, **options
        )
    forward = len(served)
    torch.autograd.grad(loss_of(stats, upstream), tensors)
    assert len(served) > forward and {b.__name__ for b in served} == {backends.reference.__name__}
