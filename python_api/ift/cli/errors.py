"""The one exception that the command line turns into a line on stderr and exit code 2."""


class CliError(Exception):
    """Bad input: names the argument, what came and what was expected."""

    def __init__(self, argument: str, problem: object) -> None:
        super().__init__(f"{argument}: {' '.join(str(problem).split())}")
