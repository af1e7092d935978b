"""One experiment, from a checkpoint to a result row: load, find the units, decompose, rebuild, evaluate."""

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
from data import DATASETS, Images
from experiments import settings
from experiments.evaluate import accuracy
from models import build
from neuron_merging import plan, synthetic
from neuron_merging.checkpoint import Checkpoint, load_checkpoint, load_weights
from neuron_merging.commandline import placed, versions
from neuron_merging.config import CHOSEN_WIDTHS, ShrinkConfig, changed, option, row_key, shares_text
from neuron_merging.counting import count_macs, count_parameters
from neuron_merging.decompose import CRITERIA
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import Space
from neuron_merging.methods import METHODS, NEED_IMAGES
from neuron_merging.restore.batches import Source
from neuron_merging.shrink import examined
from neuron_merging.shrink import shrink as shrink_network
from neuron_merging.widths.search import WidthSearch

MODEL_TYPES = ("original", *METHODS)
# keys that a row has only where the value is another than this
LATER = {"budget": None, "multiple": 1, "drop_blocks": False, "coupled": False}


def depth_wide(text: str) -> tuple[int, ...]:
    """56, or 40,4, or [40,4] → a tuple of numbers; () for nothing."""
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a depth nor depth,width") from None


@dataclass(frozen=True, kw_only=True)
class Experiment(ShrinkConfig):
    """What is measured: one of the paper's networks, a checkpoint of it, and how it is made smaller. None means as published.

    Different from `ShrinkConfig`: compensation may be "original"; widths may be "published", which is the paper's list for
    VGG-16 and uniform elsewhere. calibrate: real images to use instead of made-up inputs (data.calibration).
    """

    arch: str = option("LeNet_300_100", "--arch", "-a", help=f"one of {', '.join(settings.NETWORKS)} [%(default)s]")
    depth_wide: tuple[int, ...] | None = option(
        None, "--depth-wide", type=depth_wide, metavar="D[,W]", help="56, or 40,4 for a WideResNet [the published one]"
    )
    coupled: bool = option(
        False, "--coupled", action="store_true",
        help="also drop channels that several layers share, such as residual streams (ours)",
    )  # fmt: skip
    dataset: str | None = option(
        None, "--dataset", help="FashionMNIST, cifar10 or cifar100 [FashionMNIST for LeNet, cifar10 elsewhere]"
    )
    pretrained: Path | None = option(
        None, "--pretrained", type=Path, metavar="FILE",
        help="checkpoint to start from [the published name in pretrained/]",
    )  # fmt: skip
    compensation: str = changed(ShrinkConfig, "compensation", "original")
    criterion: str = changed(ShrinkConfig, "criterion", "l1-norm")
    widths: str | tuple[int, ...] = changed(ShrinkConfig, "widths", "published")
    threshold: float | None = changed(ShrinkConfig, "threshold", None)
    lamda: float | None = changed(ShrinkConfig, "lamda", None)
    ignore: tuple[str, ...] = field(default=(), init=False)  # the paper's networks are pruned whole
    calibrate: str | None = option(
        None, "--calibrate", metavar="WHAT",
        help="let restore, prune-bn, merge-bn or the choice look at real images: a folder, or DATASET:N",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Fill in the published settings. Raises NeuronMergingError for unknown names and for options that do not fit."""
        _one_of("network", self.arch, settings.NETWORKS)
        network = settings.NETWORKS[self.arch]
        self._fill("dataset", "FashionMNIST" if self.arch == "LeNet_300_100" else "cifar10")
        self._fill("depth_wide", network.depth_wide)
        _one_of("data set", self.dataset, DATASETS)
        _one_of("--model-type", self.compensation, MODEL_TYPES)
        _one_of("--criterion", self.criterion, (*CRITERIA, "auto"))
        dataset, merging = DATASETS[self.dataset], settings.MERGING.get((self.arch, self.dataset))
        if network.shape != dataset.shape:
            fitting = ", ".join(name for name, d in DATASETS.items() if d.shape == network.shape)
            raise NeuronMergingError(
                f"{self.arch} takes images of {_times(network.shape)}, {self.dataset} has {_times(dataset.shape)}:"
                f" use --dataset {fitting}"
            )
        if not 0 <= self.ratio < 1:
            raise NeuronMergingError(f"--pruning-ratio {self.ratio} is outside [0, 1)")
        merging = merging or settings.DEFAULT_MERGING
        self._fill("threshold", merging.threshold)
        self._fill("lamda", merging.lamda)
        name = settings.checkpoint_name(self.arch, self.depth_wide, self.dataset)
        self._fill("pretrained", settings.PRETRAINED / name)
        super().__post_init__()
        synthetic.check(self.probe)
        if self.calibrate is None and self.compensation in NEED_IMAGES:
            raise NeuronMergingError(
                f"{self.compensation} measures BatchNorm on real images: give --calibrate, such as {self.dataset}:512"
            )
        if self.calibrate is not None and not self.looks and not self.chooses:
            raise NeuronMergingError(
                f"--calibrate is for restore, {' and '.join(NEED_IMAGES)}: {self.compensation} needs no data"
            )

    def _fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def plain(self) -> ShrinkConfig:
        """The config for `shrink`, which is given the kept widths beside it."""
        rule = self.widths if self.widths in CHOSEN_WIDTHS else "uniform"
        multiple = self.multiple if isinstance(self.widths, str) else 1
        options = {f.name: getattr(self, f.name) for f in fields(ShrinkConfig)}
        return ShrinkConfig(**options | {"widths": rule, "multiple": multiple})

    @property
    def looks(self) -> bool:
        """Whether the method runs the network on inputs."""
        return self.compensation != "original" and METHODS[self.compensation].looks

    @property
    def effective_ratio(self) -> float | None:
        """The ratio that decides the widths. None if a list, a budget or the paper (VGG-16) does, or if nothing is dropped."""
        without_ratio = not isinstance(self.widths, str) or self.budget is not None
        return None if self.compensation == "original" or self.by_hand or without_ratio else self.ratio

    @property
    def by_hand(self) -> bool:
        """Whether the paper's hand-picked widths are used, or their cost limits the chosen ones."""
        return self.widths != "uniform" and self.published_widths is not None and not self.coupled

    @property
    def chooses(self) -> bool:
        """Whether widths or neurons are chosen with the help of inputs."""
        return self.compensation != "original" and super().chooses

    @property
    def rule_chooses(self) -> bool:
        """Whether widths are chosen, instead of given by a ratio or a list."""
        return self.widths in CHOSEN_WIDTHS

    @property
    def published_widths(self) -> tuple[int, ...] | None:
        """The paper's hand-picked kept widths, for the networks that have them."""
        return settings.PUBLISHED_WIDTHS.get((self.arch, self.depth_wide, self.dataset))

    def settings(self) -> dict[str, Any]:
        """All settings that decide the result, except the checkpoint, as plain JSON values. None: it makes no difference."""
        method = METHODS.get(self.compensation)
        if method is None:
            kept: set[str] = {"compensation"}
        else:
            restores = self.compensation == "restore"
            kept = {"compensation", "widths", "threshold", "lamda", *LATER}
            kept |= {"criterion"} if self.compensation != "fold" else set()  # clusters need none
            kept |= {"probe", "probe_samples"} if (restores or self.chooses) and not self.calibrate else set()
            kept |= {"ridge"} if restores or self.chooses else set()
            kept |= {"seed"} if method.seeded or self.chooses or self.calibrate else set()
        values = {row_key(f): getattr(self, f.name) if f.name in kept else None for f in fields(ShrinkConfig)}
        values |= {"ratio": self.effective_ratio, "budget": shares_text(values["budget"]), "calibrate": self.calibrate}
        values["probe"] = values["probe"] and synthetic.rule(self.probe)
        if not isinstance(self.widths, str) and method:
            values["widths_rule"] = list(self.widths)
        later = {name: values.pop(name) for name in LATER}
        del values["ignore"]
        network = {"arch": self.arch, "depth_wide": list(self.depth_wide), "dataset": self.dataset}
        return network | values | {name: v for name, v in later.items() if v is not None and v != LATER[name]}

    def network(self) -> nn.Module:
        """The network of this experiment, freshly initialised."""
        return build(self.arch, self.depth_wide, DATASETS[self.dataset].classes)


ROW_KEYS = (*(row_key(f) for f in fields(Experiment) if f.init and f.name != "pretrained"), "checkpoint_sha256")


@dataclass(frozen=True)
class Shrunk:
    """A network after an experiment's compression. `widths`: kept width of every unit; None if nothing was dropped."""

    model: nn.Module
    widths: list[int] | None
    seconds: float
    peak_mb: float | None = None
    seconds_widths: float | None = None  # the part of `seconds` that the choice of widths or neurons took


def load(experiment: Experiment) -> tuple[nn.Module, Checkpoint]:
    """The experiment's network with the weights of its checkpoint, and the checkpoint.

    Raises NeuronMergingError if there is no checkpoint, or it does not fit.
    """
    path, network = experiment.pretrained, experiment.network()
    if not path.exists():
        raise NeuronMergingError(f"{path} is not there; train it with: {_training_command(experiment)}")
    checkpoint = load_checkpoint(path)
    for name, wanted in (("arch", experiment.arch), ("dataset", experiment.dataset)):
        actual = checkpoint.about.get(name, wanted)
        if actual != wanted:
            raise NeuronMergingError(f"{path} is a checkpoint of {actual}, not of {wanted}: check --{name}")
    return load_weights(network, checkpoint), checkpoint


def shrink(
    model: nn.Module,
    experiment: Experiment,
    images: Tensor | None = None,
    searches: dict[Experiment, WidthSearch] | None = None,
) -> Shrunk:
    """`model` compressed as the experiment says. The model itself is unchanged.

    `images`: the network inputs that `experiment.calibrate` names, for methods that use data. `searches`: a cache, which is
    read and added to. It keeps what was measured of this network's units for the choice of widths, which serves all budgets.
    """
    if experiment.compensation == "original":
        return Shrunk(model, None, 0.0)
    about = replace(experiment, ratio=0.5, budget=None, multiple=1, drop_blocks=False)
    searches = {} if searches is None else searches
    search = searches.get(about)
    small, report = shrink_network(
        model,
        kept_widths(spaces_of(model, experiment), experiment),
        example_input=settings.NETWORKS[experiment.arch].shape,
        images=images,
        config=experiment.plain(),
        search=search,
    )
    if not experiment.chooses:
        return Shrunk(small, report.widths, report.seconds, report.peak_mb)
    before = search.seconds if search else 0.0
    searches[about] = report.search
    return Shrunk(small, report.widths, before + report.seconds, report.peak_mb, report.search.seconds)


def spaces_of(model: nn.Module, experiment: Experiment) -> list[Space]:
    """What of an experiment's network can be dropped."""
    survey, _, _ = examined(model, settings.NETWORKS[experiment.arch].shape)
    return plan.prunable(survey, experiment.coupled)[0]


def planned(model: nn.Module, experiment: Experiment) -> plan.Plan:
    """The neurons that each unit keeps, where neither they nor the widths are chosen with the help of inputs."""
    survey, model, _ = examined(model, settings.NETWORKS[experiment.arch].shape)
    widths = kept_widths(plan.prunable(survey, experiment.coupled)[0], experiment)
    config = replace(experiment.plain(), ratio=widths)
    return plan.make(survey, model, config, Source(survey.network, config))


def kept_widths(units: Sequence[Space], experiment: Experiment) -> list[int]:
    """The kept width of every unit. If widths are chosen, these are the ones whose cost is the budget.

    Raises NeuronMergingError if there are no units, or for a list of another length (`choose` checks its numbers).
    """
    full = [unit.size for unit in units]
    if not full:
        raise NeuronMergingError(f"{experiment.arch} has no layer left that can be pruned")
    if not isinstance(experiment.widths, str):
        if len(experiment.widths) != len(full):
            raise NeuronMergingError(
                f"--widths has {len(experiment.widths)} numbers, {experiment.arch} has {len(full)} units"
            )
        return list(experiment.widths)
    if experiment.by_hand:
        return list(experiment.published_widths)
    return settings.uniform_widths(experiment.arch, experiment.depth_wide, full, experiment.ratio)


def measure(
    experiment: Experiment,
    images: Images,
    device: torch.device,
    batch_size: int | None = None,
    searches: dict[Experiment, WidthSearch] | None = None,
    root: Path | None = None,
) -> dict[str, Any]:
    """Load, compress and evaluate; returns the result row. `searches`: as in `shrink`; root: as in `calibration`."""
    model, checkpoint = load(experiment)
    shrunk = shrink(placed(model, device), experiment, calibration(experiment, root), searches)
    return row(experiment, checkpoint, shrunk, images, device, batch_size)


def calibration(experiment: Experiment, root: Path | None = None) -> Tensor | None:
    """The network inputs [N, …] that `experiment.calibrate` names; None if it names none. root: folder of the data sets."""
    if experiment.calibrate is None:
        return None
    images = data.calibration(experiment.calibrate, experiment.dataset, root or settings.data_folder(), experiment.seed)
    return images.normalised(images.pixels)


def row(
    experiment: Experiment,
    checkpoint: Checkpoint | None,
    shrunk: Shrunk,
    images: Images,
    device: torch.device,
    batch_size: int | None,
) -> dict[str, Any]:
    """Evaluate a compressed network on `images`. Returns all that is known of it, as plain JSON values.

    `checkpoint`: the one it was made from; None for a network trained from scratch.
    """
    model, images = shrunk.model.to(device), images.to(device)
    start = time.perf_counter()
    correct, total = accuracy(model, images, batch_size)
    seconds_evaluate = time.perf_counter() - start
    original, shape = experiment.network(), DATASETS[experiment.dataset].shape
    pruned_before = checkpoint.widths if checkpoint else None
    comparable = checkpoint and not pruned_before and checkpoint.about.get("split", "test") == images.split
    return {
        **experiment.settings(),
        "widths": shrunk.widths or pruned_before,
        "accuracy": round(100 * correct / total, 2),
        "accuracy_checkpoint": checkpoint.accuracy if comparable else None,
        "correct": correct,
        "total": total,
        "split": images.split,
        "params": count_parameters(model),
        "params_original": count_parameters(original),
        "macs": count_macs(model, shape),
        "macs_original": count_macs(original, shape),
        "seconds_decompose": round(shrunk.seconds, 4),
        "seconds_widths": shrunk.seconds_widths and round(shrunk.seconds_widths, 4),
        "peak_mb": shrunk.peak_mb,
        "seconds_evaluate": round(seconds_evaluate, 4),
        "checkpoint": checkpoint.path.name if checkpoint else None,
        "checkpoint_sha256": checkpoint.sha256 if checkpoint else None,
        "device": str(device),
        "versions": versions(),
    }


def _one_of(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise NeuronMergingError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _training_command(experiment: Experiment) -> str:
    depth = ",".join(map(str, experiment.depth_wide))
    options = ["--arch", experiment.arch, *(["--depth-wide", depth] if depth else []), "--dataset", experiment.dataset]
    return shlex.join(["python", "main.py", *options, "--save", str(experiment.pretrained)])
