"""The published settings of every network and data set, in one place."""

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from math import floor
from pathlib import Path

from neuron_merging.config import option
from neuron_merging.errors import NeuronMergingError

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"


@dataclass(frozen=True)
class Network:
    """How the experiments use a network family."""

    depth_wide: tuple[int, ...]  # the published one
    shape: tuple[int, int, int]  # of its input: channels, height, width


NETWORKS = {
    "LeNet_300_100": Network((), (1, 28, 28)),
    "VGG": Network((16,), (3, 32, 32)),
    "ResNet": Network((56,), (3, 32, 32)),
    "WideResNet": Network((40, 4), (3, 32, 32)),
}


@dataclass(frozen=True)
class Merging:
    """Parameters of merging: t (`--threshold`) and λ (`--lamda`)."""

    threshold: float
    lamda: float


MERGING = {
    ("LeNet_300_100", "FashionMNIST"): Merging(0.45, 0.85),  # λ has no part in layers without BatchNorm
    ("VGG", "cifar10"): Merging(0.1, 0.85),
    ("VGG", "cifar100"): Merging(0.1, 0.7),
    ("ResNet", "cifar10"): Merging(0.1, 0.85),
    ("WideResNet", "cifar10"): Merging(0.1, 0.8),
}
DEFAULT_MERGING = Merging(0.1, 0.85)  # where the paper has no experiment

PUBLISHED_WIDTHS = {  # chosen by hand, whatever the ratio
    ("VGG", (16,), "cifar10"): (32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256),
    ("VGG", (16,), "cifar100"): (32, 64, 128, 128, 256, 256, 256, 512, 512, 256, 256, 256, 256),
}


def uniform_widths(arch: str, depth_wide: Sequence[int], full: Sequence[int], ratio: float) -> list[int]:
    """The kept width of every unit: (1 − ratio) of its width, rounded as in the paper.

    LeNet is rounded to the nearest, the others down, WideResNet in steps of its widening factor. `full`: width of every unit.
    Raises NeuronMergingError if a unit would lose its last neuron.
    """
    if arch == "LeNet_300_100":
        widths = [round(n * (1 - ratio)) for n in full]
    else:
        step = depth_wide[1] if arch == "WideResNet" and all(n % depth_wide[1] == 0 for n in full) else 1
        widths = [step * floor(n // step * (1 - ratio)) for n in full]
    if min(widths) < 1:
        raise NeuronMergingError(
            f"--pruning-ratio {ratio} leaves no neuron in a layer of {min(full)}: choose a smaller one"
        )
    return widths


Sizes = tuple[tuple[float, float], ...]  # (start as a share of the training, side as a share of the full side), …


@dataclass(frozen=True)
class Recipe:
    """How to train: with SGD, and a learning rate that follows steps or one cycle.

    schedule: epochs at which the rate is multiplied by `gammas`. norm_decay: weight decay of BatchNorm and biases; None: the
    same as for weights. cutout: side in pixels of the square that is hidden in every training image. sizes: of the images,
    which may be smaller at first.
    """

    epochs: int = option(MISSING, "--epochs", type=int, help="number of epochs")
    lr: float = option(MISSING, "--lr", type=float, help="learning rate")
    weight_decay: float = option(
        MISSING,
        "--weight-decay",
        "--wd",
        type=float,
        help="weight decay of weights; also of all else unless --norm-decay is given",
    )
    schedule: tuple[int, ...] = option(
        (),
        "--schedule",
        type=int,
        nargs="+",
        metavar="EPOCH",
        help="epochs at which the rate is multiplied by --gammas",
    )
    gammas: tuple[float, ...] = option(
        (), "--gammas", type=float, nargs="+", metavar="G", help="a factor for each epoch of --schedule"
    )
    batch_size: int = option(128, "--batch-size", type=int, help="images in a step")
    momentum: float = option(0.9, "--momentum", type=float, help="momentum of SGD")
    nesterov: bool = False
    label_smoothing: float = 0.0
    norm_decay: float | None = option(
        None, "--norm-decay", type=float, metavar="D", help="weight decay of BatchNorm and biases"
    )
    cutout: int = option(
        0, "--cutout", type=int, metavar="PIXELS", help="hide a square of this side in every image [0]"
    )
    one_cycle: bool = False
    winograd: bool = False  # on CPUs: experiments/winograd.py
    sizes: Sizes = ()


LENET = Recipe(epochs=60, lr=0.1, weight_decay=1e-4, schedule=(15, 30, 45), gammas=(0.1, 0.1, 0.1))
CIFAR = Recipe(epochs=200, lr=0.1, weight_decay=5e-4, schedule=(100, 150), gammas=(0.1, 0.1))
RECIPES = ("published", "fast")


def recipe(arch: str, name: str = "published") -> Recipe:
    """The published recipe of a network, or the `fast` one: one cycle, Nesterov, label smoothing, decay of weights only.

    The fast one also shows convolutional networks small images first, which cost a quarter and about half as much. Only the
    last three tenths of the training see full size (progressive resizing: Howard 2018, Tan & Le 2021). Fine-tuning only sees
    full size.
    """
    published = LENET if arch == "LeNet_300_100" else CIFAR
    if name == "published":
        return published
    if name == "fast":
        return replace(
            published, epochs=30, lr=0.2, schedule=(), gammas=(), nesterov=True, label_smoothing=0.1,
            norm_decay=0.0, one_cycle=True, winograd=True,
            sizes=() if arch == "LeNet_300_100" else ((0.0, 0.5), (0.4, 0.75), (0.7, 1.0)),
        )  # fmt: skip
    raise NeuronMergingError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")


def checkpoint_name(arch: str, depth_wide: Sequence[int], dataset: str) -> str:
    """The published file name of an original network's checkpoint."""
    if arch == "LeNet_300_100":
        return "LeNet_300_100.original.300_100.bias.pth.tar"
    if arch == "VGG":
        depth = "" if tuple(depth_wide) == NETWORKS["VGG"].depth_wide else f".{'_'.join(map(str, depth_wide))}"
        return f"VGG.{dataset}.original{depth}.pth.tar"
    return f"{arch}.{dataset}.original.{'_'.join(map(str, depth_wide))}.pth.tar"


def data_folder() -> Path:
    """The folder of the data sets if --data names none."""
    return Path(os.environ.get("NEURON_MERGING_DATA") or Path(__file__).resolve().parents[1] / "data")
