"""Result rows, one JSON object a line: appended by runs (also by several at once), read by tables and figures."""

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
    """What makes two rows the same measurement: all settings and the checkpoint's content."""
    missing = next((name for name in ("arch", "dataset", "type", "checkpoint_sha256") if name not in row), None)
    if missing:
        raise KeyError(missing)
    return json.dumps([*(row.get(name) for name in ROW_KEYS), row.get("split", "test")])


def load(path: Path = ROWS) -> list[Row]:
    """All rows of a file, none where there is no file. Raises NeuronMergingError where a line is no JSON object."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # no line that is half written
        return _rows(file.read(), path)


def keys(measured: Iterable[Row], path: Path, key: Callable[[Row], Hashable] = key) -> set[Hashable]:
    """What tells the rows of a file apart. Raises NeuronMergingError where one is no row of that kind."""
    try:
        return {key(row) for row in measured}
    except KeyError as error:
        raise NeuronMergingError(f"{path} has a line without {error}: it is no file of these rows") from error


def append(row: Row, path: Path = ROWS, key: Callable[[Row], Hashable] = key) -> bool:
    """Add a row unless the same measurement, by `key`, is there; whether it was added. The file is locked meanwhile.

    Raises NeuronMergingError where the file holds something else, or cannot be written: then it is left as it was.
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
        found = [json.loads(line) for line in content.splitlines()]
    except ValueError as error:
        raise NeuronMergingError(f"{path} has a line that is no JSON object: {error}") from error
    if not all(isinstance(row, dict) for row in found):
        raise NeuronMergingError(f"{path} has a line that is no JSON object")
    return found


def percent(ratio: float) -> str:
    """A ratio for people."""
    return f"{100 * ratio:.0f} %"


def ratio(row: Row) -> str:
    """A row's ratio, or budget, for people."""
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
    """SHA-256 of the checkpoints that the paper's authors published, as far as we have seen them."""
    return {line["checkpoint_sha256"] for line in _published_lines()} - {""}


def _published_lines() -> list[dict[str, str]]:
    with open(PUBLISHED, newline="") as file:
        return list(csv.DictReader(file))


def published_key(row: Row) -> tuple:
    """The key of a row in `published()`; () for widths that are not the paper's."""
    if row["widths_rule"] not in (None, "published"):
        return ()
    return (row["arch"], tuple(row["depth_wide"]), row["dataset"], row["type"], row["criterion"], row["ratio"])
