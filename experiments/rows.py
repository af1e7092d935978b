"""Files of result rows, one JSON object in each line. Runs append rows, also several at once; tables and figures read them."""

import csv
import errno
import fcntl
import functools
import json
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

from experiments.experiment import ROW_KEYS
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import cannot_write

RESULTS = Path(__file__).resolve().parents[1] / "results"
ROWS = RESULTS / "rows.jsonl"
PUBLISHED = RESULTS / "published.csv"

Row = dict[str, Any]


def key(row: Row) -> str:
    """The key of a measurement, which two rows share if all settings and the checkpoint's content are the same."""
    missing = next((name for name in ("arch", "dataset", "type", "checkpoint_sha256") if name not in row), None)
    if missing:
        raise KeyError(missing)
    return json.dumps([*(row.get(name) for name in ROW_KEYS), row.get("split", "test")])


def load(path: Path = ROWS) -> list[Row]:
    """All rows of a file; none if there is no file. Raises NeuronMergingError if a line is no JSON object."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for a line that is being written
        return _rows(file.read(), path)


def keys(measured: Iterable[Row], path: Path, key: Callable[[Row], Hashable] = key) -> set[Hashable]:
    """The keys of the rows of a file. Raises NeuronMergingError if one is not such a row."""
    try:
        return {key(row) for row in measured}
    except KeyError as error:
        raise NeuronMergingError(f"{path} has a line without {error}: it is no file of these rows") from error


def append(row: Row, path: Path = ROWS, key: Callable[[Row], Hashable] = key) -> bool:
    """Add a row, unless the file has one with the same `key`. Returns whether it was added. The file is locked meanwhile.

    Raises NeuronMergingError, and leaves the file as it was, if it holds anything but rows or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before = file.read()
            if key(row) in keys(_rows(before, path), path, key):
                return False
            line = f"{json.dumps(row, ensure_ascii=False)}\n".encode()
            if before and not before.endswith(b"\n"):
                line = b"\n" + line
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(len(before))
                raise
            return True
    except OSError as error:
        raise cannot_write(path, error) from error


def _rows(content: bytes, path: Path) -> list[Row]:
    try:
        rows = [json.loads(line) for line in content.splitlines()]
    except ValueError as error:
        raise NeuronMergingError(f"{path} has a line that is no JSON object: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise NeuronMergingError(f"{path} has a line that is no JSON object")
    return rows


def percent(ratio: float) -> str:
    """A ratio as text, in percent."""
    return f"{100 * ratio:.0f} %"


def ratio(row: Row) -> str:
    """A row's ratio or budget, as text."""
    if row["ratio"] is not None:
        return percent(row["ratio"])
    if row.get("budget"):
        return row["budget"]
    return "published widths" if row["type"] != "original" else "–"


def published() -> dict[tuple, float]:
    """The paper's accuracies in %: (arch, depth_wide, dataset, type, criterion, ratio) → accuracy."""
    return {
        (
            line["arch"], tuple(int(part) for part in line["depth_wide"].split("_") if part), line["dataset"],
            line["type"], line["criterion"] or None, float(line["ratio"]) if line["ratio"] else None,
        ): float(line["accuracy"])
        for line in _published_lines()
    }  # fmt: skip


@functools.cache
def published_checkpoints() -> set[str]:
    """SHA-256 of those checkpoints of the paper's authors that we have seen."""
    return {line["checkpoint_sha256"] for line in _published_lines()} - {""}


def _published_lines() -> list[dict[str, str]]:
    with open(PUBLISHED, newline="") as file:
        return list(csv.DictReader(file))


def published_key(row: Row) -> tuple:
    """The key of a row in `published()`; () for widths that are not the paper's."""
    if row["widths_rule"] not in (None, "published"):
        return ()
    return (row["arch"], tuple(row["depth_wide"]), row["dataset"], row["type"], row["criterion"], row["ratio"])
