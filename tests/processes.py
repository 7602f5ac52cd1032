"""Tests in several processes: what starts them, and where they meet."""

import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta

import torch

# Seconds after which a call counts as hung, on the busiest machine: no result depends on it.
HANG = 3600
# Budget and limit of a benchmark that is to be measured in full.
NEVER_ENDS = ["--minutes", "1000", "--limit", str(HANG)]

# Variables that change what pytest, Triton and the package do, by how their names start.
SETTINGS = ("PYTEST", "TRITON", "IFT_")

# Imported once, in the process that all others are forked from: that is most of their time.
# It is also the one of bench.harness.worker: what comes first decides for both.
PRELOADED = [
    "bench.suites.command",
    "ift.integrations.transformers",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
]


def run(*command, cwd=None, without=(), **environment):
    """A finished process and what it printed.

    `environment` is added to this one's, of which names that start with `without` are left out.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(without)} | environment
    command = list(map(str, command))
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG)


def python(*arguments, **options):
    """`run` of this interpreter."""
    return run(sys.executable, *arguments, **options)


def python_with_tests(*arguments, **options):
    """`python` that imports what this process can: the modules of tests too."""
    return python(*arguments, PYTHONPATH=os.pathsep.join(sys.path), **options)


def start(worker, processes, directory, *more):
    """Run ``worker(rank, processes, directory, *more)`` in so many processes and wait for all."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    given = (processes, str(directory), *more)
    torch.multiprocessing.start_processes(
        worker, given, nprocs=processes, start_method="forkserver"
    )


def fork(output, function, *arguments):
    """A process that calls ``function(*arguments)``; its exit code is the result.

    Nothing that is preloaded is imported again, which takes longer than most runs. What it prints
    goes to the file `output`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_exit_with, args=(output, function, *arguments))
    process.start()
    return process


def _exit_with(output, function, *arguments):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def results(worker, processes, directory):
    """What ``worker(rank, processes, directory)`` returns in each process of a group, by rank."""
    start(_in_group, processes, directory, worker)
    return [torch.load(f"{directory}/{rank}.pt") for rank in range(processes)]


def _in_group(rank, processes, directory, worker):
    join(rank, processes, directory)
    torch.save(worker(rank, processes, directory), f"{directory}/{rank}.pt")
    leave()


def join(rank, processes, directory):
    """Enter a process group on this machine; it meets in a file, since ports can be taken.

    The environment is that of torchrun.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used
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
