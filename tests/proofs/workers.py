"""Cases of a part in processes of their own, which may crash or hang."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from tests.proofs.parts import part

CASES_PER_PROCESS = 40  # a fresh process now and then gives memory back


def results(name: str, todo: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Lines of the log, from processes that may crash or hang."""
    spawn = multiprocessing.get_context("spawn")
    left = list(todo)
    while left:
        ours, theirs = spawn.Pipe()
        chunk = left[:CASES_PER_PROCESS]
        process = spawn.Process(target=_work, args=(name, chunk, theirs), daemon=True)
        process.start()
        theirs.close()
        for case in chunk:
            left.pop(0)
            line = {"case": case, "crashed": f"no result within {seconds} seconds"}
            try:
                if ours.poll(seconds):
                    line = ours.recv()
            except EOFError:
                line["crashed"] = "the process ended"
            yield line
            if "crashed" in line:
                break
        process.kill()
        process.join()


def _work(name: str, cases: list[str], pipe: Connection) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    proof = part(name)
    for case in cases:
        pipe.send(proof.run(case))
