"""The one exception that the command line turns into a line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from ift.cli.arguments import flag_of


class CliError(Exception):
    """Bad input: the message names the argument, the given and the expected value."""

    def __init__(self, argument: str, problem: object) -> None:
        super().__init__(f"{argument}: {' '.join(str(problem).split())}")


@contextlib.contextmanager
def refusals(
    argument: str, options: Mapping[str, str] = {}, applies: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """What our own code refuses in this block becomes a CliError, while `applies` holds.

    Errors of torch and others pass: their tracebacks are needed.

    Args:
        argument: the flag to name, unless the message names a parameter among `options`.
        options: parameter → option of the command line that sets it.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        if not (applies() and _is_ours(error)):
            raise
        name, _, problem = str(error).partition(": ")
        if name in options:
            raise CliError(flag_of(options[name]), problem) from None
        raise CliError(argument, error) from None


def _is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return str(name).split(".")[0] in ("ift", "ift_kernels")
