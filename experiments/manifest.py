"""pretrained/MANIFEST.json: for every shipped checkpoint what it is, the command that made it, its accuracy and SHA-256."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

import settings
from data import load
from experiment import Experiment, measure
from experiments import command
from experiments.grid import GRIDS, PRETRAINED, Grid
from files import write_atomically
from models import load_checkpoint

MANIFEST = PRETRAINED / "MANIFEST.json"


def read() -> dict[str, dict[str, Any]]:
    """File name → entry."""
    return json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.exists() else {}


def shipped() -> set[str]:
    """SHA-256 of the shipped checkpoints."""
    return {entry["sha256"] for entry in read().values()}


def entry(grid: Grid) -> dict[str, Any]:
    """Evaluate the file as it is shipped and put down what it says of itself."""
    about = load_checkpoint(grid.checkpoint).about
    row = measure(
        Experiment(grid.arch, grid.dataset, grid.checkpoint, grid.depth_wide),
        load(grid.dataset, "test", settings.data_folder()),
        torch.device("cpu"),
    )
    return {
        "what": f"{grid.title}, epoch {about.get('epochs')} (the last)",
        "command": about.get("command"),
        "accuracy": row["accuracy"],
        "correct": row["correct"],
        "total": row["total"],
        "parameters": row["params"],
        "bytes": grid.checkpoint.stat().st_size,
        "sha256": row["checkpoint_sha256"],
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild the manifest from the checkpoints in pretrained/."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(argv)
    entries = {grid.checkpoint.name: entry(grid) for grid in GRIDS.values() if grid.checkpoint.exists()}
    text = json.dumps(entries, indent=2) + "\n"
    write_atomically(MANIFEST, lambda file: file.write(text.encode()))
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
