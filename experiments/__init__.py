"""The paper's experiments: which there are, their rows, tables, figures and benchmarks."""

import functools
from collections.abc import Callable

from neuron_merging.errors import exit_code


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Let a command end as main.py does: one line and exit code 2 for what the user can mend, 130 for Ctrl-C."""

    @functools.wraps(main)
    def wrapped(*args: object) -> int:
        return exit_code(lambda: main(*args))

    return wrapped
