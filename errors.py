"""The one exception that ends in a line for the user instead of a traceback."""

import contextlib
from collections.abc import Iterator


class NeuronMergingError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. `main.py` prints it and exits with 2."""


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch or Python could not get the memory that they asked for. PyTorch says so on CPUs in words only."""
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def reason(error: Exception) -> str:
    """What an exception of other code says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def said(what: str, typed: bool = False) -> Iterator[None]:
    """Turn whatever other people's code raises into one line: `what`, and the reason, with the exception's type if `typed`."""
    try:
        yield
    except NeuronMergingError:
        raise
    except Exception as error:  # it can be anything
        if out_of_memory(error):  # which is nobody's fault
            raise
        kind = f"{type(error).__name__}: " if typed else ""
        raise NeuronMergingError(f"{what}: {kind}{reason(error)}") from error
