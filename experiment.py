"""One experiment, from a checkpoint to a row: load, find the units, decompose, rebuild, evaluate."""

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import probe
import settings
from data import DATASETS, Images
from decompose import CRITERIA
from errors import NeuronMergingError, said
from evaluate import accuracy, count_macs, count_parameters
from export import export
from latency import compare
from methods import LOOKING, METHODS, SEEDED, Settings
from models import Checkpoint, build, load_checkpoint, load_weights
from restore import Options
from shrink import check_choice, parse_budget, prunable, width
from shrink import shrink as shrink_network
from streams import Stream
from trace import Unit
from widths import Curve

MODEL_TYPES = ("original", *METHODS)


@dataclass(frozen=True)
class Experiment:
    """What is measured. None: as published.

    `criterion`: of decompose.CRITERIA, or "auto" (ours): the neurons that explain most. `widths`: "published", "uniform", the
    kept width of every unit, or "auto" (ours): chosen for the parameters and MACs that the ratio would leave, or for
    `budget`, the shares of them to keep, such as "params=0.5,macs=0.4"; "quick": the same by its cheap mode. See widths.py.
    `multiple`: widths are multiples of it. `drop_blocks`: the choice may leave whole residual blocks out.
    `coupled`: channels that several layers share are units too (streams.py). `probe`,
    `probe_samples`, `ridge`, `seed`: of restoration and of these choices, see probe.py and restore.py. `calibrate`: real
    images that a method is to look at instead (data.calibration), None for none.
    """

    arch: str
    dataset: str
    pretrained: Path
    depth_wide: tuple[int, ...] | None = None
    model_type: str = "original"
    criterion: str = "l1-norm"
    ratio: float = 0.5
    widths: str | tuple[int, ...] = "published"
    threshold: float | None = None
    lamda: float | None = None
    probe: str = "auto"
    probe_samples: int | None = None
    ridge: float = Options.ridge
    seed: int = 1
    calibrate: str | None = None
    budget: str | None = None
    multiple: int = 1
    drop_blocks: bool = False
    coupled: bool = False

    def __post_init__(self) -> None:
        """Fill in the published settings; raises NeuronMergingError for what does not exist or does not fit together."""
        _one_of("network", self.arch, settings.NETWORKS)
        _one_of("data set", self.dataset, DATASETS)
        _one_of("--model-type", self.model_type, MODEL_TYPES)
        _one_of("--criterion", self.criterion, (*CRITERIA, "auto"))
        network, dataset = settings.NETWORKS[self.arch], DATASETS[self.dataset]
        if network.shape != dataset.shape:
            fitting = ", ".join(name for name, d in DATASETS.items() if d.shape == network.shape)
            raise NeuronMergingError(
                f"{self.arch} takes images of {_times(network.shape)}, {self.dataset} has {_times(dataset.shape)}:"
                f" use --dataset {fitting}"
            )
        if not 0 <= self.ratio < 1:
            raise NeuronMergingError(f"--pruning-ratio {self.ratio} is outside [0, 1)")
        method = settings.MERGING.get((self.arch, self.dataset), settings.DEFAULT_MERGING)
        for name, default in (
            ("depth_wide", network.depth_wide),
            ("threshold", method.threshold),
            ("lamda", method.lamda),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        Settings(t=self.threshold, lam=self.lamda, probe=self.probe, samples=self.probe_samples, ridge=self.ridge)
        check_choice(self.widths in settings.CHOSEN_WIDTHS, self.budget, self.multiple, self.drop_blocks)
        self.shares  # noqa: B018 (raises for a budget that makes no sense)
        if self.calibrate is None and self.model_type in LOOKING:
            raise NeuronMergingError(
                f"{self.model_type} measures BatchNorm on real images: give --calibrate, such as {self.dataset}:512"
            )
        if self.calibrate is not None and self.model_type not in (*LOOKING, "restore") and not self.chooses:
            raise NeuronMergingError(
                f"--calibrate is for restore, {' and '.join(LOOKING)}: {self.model_type} needs no data"
            )

    @property
    def effective_ratio(self) -> float | None:
        """The ratio that decides the widths; None where they are given, chosen by hand (VGG-16), or nothing is dropped."""
        given = not isinstance(self.widths, str) or self.budget is not None
        return None if self.model_type == "original" or self.by_hand or given else self.ratio

    @property
    def by_hand(self) -> bool:
        """Whether the widths, or the cost that chosen ones may have, are those that the paper picked by hand."""
        return self.widths != "uniform" and self.published_widths is not None and not self.coupled

    @property
    def chooses(self) -> bool:
        """Whether widths or neurons are chosen by looking at a probe."""
        return self.model_type != "original" and (self.widths in settings.CHOSEN_WIDTHS or self.criterion == "auto")

    @property
    def shares(self) -> dict[str, float] | None:
        """What `budget` says. Raises NeuronMergingError for what makes no sense."""
        return None if self.budget is None else parse_budget(self.budget)

    @property
    def published_widths(self) -> tuple[int, ...] | None:
        """The paper's hand-picked kept widths, for the networks that have them."""
        return settings.PUBLISHED_WIDTHS.get((self.arch, self.depth_wide, self.dataset))

    def settings(self) -> dict[str, Any]:
        """All that decides the result beside the checkpoint, as plain JSON values."""
        compressed = self.model_type != "original"
        restored = self.model_type == "restore"
        probed = (restored or self.chooses) and self.calibrate is None
        later = {"budget": None, "multiple": 1, "drop_blocks": False, "coupled": False}  # said where they are not this
        return {
            "arch": self.arch,
            "depth_wide": list(self.depth_wide),
            "dataset": self.dataset,
            "type": self.model_type,
            "criterion": self.criterion if compressed and self.model_type != "fold" else None,  # clusters need none
            "ratio": self.effective_ratio,
            "widths_rule": (self.widths if isinstance(self.widths, str) else list(self.widths)) if compressed else None,
            "threshold": self.threshold if compressed else None,
            "lamda": self.lamda if compressed else None,
            "probe": probe.rule(self.probe) if probed else None,
            "probe_samples": self.probe_samples if probed else None,
            "ridge": self.ridge if restored or self.chooses else None,
            "seed": self.seed if self.model_type in SEEDED or self.chooses or self.calibrate else None,
            "calibrate": self.calibrate,
            **{
                name: getattr(self, name)
                for name, usual in later.items()
                if compressed and getattr(self, name) != usual
            },
        }

    def network(self) -> nn.Module:
        """The network of this experiment, freshly initialised."""
        return build(self.arch, self.depth_wide, DATASETS[self.dataset].classes)


@dataclass(frozen=True)
class Shrunk:
    """A network after an experiment's compression. `widths`: kept width of every unit; None where nothing was to be done."""

    model: nn.Module
    widths: list[int] | None
    seconds: float
    peak_mb: float | None = None
    seconds_widths: float | None = None  # of `seconds`, those of the choice of widths or neurons


def load(experiment: Experiment) -> tuple[nn.Module, Checkpoint]:
    """The checkpoint in the network it belongs to. Raises NeuronMergingError where there is none, or it does not fit."""
    path, network = experiment.pretrained, experiment.network()
    if not path.exists():
        raise NeuronMergingError(f"{path} is not there; train it with: {_training_command(experiment)}")
    checkpoint = load_checkpoint(path)
    for name, wanted in (("arch", experiment.arch), ("dataset", experiment.dataset)):
        found = checkpoint.about.get(name, wanted)
        if found != wanted:
            raise NeuronMergingError(f"{path} is a checkpoint of {found}, not of {wanted}: check --{name}")
    return load_weights(network, checkpoint), checkpoint


def shrink(
    model: nn.Module,
    experiment: Experiment,
    images: Tensor | None = None,
    known: dict[Experiment, tuple[list[Curve], float]] | None = None,
) -> Shrunk:
    """`model` compressed as the experiment says; the model itself is left as it is.

    `images`: the network inputs that `experiment.calibrate` names, for the methods that look at data. `known`: what earlier
    calls found of the same network's units, and in how many seconds: it serves all budgets. Looked up and added to.
    """
    if experiment.model_type == "original":
        return Shrunk(model, None, 0.0)
    about = replace(experiment, ratio=0.5, budget=None, multiple=1, drop_blocks=False)
    known = {} if known is None else known
    curves, seconds_widths = known.get(about, (None, None))
    shape, named = settings.NETWORKS[experiment.arch].shape, isinstance(experiment.widths, str)
    found, _ = prunable(model, experiment.coupled)
    small, report = shrink_network(
        model, kept_widths(model, found, experiment), example_input=shape, criterion=experiment.criterion,
        compensation=experiment.model_type, widths=settings.width_rule(experiment.widths), budget=experiment.shares,
        multiple=experiment.multiple if named else 1, drop_blocks=experiment.drop_blocks, coupled=experiment.coupled,
        threshold=experiment.threshold, lamda=experiment.lamda, probe=experiment.probe,
        probe_samples=experiment.probe_samples, ridge=experiment.ridge, seed=experiment.seed,
        images=images, known=curves,
    )  # fmt: skip
    seconds = report.seconds + (seconds_widths or 0.0)
    if experiment.chooses and curves is None:
        seconds_widths = report.seconds_widths
        known[about] = report.curves, seconds_widths
    return Shrunk(small, report.widths, seconds, report.peak_mb, seconds_widths)


def kept_widths(model: nn.Module, found: Sequence[Unit | Stream], experiment: Experiment) -> list[int]:
    """Kept width of every unit, or those whose cost is the budget where widths are chosen.

    Raises NeuronMergingError where there are no units, and for a list of another length (`choose` checks its numbers).
    """
    full = [width(model, unit) for unit in found]
    if not full:
        raise NeuronMergingError(f"{type(model).__name__} has no layer left that can be pruned")
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
    known: dict[Experiment, tuple[list[Curve], float]] | None = None,
    root: Path | None = None,
) -> dict[str, Any]:
    """Load, compress, evaluate: the result row. `known`: as of `shrink`; root: as of `calibration`."""
    model, checkpoint = load(experiment)
    shrunk = shrink(placed(model, device), experiment, calibration(experiment, root), known)
    return row(experiment, checkpoint, shrunk, images, device, batch_size)


