"""The paper's experiments: which there are, their rows, tables, figures and benchmarks."""

import functools
import os
import sys
from collections.abc import Callable

from errors import NeuronMergingError


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Let a command end as main.py does: one line and exit code 2 for what the user can mend, 130 for Ctrl-C."""

    @functools.wraps(main)
    def wrapped(*args: object) -> int:
        try:
            return main(*args)
        except NeuronMergingError as error:
            print(error, file=sys.stderr)
            return 2
        except BrokenPipeError:  # who reads our output has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            print(f"{error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return wrapped
