"""The one exception that ends in a line for the user instead of a traceback, and how commands end."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EXTRAS = {"sklearn": "baselines", "onnx": "export", "onnxscript": "export", "onnxruntime": "export"}
"""The extra of pyproject.toml that brings a package which not everybody needs."""


class NeuronMergingError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. `main.py` prints it and exits with 2."""


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch or Python could not get the memory that they asked for. PyTorch says so on CPUs in words only."""
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def missing(package: str) -> str:
    """What to say where a package is not installed: of an installed neuron-merging or of a clone."""
    extra, clone = EXTRAS.get(package), (Path(__file__).parents[1] / "pyproject.toml").exists()
    if extra:
        how = f"pip install -e '.[{extra}]'" if clone else f"pip install 'neuron-merging[{extra}]'"
    else:
        how = "run make demo once and use .venv/bin/python" if clone else f"pip install {package}"
    return f"the package {package} is missing: {how}"


def reason(error: Exception) -> str:
    """What an exception of other code says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def reported_as(what: str, typed: bool = False) -> Iterator[None]:
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


def exit_code(work: Callable[[], int], prefix: str = "") -> int:
    """The exit code of a command: its own, 2 after one line for what the user can mend, 130 for Ctrl-C, 1 if nobody reads.

    The line goes to stderr, behind `prefix`, whatever is in the message.
    """

    def complain(message: object) -> None:
        print(prefix + " ".join(str(message).split("\n")), file=sys.stderr)

    try:
        return work()
    except NeuronMergingError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # who reads our output has had enough
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
