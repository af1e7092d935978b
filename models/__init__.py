"""The networks of the paper, by name."""

from collections.abc import Sequence

from torch import nn

from models.lenet import LeNet_300_100
from models.resnet import ResNet
from models.vgg import STAGES, VGG
from models.wideresnet import WideResNet
from neuron_merging.errors import NeuronMergingError

__all__ = ["NETWORKS", "build"]

NETWORKS = {"LeNet_300_100": LeNet_300_100, "VGG": VGG, "ResNet": ResNet, "WideResNet": WideResNet}


def build(
    arch: str, depth_wide: Sequence[int] = (), num_classes: int = 10, widths: Sequence[int] | None = None
) -> nn.Module:
    """A freshly initialised network of `NETWORKS`.

    `depth_wide`: () for LeNet, (depth,) for VGG and ResNet, (depth, widening factor) for WideResNet.
    `widths`: of the layers whose width is free, in the order of the forward pass; None for the published ones.
    Raises NeuronMergingError for a depth that the family does not have.
    """
    try:
        network = NETWORKS[arch]
    except KeyError:
        raise NeuronMergingError(f"unknown network {arch!r}: choose one of {', '.join(NETWORKS)}") from None
    problem = _wrong_depth(arch, tuple(depth_wide))
    if problem:
        raise NeuronMergingError(
            f"--depth-wide {','.join(map(str, depth_wide)) or '(none)'} does not fit {arch}: {problem}"
        )
    return network(*depth_wide, num_classes=num_classes, widths=widths)


def _wrong_depth(arch: str, depth_wide: tuple[int, ...]) -> str | None:
    if arch == "LeNet_300_100":
        return "it has none" if depth_wide else None
    if arch == "WideResNet":
        fits = len(depth_wide) == 2 and depth_wide[0] >= 10 and depth_wide[0] % 6 == 4 and depth_wide[1] >= 1
        return None if fits else "give depth,width with depth = 6n + 4, such as 40,4"
    if arch == "ResNet":
        fits = len(depth_wide) == 1 and depth_wide[0] >= 8 and depth_wide[0] % 6 == 2
        return None if fits else "give one depth = 6n + 2, such as 20, 32, 44, 56 or 110"
    if arch == "VGG":
        fits = len(depth_wide) == 1 and depth_wide[0] in STAGES
        return None if fits else f"give one depth of {', '.join(map(str, STAGES))}"
    return None
