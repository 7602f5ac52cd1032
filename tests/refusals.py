"""Errors that name their argument."""

import pytest


def assert_refused(call, options, error, said, **others):
    """The first of `options` is refused by name, in one line that goes on with `said`."""
    with pytest.raises(error, match=f"^{next(iter(options))}: {said}") as caught:
        call(**others | options)
    assert "\n" not in str(caught.value)
