"""Patched models under DDP, FSDP2, tensor parallelism and PEFT: processes of some rows each are one
process of all rows, in loss and every gradient."""

import contextlib
import functools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import processes
from causal_lms import assert_close, batch, gradients, lora, make
from ift.config import IFTConfig
from ift.patching import patch

LOSSES = {"sft": None, "ift": IFTConfig(), "embedding": IFTConfig(embedding_grad=True)}
ROWS = 8  # two for each of four processes, so that there is something to accumulate


def shard(model, units, **options):
    """FSDP2 over the whole model, and over these parts of it by themselves."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(base, "transformer", None) or base.model
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    norm = getattr(layers, "ln_f", None) or layers.norm
    layers = getattr(layers, "h", None) or layers.layers
    tied = head.weight is embedding.weight
    if units != "root":
        for layer in layers:
            fully_shard(layer, **options)
    if units == "head":
        # A tied table is one parameter and goes into one group.
        fully_shard([head, embedding] if tied else head, **options)
        if not tied:
            fully_shard(embedding, **options)
    if units == "accelerate":  # 1.15: the table by itself; norm and head (and tied table) together
        if not tied:
            fully_shard(embedding, **options)
        tail = [norm, embedding, head] if tied else [norm, head]
        fully_shard(tail, reshard_after_forward=False, **options)
    return fully_shard(model, **options)


def tensor_parallel(model):
    """The head alone, sharded along its vocabulary as torch does it; all else is replicated."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plan = ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    if hasattr(model, "get_base_model"):
        plan = {"base_layer": plan, "lora_B.default": plan}
        parallelize_module(model.get_base_model().lm_head, mesh, plan)
    else:
        model.lm_head = parallelize_module(model.lm_head, mesh, plan)
    return model


MODELS = {
    "untied": lambda: make("llama"),
    "tied": lambda: make("gpt2"),
    "tied, softcap": lambda: make("gemma2"),
    "lora": lambda: lora(make("llama")),
    "lora, head saved": lambda: lora(make("llama"), modules_to_save=["lm_head"]),
    "lora on the head": lambda: lora(make("llama"), target_modules=["q_proj", "lm_head"]),
    "dora on the head": lambda: lora(make("llama"), target_modules=["lm_head"], use_dora=True),
}
WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp root": lambda model: shard(model, "root"),
    "fsdp layers": lambda model: shard(model, "layers"),
    "fsdp head": lambda model: shard(model, "head"),
    "fsdp accelerate": lambda model: shard(model, "accelerate"),
    "fsdp offload": lambda model: shard(
        model, "accelerate", offload_policy=CPUOffloadPolicy(pin_memory=False)
    ),
    "vocabulary": tensor_parallel,
}
CASES = [
    *((m, w, 1) for m in ("untied", "tied", "lora") for w in WRAPPERS if w != "vocabulary"),
    *((m, w, 2) for m in ("untied", "tied") for w in ("ddp", "fsdp accelerate", "fsdp head")),
    ("untied", "vocabulary", 1),
    ("tied, softcap", "fsdp accelerate", 1),
    ("lora, head saved", "ddp", 1),
    ("lora, head saved", "fsdp layers", 1),
    ("lora on the head", "ddp", 2),
    ("lora on the head", "fsdp head", 1),
    ("lora on the head", "fsdp accelerate", 2),
    ("lora on the head", "vocabulary", 1),
    ("dora on the head", "fsdp root", 1),
]


def runs(number):
    """Every case with one loss; in two processes with another than in four."""
    names = list(LOSSES)
    return [(*case, names[(i + i // 6 + number // 2) % len(names)]) for i, case in enumerate(CASES)]


def full(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def sync(wrapped, last):
    """The context of one of the forwards and backwards that are accumulated."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def run(wrapped, rows, accumulate, config):
    total = 0
    for number in range(accumulate):
        part = {k: v[number::accumulate] for k, v in rows.items()}
        with sync(wrapped, number == accumulate - 1):
            loss = wrapped(**part, ift=config).loss / accumulate
            loss.backward()
        total += float(loss)
    return total


def worker(rank, number, directory):
    everything, found = batch(rows=ROWS), {}
    for name, kind, accumulate, loss in runs(number):
        # What is sharded along the vocabulary sees the same rows everywhere.
        mine = slice(None) if kind == "vocabulary" else slice(rank, None, number)
        rows = {k: v[mine] for k, v in everything.items()}
        times = min(accumulate, len(rows["input_ids"]))
        model = patch(MODELS[name]())
        wrapped = WRAPPERS[kind](model)
        # DDP notices in the second that a gradient of the first is missing.
        for _ in range(1 + (kind == "ddp")):
            wrapped.zero_grad(set_to_none=True)
            value = run(wrapped, rows, times, LOSSES[loss])
        value = torch.tensor(value)
        torch.distributed.all_reduce(value)
        found[name, kind, accumulate, loss] = (
            value / number,
            {n: None if g is None else full(g) for n, g in gradients(model).items()},
        )
    with pytest.raises(ValueError, match="rule: expected 'greedy'"):
        tensor_parallel(patch(make("llama")))(**everything, ift=IFTConfig(rule="kth"))
    return found if rank == 0 else None


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What so many processes find, by run; started once."""

    @functools.cache
    def found(number):
        return processes.results(worker, number, tmp_path_factory.mktemp("processes"))[0]

    return found


@functools.cache
def one_process(name, number, accumulate, loss):
    """Loss and gradients of the mean over the parts that so many processes would see."""
    model, rows = patch(MODELS[name]()), batch(rows=ROWS)
    total = 0.0
    for rank in range(number):
        for turn in range(accumulate):
            part = {k: v[rank::number][turn::accumulate] for k, v in rows.items()}
            value = model(**part, ift=LOSSES[loss]).loss / (number * accumulate)
            value.backward()
            total += float(value)
    return total, gradients(model)


@pytest.mark.parametrize(
    ("number", "name", "kind", "accumulate", "loss"),
    [(number, *run) for number in (2, 4) for run in runs(number)],
)
def test_processes_are_one(results, number, name, kind, accumulate, loss):
    value, grads = results(number)[name, kind, accumulate, loss]
    if kind == "vocabulary":
        number = 1
    accumulate = min(accumulate, ROWS // number)
    expected, own = one_process(name, number, accumulate, loss)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert any(g is not None and g.any() for g in own.values())
    assert_close(grads, own)
