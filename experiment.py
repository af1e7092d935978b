"""One experiment, from a checkpoint to a row: load, find the units, decompose, rebuild, evaluate."""

import platform
import shlex
import time
from dataclasses import dataclass
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import memory
import settings
from data import DATASETS, Images
from decompose import CRITERIA
from errors import NeuronMergingError
from evaluate import accuracy, count_macs, count_parameters
from methods import LOOKING, METHODS, SEEDED
from methods import Settings as MethodSettings
from models import Checkpoint, build, load_checkpoint, load_weights
from probe import PROBES
from restore import Options
from trace import Unit, units

MODEL_TYPES = ("original", *METHODS)


@dataclass(frozen=True)
class Experiment:
    """What is measured. `widths`: "published", "uniform", or the kept width of every unit; None elsewhere: as published.

    `probe`, `probe_samples`, `ridge`, `seed`: of restoration, see probe.py and restore.py. `calibrate`: real images that a
    method is to look at instead (data.calibration), None for none.
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

    def __post_init__(self) -> None:
        """Fill in the published settings; raises NeuronMergingError for what does not exist or does not fit together."""
        _one_of("network", self.arch, settings.NETWORKS)
        _one_of("data set", self.dataset, DATASETS)
        _one_of("--model-type", self.model_type, MODEL_TYPES)
        _one_of("--criterion", self.criterion, CRITERIA)
        network, dataset = settings.NETWORKS[self.arch], DATASETS[self.dataset]
        if network.shape != dataset.shape:
            fitting = ", ".join(name for name, d in DATASETS.items() if d.shape == network.shape)
            raise NeuronMergingError(
                f"{self.arch} takes images of {_times(network.shape)}, {self.dataset} has {_times(dataset.shape)}:"
                f" use --dataset {fitting}"
            )
        if not 0 <= self.ratio < 1:
            raise NeuronMergingError(f"--pruning-ratio {self.ratio} is outside [0, 1)")
        method = settings.METHODS.get((self.arch, self.dataset), settings.DEFAULT_METHOD)
        for name, default in (
            ("depth_wide", network.depth_wide),
            ("threshold", method.threshold),
            ("lamda", method.lamda),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if not 0 <= self.lamda <= 1:
            raise NeuronMergingError(f"--lamda {self.lamda} is outside [0, 1]")
        if not -1 <= self.threshold <= 1:
            raise NeuronMergingError(f"--threshold {self.threshold} is no cosine: choose one in [-1, 1]")
        _one_of("--probe", self.probe, PROBES)
        if not 0 <= self.ridge < inf or (self.probe_samples is not None and self.probe_samples < 2):
            raise NeuronMergingError("--ridge cannot be negative, --probe-samples has to be at least 2")
        if self.calibrate is None and self.model_type in LOOKING:
            raise NeuronMergingError(
                f"{self.model_type} measures BatchNorm on real images: give --calibrate, such as {self.dataset}:512"
            )
        if self.calibrate is not None and self.model_type not in (*LOOKING, "restore"):
            raise NeuronMergingError(
                f"--calibrate is for restore, {' and '.join(LOOKING)}: {self.model_type} needs no data"
            )

    @property
    def effective_ratio(self) -> float | None:
        """The ratio that decides the widths; None where they are given, chosen by hand (VGG-16), or nothing is dropped."""
        by_hand = self.widths == "published" and self.published_widths is not None
        return self.ratio if self.model_type != "original" and isinstance(self.widths, str) and not by_hand else None

    @property
    def published_widths(self) -> tuple[int, ...] | None:
        """The paper's hand-picked kept widths, for the networks that have them."""
        return settings.PUBLISHED_WIDTHS.get((self.arch, self.depth_wide, self.dataset))

    def settings(self) -> dict[str, Any]:
        """All that decides the result beside the checkpoint, as plain JSON values."""
        compressed = self.model_type != "original"
        restored = self.model_type == "restore"
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
            "probe": self.probe if restored and self.calibrate is None else None,
            "probe_samples": self.probe_samples if restored and self.calibrate is None else None,
            "ridge": self.ridge if restored else None,
            "seed": self.seed if self.model_type in SEEDED or self.calibrate else None,
            "calibrate": self.calibrate,
        }

    def network(self, widths: list[int] | None = None) -> nn.Module:
        """The network of this experiment, freshly initialised."""
        return build(self.arch, self.depth_wide, DATASETS[self.dataset].classes, widths)


