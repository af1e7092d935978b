"""The one exception that ends in a line for the user instead of a traceback, and files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class NeuronMergingError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. `main.py` prints it and exits with 2."""


def check_writable(path: Path) -> None:
    """Raise NeuronMergingError where `path` could not be written later: asked before the work, not after it."""
    if path.is_dir():
        raise NeuronMergingError(f"{path} is a folder: name a file in it")
    write_atomically(path, None)


def write_atomically(path: Path, write: Callable[[BinaryIO], object] | None) -> None:
    """Write `path` under another name in its folder, then rename it: a reader sees the old or the new file, nothing between.

    With `write` None nothing but the permission is tried and nothing is left behind.
    Raises NeuronMergingError where the folder or the disk does not allow it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                if write is None:
                    return
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_umask())  # mkstemp's 0600 is for secrets, not for results
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise NeuronMergingError(
            f"cannot write {path}: {reason}; check the folder's permission and the space left"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
