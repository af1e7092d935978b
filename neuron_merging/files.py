"""Files that are written whole or not at all."""

import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from neuron_merging.errors import NeuronMergingError, reason


def check_writable(path: Path) -> None:
    """Raise NeuronMergingError if `path` cannot be written. Called before long work; leaves no file behind."""
    try:
        path = _regular(path)
        folder = next(parent for parent in path.parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write `path` under another name in its folder, then rename it: a reader sees the old file or the new one, never a part.

    Raises NeuronMergingError if the folder or the disk does not allow it.
    """
    try:
        path = _regular(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_umask())  # mkstemp's 0600 is for secrets, not for results
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # the latter from torch.save
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_partials(path: Path) -> None:
    """Remove the files that killed writers of `path` have left behind. Only call it if no other process writes `path`."""
    path = path.resolve()
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if partial.name.count(".") == path.name.count(".") + 3:  # else it belongs to a file with a longer name
            partial.unlink(missing_ok=True)


def _regular(path: Path) -> Path:
    """The file that `path` is or links to, whether it exists yet or not.

    Raises NeuronMergingError for a folder, and for a device or pipe, which a renamed file would replace.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        what = "a folder: name a file in it" if path.is_dir() else "no regular file: name another one"
        raise NeuronMergingError(f"{path} is {what}")
    return path


def cannot_write(path: Path, error: Exception) -> NeuronMergingError:
    """The error to raise if a file could not be written."""
    while not isinstance(error, OSError) and error.__context__ is not None:  # torch.save wraps the system's error
        error = error.__context__
    why = getattr(error, "strerror", None) or reason(error)
    return NeuronMergingError(f"cannot write {path}: {why}; check the folder's permission and the space left")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