@dataclass(frozen=True)
class Shrunk:
    """A network after an experiment's compression. `widths`: kept width of every unit; None where nothing was to be done."""

    model: nn.Module
    widths: list[int] | None
    seconds: float
    peak_mb: float | None = None


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
    if checkpoint.widths is not None:
        if not _are_widths(checkpoint.widths, [len(network.get_submodule(u.layer).weight) for u in units(network)]):
            raise NeuronMergingError(f"{path} does not fit {experiment.arch}: its kept widths are {checkpoint.widths}")
        network = experiment.network(checkpoint.widths)
    return load_weights(network, checkpoint), checkpoint


def shrink(model: nn.Module, experiment: Experiment, images: Tensor | None = None) -> Shrunk:
    """`model` compressed as the experiment says; the model itself is left as it is.

    `images`: the network inputs that `experiment.calibrate` names, for the methods that look at data.
    """
    if experiment.model_type == "original":
        return Shrunk(model, None, 0.0)
    device = next(model.parameters()).device
    memory.reset(device)
    start = time.perf_counter()
    found = units(model)
    widths = kept_widths(model, found, experiment)
    told = MethodSettings(
        settings.NETWORKS[experiment.arch].shape, experiment.threshold, experiment.lamda, experiment.probe,
        experiment.probe_samples, experiment.ridge, experiment.seed, None if images is None else images.to(device),
    )  # fmt: skip
    small = METHODS[experiment.model_type](model, found, widths, experiment.criterion, told)
    return Shrunk(small, widths, time.perf_counter() - start, memory.peak(device))


def kept_widths(model: nn.Module, found: list[Unit], experiment: Experiment) -> list[int]:
    """Kept width of every unit. Raises NeuronMergingError for a list of another length (`decompose` checks its numbers)."""
    full = [model.get_submodule(unit.layer).weight.shape[0] for unit in found]
    widths = experiment.widths
    if experiment.effective_ratio is not None:
        return settings.uniform_widths(experiment.arch, experiment.depth_wide, full, experiment.effective_ratio)
    if widths == "published":
        widths = experiment.published_widths
    if len(widths) != len(full):
        raise NeuronMergingError(f"--widths has {len(widths)} numbers, {experiment.arch} has {len(full)} units")
    return list(widths)


def measure(experiment: Experiment, images: Images, device: torch.device, batch_size: int = 1000) -> dict[str, Any]:
    """Load, compress, evaluate: the result row."""
    model, checkpoint = load(experiment)
    looked_at = calibration(experiment)
    return row(experiment, checkpoint, shrink(placed(model, device), experiment, looked_at), images, device, batch_size)


def calibration(experiment: Experiment, root: Path | None = None) -> Tensor | None:
    """The network inputs [N, …] that `experiment.calibrate` names, None where it names none."""
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
    batch_size: int,
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
    return {
        **experiment.settings(),
        "widths": shrunk.widths or pruned_before,
        "accuracy": round(100 * correct / total, 2),
        "accuracy_checkpoint": checkpoint.accuracy if checkpoint and not pruned_before else None,
        "correct": correct,
        "total": total,
        "split": images.split,
        "params": count_parameters(model),
        "params_original": count_parameters(original),
        "macs": count_macs(model, shape),
        "macs_original": count_macs(original, shape),
        "seconds_decompose": round(shrunk.seconds, 4),
        "peak_mb": shrunk.peak_mb,
        "seconds_evaluate": round(seconds_evaluate, 4),
        "checkpoint": checkpoint.path.name if checkpoint else None,
        "checkpoint_sha256": checkpoint.sha256 if checkpoint else None,
        "device": str(device),
        "versions": versions(),
    }


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


def _are_widths(widths: Any, full: list[int]) -> bool:
    fits = isinstance(widths, list) and len(widths) == len(full) and all(type(w) is int for w in widths)
    return fits and all(1 <= w <= n for w, n in zip(widths, full))


def _training_command(experiment: Experiment) -> str:
    depth = ",".join(map(str, experiment.depth_wide))
    options = ["--arch", experiment.arch, *(["--depth-wide", depth] if depth else []), "--dataset", experiment.dataset]
    return shlex.join(["python", "main.py", *options, "--save", str(experiment.pretrained)])
