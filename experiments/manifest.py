"""Writes pretrained/MANIFEST.json: what every shipped checkpoint is, its training command, its accuracy and its SHA-256."""

import functools
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch

from data import load
from experiments import command, settings
from experiments.experiment import Experiment, measure
from experiments.grid import GRIDS, PRETRAINED
from neuron_merging.checkpoint import load_checkpoint, sha256
from neuron_merging.commandline import Parser
from neuron_merging.errors import reported_as
from neuron_merging.files import write_text

MANIFEST = PRETRAINED / "MANIFEST.json"


def read() -> dict[str, dict[str, Any]]:
    """The manifest: file name → entry. Raises NeuronMergingError if the file is damaged."""
    if not MANIFEST.exists():
        return {}
    with reported_as(f"{MANIFEST} is damaged, delete it and run make manifest"):
        entries = json.loads(MANIFEST.read_text(encoding="utf-8"))
        return {name: entry for name, entry in entries.items() if entry["sha256"]}


@functools.cache
def shipped() -> set[str]:
    """SHA-256 of the shipped checkpoints."""
    return {entry["sha256"] for entry in read().values()}


def entry(title: str, experiment: Experiment, split: str) -> dict[str, Any]:
    """The entry of a shipped checkpoint: what its file says of itself, and its accuracy on the `split` of its data set."""
    path = experiment.pretrained
    about = load_checkpoint(path).about
    training = " && ".join(_as_shipped(part, path.name) for part in (about.get("command") or "").split(" && "))
    row = measure(experiment, load(experiment.dataset, split, settings.data_folder()), torch.device("cpu"))
    return {
        "what": f"{title}, epoch {about.get('epochs')} (the last)",
        "command": training,
        "accuracy": row["accuracy"],
        "correct": row["correct"],
        "total": row["total"],
        "split": row["split"],
        "parameters": row["params"],
        "bytes": path.stat().st_size,
        "sha256": row["checkpoint_sha256"],
    }


def _as_shipped(command: str, name: str) -> str:
    """A training command as others can repeat it: saves to pretrained/, without --data and --resume."""
    parts = [part for part in shlex.split(command) if part != "--resume"]
    for option, wanted in (("--save", f"pretrained/{name}"), ("--data", None)):
        if option in parts:
            place = parts.index(option)
            parts[place : place + 2] = [] if wanted is None else [option, wanted]
    return shlex.join(parts)


def workbench() -> Experiment:
    """The network that settings are chosen on (experiments/tuning.py)."""
    return Experiment(
        arch="ResNet", dataset="cifar10", pretrained=PRETRAINED / "ResNet.cifar10.fit.20.pth.tar", depth_wide=(20,)
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild the manifest from the checkpoints in pretrained/. Only new checkpoints are measured."""
    Parser(prog="python -m experiments.manifest", description=main.__doc__).parse_args(argv)
    files = [(g.title, g.experiment(), "test") for g in GRIDS.values()]
    files.append(("ResNet-20 on CIFAR-10 without the val images, to choose settings on", workbench(), "val"))
    known = {about["sha256"]: about for about in read().values()}
    entries = {
        e.pretrained.name: known.get(sha256(e.pretrained)) or entry(title, e, split)
        for title, e, split in files
        if e.pretrained.exists()
    }
    text = json.dumps(entries, indent=2) + "\n"
    write_text(MANIFEST, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
