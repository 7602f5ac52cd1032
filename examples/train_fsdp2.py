"""Intuitive Fine-Tuning under FSDP2, one process per device.

``torchrun --nproc-per-node 2 -m examples.train_fsdp2``
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import ift
from examples import toy


def main(arguments: list[str] | None = None) -> list[float]:
    """Train in every process, and return the losses over all of them."""
    steps = toy.options(__doc__, arguments).steps
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    words = toy.tokenizer()
    model = ift.patch(toy.model(words)).train()  # before it is sharded
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch, losses = toy.batch(words, slice(rank, None, processes)), []
    # The loss is a mean over the rows of all processes; FSDP averages gradients over processes.
    config = ift.IFTConfig(num_rows=32 / processes)
    for step in range(steps):
        loss = model(**batch, ift=config.replace(step=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / processes
        dist.all_reduce(mean)
        losses.append(mean.item())
        if rank == 0:
            print(f"step {step}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
