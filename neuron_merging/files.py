"""Files that are written whole or not at all."""

import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from neuron_merging.errors import NeuronMergingError, reason


def check_writable(path: Path) -> None:
    """Raise NeuronMergingError where `path` could not be written later: asked before the work, not after it; leaves nothing."""
    try:
        path = _regular(path)
        folder = next(parent for parent in path.parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write `path` under another name in its folder, then rename it: a reader sees the old or the new file, nothing between.

    Raises NeuronMergingError where the folder or the disk does not allow it.
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
    """Remove what killed writers of `path` have left behind. For a process that is alone in writing it."""
    path = path.resolve()
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if partial.name.count(".") == path.name.count(".") + 3:  # else it is that of a longer name
            partial.unlink(missing_ok=True)


def _regular(path: Path) -> Path:
    """The file that `path` is or leads to, which exists or can be made. Renaming onto a device or pipe would destroy it."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        what = "a folder: name a file in it" if path.is_dir() else "no regular file: name another one"
        raise NeuronMergingError(f"{path} is {what}")
    return path


def cannot_write(path: Path, error: Exception) -> NeuronMergingError:
    """What to say where a file could not be written."""
    while not isinstance(error, OSError) and error.__context__ is not None:  # torch.save wraps it in words of its own
        error = error.__context__
    why = getattr(error, "strerror", None) or reason(error)
    return NeuronMergingError(f"cannot write {path}: {why}; check the folder's permission and the space left")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
