"""Processes of their own for what is measured: none inherits another's memory, threads or caches.

A server imports torch and the measured peers once and never computes; every worker is a fresh fork
of it, so that it starts within a tenth of a second and with no thread pool. A fork cannot use a GPU
that the server has touched, and peers touch it when they are imported: `InProcess` is for GPUs.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 5.0  # seconds for a process to leave
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
# Modules that the server imports when it starts: suites, what the one of models needs, and peers.
PRELOADED = ["bench.suites.command", "ift.integrations.transformers"]


class Failed(RuntimeError):
    """A call in a worker failed; the message is the reason, in one line."""


class Worker:
    """A fresh process that answers calls, one at a time.

    >>> with Worker(threads=1) as worker:
    ...     worker.call(divmod, 7, 2)
    (3, 1)
    """

    def __init__(self, threads: int) -> None:
        context: Any = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, threads), daemon=True)
        self._process.start()
        other_end.close()

    def call(self, function: Callable[..., Any], *args: Any, limit: float | None = None) -> Any:
        """``function(*args)``, computed there.

        Args:
            function: importable by name; it, its arguments and its result are pickled.
            limit: seconds after which the process is ended.

        Raises:
            Failed: it raised, took longer than `limit`, or the process died.
        """
        try:
            self._pipe.send((function, args))
            if not self._pipe.poll(limit):
                self.close()
                raise Failed(f"took longer than {limit:g} s")
            done, value = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            code = self._process.exitcode
            why = f"was killed by signal {-code}" if code and code < 0 else f"ended ({code})"
            raise Failed(
                f"its process {why}" + (", out of memory?" if code == -9 else "")
            ) from None
        if not done:
            raise Failed(value)
        return value

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._pipe.close()  # an idle one then leaves by itself, and cleans up
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcess:
    """What answers calls like `Worker`, in this process: a limit ends nothing here."""

    def call(self, function: Callable[..., Any], *args: Any, limit: float | None = None) -> Any:
        """``function(*args)``; raises Failed if it does."""
        try:
            return function(*args)
        except Exception as error:  # the caller reports it and goes on with the next
            reason = _one_line(error)
        release()  # the error is gone by now, and with it what its frames held
        raise Failed(reason)

    def close(self) -> None:
        """Nothing is left to end."""

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def release() -> None:
    """Free what nothing refers to any more, on the GPU too."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a GPU that a kernel has crashed
            torch.cuda.empty_cache()


def _serve(pipe: Connection, threads: int) -> None:
    """Answer until the other end closes."""
    import torch

    # What compilers and peers print must not break the progress bar.
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(threads)
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = (True, function(*args))
        except KeyboardInterrupt:
            return
        except Exception as error:  # the caller reports it and goes on with the next
            answer = (False, _one_line(error))
        with contextlib.suppress(BrokenPipeError):
            pipe.send(answer)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or traceback.format_exception_only(error)[0]
    name = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
    return name + (text if len(text) <= 200 else text[:197] + "...")
