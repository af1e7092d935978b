"""The list of the paper's experiments, and a runner that measures those that are not measured yet."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import load
from experiments import rows, settings
from experiments.experiment import Experiment, measure
from neuron_merging.checkpoint import sha256
from neuron_merging.errors import NeuronMergingError
from neuron_merging.widths.search import WidthSearch

PRETRAINED = settings.PRETRAINED
# What the paper compares, and the form of merging that follows from its formulas (ours). This list is fixed, so that
# compensations which are added to decompose.py later do not get into the paper's tables.
CRITERIA = ("l1-norm", "l2-norm", "l2-GM")
FORMS = ("prune", "merge", "merge-derived")
CIFAR_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Grid:
    """A network of the paper, and the ratios at which it is pruned. VGG's widths are fixed, so it has one ratio."""

    title: str
    arch: str
    depth_wide: tuple[int, ...]
    dataset: str
    ratios: tuple[float, ...]
    criterion: str = "l2-norm"  # the one that rivals are compared with
    uniform_ratios: tuple[float, ...] = ()  # ratios for restoration, if the paper fixes the widths
    fewer: tuple[float, ...] = ()  # ratios for experiments beyond the paper, if all would take half a day
    blocks: bool = False  # whether it has residual blocks, which can be left out

    @property
    def beyond(self) -> tuple[float, ...]:
        """The ratios at which what goes beyond the paper is measured."""
        return self.fewer or self.ratios

    @property
    def fixed(self) -> bool:
        """Whether the paper fixes the widths, instead of a ratio for every layer."""
        return bool(self.uniform_ratios)

    @property
    def checkpoint(self) -> Path:
        """The file of the network's shipped checkpoint."""
        return PRETRAINED / settings.checkpoint_name(self.arch, self.depth_wide, self.dataset)

    @property
    def figure(self) -> str:
        """The name of the figure's files, without their ending."""
        return "_".join([self.arch, *map(str, self.depth_wide), self.dataset])

    def experiment(self, kind: str = "original", **about: Any) -> Experiment:
        """An experiment with the shipped checkpoint of this network."""
        return Experiment(
            arch=self.arch, dataset=self.dataset, pretrained=self.checkpoint, depth_wide=self.depth_wide,
            compensation=kind, **about,
        )  # fmt: skip

    def experiments(self) -> Iterator[Experiment]:
        """The original, then pruning and both forms of merging by criterion and ratio."""
        yield self.experiment()
        for criterion in CRITERIA:
            for ratio in self.ratios:
                for compensation in FORMS:
                    yield self.experiment(compensation, criterion=criterion, ratio=ratio)


GRIDS = {
    "lenet": Grid(
        "LeNet-300-100 on FashionMNIST", "LeNet_300_100", (), "FashionMNIST", (0.5, 0.6, 0.7, 0.8), "l1-norm"
    ),
    "vgg": Grid("VGG-16 on CIFAR-10", "VGG", (16,), "cifar10", (0.5,), uniform_ratios=(0.1, 0.2, 0.3, 0.4, 0.5)),
    "resnet": Grid("ResNet-56 on CIFAR-10", "ResNet", (56,), "cifar10", CIFAR_RATIOS, blocks=True),
    "wideresnet": Grid(
        "WideResNet-40-4 on CIFAR-10",
        "WideResNet",
        (40, 4),
        "cifar10",
        CIFAR_RATIOS,
        fewer=(0.3, 0.5, 0.7),
        blocks=True,
    ),
}


def run(
    grid: Grid,
    device: torch.device,
    path: Path,
    pretrained: Path | None = None,
    experiments: Iterable[Experiment] | None = None,
    root: Path | None = None,
) -> list[rows.Row]:
    """Measure the experiments (the grid's own) whose rows `path` does not hold yet; all rows of the grid's checkpoint.

    Interrupt it when you like: every row is on disk before the next begins. `pretrained`: another checkpoint than shipped.
    root: folder of the data sets, which is looked at only where something is to be measured.
    Raises NeuronMergingError where the checkpoint becomes another one meanwhile.
    """
    done = rows.keys(rows.load(path), path)
    pretrained = pretrained or grid.checkpoint
    checkpoint = sha256(pretrained)
    wanted = [replace(experiment, pretrained=pretrained) for experiment in experiments or grid.experiments()]
    missing = [e for e in wanted if rows.key(e.settings() | {"checkpoint_sha256": checkpoint}) not in done]
    images = load(grid.dataset, "test", root or settings.data_folder()) if missing else None
    searches: dict[Experiment, WidthSearch] = {}  # what is measured of the units serves all budgets
    for experiment in tqdm(missing, grid.title, unit="row", leave=False, disable=None):
        row = measure(experiment, images, device, searches=searches, root=root)
        check_same(pretrained, checkpoint, row["checkpoint_sha256"])
        rows.append(row, path)
    return [row for row in rows.load(path) if row["checkpoint_sha256"] == checkpoint]


def check_same(checkpoint: Path, before: str, measured: str) -> None:
    """Raises NeuronMergingError if a checkpoint's SHA-256 has changed: then earlier measurements are of another file."""
    if measured != before:
        raise NeuronMergingError(f"{checkpoint} was replaced while it was measured: run this again")
