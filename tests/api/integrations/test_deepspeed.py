"""A patched model under DeepSpeed ZeRO-3, and under what it documents of that, without DeepSpeed.

A parameter is empty but between its module's pre-forward and post-forward hooks, and again from
when a gradient reaches the module's output until its own gradient is there.
"""

import functools
import importlib.util
import os

import pytest
import torch

from causal_lms import assert_close, batch, gradients, make
from ift.config import IFTConfig
from ift.patching import patch
from processes import results


class Gather(torch.autograd.Function):
    """The identity; its backward gathers, as DeepSpeed's PreBackwardFunction."""

    @staticmethod
    def forward(ctx, gather, x):
        ctx.gather = gather
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.gather()
        return None, gradient


class Zero3:
    """Hooks on every module that has parameters of its own."""

    def __init__(self, model):
        self.whole, self.gathered = {}, set()
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id, self.whole[number] = number, parameter.data
            parameter.ds_shape = parameter.shape
            parameter.register_post_accumulate_grad_hook(self.release)
            self.release(parameter)
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(self.before)
                module.register_forward_hook(self.after)

    def gather(self, module):
        for parameter in module.parameters(recurse=False):
            parameter.data = self.whole[parameter.ds_id]
            self.gathered.add(parameter.ds_id)

    def release(self, parameter):
        parameter.data = torch.empty(0)

    def before(self, module, args):
        self.gather(module)

    def after(self, module, args, output):
        for parameter in module.parameters(recurse=False):
            self.release(parameter)
        if output.requires_grad:
            output = Gather.apply(functools.partial(self.gather, module), output)
        return output

    def restore(self, model):
        for parameter in model.parameters():
            parameter.data = self.whole[parameter.ds_id]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("config", [None, IFTConfig()], ids=["sft", "ift"])
def test_partitioned_parameters_give_the_same_gradients(name, config):
    inputs, results = batch(), []
    for zero in (False, True):
        model = patch(make(name))
        partition = Zero3(model) if zero else None
        loss = model(**inputs, ift=config).loss
        loss.backward()
        if partition is not None:
            assert all(not p.numel() for p in model.parameters() if p.grad is not None)
            partition.restore(model)
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    assert_close(results[1][1], results[0][1])


def test_a_head_that_nothing_gathers_is_refused():
    model = patch(make("llama"))
    head = model.lm_head.weight
    head.ds_id, head.ds_shape, head.data = 0, head.shape, torch.empty(0)
    with pytest.raises(RuntimeError, match=r"Linear: .*ZeRO-3; expected its ds_shape \(131, 32\)"):
        model(**batch())


CONFIGS = {"sft": None, "ift": IFTConfig()}
ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def worker(rank, processes, directory):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    grads, rows = {}, {k: v[rank::processes] for k, v in batch(rows=4).items()}
    for name, config in CONFIGS.items():
        model = patch(make("llama"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO)[0]
        assert not model.lm_head.weight.numel()  # partitioned
        engine.backward(engine(**rows, ift=config).loss)
        found = {n: deepspeed.utils.safe_get_full_grad(p) for n, p in model.named_parameters()}
        grads[name] = {n: None if g is None else g.clone() for n, g in found.items()}
    return grads


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_two_processes_of_deepspeed_are_one(tmp_path):
    found, rows = results(worker, 2, tmp_path)[0], batch(rows=4)
    for name, config in CONFIGS.items():
        model = patch(make("llama"))
        for rank in range(2):
            part = {k: v[rank::2] for k, v in rows.items()}
            (model(**part, ift=config).loss / 2).backward()
        assert_close(found[name], gradients(model))
