"""Patched models under DDP and FSDP2: two processes of one row each are one process of two rows."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from causal_lms import assert_close, batch, gradients, join, leave, make
from ift.config import IFTConfig
from ift.patching import patch

LOSSES = {"sft": None, "ift": IFTConfig(), "embedding": IFTConfig(embedding_grad=True)}


def shard(model, units):
    """FSDP2 over the whole model, and over these parts of it by themselves."""
    layers = getattr(model, "transformer", None) or model.model
    layers = getattr(layers, "h", None) or layers.layers
    if units != "root":
        for layer in layers:
            fully_shard(layer)
    if units == "head":
        fully_shard(model.lm_head)
        fully_shard(model.get_input_embeddings())
    return fully_shard(model)


WRAPPERS = {
    ("llama", "ddp"): DistributedDataParallel,  # untied head
    ("gpt2", "ddp"): DistributedDataParallel,  # tied
    ("llama", "fsdp root"): lambda model: shard(model, "root"),
    ("gpt2", "fsdp layers"): lambda model: shard(model, "layers"),
    ("llama", "fsdp head"): lambda model: shard(model, "head"),
}


def worker(rank, directory):
    torch.set_num_threads(1)
    join(rank, 2, directory)
    inputs = {k: v[rank : rank + 1] for k, v in batch(rows=2).items()}
    results = {}
    for (name, kind), wrap in WRAPPERS.items():
        for loss, config in LOSSES.items():
            model = patch(make(name))
            wrapped = wrap(model)
            for _ in range(2):  # DDP notices in the second that a gradient of the first is missing
                model.zero_grad(set_to_none=True)
                wrapped(**inputs, ift=config).loss.backward()
            results[name, kind, loss] = {
                n: g.full_tensor() if hasattr(g, "full_tensor") else g
                for n, g in gradients(model).items()
            }
    if rank == 0:
        torch.save(results, f"{directory}/results.pt")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(directory),), nprocs=2)
    return torch.load(directory / "results.pt")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("name", "kind"), WRAPPERS)
def test_two_processes_are_one(results, name, kind, loss):
    model, inputs = patch(make(name)), batch(rows=2)
    one = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(2)]
    (sum(model(**row, ift=LOSSES[loss]).loss for row in one) / 2).backward()
    assert_close(results[name, kind, loss], gradients(model))
