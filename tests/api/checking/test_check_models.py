"""`ift.check` on small real configurations, in one process and in two."""

import contextlib
import io
import json
from pathlib import Path

import model_matrix
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import causal_lms
import ift
import processes
from command_line import write_rows
from ift.cli import main
from ift.cli.check import shard
from ift.losses import GRPOLoss, ORPOLoss, SFTLoss


@pytest.mark.parametrize("name", model_matrix.MODELS)
def test_one_process(name):
    make, batch, expected = model_matrix.MODELS[name]
    found = ift.check(make(), batch())
    assert (found.stage, found.ok) == (expected, not expected), str(found)
    if expected:
        assert type(found.model) is str and found.model in found.cause


LOSSES = {
    "ift": {"ift": ift.IFTConfig()},
    "dft": {"loss": SFTLoss(scaling="dft")},
    "smoothed": {"loss": SFTLoss(label_smoothing=0.1, z_loss=1e-3, reduction="row_mean")},
    "orpo": {"loss": ORPOLoss()},
    "grpo": {"loss": lambda p, mask: GRPOLoss()(p, mask, torch.tensor([1.0, -1.0, 0.5, 2.0]))},
}


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses(name):
    found = ift.check(causal_lms.make("gemma2"), causal_lms.batch(rows=4), **LOSSES[name])
    assert found.ok, str(found)


def ddp(model):
    return DistributedDataParallel(ift.patch(model))


def tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2,))
    plan = ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    model.lm_head = parallelize_module(model.lm_head, mesh, plan)
    return model


# Wrapped by the user, and each process with rows of its own; or a copy that `check` wraps.
WRAPPED = {
    "llama, ddp": ("llama", ddp),
    "llama, fsdp": ("llama", shard),
    "qwen2, tied, fsdp": ("qwen2, tied", lambda model: shard(ift.patch(model))),
    "lora, ddp": ("lora", ddp),
    "lora head, tied, fsdp": ("lora head, tied", lambda model: shard(ift.patch(model))),
    "nf4 head, lora, ddp": ("nf4 head, lora", ddp),
    "nf4 head, lora, fsdp": ("nf4 head, lora", lambda model: shard(ift.patch(model))),
    "llama, vocabulary": ("llama", tensor_parallel),
}
COPIES = {
    "llama": shard,
    "gemma2, tied, softcap": shard,
    "lora": shard,
    "lora, head saved": ddp,
    "lora head": shard,
}


ROWS = [{"prompt": f"count {i}:", "completion": f" {i} {i + 1}"} for i in range(5)]


def worker(rank, number, directory):
    found = {}
    for name, (model, wrap) in WRAPPED.items():
        wrapped = wrap(model_matrix.MODELS[model][0]())
        batch = causal_lms.batch(seed=0 if "vocabulary" in name else rank)
        found[name] = ift.check(wrapped, batch)
    for name, wrap in COPIES.items():
        make, batch, _ = model_matrix.MODELS[name]
        found[f"copy of {name}"] = ift.check(make(), batch(rows=4), shard=wrap)
    data = write_rows(Path(directory, f"rows{rank}.jsonl"), ROWS)
    command = ["check", "--model", "tiny", "--data", data, "--cpu", "--loss", "sft", "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(command)
    with pytest.MonkeyPatch.context() as patch:  # a fault of one process is one of all
        if rank:
            patch.setattr("ift.one_pass.sft_loss", lambda p, *_, **__: p.sum())
        found["fault"] = ift.check(causal_lms.make("llama"), causal_lms.batch())
    shown = ("ok", "stage", "processes")
    return (code, printed.getvalue()), {
        name: {key: getattr(report, key) for key in shown} | {"text": str(report)}
        for name, report in found.items()
    }


def test_two_processes(tmp_path):
    for rank, ((code, printed), found) in enumerate(processes.results(worker, 2, tmp_path)):
        assert code == 0 and bool(printed) == (rank == 0)
        assert rank or json.loads(printed)["processes"] == 2
        fault = found.pop("fault")
        assert (fault["ok"], fault["stage"]) == (False, "reduction"), fault["text"]
        assert len(found) == len(WRAPPED) + len(COPIES)
        for name, report in found.items():
            assert report["ok"] and report["processes"] == 2, f"{name}\n{report['text']}"
