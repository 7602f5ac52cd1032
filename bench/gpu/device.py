"""What one run on a GPU shows: correctness first, then what is most telling.

Needs no network, no pip and no environment of its own: sources on PYTHONPATH or the installed
package, with or without its extensions. Every measurement is a line of device.jsonl as soon as it
is made; a run with the same sources goes on where the last one ended. One process measures. This
one only starts it again where a call hung, or took the process along: the measurement that was
begun is then marked as failed, and the rest goes on.

``--dry-run`` goes the same way on a CPU, on tiny shapes, with Triton interpreted.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

# How the process that measures ends: all is right, something failed, nothing can be measured, or
# it wants a new process, since the GPU does not answer this one any more.
DONE, FAILED, UNUSABLE, RENEW = 0, 3, 4, 5
USAGE = 2  # argparse's


def parser() -> argparse.ArgumentParser:
    """The command line of both processes."""
    found = argparse.ArgumentParser(prog="python -m bench device", description=__doc__)
    found.add_argument("--seconds", type=float, default=330.0,
                       help="after which nothing is begun (330); 90: a first answer")  # fmt: skip
    found.add_argument("--dry-run", action="store_true", help="the same way on a CPU")
    found.add_argument("--plot", action="store_true", help="draw the times")
    found.add_argument("--output", type=Path, help="default: bench/results/<device>")
    found.add_argument("--until", type=float, help=argparse.SUPPRESS)
    found.add_argument("--after", type=int, help=argparse.SUPPRESS)
    return found


def supervise(command: Sequence[str], seconds: float) -> int:
    """Run the process that measures, again where it did not get to its end; an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the other process too
    until, ended, late = time.time() + seconds, "", False
    while not late:
        late = time.time() >= until  # one more process, which closes the log and writes reports
        process = subprocess.Popen([*command, f"--until={until}", *([ended] if ended else [])])
        try:
            code = process.wait()
        finally:
            process.kill()
        if code in (DONE, FAILED, UNUSABLE, USAGE):
            return int(code != DONE)
        ended = f"--after={code}"
    return 1


def main(arguments: Sequence[str]) -> int:
    """``python -m bench device``; exit code 1 if anything failed."""
    options = parser().parse_args(arguments)
    if options.until is None:
        return supervise([sys.executable, "-m", "bench", "device", *arguments], options.seconds)
    try:
        # By name, as `bench.__main__` does: it imports torch and the peers, which takes seconds.
        return int(importlib.import_module("bench.gpu.device_run").main(options))
    except Exception:  # not of a measurement: a new process would end likewise
        traceback.print_exc()
        return UNUSABLE
