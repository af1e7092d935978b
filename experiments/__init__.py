"""The paper's experiments: a list of them, their result rows, tables, figures and benchmarks."""

import functools
from collections.abc import Callable

from neuron_merging.errors import exit_code


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Let a command end as main.py does: with one line and exit code 2 for a user's mistake, with 130 for Ctrl-C."""

    @functools.wraps(main)
    def wrapped(*args: object) -> int:
        return exit_code(lambda: main(*args))

    return wrapped