def calibration(experiment: Experiment, root: Path | None = None) -> Tensor | None:
    """The network inputs [N, …] that `experiment.calibrate` names, None where it names none. root: folder of the data sets."""
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
    """Evaluate a compressed network on `images` and put down all that is known of it, as plain JSON values.

    `checkpoint`: what it was made from, None for a network trained from scratch.
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


def taken_out(args: argparse.Namespace, model: nn.Module, small: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Export and compare speeds where the command line wants it; what came of it."""
    found: dict[str, Any] = {}
    if args.export:
        found |= {"export": str(args.export), "export_error": export(small, args.export, shape)}
    if args.benchmark:
        with said("--benchmark: the networks do not run on one input and on a batch of them"):
            found["benchmark"] = compare({"original": model, "smaller": small}, shape)
    return found


def description(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What a file that is saved says of itself: of its row what is known of `names`, and the command that made it."""
    command = shlex.join(["python", "main.py", *sys.argv[1:]])
    return {name: row[name] for name in names if row.get(name) is not None} | {"command": command}


def versions() -> dict[str, str]:
    """The versions that a number can depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "torchvision", "numpy")}}


def choose_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Raises NeuronMergingError for a device this machine does not have."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if there[device])
    _one_of("--device", name, there)
    if not there[name]:
        raise NeuronMergingError(f"--device {name}: PyTorch sees no such device on this machine; use --device cpu")
    return torch.device(name)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` where it can be decomposed: on `device`, or on the CPU where that has no float64 (MPS)."""
    return model if device.type == "mps" else model.to(device)


def _one_of(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise NeuronMergingError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _training_command(experiment: Experiment) -> str:
    depth = ",".join(map(str, experiment.depth_wide))
    options = ["--arch", experiment.arch, *(["--depth-wide", depth] if depth else []), "--dataset", experiment.dataset]
    return shlex.join(["python", "main.py", *options, "--save", str(experiment.pretrained)])
