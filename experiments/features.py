"""Measures how much feature maps change: ‖a − â‖ / ‖a‖ at every unit's consumer, for prune and merge (features.jsonl)."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data import Images, load
from experiments import command, rows
from experiments.experiment import load as load_network
from experiments.experiment import planned
from experiments.grid import FORMS, GRIDS, Grid
from experiments.rows import RESULTS
from experiments.settings import data_folder
from neuron_merging.checkpoint import sha256
from neuron_merging.commandline import Parser
from neuron_merging.files import write_text
from neuron_merging.graph.spaces import Space
from neuron_merging.methods import METHODS
from neuron_merging.restore.batches import Source

FEATURES = RESULTS / "features.jsonl"
CRITERION, RATIO, BATCH = "l2-norm", 0.5, 256


def outputs(model: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """The outputs of the modules `names` for the batch x [B, …]: name → [B, M, …]."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in names
    ]
    try:
        with torch.inference_mode():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def relative_errors(model: nn.Module, small: nn.Module, keep: Mapping[Space, Tensor], x: Tensor) -> list[float]:
    """‖a − â‖ / ‖a‖ of every unit's consumer, over the batch and over those of the consumer's neurons that are kept.

    keep: by unit, the neurons that it keeps.
    """
    of_layer = {space.layer: kept for space, kept in keep.items()}
    names = [space.unit.next for space in keep]
    whole, shrunk = outputs(model, names, x), outputs(small, names, x)
    errors = []
    for name in names:
        a = whole[name][:, of_layer[name]] if name in of_layer else whole[name]
        errors.append(float((a - shrunk[name]).norm() / a.norm()))
    return errors


def measure(grid: Grid, images: Images) -> dict[str, Any]:
    """One row of features.jsonl: the errors of every compensation in FORMS, on the first test images."""
    experiment = grid.experiment("prune", criterion=CRITERION, ratio=RATIO)
    model, checkpoint = load_network(experiment)
    model.eval()
    made, config = planned(model, experiment), experiment.plain()
    x = images.normalised(images.pixels[:BATCH])
    errors = {}
    for kind in FORMS:
        small, _ = METHODS[kind].run(made.survey, made.keep, config, Source(made.survey.network, config))
        errors[kind] = [round(e, 6) for e in relative_errors(model, small.model, made.keep, x)]
    return {
        "arch": grid.arch,
        "dataset": grid.dataset,
        "criterion": CRITERION,
        "ratio": experiment.effective_ratio,
        "widths": made.widths,
        "images": len(x),
        "checkpoint_sha256": checkpoint.sha256,
        "consumers": [space.unit.next for space in made.spaces],
        "errors": errors,
    }


def read() -> list[dict[str, Any]]:
    """The measured rows, one for each network."""
    measured = rows.load(FEATURES)
    rows.keys(measured, FEATURES, lambda row: row["checkpoint_sha256"])
    return measured


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every network of the grid that has a checkpoint and was not measured yet."""
    Parser(prog="python -m experiments.features", description=main.__doc__).parse_args(argv)
    known = {row["checkpoint_sha256"]: row for row in read()}
    there = [grid for grid in GRIDS.values() if grid.checkpoint.exists()]
    measured = [
        known.get(sha256(grid.checkpoint)) or measure(grid, load(grid.dataset, "test", data_folder())) for grid in there
    ]
    text = "".join(json.dumps(row) + "\n" for row in measured)
    write_text(FEATURES, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
