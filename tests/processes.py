"""Tests in several processes: what starts them, and where they meet."""

import multiprocessing
from datetime import timedelta

import torch

# Seconds after which a call counts as hung, on the busiest machine: no result depends on it.
HANG = 3600
# Budget and limit of a benchmark that is to be measured in full.
NEVER_ENDS = ["--minutes", "1000", "--limit", str(HANG)]

# Imported once, in the process that all others are forked from: that is most of their time.
# It is also the one of bench.harness.worker: what comes first decides for both.
PRELOADED = [
    "bench.suites.command",
    "ift.integrations.transformers",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
]


def start(worker, processes, directory):
    """Run ``worker(rank, processes, directory)`` in so many processes and wait for all."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        worker, (processes, str(directory)), nprocs=processes, start_method="forkserver"
    )


def join(rank, processes, directory):
    """Enter a process group on this machine; it meets in a file, since ports can be taken."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=HANG),
    )


def leave():
    """Leave the process group together: a process that is gone cannot answer the others."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
