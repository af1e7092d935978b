"""The exception that the user sees as one line instead of a traceback, and the exit codes of commands."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EXTRAS = {"sklearn": "baselines", "onnx": "export", "onnxscript": "export", "onnxruntime": "export"}
"""By optional package: the extra of pyproject.toml that installs it."""


class NeuronMergingError(Exception):
    """A mistake that the user can correct: one line says what is wrong and what to do. Commands print it and exit with 2."""


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch or Python ran out of memory. On CPUs, PyTorch says so only in the message of a RuntimeError."""
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def missing(package: str) -> str:
    """The message for a package that is not installed; a clone is told something else than an installed neuron-merging."""
    extra, clone = EXTRAS.get(package), (Path(__file__).parents[1] / "pyproject.toml").exists()
    if extra:
        how = f"pip install -e '.[{extra}]'" if clone else f"pip install 'neuron-merging[{extra}]'"
    else:
        how = "run make demo once and use .venv/bin/python" if clone else f"pip install {package}"
    return f"the package {package} is missing: {how}"


def reason(error: Exception) -> str:
    """The message of an exception of other code, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def reported_as(what: str, typed: bool = False) -> Iterator[None]:
    """Turn any exception of other people's code into a NeuronMergingError: `what: reason`, with the type if `typed`."""
    try:
        yield
    except NeuronMergingError:
        raise
    except Exception as error:  # it can be anything
        if out_of_memory(error):  # not a mistake in that code
            raise
        kind = f"{type(error).__name__}: " if typed else ""
        raise NeuronMergingError(f"{what}: {kind}{reason(error)}") from error


def exit_code(work: Callable[[], int], prefix: str = "") -> int:
    """Run a command. Returns its exit code, or 2 after one line about an error, 130 for Ctrl-C, 1 if the reader of a pipe left.

    The line goes to stderr, after `prefix`; a message of several lines is joined.
    """

    def complain(message: object) -> None:
        print(prefix + " ".join(str(message).split("\n")), file=sys.stderr)

    try:
        return work()
    except NeuronMergingError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # the reader of our output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(f"{error.filename or 'output'}: {error.strerror or error}")
        return 2
    except ModuleNotFoundError as error:
        complain(missing(str(error.name)))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        complain("out of memory: a smaller --batch-size, --test-batch-size, --probe-samples or --calibrate needs less")
        return 2
    except KeyboardInterrupt as stop:
        complain(stop if str(stop) else "stopped")
        return 130
